"""Steps of a run against the clock: through its loader, as training makes them."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from relssl.data.from_files import FromFiles
from relssl.data.resident import Resident
from relssl.data.workers import loader_workers
from relssl.engine import Engine
from relssl.train.trainer import Trainer

# Steps before the clock starts, on one batch: kernels are chosen and memory is taken. Fewer where steps are slow.
_WARM, _WARM_SECONDS = 3, 20.0
# The least steps that are timed, however slow they are.
_LEAST = 3


@dataclass(frozen=True)
class Timing:
    """Steps one after another.

    Attributes:
        steps: seconds of each, its data included.
        waits: seconds of each in which the device had nothing but the making of its batch to do.
        bad: (file, reason) of images that could not be read.
    """

    steps: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)


def time_steps(trainer: Trainer, steps: int, limit: float = 60.0) -> Timing:
    """Train some steps and time them. Every rank has to call it; the trainer is that many steps further afterwards.

    Args:
        steps: how many; a few more where the loader's processes deliver in turns, so that each has had as many, or where
            views of several steps are made in one go.
        limit: seconds after which no further step begins, once there are three.
    """
    _warm_up(trainer)
    turns = _turns(trainer)
    wanted = turns * math.ceil(steps / turns)
    stream = trainer.loader.stream(trainer.step, trainer.step + turns + wanted)
    begun = time.perf_counter()
    # The first batches had their start-up to wait for, or lay ready.
    for parts in itertools.islice(stream, turns):
        trainer.train_step(parts)
        if _over(trainer, begun, _WARM_SECONDS):
            break
    marks, bad, begun = _Marks(trainer.engine), [], time.perf_counter()
    marks.set()
    for done, parts in enumerate(itertools.islice(stream, wanted), start=1):
        marks.set()
        trainer.train_step(parts)
        marks.set()
        bad += [fault for part in parts for fault in part.bad]
        if done >= _LEAST and _over(trainer, begun, limit):
            break
    spans = marks.spans()
    waits, works = spans[::2], spans[1::2]
    return Timing([wait + work for wait, work in zip(waits, works, strict=True)], waits, bad)


def _warm_up(trainer: Trainer) -> None:
    (parts,) = trainer.loader.stream(trainer.step, trainer.step + 1)
    begun = time.perf_counter()
    for _ in range(_WARM):
        trainer.train_step(parts)
        if _over(trainer, begun, _WARM_SECONDS):
            break


def workers(trainer: Trainer) -> int | None:
    """The loader's processes; None if images are in memory."""
    return loader_workers(trainer.config) if isinstance(trainer.loader, FromFiles) else None


def _turns(trainer: Trainer) -> int:
    """Steps in which each of the loader's processes delivers once, or whose views are made in one go; the same on all ranks."""
    if isinstance(trainer.loader, Resident):
        return trainer.loader.ahead
    # Machines may differ in their cores, and all have to make the same steps.
    return trainer.engine.largest(max(1, math.ceil((workers(trainer) or 0) / trainer.plan.parts)))


def _over(trainer: Trainer, begun: float, seconds: float) -> bool:
    """Whether the time is up on any rank: all have to make the same steps."""
    return bool(trainer.engine.largest(int(time.perf_counter() - begun > seconds)))


class _Marks:
    """Points that the device passes in turn; setting one does not keep the host waiting where the device has clocks."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.marks = engine, list[Any]()

    def set(self) -> None:
        """Set a mark behind all that was asked of the device so far."""
        if self.engine.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()  # type: ignore[no-untyped-call]
            self.marks.append(event)
        else:
            self.engine.synchronise()
            self.marks.append(time.perf_counter())

    def spans(self) -> list[float]:
        """Seconds from each mark to the next."""
        self.engine.synchronise()
        if self.engine.device.type == "cuda":
            return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(self.marks)]
        return [b - a for a, b in itertools.pairwise(self.marks)]
