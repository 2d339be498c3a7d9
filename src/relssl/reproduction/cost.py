"""What a plan will take: from runs that are done, else from a few steps of its first run, the others by their operations."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from relssl.errors import DataError, RelsslError
from relssl.methods import METHODS
from relssl.reproduction.plan import Run, state

# Steps that are timed, and seconds after which no further one begins.
_STEPS, _SECONDS = 5, 20.0


@dataclass(frozen=True)
class Work:
    """Operations of one run: of its training steps, and of making features for its evaluation."""

    training: float
    evaluation: float


@dataclass(frozen=True)
class Cost:
    """What is still to do.

    Attributes:
        seconds: of all runs of a row that are not done, by the row's name; None where the row cannot be set up.
        basis: where the figures come from, in words.
    """

    seconds: dict[str, float | None]
    basis: str

    @property
    def total(self) -> float:
        """Seconds of all rows that are known."""
        return sum(value for value in self.seconds.values() if value is not None)


def cost(runs: Sequence[Run], outcomes: Mapping[tuple[str, int], Mapping[str, Any]], say: Callable[[str], None]) -> Cost:
    """The cost of the runs that are not done.

    Reading and making views is in the timed steps; a probe's own time is only known from runs that are done.

    Args:
        outcomes: of runs that are done, by row and seed.
        say: told of rows that cannot be set up, a line each.
    """
    work = _works(runs, say)
    done = [run for run in runs if (run.row.name, run.seed) in outcomes and work.get(run.row.name)]
    trained = [_pace(work[run.row.name], outcomes[run.row.name, run.seed]) for run in done]
    if trained:
        rate = statistics.fmean(trained)
        after = [outcomes[run.row.name, run.seed]["evaluation_seconds"] for run in done]
        evaluation: float | None = statistics.fmean(after)
        basis = f"from {len(done)} runs that are done"
    else:
        first = next((run for run in runs if work.get(run.row.name)), None)
        measured = _measure(first, say) if first else None
        if first is None or measured is None:
            return Cost({run.row.name: None for run in runs}, "as no row can be set up here")
        rate, evaluation = measured, None
        basis = f"from a few steps of {first.row.name}, the other rows by their operations; without the probe's own time"
    seconds: dict[str, float | None] = {}
    for run in runs:
        each, name = work[run.row.name], run.row.name
        if each is None:
            seconds[name] = None
            continue
        training = 0.0 if state(run) in ("trained", "done") else each.training / rate
        features = 0.0 if state(run) == "done" else each.evaluation / rate if evaluation is None else evaluation
        seconds[name] = (seconds.get(name) or 0.0) + training + features
    return Cost(seconds, basis)


def _pace(work: Work | None, outcome: Mapping[str, Any]) -> float:
    """Operations a second of a run that is done."""
    assert work is not None
    return work.training / float(outcome["training_seconds"])


def _works(runs: Sequence[Run], say: Callable[[str], None]) -> dict[str, Work | None]:
    """The work of a run of each row; None for a row that cannot be set up, whose run will say the same."""
    images = functools.cache(_images)  # the rows mostly share their data
    found: dict[str, Work | None] = {}
    for run in runs:
        if run.row.name not in found:
            try:
                found[run.row.name] = work(run, images)
            except (RelsslError, RuntimeError, ValueError) as error:
                say(f"{run.row.name}: time unknown: {str(error).splitlines()[0]}")
                found[run.row.name] = None
    return found


def _images(data: str, root: str | None, side: str, at_most: tuple[int, int] | None, seed: int) -> tuple[int, int, int]:
    """How many images there are to train on, and on the two sides of an evaluation; nothing is downloaded to know it."""
    from relssl.data.sources import at_hand, load
    from relssl.evaluation.pairs import LabelledPair

    if not at_hand(data, root):
        raise DataError(f"{data} is not under data_root, and no plan downloads it; its runs do")
    pair = LabelledPair.load(data, root, at_most, seed)
    return len(load(data, root, side)), len(pair.bank), len(pair.test)


def work(run: Run, images: Callable[..., tuple[int, int, int]] = _images) -> Work:
    """The operations of a run, two for a multiply-add."""
    from relssl.train.floor import step_flops

    config, asked = run.config, run.evaluation
    flops = step_flops(config)
    side = "bank" if METHODS[config.method.name].labels else "train"
    there, bank, test = images(config.data, config.data_root, side, asked.images, asked.seed)
    count = min(there, config.max_images or there)
    # A classifier trained on augmented images passes them through the frozen network again in each epoch.
    passes = 1 + (asked.linear.epochs if "linear" in asked.protocol else 0)
    views = 1 + len(config.strong_views) if config.two_way else max(1, len(config.strong_views))
    features = len(asked.network or config.networks) * flops["student"] / views * (passes * bank + test)
    steps = config.epochs * (count // config.batch_size)
    return Work(float(sum(flops.values()) * steps * config.batch_size), float(features))


def _measure(run: Run, say: Callable[[str], None]) -> float | None:
    """Operations a second in a few steps of a run; None if it cannot be set up."""
    from relssl.engine import Engine
    from relssl.train.assembly import build
    from relssl.train.estimate import timed
    from relssl.train.floor import step_flops
    from relssl.train.timing import time_steps

    quick = dataclasses.replace(timed(run.config), log=dataclasses.replace(run.config.log, knn_every=0))
    try:
        trainer = build(quick, Engine(quick.engine))
        trainer.compile()
        steps = time_steps(trainer, _STEPS, limit=_SECONDS).steps
    except (RelsslError, RuntimeError, ValueError) as error:
        say(f"{run.row.name}: time unknown: {str(error).splitlines()[0]}")
        return None
    # The median, as a busy machine stalls now and then.
    return sum(step_flops(run.config).values()) * run.config.batch_size / statistics.median(steps)
