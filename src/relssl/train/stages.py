"""Where the time of a step goes: each of its stages alone, on real batches."""

from __future__ import annotations

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from relssl.data.batch import Batch
from relssl.data.from_files import FromFiles
from relssl.data.jpegs import Files
from relssl.data.resident import Resident
from relssl.data.samples import Sample
from relssl.engine import Engine
from relssl.train.trainer import Trainer

# In the order of a step.
STAGES = (
    *("load", "views", "transfer", "layout", "teacher", "student", "loss", "backward"),
    *("health", "optimizer", "push", "follow"),
)
# Images that stand for all when the work of the loader's processes is timed on one core.
_SAMPLE = 32


def stages(trainer: Trainer, repeats: int = 5) -> dict[str, float]:
    """Seconds of each stage of one optimizer step, all accumulated parts together, on this rank.

    Every rank has to call it. The run is left as it was: networks, memory, optimizer and random generators.

    Args:
        trainer: a run that is set up; its loader gives the batches, from its present step on.
        repeats: times that each stage is measured, at least 1, after one that does not count.

    Returns:
        Medians over the repeats, by name:
        load: from files only, reading the images and making their views, as one core in a loader's process does it.
        views: of images in memory only, making the views on the device; of steps made in one go, each its part.
        transfer: from files only, what workers made to the device, and what is left to do there: to normalise it, and as
            settings say to decode it, and to change its colours.
        layout: the views to channels last.
        teacher, student: forward passes; without a teacher there is none of it.
        loss: relations to the memory and the loss; computed in tiles, also its gradient to the queries.
        backward: of the student, and else of the loss.
        optimizer, push, follow: the updates of student, memory and teacher.
        health: the figures of a step that is logged; other steps go without.

        What is not among them, such as norms, schedules and ranks' exchange, is the difference to a whole step.
    """
    files = isinstance(trainer.loader, FromFiles)
    with _unchanged(trainer):
        held = _parts(trainer) if files else None  # the loader's processes are at rest while the rest is timed
        counts = [_step(trainer, held) for _ in range(repeats + 1)][1:]
    found = {name: statistics.median(count[name] for count in counts) for name in counts[0]}
    if files:
        found |= _loading(trainer, repeats)
    return {name: found[name] for name in STAGES if name in found}


class _Clock:
    """Adds up seconds by name; the device has done all of it when a clock is read. What is timed within counts there alone."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.seconds: dict[str, float] = defaultdict(float)
        self._within = 0.0  # seconds of what has been timed inside the present block

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        outer, self._within = self._within, 0.0
        self.engine.synchronise()
        begun = time.perf_counter()
        yield
        self.engine.synchronise()
        taken = time.perf_counter() - begun
        self.seconds[name] += taken - self._within
        self._within = outer + taken

    @contextmanager
    def forward(self, network: nn.Module | None, name: str) -> Iterator[None]:
        """Time each forward pass of the network meanwhile."""
        open_blocks: list[Any] = []

        def begin(*_: Any) -> None:
            open_blocks.append(self.time(name))
            open_blocks[-1].__enter__()

        def end(*_: Any) -> None:
            open_blocks.pop().__exit__(None, None, None)

        hooks = [] if network is None else [network.register_forward_pre_hook(begin), network.register_forward_hook(end)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _parts(trainer: Trainer) -> list[Batch]:
    """The batch of the present step."""
    (parts,) = trainer.loader.stream(trainer.step, trainer.step + 1)
    return parts


def _step(trainer: Trainer, held: list[Batch] | None) -> dict[str, float]:
    """One optimizer step in pieces, on the batch `held` or a new one."""
    clock, parts = _Clock(trainer.engine), held
    if parts is None:
        with clock.time("views"):
            parts = _parts(trainer)
        if isinstance(trainer.loader, Resident):
            clock.seconds["views"] /= trainer.loader.stretch(trainer.step)  # all of which were made
    made = []
    for number, part in enumerate(parts, start=1):
        with trainer.engine.part(trainer.model.student, last=number == len(parts)):
            trainer.shuffle(number - 1)
            made.append(_passes(trainer, part, clock))
    queries = torch.cat([part for part, _ in made], dim=1)
    keys = torch.cat([part for _, part in made])
    _updates(trainer, queries, keys, torch.cat([part.ids for part in parts]), clock)
    return clock.seconds


def _passes(trainer: Trainer, part: Batch, clock: _Clock) -> tuple[Tensor, Tensor]:
    """Both networks and the loss on one part; its queries [V, B, D] and keys [B, D]."""
    engine, model = trainer.engine, trainer.model
    with clock.time("layout"):
        placed = Batch(part.ids, engine.place(part.weak), [engine.place(view) for view in part.strong])
    networks = clock.forward(model.teacher, "teacher"), clock.forward(model.student, "student")
    with networks[0], networks[1], clock.time("loss"), engine.autocast():  # the loss is what the networks leave of the step
        made = trainer.look(placed, trainer.settings_at(trainer.step))
    with clock.time("backward"):
        engine.backward(made.loss)
    return made.queries, made.keys


def _updates(trainer: Trainer, queries: Tensor, keys: Tensor, ids: Tensor, clock: _Clock) -> None:
    """What follows the backward pass: on queries [V, B, D], keys [B, D] and ids [B] of this rank."""
    now, good = trainer.settings_at(trainer.step), torch.ones((), dtype=torch.bool, device=keys.device)
    with clock.time("health"):
        trainer.health(queries, keys, now)
    with clock.time("optimizer"):
        trainer.move_student(good)
    with clock.time("push"):
        trainer.model.push(keys, ids, good)
    with clock.time("follow"):
        trainer.model.follow(now["teacher_momentum"], good)


@contextmanager
def _unchanged(trainer: Trainer) -> Iterator[None]:
    """The run's tensors and generators are put back afterwards."""
    tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    moments, generators = copy.deepcopy(trainer.optimizer.state_dict()), trainer.engine.random_state()
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.optimizer.load_state_dict(moments)
        trainer.engine.restore_random_state(generators)


def _loading(trainer: Trainer, repeats: int) -> dict[str, float]:
    """What the loader's processes do for a step's images, on one core, and what is left to the device."""
    loader, share, clock = trainer.loader, trainer.plan.share, _Clock(trainer.engine)
    assert isinstance(loader, FromFiles)
    samples = loader.samples()
    rows = trainer.plan.order(0)[: min(_SAMPLE, share)].tolist()
    begun = time.perf_counter()
    made = [samples[0, row] for row in rows]
    each = (time.perf_counter() - begun) / len(rows)
    joined = _as_sent(loader, loader.collate((made * -(-share // len(made)))[:share]))
    times = []
    for _ in range(repeats + 1):
        with clock.time("transfer"):
            loader.batch(joined)
        times.append(clock.seconds.pop("transfer"))
    parts = trainer.plan.parts
    return {"load": each * share * parts, "transfer": parts * statistics.median(times[1:])}


def _as_sent(loader: FromFiles, joined: Sample | Files) -> Sample | Files:
    """What workers made, in page-locked memory where the loader has it there."""
    if isinstance(joined, Files) or loader.device.type != "cuda":
        return joined
    assert isinstance(joined.row, Tensor)
    return joined._replace(row=joined.row.pin_memory(), views=[view.pin_memory() for view in joined.views])
