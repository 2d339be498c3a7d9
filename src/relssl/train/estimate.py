"""An estimate of what a run would take, from a few of its own steps on this machine; nothing is written to the disk."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from relssl.data.cache import Shrunk, place, root
from relssl.data.images import Files
from relssl.engine import Engine, available_cores, fast_bf16
from relssl.errors import ConfigError
from relssl.files import size
from relssl.method import create_student
from relssl.method.backbones import count_flops
from relssl.settings.run import METHODS, Config, derive, resolve
from relssl.train.checkpoint import whole_state
from relssl.train.loop import Run, knn_due, save_due, train_step
from relssl.train.pretrain import WORTH_COMPILING, build, compile_networks, explaining, read
from relssl.train.run_folder import default_folder
from relssl.weights import store

# Bytes of a logged row: JSON in metrics.jsonl, and events of TensorBoard.
_ROW, _EVENTS = 500, 900
# Weights that hardly move stay finite on networks that skipped their warm-up; how fast they move costs no time.
_STILL = 1e-8
# Steps before the clock starts; fewer where they are slow.
_WARM, _WARM_SECONDS = 3, 30.0
# Side of the matrices that are multiplied, and images [N, C, S, S] of 3x3 convolutions C -> C as in residual networks.
_SMALL = (2048, ((32, 64, 32), (32, 128, 28), (32, 256, 14)))
_LARGE = (8192, ((256, 64, 56), (256, 128, 28), (256, 256, 14), (256, 512, 14)))


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of the training processes of this machine, and its bytes; `device`: those of its GPU, 0 of 0 without one."""

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
    """Bytes of a checkpoint, of which there are `checkpoints` at most, of both exports and the logs, and those free where the run folder
    would lie; of the images that the cache still lacks, about, and those free where it would lie."""

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
    """The number of evaluations and checkpoints of the whole run, and the seconds of each; saving without the disk's own time."""

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
        step_seconds, step_low, step_high: median, 10 and 90 % of the steps timed; step_mean: what the whole run follows from.
        seconds: of the whole run = training_seconds + evaluation_seconds + saving_seconds.
        flops: operations an image, see `step_flops`; attainable_flops: a second, of one device at its best, measured.
        floor_seconds, floor_multiple: the step's operations at that rate, and how often that goes into the mean step.
        shares: of a step, summing to 1: data (waiting for it; for images in memory, making the views), teacher, student, backward
            (with the loss), update (optimizer, memory, teacher's average, figures); limit: the largest of data, networks and update.
        unreadable: images met that could not be read.
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

    Takes a minute or so, longer where a step takes seconds. Leaves no run folder and no cache: one that `loader.cache` asks for is read
    if it is complete; else the steps read the files themselves.

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
    engine, still = Engine(settings.engine), dataclasses.replace(settings.optimizer, lr=_STILL)
    with engine.running(), explaining(settings, engine):
        run = build(dataclasses.replace(settings, optimizer=still), engine)
        compile_networks(run)
        if engine.is_first and not quiet:
            what = f"timing {steps} steps of {settings.backbone} on {len(run.images)} images, {engine.describe()}"
            print(what, file=sys.stderr, flush=True)
        figures = _measure(run, steps)
    return dataclasses.replace(figures, advice=advise(figures, settings)) if engine.is_first else None


def _measure(run: Run, steps: int) -> Estimate:
    """Return all figures but the advice; every rank measures its own."""
    config, engine, cache = run.config, run.engine, _missing_cache(run)
    evaluations, saves = _interruptions(run)
    run.state.step = run.total_steps // 2
    timing = time_steps(run, steps)
    memory = peak_memory(engine, config.engine.devices)  # before anything is measured that training does not do
    shares, mean = timing.shares, float(np.mean(timing.steps))
    low, middle, high = np.quantile(timing.steps, [0.1, 0.5, 0.9]).tolist()
    flops, rate = step_flops(config, run.classes), attainable(engine)
    floor = sum(flops.values()) * config.batch_size / engine.world / rate
    # An evaluated image is waited for and passes each network once: about what one of the student's views takes.
    each = (shares["data"] + shares["student"] / max(1, len(derive(config).strong))) * mean * engine.world / config.batch_size
    evaluated = len(run.networks) * (len(run.online.pair.bank) + len(run.online.pair.test)) if run.online else 0
    disk, save_seconds = _saving(run, saves, cache)
    extras = Extras(evaluations if run.online else 0, each * evaluated, saves, save_seconds)
    training, evaluating, saving = run.total_steps * mean, extras.evaluations * each * evaluated, saves * save_seconds
    groups = {"data": shares["data"], "networks": 1 - shares["data"] - shares["update"], "update": shares["update"]}
    what: dict[str, Any] = {name: getattr(config, name) for name in ("data", "backbone", "batch_size", "epochs")}
    what |= {
        "images": len(run.images),
        "total_steps": run.total_steps,
        "unreadable": timing.unreadable,
        "workers": run.loader.workers,
    }
    what |= {"device": engine.describe(), "kind": engine.device.type, "world": engine.world, "threads": engine.threads}
    what |= {"step_seconds": middle, "step_low": low, "step_high": high, "step_mean": mean, "steps_timed": len(timing.steps)}
    what |= {"training_seconds": training, "evaluation_seconds": evaluating, "saving_seconds": saving}
    what |= {"attainable_flops": rate, "floor_seconds": floor, "floor_multiple": mean / floor, "cores": available_cores()}
    return Estimate(
        **what,
        images_per_second=config.batch_size / mean,
        seconds=training + evaluating + saving,
        memory=memory,
        disk=disk,
        extras=extras,
        flops=flops,
        shares=shares,
        limit=max(groups, key=lambda name: groups[name]),
    )


def _interruptions(run: Run) -> tuple[int, int]:
    """Count the kNN evaluations of a whole run, one before the first step included, and the checkpoints."""
    state, evaluations, saves = run.state, int(run.config.log.knn_every > 0), 0
    for state.step in range(1, run.total_steps + 1):
        evaluations, saves = evaluations + knn_due(run), saves + save_due(run)
    return evaluations, saves


def _missing_cache(run: Run) -> int:
    """Let the run read its cache of shrunk images if that is complete on all ranks; return about how many bytes it lacks."""
    loader, images = run.config.loader, run.images
    if loader.cache is None:
        return 0
    assert isinstance(images.source, Files)
    shrunk = Shrunk.load(place(images, loader), images.source)
    lacking = len(images) - len(shrunk)
    if not run.engine.largest(lacking):
        read(run, dataclasses.replace(images, source=shrunk))
    return lacking * 3 * loader.cache * round(loader.cache * 4 / 3)  # the shape of most photographs


@dataclass(frozen=True)
class Timing:
    """Seconds of steps one after another, the shares of what they are spent on, and the number of unreadable images among them."""

    steps: list[float]
    shares: dict[str, float]
    unreadable: int


def time_steps(run: Run, steps: int, limit: float = 60.0) -> Timing:
    """Train some steps and time them, for so many seconds, but three steps at least; every rank has to call it.

    A few steps more are timed where the loader's processes deliver in turns, so that each has had as many, or where views of several
    steps are made in one go.
    """
    engine, loader, state, begun = run.engine, run.loader, run.state, time.perf_counter()
    gpu, marks = engine.device.type == "cuda", list[tuple[str, Any]]()

    def over(seconds: float) -> bool:
        """Return true if time is up on any rank: all have to make the same steps."""
        return bool(engine.largest(int(time.perf_counter() - begun > seconds)))

    def mark(name: str, *_: Any) -> None:
        """Note when the device is through with all that was asked of it so far, without waiting for it on a GPU; here ends `name`."""
        if gpu:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            marks.append((name, event))
        else:
            engine.synchronise()
            marks.append((name, time.perf_counter()))

    (first,) = loader.stream(state.step, state.step + 1)
    turns = loader.ahead if loader.workers is None else math.ceil(loader.workers / run.plan.parts)
    turns = max(1, engine.largest(turns))  # machines may differ in their cores
    count = turns * math.ceil(steps / turns)
    stream = loader.stream(state.step, state.step + turns + count)
    # On one batch kernels are chosen and memory is taken; the stream's own first steps have its start-up to wait for, or lie ready.
    for batches in itertools.chain(itertools.repeat(first, _WARM), itertools.islice(stream, turns)):
        train_step(run, batches)
        if over(_WARM_SECONDS):
            break
    # Between the networks and the optimizer is the loss, with its backward pass and the student's.
    handles: list[Any] = [state.optimizer.register_step_pre_hook(partial(mark, "backward"))]
    for name, network in (("student", state.model.student), ("teacher", state.model.teacher)):
        if network is not None:
            handles += [network.register_forward_pre_hook(partial(mark, "backward"))]
            handles += [network.register_forward_hook(partial(mark, name))]
    begun, unreadable = time.perf_counter(), set[str]()
    mark("begin")
    for number, batches in enumerate(itertools.islice(stream, count), start=1):
        mark("data")
        train_step(run, batches)
        mark("update")
        unreadable.update(name for part in batches for name, _ in part.bad)
        if number >= 3 and over(limit):
            break
    for handle in handles:
        handle.remove()
    engine.synchronise()
    spent, seconds = dict.fromkeys(("data", "teacher", "student", "backward", "update"), 0.0), [0.0]
    for (_, start), (name, end) in itertools.pairwise(marks):
        span = start.elapsed_time(end) / 1000 if gpu else end - start
        spent[name] += span
        seconds[-1] += span
        if name == "update":
            seconds.append(0.0)
    return Timing(seconds[:-1], {name: span / sum(seconds) for name, span in spent.items()}, len(unreadable))


def peak_memory(engine: Engine, processes: int) -> Memory:
    """Return the peak up to now, if all `processes` of this machine take as much as this one."""
    used = processes * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # no container, or one without a limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    if engine.device.type != "cuda":
        return Memory(used, total, 0, 0)
    device = torch.cuda.get_device_properties(engine.device).total_memory
    return Memory(used, total, torch.cuda.max_memory_reserved(engine.device), device)


def _saving(run: Run, saves: int, cache: int) -> tuple[Disk, float]:
    """Return the disk a run needs, and the seconds to make a checkpoint's bytes and their hash; nothing is written."""
    config, begun = run.config, time.perf_counter()
    checkpoint = store.encode(store.flatten(whole_state(run.state, run.engine))[0])
    hashlib.sha256(checkpoint).hexdigest()
    seconds = time.perf_counter() - begun
    folders = (Path(config.out or default_folder(config)), root(config.loader))
    places = [next(each for each in (path, *path.absolute().parents) if each.exists()) for path in folders]
    free, cache_free = (shutil.disk_usage(each).free for each in places)
    checkpoints = (
        min(config.checkpoint.keep, saves) + (run.online is not None) + 1
    )  # the best, and a new one before the oldest goes
    exports = sum(tensor.nbytes for network in run.networks for tensor in network.backbone.state_dict().values())
    logs = (run.total_steps // config.log.every + config.epochs) * (_ROW + _EVENTS * config.log.tensorboard)
    return Disk(len(checkpoint), checkpoints, exports, logs, free, cache, cache_free), seconds


def step_flops(config: Config, classes: int = 1) -> dict[str, int]:
    """Count the floating-point operations of one optimizer step per image, two for a multiply-add, on the run's own networks: convolutions,
    matrix products and attention. ReSSL's InfoNCE adds nothing, as its similarities are those of the relation.

    Args:
        classes: of the labels, for supervised learning; where they are not known, 1 leaves out next to nothing.

    Returns:
        {"teacher", "student": forward, "backward": the student's, "memory": similarities and their gradient}; 0 for what there is not.
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


def attainable(engine: Engine, seconds: float = 1.0) -> float:
    """Measure, for so many seconds, the operations a second that this rank's device reaches at its best in the engine's precision: in
    several 3x3 convolutions, channels last, and a large matrix product. No step is faster than its operations at this rate."""
    dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
    side, shapes = _LARGE if engine.device.type == "cuda" else _SMALL
    left, right = (torch.randn(side, side).to(engine.device, dtype) for _ in range(2))
    candidates: list[tuple[Callable[[], object], int]] = [(partial(torch.mm, left, right), 2 * side**3)]
    for batch, channels, pixels in shapes:
        images = engine.place(torch.randn(batch, channels, pixels, pixels)).to(dtype)
        weight = engine.place(torch.randn(channels, channels, 3, 3)).to(dtype)
        candidates.append((partial(F.conv2d, images, weight, padding=1), 2 * 9 * batch * channels**2 * pixels**2))
    rates = []
    with torch.no_grad():
        for work, flops in candidates:
            work()  # builds the kernels
            calls, best, end = (
                10 if engine.device.type == "cuda" else 1,
                math.inf,
                time.perf_counter() + seconds / len(candidates),
            )
            while time.perf_counter() < end or best == math.inf:  # others may use the machine: its best counts
                engine.synchronise()
                begun = time.perf_counter()
                for _ in range(calls):
                    work()
                engine.synchronise()
                best = min(best, (time.perf_counter() - begun) / calls)
            rates.append(flops / best)
    return max(rates)


def advise(figures: Estimate, config: Config) -> tuple[Advice, ...]:
    """Return the three changes most worth trying, the most important first."""
    disk, used, waiting, gpu = figures.disk, figures.memory.share, figures.shares["data"], figures.kind == "cuda"
    computing, spare = figures.threads * config.engine.devices, figures.cores // config.engine.devices - 1
    parts, knn, saving = 2 * config.accumulate, config.log.knn_every, config.checkpoint
    more = used > 0.9 and not config.batch_size % (parts * figures.world) and config.batch_size // figures.world >= 2 * parts
    slow = figures.workers is not None and waiting > 0.1 and not disk.cache
    idle = slow and (figures.workers or 0) < spare
    side = round(max(view.size for view in derive(config).views) * 8 / 7)
    knn_share, saving_share = figures.evaluation_seconds / figures.seconds, figures.saving_seconds / figures.seconds
    often = figures.evaluation_seconds > 60 and knn_share > 0.1 and knn < config.epochs
    saves = figures.saving_seconds > 60 and saving_share > 0.05 and saving.every < config.epochs
    rare = (
        ("checkpoint.every_steps", "null")
        if saving.every_steps
        else ("checkpoint.every", str(min(10 * saving.every, config.epochs)))
    )
    compiling = config.compile == "off" and gpu and figures.total_steps >= WORTH_COMPILING
    small = gpu and figures.floor_multiple > 4 and waiting <= 0.1 and used <= 0.4 and parts == 2
    full, waits = f"{used:.0%} of the memory is taken", f"{waiting:.0%} of a step is waiting for data"
    rules = (
        (disk.total > disk.free, "out", "another disk", f"the run folder needs {size(disk.total)}, {size(disk.free)} are free"),
        (disk.cache > disk.cache_free, "loader.cache_folder", "another disk", f"{size(disk.cache_free)} are free"),
        (more and not METHODS[config.method.name].whole_batch, "accumulate", str(parts), f"{full}; in parts, a batch takes less"),
        (parts > 2 and used * parts <= 1.6, "accumulate", "1", f"{full}; the batch fits as a whole"),
        (idle, "loader.workers", "null", f"{waits}, and each process has {spare + 1} cores"),
        (slow and not idle and config.loader.cache is None, "loader.cache", str(side), f"{waits}; decode each image only once"),
        (slow and not idle and config.loader.cache is not None, "data", "a faster disk, or more cores", waits),
        (not gpu and computing < figures.cores, "engine.threads", "null", f"{computing} of {figures.cores} cores compute"),
        (config.engine.precision == "fp32" and fast_bf16(figures.kind), "engine.precision", "bf16", "the device is built for it"),
        (compiling, "compile", "auto", "compiled networks mostly pay in a run of so many steps"),
        (often, "log.knn_every", str(min(10 * knn, config.epochs)), f"kNN while training takes {knn_share:.0%} of the run"),
        (saves, *rare, f"saving takes {saving_share:.0%} of the run"),
        (small, "batch_size", str(2 * config.batch_size), f"{full}, and too little work; choose the learning rate anew"),
    )
    return tuple(Advice(*change) for applies, *change in rules if applies)[:3]
