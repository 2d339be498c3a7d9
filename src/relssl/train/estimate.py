"""What a run would take, from a few of its steps on this machine; nothing stays on the disk."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import math
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from relssl.data.cache import Shrunk, place, root, shrunken
from relssl.data.decode import BadImage, Decoded
from relssl.data.images import Files as ImageFiles
from relssl.data.images import Images, Pixels
from relssl.data.loader import Batch, FromFiles, Resident, Sample, collate, worker_count
from relssl.data.plain import PlainView, Reader, plain_view
from relssl.engine import Engine, available_cores, fast_bf16
from relssl.errors import ConfigError
from relssl.evaluation.features import extract
from relssl.evaluation.knn import knn_accuracy
from relssl.evaluation.pairs import choose
from relssl.files import to_json
from relssl.method import create_student
from relssl.method.backbones import count_flops
from relssl.method.base import World
from relssl.settings.run import METHODS, Config, derive, resolve
from relssl.train.checkpoint import whole_state
from relssl.train.loop import WORTH_COMPILING, Trainer
from relssl.train.pretrain import build, named
from relssl.train.run_folder import Display, default_folder
from relssl.units import size
from relssl.weights import store


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, of this machine's training processes so far without the loader's processes, and what there is.

    `device` is what was reserved on a GPU; 0 of 0 without one.
    """

    used: int
    total: int
    device_used: int
    device_total: int

    @property
    def share(self) -> float:
        """The fuller of the two, 0 to 1."""
        return max(self.used / self.total, self.device_used / self.device_total if self.device_total else 0.0)


def peak_memory(engine: Engine, processes: int) -> Memory:
    """The peak up to now, if all `processes` of this machine take as much as this one."""
    used, total = processes * host_memory("VmHWM"), _memory_allowed()
    if engine.device.type != "cuda":
        return Memory(used, total, 0, 0)
    device = torch.cuda.get_device_properties(engine.device)
    return Memory(used, total, torch.cuda.max_memory_reserved(engine.device), device.total_memory)


def host_memory(field: str) -> int:
    """Bytes that this process holds (VmRSS) or held at most (VmHWM), as the kernel accounts for it.

    The peak of getrusage would not do, as a new process inherits its parent's; it has to where there is no such account.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _memory_allowed() -> int:
    """The machine's memory, or what a container may take of it."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            return min(total, int((Path("/sys/fs/cgroup") / name).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return total


# Bytes of a logged row: JSON in metrics.jsonl, and events of TensorBoard.
_ROW, _EVENTS = 500, 900
# Images whose features are timed, and images read on one core, to stand for all of an evaluation.
_FEATURES, _READ = 256, 16


@dataclass(frozen=True)
class Disk:
    """Bytes that the run folder comes to, and a cache of shrunk images.

    Attributes:
        checkpoint: of one of them.
        checkpoints: how many there are at most: those kept, the best by kNN, and a new one before the oldest goes.
        exports: both backbones.
        logs: metrics and events.
        free: where the folder would lie.
        cache: what is still to be written of shrunk images.
        cache_free: where these would lie, once the run folder is full grown if that is on the same disk.
    """

    checkpoint: int
    checkpoints: int
    exports: int
    logs: int
    free: int
    cache: int
    cache_free: int

    @property
    def total(self) -> int:
        """The run folder in the end."""
        return self.checkpoint * self.checkpoints + self.exports + self.logs


@dataclass(frozen=True)
class Extras:
    """What interrupts training: how many there are of each in the whole run, and the seconds of one.

    Saving is timed up to the disk, whose own time is not in it.
    """

    evaluations: int
    evaluation_seconds: float
    saves: int
    save_seconds: float


def measure_saving(trainer: Trainer, cache: int = 0) -> tuple[Disk, float]:
    """The disk a run needs, and the seconds it takes to make a checkpoint's bytes and their hash. Nothing is written.

    Args:
        cache: bytes of shrunk images still to be written.
    """
    config = trainer.config
    begun = time.perf_counter()
    tensors, rest = store.flatten(whole_state(trainer.model, trainer.optimizer, trainer.engine))
    data = store.encode(tensors)
    hashlib.sha256(data).hexdigest()
    seconds = time.perf_counter() - begun
    exports = sum(tensor.nbytes for network in trainer.networks for tensor in network.backbone.state_dict().values())
    rows = trainer.total_steps // config.log.every + config.epochs
    held = min(config.checkpoint.keep, saves(config, trainer.steps_per_epoch)) + (trainer.online is not None) + 1
    logs = rows * (_ROW + _EVENTS * config.log.tensorboard)
    out, caches = _existing(Path(config.out or default_folder(config))), _existing(root(config.loader))
    disk = Disk(len(data) + len(to_json(rest)), held, exports, logs, shutil.disk_usage(out).free, cache, 0)
    taken = disk.total if out.stat().st_dev == caches.stat().st_dev else 0
    return dataclasses.replace(disk, cache_free=max(0, shutil.disk_usage(caches).free - taken)), seconds


