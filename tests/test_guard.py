"""Non-finite steps are judged on the device: nothing in the loop waits for it, and nothing is left behind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from relssl.data.named import load
from relssl.engine import Engine
from relssl.settings.reading import merge, nest
from relssl.settings.run import resolve
from relssl.train.loop import Guard, Trainer
from relssl.train.pretrain import complete_settings
from small_runs import SMALL

CPU = torch.device("cpu")


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)))


def test_joined_buffers_train_load_and_copy_as_they_did() -> None:
    plain, joined = network(), network()
    Guard([joined], CPU)
    images = torch.rand(5, 3, 8, 8)
    torch.testing.assert_close(joined(images), plain(images), rtol=0, atol=0)
    assert plain.state_dict().keys() == joined.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(joined.state_dict()[name], value)
    assert joined[1].num_batches_tracked.ndim == 0 and int(joined[1].num_batches_tracked) == 1
    block = joined[1].running_mean.untyped_storage().data_ptr()
    joined.load_state_dict(network().state_dict())
    assert joined[1].running_mean.untyped_storage().data_ptr() == block  # still a view of the block
    assert torch.equal(joined[1].running_var, torch.ones(4))
    twin = copy.deepcopy(joined)
    twin(images)
    assert torch.equal(joined[1].running_var, torch.ones(4)) and not torch.equal(twin[1].running_var, torch.ones(4))


@pytest.mark.parametrize("fault", [None, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["loss", "norm"])
def test_a_bad_step_leaves_the_statistics_alone(fault: float | None, where: str) -> None:
    net = network()
    guard = Guard([net], CPU)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    guard.watch()
    net(torch.rand(5, 3, 8, 8) * (1 if fault is None else fault))
    figures = {"loss": torch.tensor(1.0), "norm": torch.tensor(1.0)}
    if fault is not None:
        figures[where] = torch.tensor(fault)
    good = guard.judge(**figures)
    same = all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert bool(good) == (fault is None) == (not same)
    assert int(guard.streak) == (0 if fault is None else 1)


def test_the_longest_streak_is_kept_until_it_is_read() -> None:
    guard = Guard([], CPU)
    one, nan = torch.tensor(1.0), torch.tensor(float("nan"))
    for loss in (nan, nan, nan, one, nan, nan):
        guard.judge(loss, one)
    assert int(guard.longest()) == 3 and int(guard.streak) == 2
    assert int(guard.longest()) == 2
    guard.judge(nan, one)
    guard.judge(one, one)
    assert int(guard.longest()) == 3 and int(guard.longest()) == 0


class NoQuestions(TorchDispatchMode):
    """Refuses every operation that has to know a value, or a size that depends on values: on a GPU these wait for it."""

    ASKING = (
        "_local_scalar_dense",
        "item",
        "is_nonzero",
        "nonzero",
        "masked_select",
        "equal",
        "unique",
        "allclose",
        "_assert_async",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert not name.startswith(self.ASKING), f"{name} waits for the device"
        if name in ("index.Tensor", "index", "index_put_", "index_put", "_index_put_impl_"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), (
                "a mask's size is known to the device alone"
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate": 2, "optimizer.clip": 1.0, "views.strong": "contrastive", "method.warmup": "cosine"},
        {
            "method.loss_form": "plain",
            "views.strong": "strong",
            "views.crops": [[32, 0.2, 1.0], [16, 0.1, 0.5]],
            "engine.precision": "bf16",
        },
    ],
    ids=["plain", "accumulated", "crops"],
)
def test_neither_views_nor_step_wait_for_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    images = load("digits", None, "train").subset(range(320))
    config = complete_settings(resolve(merge(SMALL, nest({"out": str(tmp_path / "run")} | settings))), images)
    trainer = Trainer(config, Engine(config.engine), images, None)
    stream = trainer.loader.stream(0, 10)
    for name in ("cpu", "numpy", "tolist"):  # which a processor's own tensors answer without an operation
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name, **__: pytest.fail(f"{name} waits for the device"))
    with NoQuestions():
        told = [trainer.train_step(parts) for parts in stream]
    monkeypatch.undo()
    rows = [figures for figures in told if figures is not None]
    assert [figures.step for figures in rows] == [3, 6, 9, 10]
    assert all(torch.isfinite(figures.read()["loss"]) for figures in rows)


def test_no_questions_would_notice(tmp_path: Path) -> None:
    for asking in (lambda x: float(x.sum()), lambda x: x[x > 0], lambda x: bool(x.any()), lambda x: x.nonzero()):
        with pytest.raises(AssertionError), NoQuestions():
            asking(torch.rand(4))
