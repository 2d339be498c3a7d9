"""What to change about a run, from what was measured of it: each rule is a pure function of the figures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from relssl.config import Config
from relssl.methods import METHODS
from relssl.train.choices import WORTH_COMPILING
from relssl.units import size

if TYPE_CHECKING:
    from relssl.train.estimate import Estimate

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
    side = round(max(view.size for view in config.all_views) * 8 / 7)
    needs = found.images * side * round(side * _ASPECT) * 3
    if config.loader.cache is None and config.loader.decoder == "pillow" and needs <= found.disk.cache_free:
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
