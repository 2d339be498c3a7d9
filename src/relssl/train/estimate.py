"""What a run would take, from a few of its own steps on this machine; nothing stays on the disk."""

from __future__ import annotations

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console

from relssl.data.cache import Shrunk, place, root, shrunken
from relssl.data.decode import BadImage, Decoded
from relssl.data.images import Files, Images
from relssl.data.loader import Batch, FromFiles, Resident
from relssl.data.plain import PlainView, plain_view
from relssl.engine import Engine, available_cores, fast_bf16
from relssl.errors import ConfigError
from relssl.evaluation.pairs import choose
from relssl.files import size
from relssl.method import create_student
from relssl.method.backbones import count_flops
from relssl.settings.run import METHODS, Config, derive, resolve
from relssl.train.checkpoint import whole_state
from relssl.train.loop import Run, train_step
from relssl.train.pretrain import WORTH_COMPILING, build, compile_networks, explaining, read
from relssl.train.run_folder import Display, default_folder
from relssl.weights import store

# Bytes of a logged row: JSON in metrics.jsonl, and events of TensorBoard.
_ROW, _EVENTS = 500, 900
# Images that stand for all: those that are read on one core, and those that are shrunk for a cache.
_READ, _SHRUNK = 16, 256
# Weights that hardly move stay finite on networks that skipped their warm-up; how fast they move costs no time.
_STILL = 1e-8
# Steps before the clock starts; fewer where they are slow.
_WARM, _WARM_SECONDS = 3, 20.0


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of this machine's training processes, without those of the loader, and what there is; `device` is what was
    reserved on a GPU, 0 of 0 without one."""

    used: int
    total: int
    device_used: int
    device_total: int

    @property
    def share(self) -> float:
        """The fuller of the two, 0 to 1."""
        return max(self.used / self.total, self.device_used / max(self.device_total, 1))


@dataclass(frozen=True)
class Disk:
    """Bytes of a checkpoint, of which there are so many at most, of both exports and of the logs, and what is free where the run folder
    would lie; of the shrunk images still to be written for a cache, and what is free where these would lie."""

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
    """How often training is interrupted in the whole run, and the seconds of each time; saving without the disk's own time."""

    evaluations: int
    evaluation_seconds: float
    saves: int
    save_seconds: float


@dataclass(frozen=True)
class Advice:
    """A change worth trying: the setting's dotted name, its value, and why."""

    setting: str
    value: str
    why: str


