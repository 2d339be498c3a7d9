"""Split batch norm against BatchNorm2d on each part; a shuffled teacher batch against permutations by hand."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from relssl.data.loader import Plan
from relssl.engine import Engine
from relssl.errors import ConfigError
from relssl.method import create_student
from relssl.method.batchnorm import SplitBatchNorm2d, shuffled, split_batch_norms
from relssl.settings.reading import merge
from relssl.settings.run import derive, resolve
from relssl.train.loop import train_step
from relssl.train.run import build
from small_runs import NORMLESS, SMALL


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
    before = copy.deepcopy(plain)
    images = torch.randn(8, 5, 3, 4, dtype=torch.float64).contiguous(memory_format=layout)
    ours, theirs = (images.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
    weights = torch.randn(8, 5, 3, 4, dtype=torch.float64)

    found = split(ours)
    (found * weights).sum().backward()
    parts, means, variances = [], [], []
    for part in theirs.chunk(splits):
        plain.running_mean, plain.running_var = before.running_mean.clone(), before.running_var.clone()
        parts.append(plain(part))
        means.append(plain.running_mean)
        variances.append(plain.running_var)
    expected = torch.cat(parts)
    (expected * weights).sum().backward()

    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(split.weight.grad, plain.weight.grad)
    torch.testing.assert_close(split.bias.grad, plain.bias.grad)
    torch.testing.assert_close(split.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(split.running_var, torch.stack(variances).mean(0))
    assert split.num_batches_tracked == 1 and found.is_contiguous(memory_format=layout)


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
        found = split(images)
    expected = twin(images.float())
    assert found.dtype == torch.bfloat16 and found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=2e-2)
    torch.testing.assert_close(split.running_mean, twin.running_mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_a_networks_norms_are_split_in_place(name: str) -> None:
    plain = timm.create_model(name, num_classes=0)
    split = copy.deepcopy(plain)
    split_batch_norms(split, 2)
    assert list(split.state_dict()) == list(plain.state_dict()) and list(dict(split.named_parameters())) == list(
        dict(plain.named_parameters())
    )
    count = sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    assert sum(isinstance(module, SplitBatchNorm2d) for module in split.modules()) == count > 0
    images = torch.randn(4, 3, 64, 64)
    torch.testing.assert_close(split.eval()(images), plain.eval()(images))  # activations are still there
    plain.train(), split.train()
    # Two equal halves have the statistics of the whole.
    torch.testing.assert_close(split(images[:2].repeat(2, 1, 1, 1)), plain(images[:2].repeat(2, 1, 1, 1)), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(split(images), plain(images), rtol=1e-2, atol=1e-2)


def test_one_part_changes_nothing_and_other_norms_are_refused_by_name() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(4))
    before = list(network.children())
    split_batch_norms(network, 1)
    assert list(network.children()) == before
    with pytest.raises(ConfigError, match=r"encoder.batch_norm_splits: 3 is BatchNorm1d.*cannot be split"):
        split_batch_norms(network, 2)
    with pytest.raises(ConfigError, match="0 is BatchNorm2d"):
        split_batch_norms(nn.Sequential(nn.BatchNorm2d(4, affine=False)), 2)
    normless = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm(4))
    split_batch_norms(normless, 8)
    assert [type(module) for module in normless] == [nn.Conv2d, nn.LayerNorm]


def splits_of(**over: Any) -> list[int]:
    encoder = create_student(resolve({**SMALL, **over}))
    return [module.splits for module in encoder.backbone.modules() if isinstance(module, SplitBatchNorm2d)]


def test_the_encoder_splits_what_devices_and_parts_do_not() -> None:
    eight = {"recipe": "digits", "encoder": {**SMALL["encoder"], "batch_norm_splits": 8}}
    assert set(splits_of(**eight)) == {8} and splits_of(recipe="digits") == []
    assert set(splits_of(**eight, accumulate=2)) == {4}
    assert set(splits_of(**eight, accumulate=2, engine={"devices": 2})) == {2}
    assert splits_of(**eight, engine={"devices": 8}) == [] == splits_of(**eight, engine={"devices": 16})


@pytest.mark.parametrize(
    "over", [{}, {"encoder.batch_norm_splits": 256}, {"encoder.batch_norm_splits": 8, "batch_size": 192, "accumulate": 3}]
)
def test_splits_must_fit_the_batch(over: dict[str, Any]) -> None:
    assert derive(resolve({"recipe": "folder", "encoder.batch_norm_splits": 128})).norm_splits == 128
    with pytest.raises(ConfigError, match=r"encoder\.batch_norm_splits"):
        resolve({"recipe": "folder", "encoder.batch_norm_splits": 3} | over)


# The shuffled batch


def normless(images: Tensor) -> Tensor:
    return images.flatten(1).cumsum(1)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_without_batch_norm_shuffling_changes_nothing(world: int, share: int, step: int) -> None:
    order = torch.from_numpy(Plan(1000, world * share, rank=0, world=world, seed=3).shuffle(step, 0))
    whole = torch.randn(world * share, 3, 2, 2)
    for rank in range(world):
        assert torch.equal(by_hand(normless, whole, order, world)[rank], normless(whole).chunk(world)[rank])


def by_hand(network: Any, whole: Tensor, order: Tensor, world: int) -> list[Tensor]:
    """What `shuffled` gives each of several ranks, the exchange played by one process."""
    passed = [network(whole[part]) for part in order.chunk(world)]
    found = []
    for rank, share in enumerate(whole.chunk(world)):
        answers = iter((whole, torch.cat(passed)))
        found.append(
            shuffled(lambda rows, rank=rank: passed[rank], share, order, rank, lambda rows, answers=answers: next(answers))
        )
    return found


def test_a_batch_norm_sees_the_permuted_parts() -> None:
    split, _ = norms(2, channels=3)
    images, order = torch.randn(4, 3, 2, 2), torch.tensor([2, 0, 3, 1])
    found = shuffled(copy.deepcopy(split), images, order, 0, lambda rows: rows)
    permuted = split(torch.stack([images[2], images[0], images[3], images[1]]))
    # Image 0 went second, 1 last, 2 first, 3 third.
    torch.testing.assert_close(found, torch.stack([permuted[1], permuted[3], permuted[0], permuted[2]]))
    assert not torch.allclose(found, split(images)) and not found.requires_grad


def test_the_order_is_a_permutation_that_ranks_share_and_steps_do_not() -> None:
    one, two = Plan(100, 24, parts=2, seed=5), Plan(100, 24, parts=2, rank=1, world=2, seed=5)
    orders = [one.shuffle(step, part) for step in range(3) for part in range(2)]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    np.testing.assert_array_equal(orders[3], two.shuffle(1, 1))
    assert (Plan(100, 24, parts=2, seed=6).shuffle(0, 0) != orders[0]).any()


def test_a_run_shuffles_its_teachers_batch(tmp_path: Path) -> None:
    """Without batch norm that changes nothing; with split ones the teacher's keys, and those alone at the first step."""

    def first_step(out: Path, shuffle: bool, **settings: Any) -> tuple[Tensor, Tensor]:
        base = {key: value for key, value in SMALL.items() if key != "backbone_args" or key not in settings}
        config = resolve(merge(merge(base, settings), {"out": str(out), "method": {"shuffle": shuffle}, "log": {"knn_every": 0}}))
        run = build(config, Engine(config.engine))
        train_step(run, next(run.loader.stream(0, 1)))
        model = run.state.model
        return model.memory.keys[:32].clone(), next(model.teacher.parameters()).clone()

    plain, mixed = (first_step(tmp_path, shuffle, **NORMLESS) for shuffle in (False, True))
    torch.testing.assert_close(mixed[0], plain[0], rtol=1e-5, atol=1e-6)
    split = {"encoder": {"batch_norm_splits": 8}, "engine": {"precision": "fp32"}}
    plain, mixed = (first_step(tmp_path, shuffle, **split) for shuffle in (False, True))
    assert float((mixed[0] - plain[0]).norm()) > 1e-2