def _existing(place: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    place = place.absolute()
    while not place.exists():
        place = place.parent
    return place


def saves(config: Config, steps_per_epoch: int) -> int:
    """Checkpoints written over a whole run: at ends of epochs, with each evaluation, between, and at the end."""
    every, total = config.checkpoint.every_steps, config.epochs * steps_per_epoch
    ends = {epoch * steps_per_epoch for epoch in (*range(0, config.epochs, config.checkpoint.every), *_evaluated(config))}
    between = set(range(every, total, every)) if every else set()
    return len((ends | between | {total}) - {0})


def _evaluated(config: Config) -> list[int]:
    """The epochs with kNN at their end, if the data has labels."""
    every = config.log.knn_every
    return sorted({*range(every, config.epochs + 1, every), config.epochs}) if every else []


def measure_extras(trainer: Trainer, save_seconds: float) -> Extras:
    """Evaluations, timed on a few images, and checkpoints."""
    written = saves(trainer.config, trainer.steps_per_epoch)
    if trainer.online is None:
        return Extras(0, 0.0, written, save_seconds)
    count = len(_evaluated(trainer.config)) + 1  # and one before the first step
    return Extras(count, _evaluation(trainer), written, save_seconds)


def _evaluation(trainer: Trainer) -> float:
    """Seconds of one evaluation: features of both sides by both networks, and the search for neighbours."""
    assert trainer.online is not None
    pair, config, engine = trainer.online.pair, trainer.config, trainer.engine
    backbone, size = trainer.networks[-1].backbone, config.views.weak.size
    # For files, images of noise stand in: reading them is timed apart, as the loader's processes do it at the same time.
    sample = choose(pair.test, _FEATURES, 0)
    if not sample.in_memory:
        sample = Images("noise", Pixels(torch.randint(256, (_FEATURES, 3, size, size), dtype=torch.uint8)))
    seconds, width = [], 0
    for _ in range(2):  # the first chooses kernels
        begun = time.perf_counter()
        width = extract(backbone, sample, Reader(PlainView.of(config.views)), engine.device, engine.autocast()).vectors.shape[1]
        seconds.append(time.perf_counter() - begun)
    each = min(seconds) / len(sample)
    if not pair.test.in_memory:
        workers = worker_count(config.loader.workers, config.engine.devices)
        reading = _reading(pair.test, config)
        each = max(each, reading / workers) if workers else each + reading
    return len(trainer.networks) * (
        each * (len(pair.bank) + len(pair.test)) + _search(len(pair.bank), len(pair.test), width, config)
    )


def _reading(images: Images, config: Config) -> float:
    """Seconds to read one image and make its plain view, on one core."""
    view, read, begun = PlainView.of(config.views), 0, time.perf_counter()
    for row in range(min(_READ, len(images))):
        try:
            plain_view(images.read(row, config.loader.max_pixels), view)
            read += 1
        except BadImage:
            continue
    return (time.perf_counter() - begun) / max(read, 1)


def _search(bank: int, queries: int, width: int, config: Config) -> float:
    """Seconds to find the neighbours of all queries, from a part of both sides."""
    some, few = min(bank, 1 << 14), min(queries, 1 << 8)
    features = torch.randn(some + few, width)
    labels = torch.arange(some + few) % 2
    begun = time.perf_counter()
    knn_accuracy(features[:some], labels[:some], features[some:], labels[some:], classes=2, settings=[config.log.knn], cap=True)
    return (time.perf_counter() - begun) * bank / some * queries / few


# Images [N, C, H, W] of 3x3 convolutions C -> C: the widths and sizes of residual networks.
_CONVOLUTIONS = {
    "cpu": ((32, 64, 32, 32), (32, 128, 28, 28), (32, 256, 14, 14)),
    "cuda": ((256, 64, 56, 56), (256, 128, 28, 28), (256, 256, 14, 14), (256, 512, 14, 14)),
}
# Side of the square matrices that are multiplied.
_MATRIX = {"cpu": 2048, "cuda": 8192}


def step_flops(config: Config, classes: int = 1) -> dict[str, int]:
    """Floating-point operations of one optimizer step per image, two for a multiply-add.

    Counted on the run's own networks in convolutions, matrix products and attention; all that is done entry by entry is left
    out. ReSSL's InfoNCE adds nothing, as its similarities are those of the relation.

    Args:
        classes: of the labels, for supervised learning; where they are not known, 1 leaves out next to nothing.

    Returns:
        {"teacher": forward, 0 without one; "student": forward, "backward": of the student, "memory": similarities and their
        gradient, to the memory or within the batch; 0 without either}.

    Raises:
        ConfigError: if the network cannot be built, or images of the views' sizes do not pass through it.
    """
    derived = derive(config)
    # Split norms need whole batches, and cost nothing that is counted.
    config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, batch_norm_splits=1))
    with torch.random.fork_rng(devices=[]):  # networks are drawn, and others go on drawing afterwards
        student = create_student(config, classes)
        # Two images, as batch norm has to have a spread to normalise by.
        weak, *strong = (torch.randn(2, config.views.channels, view.size, view.size) for view in derived.views)
        both = [weak, *strong]
        seen = both if derived.two_way or not strong else strong
        taught = both if derived.two_way else [weak]
        made: list[torch.Tensor] = []
        teacher_flops = 0
        if "teacher" in derived.networks:
            teacher = student.teacher()
            with torch.no_grad():
                teacher_flops = count_flops(lambda: teacher(taught))
        student_flops = count_flops(lambda: made.append(student(seen)))
        backward_flops = count_flops(lambda: made[0].sum().backward())  # type: ignore[no-untyped-call]
    memory = _products(config, len(seen), len(taught)) * 2 * config.encoder.dim
    return {"teacher": teacher_flops // 2, "student": student_flops // 2, "backward": backward_flops // 2, "memory": memory}


def _products(config: Config, queries: int, keys: int) -> int:
    """Inner products of embeddings that an image takes part in: similarities and their gradient."""
    traits = METHODS[config.method.name]
    if traits.whole_batch:
        return 2 * queries * 2 * config.batch_size  # each query and its gradient, with two views of each image
    # The queries and their gradient by the memory, and the keys where the teacher's relation is wanted.
    return (2 * queries + keys * traits.sharpened) * config.method.memory_size * traits.memory


def attainable(engine: Engine, precision: str | None = None, seconds: float = 1.0) -> float:
    """Floating-point operations a second that this rank's device reaches at its best, measured.

    The best of several 3x3 convolutions, channels last, and of a large matrix product, in the run's own settings of the
    libraries. A network's step cannot be faster than its operations at this rate.

    Args:
        precision: fp32 or bf16; default: the engine's.
        seconds: for all of them together, after a warm-up.
    """
    dtype = torch.bfloat16 if (precision or engine.precision) == "bf16" else torch.float32
    kind = "cuda" if engine.device.type == "cuda" else "cpu"
    candidates = [_convolution(shape, dtype, engine) for shape in _CONVOLUTIONS[kind]]
    candidates.append(_product(_MATRIX[kind], dtype, engine))
    with torch.no_grad():
        return max(_rate(work, flops, engine, seconds / len(candidates)) for work, flops in candidates)


def _convolution(shape: tuple[int, int, int, int], dtype: torch.dtype, engine: Engine) -> tuple[Callable[[], object], int]:
    """A convolution to do, and its operations."""
    batch, channels, height, width = shape
    images: torch.Tensor = engine.place(torch.randn(shape)).to(dtype)
    weight: torch.Tensor = engine.place(nn.Conv2d(channels, channels, 3, bias=False)).weight.detach().to(dtype)
    return lambda: F.conv2d(images, weight, padding=1), 2 * 9 * batch * channels**2 * height * width


def _product(side: int, dtype: torch.dtype, engine: Engine) -> tuple[Callable[[], object], int]:
    """A product of square matrices to do, and its operations."""
    left, right = (torch.randn(side, side).to(engine.device, dtype) for _ in range(2))
    return lambda: left @ right, 2 * side**3


def _rate(work: Callable[[], object], flops: int, engine: Engine, seconds: float) -> float:
    """The best rate among rounds of a few calls each; a machine that others use is at its best now and then."""
    once = _seconds(work, 1, engine)  # builds the kernels; too slow to count
    once = min(once, _seconds(work, 1, engine))
    calls = max(1, int(seconds / 10 / max(once, 1e-6)))
    best, end = once, time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, _seconds(work, calls, engine) / calls)
    return flops / best


