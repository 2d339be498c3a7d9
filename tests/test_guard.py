"""Non-finite steps are judged on the device: nothing in the loop waits for it, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from relssl.train.loop import train_step
from relssl.train.state import Guard
from small_runs import ready_run

CPU = torch.device("cpu")


class Network(nn.Module):
    """Batch norms, and buffers of other kinds: a table of integers, as in Swin, and a scalar of half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
        self.register_buffer("table", torch.arange(9).view(3, 3).T)
        self.register_buffer("count", torch.tensor(0.5, dtype=torch.float16))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.layers(images)


@pytest.mark.parametrize("fault", [None, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["loss", "norm"])
def test_a_bad_step_leaves_the_buffers_alone(fault: float | None, where: str) -> None:
    network, plain = Network(), Network()
    plain.load_state_dict(network.state_dict())
    guard, images = Guard([network], CPU), torch.rand(5, 3, 8, 8)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for _ in range(2):
        guard.watch()
        network(images * (1 if fault is None else fault))
        figures = {"loss": torch.tensor(1.0), "norm": torch.tensor(1.0)}
        if fault is not None:
            figures[where] = torch.tensor(fault)
        assert bool(guard.judge(**figures)) == (fault is None)
        plain(images)
    expected = before if fault is not None else plain.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())
    assert int(guard.streak) == (0 if fault is None else 2)


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
        *("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "allclose"),
        "_assert_async",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert not name.startswith(self.ASKING), f"{name} waits for the device"
        if name in ("index.Tensor", "index", "index_put_", "index_put", "_index_put_impl_"):
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
            assert not masks, "a mask's size is known to the device alone"
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
    run = ready_run(tmp_path / "run", images=160, **settings)
    stream = run.loader.stream(0, 5)
    for name in ("cpu", "numpy", "tolist"):  # which a processor's own tensors answer without an operation
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name, **__: pytest.fail(f"{name} waits for the device"))
    with NoQuestions():
        steps = [train_step(run, parts) for parts in stream]
    monkeypatch.undo()
    rows = [figures for figures in steps if figures is not None]
    assert [figures.step for figures in rows] == [3, 5]
    assert all(torch.isfinite(figures.read()["loss"]) for figures in rows)


def test_no_questions_would_notice() -> None:
    for asking in (lambda x: float(x.sum()), lambda x: x[x > 0], lambda x: bool(x.any()), lambda x: x.nonzero()):
        with pytest.raises(AssertionError), NoQuestions():
            asking(torch.rand(4))
