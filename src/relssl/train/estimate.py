"""An estimate of what a run would take, from a few of its own steps on this machine; nothing is written to the disk."""

import copy
import itertools
import math
import shutil
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from relssl.data.cache import Shrunk, place
from relssl.engine import Engine, cores_each, fast_bf16
from relssl.errors import ConfigError
from relssl.files import size
from relssl.method import create_student
from relssl.method.backbones import count_flops
from relssl.settings.launcher import with_launch
from relssl.settings.run import Config, derive, handed_over
from relssl.train.checkpoint import whole_state
from relssl.train.loop import knn_due, save_due, train_step
from relssl.train.memory import double, peak_memory, step_memory
from relssl.train.pretrain import WORTH_COMPILING, compile_networks, explaining, pass_noise
from relssl.train.run import Run, build, create_run
from relssl.train.run_folder import default_folder
from relssl.weights import store

# Weights that hardly move stay finite on networks that skipped their warm-up; how fast they move costs no time.
_STILL = 1e-8
# Steps before the clock starts; fewer where they are slow.
_WARM, _WARM_SECONDS = 3, 30.0
# Steps that are made at least, those before the clock starts among them.
_LEAST = 6
# A step's: waiting for data (of images in memory, making the views); forward passes; the loss and the way back; optimizer, memory,
# teacher's average and figures.
_PARTS = ("data", "teacher", "student", "backward", "update")
# Side of the matrices that are multiplied, and images [N, C, S, S] of 3x3 convolutions C -> C as in residual networks.
_SMALL = (2048, ((32, 64, 32), (32, 128, 28), (32, 256, 14)))
_LARGE = (8192, ((256, 64, 56), (256, 128, 28), (256, 256, 14), (256, 512, 14)))
_SPREAD = (0.1, 0.5, 0.9)  # quantiles of the steps' seconds


@dataclass(frozen=True)
class Advice:
    """A change worth trying: the setting's dotted name, its value, and why."""

    setting: str
    value: str
    why: str


@dataclass(frozen=True)
class Estimate:
    """The cost of a run on this machine, extrapolated from its middle, where InfoNCE is on if it is most of the time."""

    data: str
    images: int
    backbone: str
    batch_size: int
    epochs: int
    total_steps: int
    device: str  # in words
    kind: str  # cpu, cuda or mps
    world: int  # processes
    cores: int  # of this machine
    threads: int  # of a process
    workers: int | None  # the loader's processes; None without files
    steps_timed: int
    timed_batch: int  # images of the steps that were timed; fewer than a batch where its own steps take too long
    step_seconds: float  # the median
    step_low: float  # 10 and 90 % of the steps
    step_high: float
    step_mean: float  # what the whole run follows from
    images_per_second: float
    seconds: float  # of the whole run, the sum of the next two
    training_seconds: float
    evaluation_seconds: float
    evaluations: int
    memory: dict[str, int]  # bytes at this machine's peak: used, total; of its GPU, 0 without one: device_used, device_total
    disk: dict[str, int]  # bytes of a checkpoint, the most checkpoints there are, bytes free; cache: bytes that it lacks, about
    flops: dict[str, int]  # operations an image, see `step_flops`
    attainable_flops: float  # a second, of one device at its best, measured
    floor_seconds: float  # the step's operations at that rate
    floor_multiple: float  # how often that goes into the mean step
    shares: dict[str, float]  # of a step, by _PARTS, summing to 1
    limit: str  # the largest of data, networks and update
    unreadable: int  # images met that could not be read
    advice: tuple[Advice, ...] = ()  # what to change, three changes at most, the most important first
    rank: int = 0  # of this process; each measures its own