def _seconds(work: Callable[[], object], calls: int, engine: Engine) -> float:
    engine.synchronise()
    begun = time.perf_counter()
    for _ in range(calls):
        work()
    engine.synchronise()
    return time.perf_counter() - begun


# Images that stand for all of a set.
_SAMPLE = 256


class Repeated(Shrunk):
    """A few shrunk images over and over, in the place of all files."""

    def __init__(self, few: Shrunk, files: ImageFiles) -> None:
        super().__init__(few.folder, files, few.sizes, few.bad)

    def __len__(self) -> int:
        return len(self.files)

    def open(self, row: int, max_pixels: int) -> Decoded:
        return super().open(row % len(self.sizes), max_pixels)


@contextmanager
def stand_in(trainer: Trainer) -> Iterator[int]:
    """Within, the trainer reads shrunk images, if they are asked for: those of an earlier run, or a few that stand for all.

    Every rank has to call it.

    Yields:
        Bytes that a run would still write to have them all; 0 if it would write none.

    Raises:
        StorageError: if the few do not fit the system's temporary folder.
    """
    config, images = trainer.config, trainer.images
    if config.loader.cache is None:
        yield 0
        return
    assert isinstance(images.source, ImageFiles)
    there = Shrunk.load(place(images, config.loader), images.source)
    if not trainer.engine.largest(int(len(there) < len(images))):
        trainer.read(dataclasses.replace(images, source=there))
        yield 0
        return
    with tempfile.TemporaryDirectory(prefix="relssl-") as scratch, Display(1, 0, show=False) as silent:
        # By this process alone, as its neighbours do the same at this time.
        loader = dataclasses.replace(config.loader, cache_folder=scratch, workers=0)
        few = shrunken(choose(images, _SAMPLE, config.seed), loader, silent)
        trainer.read(dataclasses.replace(images, source=Repeated(few, images.source)))
        yield few.total * (len(images) - len(there)) // len(few)


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


