"""Split batch norm against BatchNorm2d on each part; a shuffled teacher batch against permutations by hand."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from relssl.data.loader import Plan
from relssl.engine import Engine
from relssl.errors import ConfigError
from relssl.method import create_student
from relssl.method.batchnorm import SplitBatchNorm2d, shuffled, split_batch_norms
from relssl.settings.run import derive, resolve
from relssl.train.loop import train_step
from relssl.train.run import build
from small_runs import NORMLESS, SMALL, merge


def norms(splits: int, channels: int = 5) -> tuple[SplitBatchNorm2d, nn.BatchNorm2d]:
    """A split norm and a plain one with the same parameters and statistics."""
    plain = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3)
    for tensor in (plain.weight, plain.bias, plain.running_mean, plain.running_var):
        assert tensor is not None
        nn.init.uniform_(tensor, 0.5, 2.0)
    split = SplitBatchNorm2d(channels, splits, eps=1e-3, momentum=0.3)
    split.load_state_dict(plain.state_dict())
    return split, plain


@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_each_part_is_normalised_as_by_a_batch_norm_of_its_own(splits: int, layout: torch.memory_format) -> None:
    split, plain = (norm.double() for norm in norms(splits))
    weights, images = torch.randn(2, 8, 5, 3, 4, dtype=torch.float64)
    ours, theirs = (images.contiguous(memory_format=layout).clone().requires_grad_() for _ in range(2))
    parts, statistics = [], []
    for part in theirs.chunk(splits):
        alone = copy.deepcopy(plain)
        alone.weight, alone.bias = plain.weight, plain.bias
        parts.append(alone(part))
        statistics.append(torch.stack([alone.running_mean, alone.running_var]))  # type: ignore[list-item]
    (torch.cat(parts) * weights).sum().backward()
    features = split(ours)
    (features * weights).sum().backward()
    torch.testing.assert_close(features, torch.cat(parts))
    for one, other in ((ours, theirs), (split.weight, plain.weight), (split.bias, plain.bias)):
        torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(torch.stack([split.running_mean, split.running_var]), torch.stack(statistics).mean(0))
    assert split.num_batches_tracked == 1 and features.is_contiguous(memory_format=layout)


def test_two_crops_pass_where_all_statistics_lie_in_one_block() -> None:
    split, plain = norms(2)
    block = torch.cat([split.running_mean, plain.running_mean])  # type: ignore[list-item]
    split.running_mean, plain.running_mean = block[:5], block[5:]
    sum(plain(split(torch.randn(4, 5, side, side))).square().sum() for side in (4, 2)).backward()  # type: ignore[union-attr]
    assert split.weight.grad is not None and bool(split.weight.grad.isfinite().all())


def test_under_bf16_statistics_are_fp32() -> None:
    split, _ = norms(2)
    twin = copy.deepcopy(split)
    images = (torch.randn(64, 5, 8, 8) + 8).bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        features = split(images)
    assert features.dtype == torch.bfloat16 and features.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(features.float(), twin(images.float()), rtol=1e-2, atol=2e-2)
    torch.testing.assert_close(split.running_mean, twin.running_mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_a_networks_norms_are_split_in_place(name: str) -> None:
    plain = timm.create_model(name, num_classes=0)
    split = copy.deepcopy(plain)
    split_batch_norms(split, 2)
    assert list(split.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in split.named_parameters()] == [name for name, _ in plain.named_parameters()]
    count = sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    assert sum(isinstance(module, SplitBatchNorm2d) for module in split.modules()) == count > 0
    images = torch.randn(4, 3, 64, 64)
    torch.testing.assert_close(split.eval()(images), plain.eval()(images))  # activations are still there
    twice = images[:2].repeat(2, 1, 1, 1)  # two equal halves have the statistics of the whole
    torch.testing.assert_close(split.train()(twice), plain.train()(twice), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(split(images), plain(images), rtol=1e-2, atol=1e-2)


def test_one_part_changes_nothing_and_other_norms_are_refused_by_name() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(4))
    normless = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm(4))
    for unchanged, splits in ((network, 1), (normless, 8)):
        before = list(unchanged.children())
        split_batch_norms(unchanged, splits)
        assert list(unchanged.children()) == before
    for refused, named in ((network, "3 is BatchNorm1d"), (nn.Sequential(nn.BatchNorm2d(4, affine=False)), "0 is BatchNorm2d")):
        with pytest.raises(ConfigError, match=rf"encoder.batch_norm_splits: {named}"):
            split_batch_norms(refused, 2)


@pytest.mark.parametrize(
    ("splits", "over", "each"),
    [(1, {}, 1), (8, {}, 8), (8, {"accumulate": 2}, 4), (8, {"accumulate": 2, "engine.devices": 2}, 2)]
    + [(8, {"engine.devices": devices}, 1) for devices in (8, 16)],
)
def test_the_encoder_splits_what_devices_and_parts_do_not(splits: int, over: dict[str, Any], each: int) -> None:
    config = resolve(merge(SMALL, {"recipe": "digits", "encoder": {"batch_norm_splits": splits}}) | over)
    kinds = [module for module in create_student(config).backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {getattr(module, "splits", 1) for module in kinds} == {each}


@pytest.mark.parametrize(
    "over", [{}, {"encoder.batch_norm_splits": 256}, {"encoder.batch_norm_splits": 8, "batch_size": 192, "accumulate": 3}]
)
def test_splits_must_fit_the_batch(over: dict[str, Any]) -> None:
    assert derive(resolve({"recipe": "folder", "encoder.batch_norm_splits": 128})).norm_splits == 128
    with pytest.raises(ConfigError, match=r"encoder\.batch_norm_splits"):
        resolve({"recipe": "folder", "encoder.batch_norm_splits": 3} | over)


# The shuffled batch


@pytest.mark.parametrize(("world", "share"), [(1, 6), (2, 1), (3, 5), (4, 4)])
def test_ranks_pass_the_parts_of_a_permuted_batch_and_get_their_own_back(world: int, share: int) -> None:
    """The exchange is played by one process."""
    whole, seen = torch.randn(world * share, 3, 2, 2), []
    order = torch.from_numpy(Plan(1000, world * share, rank=0, world=world, seed=3).shuffle(7, 0))
    passed = torch.cat([part.flatten(1).cumsum(1) for part in whole[order].chunk(world)])
    for rank, mine in enumerate(whole.chunk(world)):
        answers = iter((whole, passed))

        def network(rows: Tensor) -> Tensor:
            seen.append(rows)
            return rows.flatten(1).cumsum(1)

        keys = shuffled(network, mine, order, rank, lambda rows, answers=answers: next(answers))
        assert torch.equal(keys, mine.flatten(1).cumsum(1)) and not keys.requires_grad
    assert torch.equal(torch.cat(seen), whole[order])


def test_a_batch_norm_sees_the_permuted_parts() -> None:
    split, _ = norms(2, channels=3)
    images, order = torch.randn(4, 3, 2, 2), torch.tensor([2, 0, 3, 1])
    keys = shuffled(copy.deepcopy(split), images, order, 0, lambda rows: rows)
    permuted = split(torch.stack([images[2], images[0], images[3], images[1]]))
    # Image 0 went second, 1 last, 2 first, 3 third.
    torch.testing.assert_close(keys, torch.stack([permuted[1], permuted[3], permuted[0], permuted[2]]))
    assert not torch.allclose(keys, split(images))


def test_the_order_is_a_permutation_that_ranks_share_and_steps_do_not() -> None:
    one, two = Plan(100, 24, parts=2, seed=5), Plan(100, 24, parts=2, rank=1, world=2, seed=5)
    orders = [tuple(one.shuffle(step, part)) for step in range(3) for part in range(2)]
    assert all(sorted(order) == list(range(12)) for order in orders) and len(set(orders)) == 6
    assert orders[3] == tuple(two.shuffle(1, 1)) and orders[0] != tuple(Plan(100, 24, parts=2, seed=6).shuffle(0, 0))


def test_a_run_shuffles_its_teachers_batch(tmp_path: Path) -> None:
    """Without batch norm that changes nothing; with split ones it changes the teacher's keys."""

    def first_keys(shuffle: bool, **settings: Any) -> Tensor:
        base = {key: value for key, value in SMALL.items() if key != "backbone_args" or key not in settings}
        over = {"out": str(tmp_path), "method": {"shuffle": shuffle}, "log": {"knn_every": 0}}
        config = resolve(merge(merge(base, settings), over))
        run = build(config, Engine(config.engine))
        train_step(run, next(run.loader.stream(0, 1)))
        return run.state.model.memory.keys[:32].clone()

    torch.testing.assert_close(first_keys(True, **NORMLESS), first_keys(False, **NORMLESS), rtol=1e-5, atol=1e-6)
    split = {"encoder": {"batch_norm_splits": 8}, "engine": {"precision": "fp32"}}
    assert float((first_keys(True, **split) - first_keys(False, **split)).norm()) > 1e-2
