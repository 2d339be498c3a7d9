"""What a run would take, from a few of its steps on this machine; nothing stays on the disk."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from relssl.config import Config, resolve
from relssl.cores import available_cores
from relssl.data.tuning import PREFETCH
from relssl.data.workers import loader_workers
from relssl.engine import Engine, fast_bf16
from relssl.errors import ConfigError
from relssl.train.advice import Advice, advise
from relssl.train.assembly import build
from relssl.train.cached import stand_in
from relssl.train.costs import Disk, Extras, measure_extras, measure_saving
from relssl.train.floor import attainable, step_flops
from relssl.train.memory import Memory, peak_memory
from relssl.train.pretrain import named
from relssl.train.stages import stages
from relssl.train.timing import Timing, time_steps, workers
from relssl.train.trainer import Trainer

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
    loader = dataclasses.replace(config.loader, workers=loader_workers(config), prefetch=config.loader.prefetch or PREFETCH)
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=_STILL), loader=loader)


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
    pieces = stages(trainer, engine.first_says(max(1, min(_REPEATS, int(_STAGES_SECONDS / middle)))))
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