def estimate(
    data: Any = None,
    *,
    config: str | Path | None = None,
    settings: Config | None = None,
    steps: int = 20,
    quiet: bool = False,
    **overrides: Any,
) -> Estimate:
    """Set up a run, make a few of its steps, and say what the whole would take and what to change.

    Takes a minute or so, and below two on any network: where steps take too long, smaller ones are timed. Leaves no run folder and no
    cache: one that `loader.cache` asks for is read if it is complete; else the steps read the files themselves.

    Args:
        data, config, settings, quiet, overrides: as for `pretrain`; it raises the same, and ConfigError if a batch does not fit in memory.
        steps: how many are timed, at least 1; fewer, but three, if they take over a minute.

    Returns:
        The figures, on every rank its own.
    """
    if steps < 1:
        raise ConfigError(f"steps: must be at least 1, got {steps}")
    with handed_over(data, config, settings, overrides) as given:
        return _estimate(with_launch(given), steps, quiet)


def _estimate(settings: Config, steps: int, quiet: bool) -> Estimate:
    """Estimate a run whose parts are at hand; arguments as of `estimate`."""
    engine, lines = Engine(settings.engine), list[str]()
    with engine.running(), explaining(settings, engine):
        run = build(settings, engine, lines.append)
        run.config = replace(run.config, optimizer=replace(run.config.optimizer, lr=_STILL))
        timed = affordable(run)
        compile_networks(timed)
        batch = "" if timed is run else f" of {timed.config.batch_size} instead of {run.config.batch_size} images"
        lines.append(f"timing steps{batch} of {settings.backbone} on {len(run.images)} images, {engine.describe()}")
        if engine.is_first and not quiet:
            print("\n".join(lines), file=sys.stderr, flush=True)
        figures = _measure(run, timed, steps)
    return replace(figures, advice=advise(figures, settings), rank=engine.rank)


def affordable(run: Run, seconds: float = 60.0) -> Run:
    """Return the run, or one like it of a smaller batch if a few steps of its own would take longer than so many seconds."""
    engine, derived, most = run.engine, derive(run.config), run.plan.share
    if engine.device.type == "cuda":  # where a few images take as long as many
        return run
    smallest = min(most, max(4, 2 * derived.norm_splits))
    pass_noise(run, smallest)  # kernels are chosen
    begun = time.perf_counter()
    pass_noise(run, smallest)
    engine.synchronise()
    milliseconds = engine.largest(int(1000 * (time.perf_counter() - begun)) + 1)
    run.state.optimizer.zero_grad(set_to_none=True)
    in_time = 1000 * seconds * smallest * engine.world / (_LEAST * milliseconds * derived.passes)
    share = double(smallest, min(in_time, most))
    if 2 * share > most:
        return run
    return create_run(replace(run.config, batch_size=share * derived.passes), engine, run.images, run.online, run.given)