@dataclass(frozen=True)
class Estimate:
    """What a run would take on this machine, extrapolated from its middle, where InfoNCE is on if it is most of the time.

    Attributes:
        device: in words; `kind`: cpu, cuda or mps; `world`: processes; `cores`: of this machine; `threads`: of a process; `workers`: its
            loader's processes, None without files.
        steps_timed: steps that all this is drawn from. step_seconds, step_low, step_high: median, 10 and 90 % of them; step_mean: what
            images_per_second and training_seconds follow from.
        seconds: of the whole run = training_seconds + evaluation_seconds + saving_seconds.
        flops: operations an image, see `step_flops`. attainable_flops: a second, of one device at its best, measured.
        floor_seconds, floor_multiple: the step's operations at that rate, and how often that goes into the mean step.
        shares: of a step, summing to 1: data (waiting for it; for images in memory, making the views), teacher, student, backward
            (with the loss), update (optimizer, memory, teacher's average, figures). limit: the largest of data, networks and update.
        unreadable: images among them that could not be read.
        advice: what to change, three changes at most, the most important first.
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
    floor_seconds: float
    floor_multiple: float
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

    Takes a minute or so, longer where a step takes seconds. Leaves no run folder, and no cache: where `loader.cache` asks for one that
    is not complete, a few hundred images in a temporary folder stand for all.

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
    settings = settings or resolve(({} if data is None else {"data": data}) | overrides, config)
    engine = Engine(settings.engine)
    with _set_up(settings, engine) as run, _stand_in(run) as cache:
        if engine.is_first and not quiet:
            what = f"timing {steps} steps of {settings.backbone} on {len(run.images)} images, {engine.describe()}"
            Console(stderr=True, highlight=False).print(what, markup=False, soft_wrap=True)
        figures, reading = _measure(run, steps, cache)
    advice = itertools.islice(advise(figures, settings, reading), 3)
    return dataclasses.replace(figures, advice=tuple(advice)) if engine.is_first else None


def step_seconds(config: Config, steps: int = 5) -> float:
    """Return the median seconds of a few steps of a run."""
    with _set_up(dataclasses.replace(config, log=dataclasses.replace(config.log, knn_every=0)), Engine(config.engine)) as run:
        return statistics.median(time_steps(run, steps, limit=20.0).steps)


@contextmanager
def _set_up(config: Config, engine: Engine) -> Iterator[Run]:
    """A run in its middle, whose weights stand still; what goes wrong with it is told as in training."""
    still = dataclasses.replace(config.optimizer, lr=_STILL)
    with engine.running(), explaining(config, engine):
        run = build(dataclasses.replace(config, optimizer=still), engine)
        compile_networks(run)
        run.state.step = run.total_steps // 2
        yield run


def _measure(run: Run, steps: int, cache: int) -> tuple[Estimate, float]:
    """Return all figures but the advice, and the seconds to read an image; every rank measures its own."""
    config, engine, images = run.config, run.engine, run.images
    timing = time_steps(run, steps)
    memory = peak_memory(engine, config.engine.devices)  # before anything is measured that training does not do
    shares = _shares(run, timing)
    flops, rate = step_flops(config, run.classes), attainable(engine)
    disk, save_seconds = _saving(run, cache)
    evaluations, saves = interruptions(config, run.plan.steps_per_epoch)
    reading = 0.0 if images.in_memory else _reading(images, config)
    forward = shares["student"] * statistics.mean(timing.steps) * engine.world / config.batch_size  # of all views of an image
    seconds = _evaluation(run, forward / max(1, len(derive(config).views) - 1), reading, rate)
    extras = Extras(evaluations if run.online else 0, seconds, saves, save_seconds)
    low, middle, high = np.quantile(timing.steps, [0.1, 0.5, 0.9]).tolist()
    mean = statistics.mean(timing.steps)
    floor = sum(flops.values()) * config.batch_size / engine.world / rate
    training, evaluating = run.total_steps * mean, extras.evaluations * extras.evaluation_seconds
    networks = shares["teacher"] + shares["student"] + shares["backward"]
    groups = {"data": shares["data"], "networks": networks, "update": shares["update"]}
    figures = Estimate(
        data=config.data,
        images=len(images),
        backbone=config.backbone,
        batch_size=config.batch_size,
        epochs=config.epochs,
        total_steps=run.total_steps,
        device=engine.describe(),
        kind=engine.device.type,
        world=engine.world,
        cores=available_cores(),
        threads=engine.threads,
        workers=run.loader.workers if isinstance(run.loader, FromFiles) else None,
        steps_timed=len(timing.steps),
        step_seconds=middle,
        step_low=low,
        step_high=high,
        step_mean=mean,
        images_per_second=config.batch_size / mean,
        seconds=training + evaluating + saves * save_seconds,
        training_seconds=training,
        evaluation_seconds=evaluating,
        saving_seconds=saves * save_seconds,
        memory=memory,
        disk=disk,
        extras=extras,
        flops=flops,
        attainable_flops=rate,
        floor_seconds=floor,
        floor_multiple=mean / floor,
        shares=shares,
        limit=max(groups, key=lambda name: groups[name]),
        unreadable=len(timing.unreadable),
    )
    return figures, reading


@dataclass(frozen=True)
class Timing:
    """Seconds of steps one after another, and those of each in which the device had only the making of its batch to do; the names of
    unreadable images among them; a batch."""

    steps: list[float]
    waits: list[float]
    unreadable: set[str]
    parts: list[Batch]


def time_steps(run: Run, steps: int, limit: float = 60.0) -> Timing:
    """Train some steps and time them, for so many seconds, but three steps at least; every rank has to call it.

    A few steps more are timed where the loader's processes deliver in turns, so that each has had as many, or where views of several
    steps are made in one go.
    """
    engine, loader, begun = run.engine, run.loader, time.perf_counter()

    def over(seconds: float) -> bool:
        """Return true if time is up on any rank: all have to make the same steps."""
        return bool(engine.largest(int(time.perf_counter() - begun > seconds)))

    (parts,) = loader.stream(run.state.step, run.state.step + 1)
    for _ in range(_WARM):  # kernels are chosen and memory is taken
        train_step(run, parts)
        if over(_WARM_SECONDS):
            break
    turns = loader.ahead if isinstance(loader, Resident) else math.ceil(loader.workers / run.plan.parts)
    turns = max(1, engine.largest(turns))  # machines may differ in their cores
    count = turns * math.ceil(steps / turns)
    stream = loader.stream(run.state.step, run.state.step + turns + count)
    for batches in itertools.islice(stream, turns):  # which had their start-up to wait for, or lay ready
        train_step(run, batches)
        if over(2 * _WARM_SECONDS):
            break
    marks, unreadable, begun = _Marks(engine), set[str](), time.perf_counter()
    marks.set("begin")
    for number, batches in enumerate(itertools.islice(stream, count), start=1):
        marks.set("wait")
        train_step(run, batches)
        marks.set("work")
        unreadable.update(name for part in batches for name, _ in part.bad)
        if number >= 3 and over(limit):
            break
    seconds = [span for _, span in marks.spans()]
    waits = seconds[::2]
    return Timing([wait + work for wait, work in zip(waits, seconds[1::2], strict=True)], waits, unreadable, parts)


class _Marks:
    """Points that the device passes in turn, each named after what ends there; setting one makes no host wait for a GPU."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.marks = engine, list[tuple[str, Any]]()

    def set(self, name: str, *_: Any) -> None:
        """Set a mark behind all that was asked of the device so far."""
        if self.engine.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self.marks.append((name, event))
        else:
            self.engine.synchronise()
            self.marks.append((name, time.perf_counter()))

    def spans(self) -> list[tuple[str, float]]:
        """Return the seconds from each mark to the next, with the next one's name."""
        self.engine.synchronise()
        gpu, pairs = self.engine.device.type == "cuda", itertools.pairwise(self.marks)
        return [(name, a.elapsed_time(b) / 1000 if gpu else b - a) for (_, a), (name, b) in pairs]


