"""The stages of a step are those of training, and timing them leaves no trace."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from relssl.engine import Engine
from relssl.settings.reading import merge, nest
from relssl.settings.run import resolve
from relssl.train import estimate as module
from relssl.train.estimate import STAGES, _Marks, _turns, stages, time_steps
from relssl.train.loop import Run, scheduled, train_step
from relssl.train.pretrain import build
from small_runs import SMALL

ALWAYS = set(STAGES) - {"load", "views", "transfer"}


def trainer(**over: Any) -> Run:
    config = resolve(merge(SMALL, nest(over)))
    return build(config, Engine(config.engine))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(12):
        pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02}.jpg")
    (tmp_path / "11.jpg").write_bytes(b"no image")
    return tmp_path


def files(folder: Path, **over: Any) -> Run:
    views = {side: {"size": 16} for side in ("weak", "strong")}
    batch = {"batch_size": 4, "max_images": None, "recipe": "folder", "loader.workers": 0, "views": views}
    return trainer(data=str(folder), **batch | over)


def train(run: Run, steps: int) -> None:
    for parts in run.loader.stream(run.state.step, run.state.step + steps):
        train_step(run, parts)


@pytest.mark.parametrize("over", [{}, {"accumulate": 2, "engine.precision": "bf16"}])
def test_training_goes_on_as_if_nothing_had_been_timed(over: dict[str, Any]) -> None:
    timed, plain = trainer(**over), trainer(**over)
    for run in (timed, plain):
        train(run, 3)
    found = stages(timed, repeats=2)
    assert set(found) == ALWAYS | {"views"} and all(seconds > 0 for seconds in found.values())
    for run in (timed, plain):
        train(run, 3)
    assert timed.state.step == plain.state.step == 6
    expected, actual = plain.state.model.state_dict(), timed.state.model.state_dict()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []
    moments = zip(plain.state.optimizer.state.values(), timed.state.optimizer.state.values(), strict=True)
    for one, other in moments:
        assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])
        assert one["momentum_buffer"].stride() == other["momentum_buffer"].stride()


def test_timing_before_the_first_step_leaves_the_optimizer_without_momentum() -> None:
    run = trainer()
    random = torch.get_rng_state()
    stages(run, repeats=1)
    assert all(not state["momentum_buffer"].any() for state in run.state.optimizer.state.values())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in run.networks[0].parameters())


@pytest.mark.parametrize("step", [4, 18])  # with InfoNCE in the loss, and without
def test_the_pieces_make_the_gradients_of_a_step(step: int) -> None:
    run = trainer(**{"engine.precision": "fp32", "method.warmup": "linear"})
    run.state.step = step
    now = scheduled(run, step)
    assert (now["warmup_mix"] > 0) == (step == 4)
    (part,) = module._parts(run)
    made = run.state.model.step(
        part.weak,
        part.strong,
        student_temperature=0.1,
        teacher_temperature=now["teacher_temperature"],
        warmup_mix=now["warmup_mix"],
    )
    made.loss.backward()
    expected = [parameter.grad.clone() for parameter in run.networks[0].parameters() if parameter.grad is not None]
    run.state.optimizer.zero_grad(set_to_none=True)
    queries, keys = module._passes(run, part, 0, module._Clock(run.engine))
    actual = [parameter.grad for parameter in run.networks[0].parameters() if parameter.grad is not None]
    assert len(actual) == len(expected) > 0
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(queries, made.queries)
    torch.testing.assert_close(keys, made.keys)


def test_files_are_loaded_and_moved_where_pixels_are_viewed(folder: Path) -> None:
    found = stages(files(folder), repeats=1)
    assert set(found) == ALWAYS | {"load", "transfer"} and list(found) == [name for name in STAGES if name in found]


def test_steps_are_timed_through_the_loader_and_repeat_epochs(folder: Path) -> None:
    run = files(folder, epochs=1, **{"optimizer.warmup_epochs": 0.5})
    timing = time_steps(run, 7)
    # Three steps to warm up and one to settle come first; the epoch has three.
    assert len(timing.steps) == len(timing.waits) == 7 and run.state.step == 3 + 1 + 7
    assert all(0 < wait < step for wait, step in zip(timing.waits, timing.steps, strict=True))
    assert {Path(name).name for name, _ in timing.bad} == {"11.jpg"}


def test_slow_steps_are_cut_short() -> None:
    run = trainer()
    assert len(time_steps(run, 50, limit=0.0).steps) == 3 and run.state.step == 3 + 1 + 3


def test_each_loader_process_delivers_as_often(folder: Path) -> None:
    run = files(folder, **{"loader.workers": 2})
    assert len(time_steps(run, 3).steps) == 4


def test_on_a_gpu_its_own_clock_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks are events in the device's queue, read once at the end: none may wait for the device in between."""
    waits: list[int] = []

    class Event:
        passed = 0.0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            assert not waits
            Event.passed += 250.0
            self.at = Event.passed

        def elapsed_time(self, later: Any) -> float:
            return float(later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    gpu: Any = SimpleNamespace(device=torch.device("cuda"), synchronise=lambda: waits.append(1))
    marks = _Marks(gpu)
    for _ in range(4):
        marks.set()
    assert marks.spans() == [0.25, 0.25, 0.25] and waits == [1]


def test_views_of_several_steps_are_shared_out_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that making views alone moves."""
    run, now = trainer(**{"loader.views_ahead": 4}), [0.0]
    make = run.loader._views  # type: ignore[union-attr]

    def slowly(*arguments: Any) -> list[torch.Tensor]:
        now[0] += 8.0
        return make(*arguments)

    monkeypatch.setattr(run.loader, "_views", slowly)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert stages(run, repeats=1)["views"] == 2.0
    run.state.step = 9  # an epoch has ten, so that its last stretch has two
    assert stages(run, repeats=1)["views"] == 4.0


def test_whole_stretches_of_views_are_timed() -> None:
    run = trainer(**{"loader.views_ahead": 4})
    assert len(time_steps(run, 5).steps) == 8


def test_ranks_with_other_cores_make_the_same_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = files(folder, **{"loader.workers": 2})
    monkeypatch.setattr(run.engine, "largest", lambda mine: mine + 4)
    assert _turns(run) == 6


def test_parts_exchange_gradients_with_the_last_as_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    run, lasts = trainer(accumulate=2), list[bool]()

    def part(student: torch.nn.Module, last: bool) -> Any:
        assert student is run.state.model.student
        lasts.append(last)
        return nullcontext()

    monkeypatch.setattr(run.engine, "part", part)
    stages(run, repeats=1)
    assert lasts == [False, True] * 2


def test_what_moves_to_a_gpu_is_page_locked_as_in_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, locked = files(folder), list[torch.Tensor]()
    loader: Any = run.loader

    def lock(values: torch.Tensor) -> torch.Tensor:
        locked.append(values.clone())
        return locked[-1]

    def batch(joined: Any) -> None:
        assert all(any(value is one for one in locked) for value in (joined.row, *joined.views))

    monkeypatch.setattr(torch.Tensor, "pin_memory", lock)
    monkeypatch.setattr(loader, "device", torch.device("cuda"))
    monkeypatch.setattr(loader, "batch", batch)
    assert module._loading(run, 1)["transfer"] >= 0 and len(locked) == 3