def _measure(run: Run, timed: Run, steps: int) -> Estimate:
    """Return all figures but the advice, from the steps of `timed`; every rank measures its own."""
    config, engine, state, lacking = run.config, run.engine, run.state, _missing_cache(run)
    evaluations, saves = int(run.online is not None), 0  # one evaluation comes before the first step
    for state.step in range(1, run.total_steps + 1):
        evaluations, saves = evaluations + (knn_due(run) and run.online is not None), saves + save_due(run)
    timed.state.step = timed.total_steps // 2
    times, shares, unreadable = time_steps(timed, steps)
    seconds = np.multiply(times, config.batch_size / timed.config.batch_size)
    memory = _memory(run, timed)  # before anything is measured that training does not do
    mean, per_rank, (low, middle, high) = float(np.mean(seconds)), config.batch_size / engine.world, np.quantile(seconds, _SPREAD)
    flops, rate = step_flops(config, run.images.class_count, state.model.given), attainable(engine)
    flops |= {} if timed.known is None else {"teacher": 0}  # which has seen each image once
    floor = sum(flops.values()) * per_rank / rate
    # An evaluated image is waited for and passes each network once: about what one of the student's views takes.
    view = (shares["data"] + shares["student"] / max(1, len(derive(config).strong))) * mean / per_rank
    training, evaluating = run.total_steps * mean, evaluations * (run.online.passes if run.online else 0) * view
    limits = {"data": shares["data"], "networks": 1 - shares["data"] - shares["update"], "update": shares["update"]}
    return Estimate(
        data=config.data,
        images=len(run.images),
        backbone=config.backbone,
        batch_size=config.batch_size,
        epochs=-(-run.total_steps // run.plan.steps_per_epoch),
        total_steps=run.total_steps,
        device=engine.describe(),
        kind=engine.device.type,
        world=engine.world,
        cores=cores_each(run.config.engine.devices) * run.config.engine.devices,
        threads=engine.threads,
        workers=run.loader.workers,
        steps_timed=len(seconds),
        timed_batch=timed.config.batch_size,
        step_seconds=float(middle),
        step_low=float(low),
        step_high=float(high),
        step_mean=mean,
        images_per_second=config.batch_size / mean,
        seconds=training + evaluating,
        training_seconds=training,
        evaluation_seconds=evaluating,
        evaluations=evaluations,
        memory=memory,
        disk=_disk(run, saves) | {"cache": lacking},
        flops=flops,
        attainable_flops=rate,
        floor_seconds=floor,
        floor_multiple=mean / floor,
        shares=shares,
        limit=max(limits, key=limits.__getitem__),
        unreadable=unreadable,
    )


def _memory(run: Run, timed: Run) -> dict[str, int]:
    """Return the peak of memory after steps of `timed`, with what the run's own would take besides."""
    processes, given = run.config.engine.devices, run.state.model.given
    given = None if given is None else copy.deepcopy(given).cpu()
    memory = peak_memory(run.engine, processes)
    if timed is not run:
        classes = run.images.class_count
        whole, part = (step_memory(each.config, each.engine, each.plan.share, classes, given) for each in (run, timed))
        memory["device_used" if memory["device_total"] else "used"] += (whole - part) * processes
    return memory


def _disk(run: Run, saves: int) -> dict[str, int]:
    """Return the bytes of a checkpoint, how many there are at most of so many that are saved, and the bytes free."""
    folder = Path(run.config.out or default_folder(run.config)).absolute()
    tensors, _ = store.flatten(whole_state(run.state, run.engine))
    return {
        "checkpoint": sum(tensor.nbytes for tensor in tensors.values()),
        # At most there are the newest, the best, and a new one before the oldest goes.
        "checkpoints": min(run.config.checkpoint.keep, saves) + (run.online is not None) + 1,
        "free": shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free,
    }


def _missing_cache(run: Run) -> int:
    """Let the run read its cache of shrunk images if that is complete on all ranks; return about how many bytes it lacks."""
    loader, images = run.config.loader, run.images
    if loader.cache is None:
        return 0
    shrunk = Shrunk.load(place(images, loader), images.source)
    lacking = len(images) - len(shrunk)
    if not run.engine.largest(lacking):
        run.read(replace(images, source=shrunk))
    return lacking * 3 * loader.cache * round(loader.cache * 4 / 3)  # the shape of most photographs


def time_steps(run: Run, steps: int, limit: float = 60.0) -> tuple[list[float], dict[str, float], int]:
    """Train some steps and time them, for so many seconds, but three steps at least; every rank has to call it.

    A few steps more are timed where the loader's processes deliver in turns, so that each has had as many, or where views of several
    steps are made in one go. Returns the seconds of each step, the shares of what they are spent on, and how many images met were
    unreadable.
    """
    engine, loader, model, gpu = run.engine, run.loader, run.state.model, run.engine.device.type == "cuda"
    marks: list[tuple[str, Any]] = []

    def mark(name: str, *_: Any) -> None:
        """Note when the device is through with all that was asked of it so far, without waiting for it on a GPU; here ends `name`."""
        if gpu:
            moment: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            moment.record()
        else:
            engine.synchronise()
            moment = time.perf_counter()
        marks.append((name, moment))

    def spans(moments: list[Any]) -> list[float]:
        return [a.elapsed_time(b) / 1000 if gpu else b - a for a, b in itertools.pairwise(moments)]

    def over(begun: float, seconds: float) -> bool:
        """Return true if time is up on any rank: all have to make the same steps."""
        return bool(engine.largest(int(time.perf_counter() - begun > seconds)))

    turns = loader.ahead if loader.workers is None else math.ceil(loader.workers / run.plan.parts)
    turns = max(1, engine.largest(turns))  # machines may differ in their cores
    warm, count, begun = max(_WARM, turns), turns * math.ceil(steps / turns), time.perf_counter()
    stream, unreadable = loader.stream(run.state.step, run.state.step + warm + count), set[str]()
    for batches in itertools.islice(stream, warm):  # kernels are chosen, memory is taken, and loaders start
        train_step(run, batches)
        if over(begun, _WARM_SECONDS):
            break
    # Between the networks and the optimizer is the loss, with its backward pass and the student's.
    handles: list[Any] = [run.state.optimizer.register_step_pre_hook(partial(mark, "backward"))]
    for name, network in (("student", model.student), ("teacher", model.teacher), ("teacher", model.given)):
        if network is not None:
            handles += [network.register_forward_pre_hook(partial(mark, "backward"))]
            handles += [network.register_forward_hook(partial(mark, name))]
    begun = time.perf_counter()
    mark("begin")
    for number, batches in enumerate(itertools.islice(stream, count), start=1):
        mark("data")
        train_step(run, batches)
        mark("update")
        unreadable.update(name for part in batches for name, _ in part.bad)
        if number >= 3 and over(begun, limit):
            break
    for handle in handles:
        handle.remove()
    engine.synchronise()
    seconds, parts = spans([moment for name, moment in marks if name in ("begin", "update")]), dict.fromkeys(_PARTS, 0.0)
    for (name, _), span in zip(marks[1:], spans([moment for _, moment in marks]), strict=True):
        parts[name] += span
    return seconds, {name: span / sum(seconds) for name, span in parts.items()}, len(unreadable)


def step_flops(config: Config, classes: int = 0, given: torch.nn.Module | None = None) -> dict[str, int]:
    """Count the floating-point operations of one optimizer step per image, two for a multiply-add, on the run's own networks: convolutions,
    matrix products and attention. ReSSL's InfoNCE adds nothing, as its similarities are those of the relation.

    `given` is a frozen teacher. Returns {"teacher", "student": forward, "backward": the student's, "memory": similarities and their
    gradient}; 0 for what there is not.
    """
    derived = derive(config)
    # Split norms need whole batches, and cost nothing that is counted.
    config = replace(config, encoder=replace(config.encoder, batch_norm_splits=1))
    with torch.random.fork_rng(devices=[]):  # networks are drawn, and others go on drawing afterwards
        student = create_student(config, max(1, classes))
        # Two images, as batch norm has to have a spread to normalise by.
        views = [torch.randn(2, config.views.channels, view.size, view.size) for view in derived.views]
        seen = views if derived.two_way or not derived.strong else views[1:]
        taught = views if derived.two_way else views[:1]
        embeddings: list[torch.Tensor] = []
        flops = {"teacher": 0, "student": count_flops(lambda: embeddings.append(student(seen)))}
        flops["backward"] = count_flops(lambda: embeddings[0].sum().backward())  # type: ignore[no-untyped-call]
        if derived.traits.teacher:
            teacher = student.teacher() if given is None else copy.deepcopy(given).cpu()
            flops["teacher"] = count_flops(lambda: teacher(taught))
    if derived.traits.whole_batch:  # each query with two views of each image, and its gradient
        products = 2 * len(seen) * 2 * config.batch_size
    else:  # the queries and their gradient by the memory, and the keys where the teacher's relation is wanted
        products = 2 * len(seen) + len(taught) * derived.traits.sharpened
        products *= config.method.memory_size * derived.traits.memory
    return {name: count // 2 for name, count in flops.items()} | {"memory": products * 2 * config.encoder.dim}


def attainable(engine: Engine, seconds: float = 1.0) -> float:
    """Measure, for so many seconds, the operations a second that this rank's device reaches at its best in the engine's precision: in
    several 3x3 convolutions, channels last, and a large matrix product. No step is faster than its operations at this rate."""
    dtype, rates = torch.bfloat16 if engine.precision == "bf16" else torch.float32, []
    side, shapes = _LARGE if engine.device.type == "cuda" else _SMALL
    left, right = (torch.randn(side, side).to(engine.device, dtype) for _ in range(2))
    work = [partial(torch.mm, left, right)]
    for batch, channels, pixels in shapes:
        images = engine.place(torch.randn(batch, channels, pixels, pixels)).to(dtype)
        weight = engine.place(torch.randn(channels, channels, 3, 3)).to(dtype)
        work.append(partial(F.conv2d, images, weight, padding=1))
    for each in work:
        flops = count_flops(each)  # which builds the kernels, too
        engine.synchronise()
        fastest, until = math.inf, time.perf_counter() + seconds / len(work)
        while (begun := time.perf_counter()) < until:
            for _ in range(4):
                each()
            engine.synchronise()
            fastest = min(fastest, (time.perf_counter() - begun) / 4)  # others may use the machine: its best counts
        rates.append(flops / fastest)
    return max(rates)


def advise(figures: Estimate, config: Config) -> tuple[Advice, ...]:
    """Return the three changes most worth trying, the most important first."""
    disk, memory, waiting, gpu = figures.disk, figures.memory, figures.shares["data"], figures.kind == "cuda"
    needed, parts, knn = disk["checkpoint"] * disk["checkpoints"], 2 * config.accumulate, config.log.knn_every
    used = max(memory["used"] / memory["total"], memory["device_used"] / max(memory["device_total"], 1))
    computing, spare = figures.threads * config.engine.devices, figures.cores // config.engine.devices - 1
    fits = config.batch_size % (parts * figures.world) == 0 and config.batch_size // figures.world >= 2 * parts
    crowded = used > 0.9 and fits and not derive(config).traits.whole_batch
    slow = figures.workers is not None and waiting > 0.1 and not disk["cache"]
    idle = slow and (figures.workers or 0) < spare
    side = round(max(view.size for view in derive(config).views) * 8 / 7)
    knn_share = figures.evaluation_seconds / figures.seconds
    often = figures.evaluation_seconds > 60 and knn_share > 0.1 and knn < config.epochs
    compiling = config.compile == "off" and gpu and figures.total_steps >= WORTH_COMPILING
    small = gpu and figures.floor_multiple > 4 and waiting <= 0.1 and used <= 0.4 and parts == 2
    bf16 = config.engine.precision == "fp32" and fast_bf16(torch.device(figures.kind))
    full, waits = f"{used:.0%} of the memory is taken", f"{waiting:.0%} of a step is waiting for data"
    rules = (
        (needed > disk["free"], "out", "another disk", f"checkpoints need {size(needed)}, {size(disk['free'])} are free"),
        (crowded, "accumulate", str(parts), f"{full}; in parts, a batch takes less"),
        (parts > 2 and used * parts <= 1.6, "accumulate", "1", f"{full}; the batch fits as a whole"),
        (idle, "loader.workers", "null", f"{waits}, and each process has {spare + 1} cores"),
        (slow and not idle and config.loader.cache is None, "loader.cache", str(side), f"{waits}; decode each image only once"),
        (slow and not idle and config.loader.cache is not None, "data", "a faster disk, or more cores", waits),
        (not gpu and computing < figures.cores, "engine.threads", "null", f"{computing} of {figures.cores} cores compute"),
        (bf16, "engine.precision", "bf16", "the device is built for it"),
        (compiling, "compile", "auto", "compiled networks mostly pay in a run of so many steps"),
        (often, "log.knn_every", str(min(10 * knn, config.epochs)), f"kNN while training takes {knn_share:.0%} of the run"),
        (small, "batch_size", str(2 * config.batch_size), f"{full}, and too little work; choose the learning rate anew"),
    )
    return tuple(Advice(*change) for applies, *change in rules if applies)[:3]