def step_seconds(config: Config) -> float:
    """Return the median seconds of a few steps of a run."""
    quick = dataclasses.replace(timed(config), log=dataclasses.replace(config.log, knn_every=0))
    engine = Engine(quick.engine)
    with engine.running():
        trainer = build(quick, engine)
        trainer.compile()
        return statistics.median(time_steps(trainer, 5, limit=20.0).steps)


def _warm_up(trainer: Trainer) -> None:
    (parts,) = trainer.loader.stream(trainer.step, trainer.step + 1)
    begun = time.perf_counter()
    for _ in range(_WARM):
        trainer.train_step(parts)
        if _over(trainer, begun, _WARM_SECONDS):
            break


def workers(trainer: Trainer) -> int | None:
    """The loader's processes; None if images are in memory."""
    return trainer.loader.workers if isinstance(trainer.loader, FromFiles) else None


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


# In the order of a step.
STAGES = (
    *("load", "views", "transfer", "layout", "teacher", "student", "loss", "backward"),
    *("health", "optimizer", "push", "follow"),
)
# Images that stand for all when the work of the loader's processes is timed on one core.
_SAMPLE_stages = 32


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
            made.append(_passes(trainer, part, trainer.world(number - 1), clock))
    queries = torch.cat([part for part, _ in made], dim=1)
    keys = torch.cat([part for _, part in made])
    _updates(trainer, queries, keys, torch.cat([part.ids for part in parts]), clock)
    return clock.seconds