def _shares(run: Run, timing: Timing) -> dict[str, float]:
    """Share out a mean step among what it is spent on, by marks that networks and optimizer set in one on a batch that is there."""
    marks = _Marks(run.engine)
    # Between the networks and the optimizer is the loss, with its backward pass and the student's.
    handles = [run.state.optimizer.register_step_pre_hook(partial(marks.set, "backward"))]
    for name, network in (("student", run.state.model.student), ("teacher", run.state.model.teacher)):
        if network is not None:
            handles.append(network.register_forward_pre_hook(partial(marks.set, "backward")))
            handles.append(network.register_forward_hook(partial(marks.set, name)))
    marks.set("update")
    for _ in range(_WARM):
        train_step(run, timing.parts)
        marks.set("update")
    for handle in handles:
        handle.remove()
    seconds = dict.fromkeys(("teacher", "student", "backward", "update"), 0.0)
    for name, span in marks.spans():
        seconds[name] += span
    data = sum(timing.waits) / sum(timing.steps)
    return {"data": data} | {name: (1 - data) * value / sum(seconds.values()) for name, value in seconds.items()}


def peak_memory(engine: Engine, processes: int) -> Memory:
    """Return the peak up to now, if all `processes` of this machine take as much as this one."""
    used, total = processes * host_memory("VmHWM"), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # what a container may take of it
        try:
            total = min(total, int((Path("/sys/fs/cgroup") / name).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    if engine.device.type != "cuda":
        return Memory(used, total, 0, 0)
    device = torch.cuda.get_device_properties(engine.device).total_memory
    return Memory(used, total, torch.cuda.max_memory_reserved(engine.device), device)


def host_memory(field: str) -> int:
    """Return the bytes that this process holds (VmRSS) or held at most (VmHWM), by the kernel's account: in getrusage's, which has to
    do where there is no other, a new process inherits its parent's peak."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def interruptions(config: Config, steps_per_epoch: int) -> tuple[int, int]:
    """Count the kNN evaluations of a whole run on labelled data, one before the first step included, and the checkpoints."""
    every, total, knn = config.checkpoint.every_steps, config.epochs * steps_per_epoch, config.log.knn_every
    evaluated = {*range(knn, config.epochs + 1, knn), config.epochs} if knn else set()
    ends = {epoch * steps_per_epoch for epoch in (*range(0, config.epochs, config.checkpoint.every), *evaluated)}
    between = set(range(every, total, every)) if every else set()
    return len(evaluated) + bool(knn), len((ends | between | {total}) - {0})


def _saving(run: Run, cache: int) -> tuple[Disk, float]:
    """Return the disk a run needs, and the seconds to make a checkpoint's bytes and their hash; nothing is written."""
    config, begun = run.config, time.perf_counter()
    tensors, _ = store.flatten(whole_state(run.state, run.engine))
    checkpoint = store.encode(tensors)
    hashlib.sha256(checkpoint).hexdigest()
    seconds = time.perf_counter() - begun
    _, saves = interruptions(config, run.plan.steps_per_epoch)
    exports = sum(tensor.nbytes for network in run.networks for tensor in network.backbone.state_dict().values())
    rows = run.total_steps // config.log.every + config.epochs
    disk = Disk(
        checkpoint=len(checkpoint),
        checkpoints=min(config.checkpoint.keep, saves) + (run.online is not None) + 1,
        exports=exports,
        logs=rows * (_ROW + _EVENTS * config.log.tensorboard),
        free=_free(Path(config.out or default_folder(config))),
        cache=cache,
        cache_free=_free(root(config.loader)),
    )
    return disk, seconds


def _free(folder: Path) -> int:
    """Return the bytes free where the folder lies or would lie."""
    return shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free


def _evaluation(run: Run, forward: float, reading: float, rate: float) -> float:
    """Return the seconds of one kNN evaluation: features of both sides by all networks, and the search for neighbours; from those of a
    view's forward pass and of reading an image on one core (0 in memory), and the operations a second."""
    if run.online is None:
        return 0.0
    bank, test, workers = len(run.online.pair.bank), len(run.online.pair.test), getattr(run.loader, "workers", 0)
    each = max(forward, reading / workers) if workers else forward + reading
    search = 2 * bank * test * getattr(run.networks[0].backbone, "num_features", 2048) / rate
    return len(run.networks) * (each * (bank + test) + search)


def _reading(images: Images, config: Config) -> float:
    """Return the seconds to read one image and make its plain view, on one core."""
    view, read, begun = PlainView.of(config.views), 0, time.perf_counter()
    for row in range(min(_READ, len(images))):
        with suppress(BadImage):
            plain_view(images.read(row, config.loader.max_pixels), view)
            read += 1
    return (time.perf_counter() - begun) / max(read, 1)


def step_flops(config: Config, classes: int = 1) -> dict[str, int]:
    """Count the floating-point operations of one optimizer step per image, two for a multiply-add.

    Counted on the run's own networks in convolutions, matrix products and attention; all that is done entry by entry is left
    out. ReSSL's InfoNCE adds nothing, as its similarities are those of the relation.

    Args:
        classes: of the labels, for supervised learning; where they are not known, 1 leaves out next to nothing.

    Returns:
        {"teacher", "student": their forward passes, "backward": the student's, "memory": similarities, to the memory or within the
        batch, and their gradient}; 0 for what the method has not.
    """
    derived, traits = derive(config), METHODS[config.method.name]
    # Split norms need whole batches, and cost nothing that is counted.
    config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, batch_norm_splits=1))
    with torch.random.fork_rng(devices=[]):  # networks are drawn, and others go on drawing afterwards
        student = create_student(config, classes)
        # Two images, as batch norm has to have a spread to normalise by.
        views = [torch.randn(2, config.views.channels, view.size, view.size) for view in derived.views]
        seen = views if derived.two_way or not derived.strong else views[1:]
        taught = views if derived.two_way else views[:1]
        embeddings: list[torch.Tensor] = []
        flops = {"teacher": 0, "student": count_flops(lambda: embeddings.append(student(seen)))}
        flops["backward"] = count_flops(lambda: embeddings[0].sum().backward())  # type: ignore[no-untyped-call]
        if "teacher" in derived.networks:
            teacher = student.teacher()
            with torch.no_grad():
                flops["teacher"] = count_flops(lambda: teacher(taught))
    if traits.whole_batch:  # each query with two views of each image, and its gradient
        products = 2 * len(seen) * 2 * config.batch_size
    else:  # the queries and their gradient by the memory, and the keys where the teacher's relation is wanted
        products = (2 * len(seen) + len(taught) * traits.sharpened) * config.method.memory_size * traits.memory
    return {name: count // 2 for name, count in flops.items()} | {"memory": products * 2 * config.encoder.dim}


# Side of the matrices that are multiplied, and images [N, C, S, S] of 3x3 convolutions C -> C as in residual networks.
_SMALL = (2048, ((32, 64, 32), (32, 128, 28), (32, 256, 14)))
_LARGE = (8192, ((256, 64, 56), (256, 128, 28), (256, 256, 14), (256, 512, 14)))


def attainable(engine: Engine, precision: str | None = None, seconds: float = 1.0) -> float:
    """Measure the operations a second that this rank's device reaches at its best, for so many seconds: in several 3x3 convolutions,
    channels last, and a large matrix product, in fp32 or bf16 (default: the engine's). No step is faster than its operations at
    this rate."""
    dtype = torch.bfloat16 if (precision or engine.precision) == "bf16" else torch.float32
    side, shapes = _LARGE if engine.device.type == "cuda" else _SMALL
    left, right = (torch.randn(side, side).to(engine.device, dtype) for _ in range(2))
    candidates: list[tuple[Callable[[], object], int]] = [(lambda: left @ right, 2 * side**3)]
    for batch, channels, pixels in shapes:
        images = engine.place(torch.randn(batch, channels, pixels, pixels)).to(dtype)
        weight = engine.place(torch.randn(channels, channels, 3, 3)).to(dtype)
        candidates.append((partial(F.conv2d, images, weight, padding=1), 2 * 9 * batch * channels**2 * pixels**2))
    with torch.no_grad():
        return max(flops / _fastest(work, engine, seconds / len(candidates)) for work, flops in candidates)


def _fastest(work: Callable[[], object], engine: Engine, seconds: float) -> float:
    """Return the seconds of one call in the fastest of several rounds: a machine that others use is at its best now and then."""
    work()  # builds the kernels
    best, calls, end = math.inf, 10 if engine.device.type == "cuda" else 1, time.perf_counter() + seconds
    while time.perf_counter() < end or best == math.inf:
        engine.synchronise()
        begun = time.perf_counter()
        for _ in range(calls):
            work()
        engine.synchronise()
        best = min(best, (time.perf_counter() - begun) / calls)
    return best


class _Repeated(Shrunk):
    """A few shrunk images over and over, in the place of all of a set."""

    def __init__(self, few: Shrunk, whole: Files) -> None:
        super().__init__(few.folder, whole, few.sizes, few.bad)

    def __len__(self) -> int:
        return len(self.files)

    def open(self, row: int, max_pixels: int) -> Decoded:
        return super().open(row % len(self.sizes), max_pixels)


@contextmanager
def _stand_in(run: Run) -> Iterator[int]:
    """Let the run read shrunk images, if it is to: those of an earlier run, or a few in a temporary folder that stand for all. Every
    rank has to call it. Yields the bytes that a run would still write to have them all."""
    config, images = run.config, run.images
    if config.loader.cache is None:
        yield 0
        return
    assert isinstance(images.source, Files)
    there = Shrunk.load(place(images, config.loader), images.source)
    if not run.engine.largest(int(len(there) < len(images))):
        read(run, dataclasses.replace(images, source=there))
        yield 0
        return
    with tempfile.TemporaryDirectory(prefix="relssl-") as folder, Display(1, 0, show=False) as silent:
        # By this process alone, as its neighbours do the same at this time.
        loader = dataclasses.replace(config.loader, cache_folder=folder, workers=0)
        few = shrunken(choose(images, _SHRUNK, config.seed), loader, silent)
        read(run, dataclasses.replace(images, source=_Repeated(few, images.source)))
        yield few.total * (len(images) - len(there)) // len(few)


def advise(figures: Estimate, config: Config, reading: float = 0.0) -> Iterator[Advice]:
    """Yield what to change, the most important first; `reading`: seconds to read an image on one core, of files."""
    traits, disk, used = METHODS[config.method.name], figures.disk, figures.memory.share
    gpu, waits, computing = figures.kind == "cuda", figures.shares["data"], figures.threads * config.engine.devices
    if disk.total > disk.free:
        yield Advice("out", "another disk", f"the run folder needs {size(disk.total)} and {size(disk.free)} are free")
    if disk.cache > disk.cache_free:
        why = f"shrunk images need {size(disk.cache)} and {size(disk.cache_free)} are free"
        yield Advice("loader.cache_folder", "another disk", why)
    parts = 2 * config.accumulate
    if used > 0.9 and config.batch_size // figures.world >= 2 * parts and not config.batch_size % (parts * figures.world):
        if not traits.whole_batch:
            why = f"{used:.0%} of the memory is taken; in more parts, each normalised by itself, a batch takes less"
            yield Advice("accumulate", str(parts), why)
    elif config.accumulate > 1 and used * config.accumulate <= 0.8:
        yield Advice("accumulate", "1", f"{used:.0%} of the memory is taken; the batch fits as a whole")
    if figures.workers is not None and waits > 0.1:
        yield _data_advice(figures, config, reading)
    if not gpu and computing < figures.cores:
        yield Advice("engine.threads", "null", f"{computing} of {figures.cores} cores compute")
    if config.engine.precision == "fp32" and fast_bf16(figures.kind):
        yield Advice("engine.precision", "bf16", "this device has hardware of its own for it")
    if config.compile == "off" and gpu and figures.total_steps >= WORTH_COMPILING:
        yield Advice("compile", "auto", "compiled networks mostly pay in a run of so many steps")
    if figures.evaluation_seconds > max(60.0, 0.1 * figures.seconds) and config.log.knn_every < config.epochs:
        why = f"kNN while training takes {figures.evaluation_seconds / figures.seconds:.0%} of the run"
        yield Advice("log.knn_every", str(min(10 * config.log.knn_every, config.epochs)), why)
    if figures.saving_seconds > max(60.0, 0.05 * figures.seconds) and config.checkpoint.every < config.epochs:
        why = f"saving takes {figures.saving_seconds / figures.seconds:.0%} of the run"
        rare = ("checkpoint.every_steps", "null"), ("checkpoint.every", str(min(10 * config.checkpoint.every, config.epochs)))
        yield Advice(*rare[config.checkpoint.every_steps is None], why)
    if gpu and figures.floor_multiple > 4 and waits <= 0.1 and used <= 0.4 and config.accumulate == 1:
        why = f"a step takes {figures.floor_multiple:.1f} x its floor in {used:.0%} of the memory: too little work at a time"
        yield Advice("batch_size", str(2 * config.batch_size), f"{why}; the learning rate has to be chosen anew")


def _data_advice(figures: Estimate, config: Config, reading: float) -> Advice:
    waits = f"{figures.shares['data']:.0%} of a step is waiting for data"
    cores = max(1, figures.cores // config.engine.devices)  # of each training process, whose own the workers are
    busy = figures.step_mean * (1 - figures.shares["data"])
    workers = min(math.ceil(reading * config.batch_size / figures.world / busy), cores - 1)
    if figures.workers is not None and workers > figures.workers:
        return Advice("loader.workers", str(workers), f"{waits}, and each process has {cores} cores")
    side = round(max(view.size for view in derive(config).views) * 8 / 7)
    needs = figures.images * side * round(side * 4 / 3) * 3  # at the shape of most photographs
    if config.loader.cache is None and needs <= figures.disk.cache_free:
        why = f"{waits}, with no core left: decode once, and keep the images at that side, in about {size(needs)}"
        return Advice("loader.cache", str(side), why)
    return Advice("data", "a faster disk, or more cores", f"{waits}, with no core left")