def _passes(trainer: Trainer, part: Batch, world: World, clock: _Clock) -> tuple[Tensor, Tensor]:
    """Both networks and the loss on one part; its queries [V, B, D] and keys [B, D]."""
    engine, model = trainer.engine, trainer.model
    with clock.time("layout"):
        placed = Batch(part.ids, engine.place(part.weak), [engine.place(view) for view in part.strong])
    networks = clock.forward(model.teacher, "teacher"), clock.forward(model.student, "student")
    with networks[0], networks[1], clock.time("loss"), engine.autocast():  # the loss is what the networks leave of the step
        made = trainer.look(placed, trainer.settings_at(trainer.step), world)
    with clock.time("backward"):
        made.loss.backward()  # type: ignore[no-untyped-call]
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
    samples = loader.samples
    rows = trainer.plan.order(0)[: min(_SAMPLE_stages, share)].tolist()
    begun = time.perf_counter()
    made = [samples[0, row] for row in rows]
    each = (time.perf_counter() - begun) / len(rows)
    joined = _as_sent(loader, collate((made * -(-share // len(made)))[:share]))
    times = []
    for _ in range(repeats + 1):
        with clock.time("transfer"):
            loader.batch(joined)
        times.append(clock.seconds.pop("transfer"))
    parts = trainer.plan.parts
    return {"load": each * share * parts, "transfer": parts * statistics.median(times[1:])}


def _as_sent(loader: FromFiles, joined: Sample) -> Sample:
    """What workers made, in page-locked memory where the loader has it there."""
    if loader.device.type != "cuda":
        return joined
    assert isinstance(joined.row, Tensor)
    return joined._replace(row=joined.row.pin_memory(), crops=[crops.pin_memory() for crops in joined.crops])


# Width to height of most photographs.
_ASPECT = 4 / 3


@dataclass(frozen=True)
class Advice:
    """A change worth trying.

    Attributes:
        setting: its dotted name.
        value: what to set it to.
        why: what was measured, and what else the change touches.
        gain: factor on the speed of the whole run that it may bring, at best; None where no figure says.
    """

    setting: str
    value: str
    why: str
    gain: float | None = None


def advise(found: Estimate, config: Config) -> tuple[Advice, ...]:
    """All that applies, in the order of what they may bring."""
    made = [advice for rule in RULES if (advice := rule(found, config)) is not None]
    return tuple(sorted(made, key=lambda advice: -(advice.gain or 0)))


def memory_nearly_full(found: Estimate, config: Config) -> Advice | None:
    """Above 90 %: parts of a batch need less at a time."""
    parts = 2 * config.accumulate
    share = config.batch_size / (parts * found.world)
    if found.memory.share <= 0.9 or share < 2 or share != int(share) or METHODS[config.method.name].whole_batch:
        return None
    why = f"{found.memory.share:.0%} of the memory is taken; in more parts, each normalised by itself, a batch takes less"
    return Advice("accumulate", str(parts), why)


def parts_without_need(found: Estimate, config: Config) -> Advice | None:
    """The whole batch would take 80 % of the memory at most."""
    if config.accumulate == 1 or found.memory.share * config.accumulate > 0.8:
        return None
    return Advice("accumulate", "1", f"{found.memory.share:.0%} of the memory is taken; the batch fits as a whole")


def waiting_for_files(found: Estimate, config: Config) -> Advice | None:
    """Over 10 % of a step goes by waiting for the loader's processes."""
    waits = found.shares["data"]
    if found.workers is None or waits <= 0.1:
        return None
    core_seconds, busy = found.stages["load"], found.step_mean * (1 - waits)
    cores = max(1, found.cores // config.engine.devices)  # of each training process, whose own the workers are
    value = min(math.ceil(core_seconds / busy), cores - 1)
    if value > found.workers:
        computing = busy * found.threads if found.kind == "cpu" else 0.0  # on the cores that are to load as well
        gain = found.step_mean / max(busy, core_seconds / value, (computing + core_seconds) / cores)
        why = f"{waits:.0%} of a step is waiting for data, and each process has {cores} cores"
        return Advice("loader.workers", str(value), why, gain) if gain > 1.05 else None
    why = f"{waits:.0%} of a step is waiting for data, with no core left"
    side = round(max(view.size for view in derive(config).views) * 8 / 7)
    needs = found.images * side * round(side * _ASPECT) * 3
    if config.loader.cache is None and needs <= found.disk.cache_free:
        why = f"{why}: decode once, and keep the images at that side, in about {size(needs)}"
        return Advice("loader.cache", str(side), why, 1 / (1 - waits))
    return Advice("data", "a faster disk, or more cores", why, 1 / (1 - waits))


def slow_precision(found: Estimate, config: Config) -> Advice | None:
    """fp32 was asked for where bf16 is at least a quarter faster."""
    if found.bf16_gain is None or found.bf16_gain < 1.25:
        return None
    networks = found.shares["teacher"] + found.shares["student"] + found.shares["backward"]
    gain = 1 / (1 - networks + networks / found.bf16_gain)
    return Advice("engine.precision", "bf16", f"this device computes {found.bf16_gain:.1f} x as fast in bf16", gain)


def not_compiled(found: Estimate, config: Config) -> Advice | None:
    """Compiling is switched off on a GPU, in a run long enough to earn it back."""
    if config.compile != "off" or found.kind != "cuda" or found.total_steps < WORTH_COMPILING:
        return None
    return Advice("compile", "auto", "compiled networks are tried at the start, and kept if they are faster")


def idle_cores(found: Estimate, config: Config) -> Advice | None:
    """Fewer threads than cores, where they do the work."""
    computing = found.threads * config.engine.devices
    if found.kind != "cpu" or computing >= found.cores:
        return None
    return Advice("engine.threads", "null", f"{computing} of {found.cores} cores compute", found.cores / computing)


def small_batch(found: Estimate, config: Config) -> Advice | None:
    """A GPU with memory to spare, far from what it can do though its data is there."""
    waits, far = found.shares["data"], found.floor_multiple > 4
    if found.kind != "cuda" or not far or waits > 0.1 or found.memory.share > 0.4 or config.accumulate > 1:
        return None
    why = f"a step takes {found.floor_multiple:.1f} x its floor in {found.memory.share:.0%} of the memory: too little work at a time"
    return Advice("batch_size", str(2 * config.batch_size), f"{why}; the learning rate has to be chosen anew")


def large_memory(found: Estimate, config: Config) -> Advice | None:
    """The loss over the memory is over 20 % of a step."""
    share, half = found.shares["loss"], config.method.memory_size // 2
    if share <= 0.2 or half < config.batch_size or not METHODS[config.method.name].memory:
        return None
    why = f"the loss over {config.method.memory_size} keys is {share:.0%} of a step; fewer change the relation"
    return Advice("method.memory_size", str(half), why, 1 / (1 - share / 2))


def frequent_figures(found: Estimate, config: Config) -> Advice | None:
    """Logged steps cost over 5 % of the time."""
    share = found.stages["health"] / config.log.every / found.step_mean
    if share <= 0.05:
        return None
    times = math.ceil(share / 0.02)
    why = f"the figures of logged steps take {share:.0%} of the time"
    return Advice("log.every", str(times * config.log.every), why, _seldom(share, times))


def frequent_saves(found: Estimate, config: Config) -> Advice | None:
    """Checkpoints take over 5 % of the run, and over a minute."""
    share, why = found.saving_seconds / found.seconds, "saving takes {:.0%} of the run"
    if share <= 0.05 or found.saving_seconds < 60:
        return None
    if config.checkpoint.every_steps is not None:
        return Advice("checkpoint.every_steps", "null", why.format(share))
    times = min(math.ceil(share / 0.02), config.epochs // config.checkpoint.every)
    if times < 2:
        return None
    return Advice("checkpoint.every", str(times * config.checkpoint.every), why.format(share), _seldom(share, times))


def frequent_evaluations(found: Estimate, config: Config) -> Advice | None:
    """kNN while training takes over 10 % of the run, and over a minute."""
    share = found.evaluation_seconds / found.seconds
    if share <= 0.1 or found.evaluation_seconds < 60:
        return None
    times = min(math.ceil(share / 0.05), config.epochs // config.log.knn_every)
    if times < 2:
        return None
    why = f"kNN while training takes {share:.0%} of the run"
    return Advice("log.knn_every", str(times * config.log.knn_every), why, _seldom(share, times))


def _seldom(share: float, times: int) -> float:
    """The speed-up when what takes that share of the time is done so many times less often."""
    return 1 / (1 - share * (1 - 1 / times))


def full_disk(found: Estimate, config: Config) -> Advice | None:
    """The run folder does not fit."""
    needs, free = found.disk.total, found.disk.free
    if needs <= free:
        return None
    return Advice("out", "another disk", f"the run folder needs {size(needs)} and {size(free)} are free")


def full_cache_disk(found: Estimate, config: Config) -> Advice | None:
    """Shrunk images do not fit."""
    needs, free = found.disk.cache, found.disk.cache_free
    if needs <= free:
        return None
    why = f"shrunk images need {size(needs)}, {size(free)} are free beside the run"
    return Advice("loader.cache_folder", "another disk", why)


RULES = (
    full_disk,
    full_cache_disk,
    memory_nearly_full,
    parts_without_need,
    waiting_for_files,
    slow_precision,
    not_compiled,
    idle_cores,
    small_batch,
    large_memory,
    frequent_figures,
    frequent_saves,
    frequent_evaluations,
)


# Weights that hardly move stay finite on networks that skipped their warm-up; how fast they move costs no time.
_STILL = 1e-8
# What the repeated stages may take together, in seconds, and how often they are repeated at most.
_STAGES_SECONDS, _REPEATS = 20.0, 5


@dataclass(frozen=True)
class Estimate:
    """What a run would take on this machine, extrapolated from its middle, where InfoNCE is on if it is most of the time.

    Attributes:
        data, images, backbone, batch_size, epochs, total_steps: the run.
        device: in words; `kind` is cpu, cuda or mps, `world` the processes.
        cores, threads, workers: this machine's cores, a process's threads, its loader's processes (None: no files).
        steps_timed: how many steps all this is drawn from.
        step_seconds, step_low, step_high: median, 10 and 90 % of a step.
        step_mean: mean of a step, in which those that wait for data or make several steps' views have their part.
        images_per_second: from the mean step, over all processes.
        seconds: of the whole run = training_seconds + evaluation_seconds + saving_seconds.
        memory, disk, extras: see there.
        flops: operations an image, by network; see `step_flops`.
        attainable_flops: operations a second of one device at its best, measured.
        bf16_gain: how much faster that is in bf16, if the run is in fp32 though bf16 is fast here; else None.
        floor_seconds, floor_multiple: the step's operations at that rate, and how often that goes into the mean step.
        stages: seconds of each stage alone; see `stages`.
        shares: of a step, summing to 1: data (waiting for it; for images in memory, making the views), transfer (and
            layout), teacher, student, loss, backward, health (spread over the steps between), update, rest.
        limit: what most of a step goes to: data, transfer, networks, loss, or the rest.
        unreadable: images met that could not be read.
        advice: what to change.
    """

    data: str
    images: int
    backbone: str
    batch_size: int
    epochs: int
    total_steps: int
    device: str
    kind: str
    world: int
    cores: int
    threads: int
    workers: int | None
    steps_timed: int
    step_seconds: float
    step_low: float
    step_high: float
    step_mean: float
    images_per_second: float
    seconds: float
    training_seconds: float
    evaluation_seconds: float
    saving_seconds: float
    memory: Memory
    disk: Disk
    extras: Extras
    flops: dict[str, int]
    attainable_flops: float
    bf16_gain: float | None
    floor_seconds: float
    floor_multiple: float
    stages: dict[str, float]
    shares: dict[str, float]
    limit: str
    unreadable: int
    advice: tuple[Advice, ...] = ()


def estimate(
    data: str | None = None,
    *,
    config: str | Path | None = None,
    settings: Config | None = None,
    steps: int = 20,
    quiet: bool = False,
    **overrides: Any,
) -> Estimate | None:
    """Set up a run, make a few of its steps, and say what the whole would take and what to change.

    Takes a minute or so, longer where a step takes seconds. No run folder is made, and no cache: where `loader.cache` asks for
    one that is not there in full, a few hundred images in a temporary folder stand for all.

    Args:
        data, config, settings, overrides: as for `pretrain`.
        steps: how many are timed, at least 1; fewer, but three, if they take over a minute.
        quiet: print nothing.

    Returns:
        The figures; None on ranks other than the first.

    Raises:
        ConfigError, DataError: as `pretrain` would, and for a batch that does not fit in memory.
    """
    if steps < 1:
        raise ConfigError(f"steps: must be at least 1, got {steps}")
    made = settings or resolve(({} if data is None else {"data": data}) | overrides, config)
    engine = Engine(made.engine)
    with engine.running():
        return _estimate(made, engine, steps, quiet)


def _estimate(made: Config, engine: Engine, steps: int, quiet: bool) -> Estimate | None:
    trainer = build(timed(made), engine)
    console = Console(stderr=True, quiet=quiet or not engine.is_first, highlight=False)
    try:
        trainer.compile()
        # In the middle, as whether InfoNCE is part of the loss there holds for most of the run.
        trainer.step = trainer.total_steps // 2
        with stand_in(trainer) as cache:
            found = _measure(trainer, steps, console, cache)
    except Exception as error:
        known = named(error, trainer)
        if known is error:
            raise
        raise known from error
    return dataclasses.replace(found, advice=advise(found, made)) if engine.is_first else None


def timed(config: Config) -> Config:
    """The run's settings but for what would disturb its timing: weights that move, and trials of other workers."""
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=_STILL))


def _measure(trainer: Trainer, steps: int, console: Console, cache: int) -> Estimate:
    """All figures but the advice; every rank measures its own. `cache`: bytes of shrunk images still to be written."""
    config, engine = trainer.config, trainer.engine
    console.print(
        f"timing {steps} steps of {config.backbone} on {len(trainer.images)} images, {engine.describe()}",
        markup=False,
        soft_wrap=True,
    )
    timing = time_steps(trainer, steps)
    memory = peak_memory(engine, config.engine.devices)  # before anything is measured that training does not do
    console.print("timing the stages of a step", markup=False, soft_wrap=True)
    low, middle, high = np.quantile(timing.steps, [0.1, 0.5, 0.9]).tolist()
    # By the first rank's clock on all of them, as they exchange gradients each time.
    pieces = stages(trainer, engine.broadcast(max(1, min(_REPEATS, int(_STAGES_SECONDS / middle)))))
    console.print("timing the device at its best, an evaluation and a checkpoint", markup=False, soft_wrap=True)
    flops, rate = step_flops(config, trainer.classes), attainable(engine)
    slow = engine.precision == "fp32" and fast_bf16(engine.device.type)
    disk, save_seconds = measure_saving(trainer, cache)
    extras = measure_extras(trainer, save_seconds)
    mean, parts = statistics.mean(timing.steps), shares(timing, pieces, config.log.every)
    floor = sum(flops.values()) * config.batch_size / engine.world / rate
    evaluating, saving = extras.evaluations * extras.evaluation_seconds, extras.saves * extras.save_seconds
    return Estimate(
        **_about(trainer),
        steps_timed=len(timing.steps),
        step_seconds=middle,
        step_low=low,
        step_high=high,
        step_mean=mean,
        images_per_second=config.batch_size / mean,
        seconds=trainer.total_steps * mean + evaluating + saving,
        training_seconds=trainer.total_steps * mean,
        evaluation_seconds=evaluating,
        saving_seconds=saving,
        memory=memory,
        disk=disk,
        extras=extras,
        flops=flops,
        attainable_flops=rate,
        bf16_gain=attainable(engine, "bf16") / rate if slow else None,
        floor_seconds=floor,
        floor_multiple=mean / floor,
        stages=pieces,
        shares=parts,
        limit=limit(parts),
        unreadable=len({name for name, _ in timing.bad}),
    )


def _about(trainer: Trainer) -> dict[str, Any]:
    """The run and the machine."""
    config, engine = trainer.config, trainer.engine
    return {
        "data": config.data,
        "images": len(trainer.images),
        "backbone": config.backbone,
        "batch_size": config.batch_size,
        "epochs": config.epochs,
        "total_steps": trainer.total_steps,
        "device": engine.describe(),
        "kind": engine.device.type,
        "world": engine.world,
        "cores": available_cores(),
        "threads": engine.threads,
        "workers": workers(trainer),
    }


def shares(timing: Timing, pieces: dict[str, float], log_every: int) -> dict[str, float]:
    """What part of a mean step each kind of work takes, summing to 1; see `Estimate.shares`.

    Stages are timed alone and may come to more than the step on a machine that others use; then they are scaled to it.
    """
    transfer = pieces.get("transfer", 0.0)  # which the wait for a loader of files ends with
    seconds = {"data": max(0.0, statistics.mean(timing.waits) - transfer), "transfer": transfer + pieces["layout"]}
    seconds |= {name: pieces.get(name, 0.0) for name in ("teacher", "student", "loss", "backward")}
    seconds["health"] = pieces["health"] / log_every
    seconds["update"] = pieces["optimizer"] + pieces["push"] + pieces["follow"]
    whole = max(statistics.mean(timing.steps), sum(seconds.values()))
    return {name: value / whole for name, value in seconds.items()} | {"rest": 1 - sum(seconds.values()) / whole}


def limit(shares: dict[str, float]) -> str:
    """The largest of data, transfer, networks, loss and the rest."""
    groups = {name: shares[name] for name in ("data", "transfer", "loss")}
    groups["networks"] = shares["teacher"] + shares["student"] + shares["backward"]
    groups["rest"] = 1 - sum(groups.values())
    return max(groups, key=lambda name: groups[name])
