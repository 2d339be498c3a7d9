"""Rerunning one of the paper's comparisons, from the plan to the page of results; torch is imported once runs start."""

from __future__ import annotations

import dataclasses
import functools
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from relssl.errors import ConfigError, DataError, Interrupted, LockedError, RelsslError, StorageError
from relssl.files import write_json
from relssl.reproduction.plan import Run, choose, noted, plain, state
from relssl.reproduction.results import outcome
from relssl.reproduction.study import Study
from relssl.reproduction.tables import read_scale, read_table
from relssl.settings.run import METHODS, derive
from relssl.train.signals import REASONS, TIME_LIMIT
from relssl.units import duration

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
    from relssl.data.named import at_hand, load
    from relssl.evaluation.pairs import LabelledPair

    if not at_hand(data, root):
        raise DataError(f"{data} is not under data_root, and no plan downloads it; its runs do")
    pair = LabelledPair.load(data, root, at_most, seed)
    return len(load(data, root, side)), len(pair.bank), len(pair.test)


def work(run: Run, images: Callable[..., tuple[int, int, int]] = _images) -> Work:
    """The operations of a run, two for a multiply-add."""
    from relssl.train.estimate import step_flops

    config, asked = run.config, run.evaluation
    derived = derive(config)
    flops = step_flops(config)
    side = "bank" if METHODS[config.method.name].labels else "train"
    there, bank, test = images(config.data, config.data_root, side, asked.images, asked.seed)
    count = min(there, config.max_images or there)
    # A classifier trained on augmented images passes them through the frozen network again in each epoch.
    passes = 1 + (asked.linear.epochs if "linear" in asked.protocol else 0)
    views = 1 + len(derived.strong) if derived.two_way else max(1, len(derived.strong))
    features = len(asked.network or derived.networks) * flops["student"] / views * (passes * bank + test)
    steps = config.epochs * (count // config.batch_size)
    return Work(float(sum(flops.values()) * steps * config.batch_size), float(features))


def _measure(run: Run, say: Callable[[str], None]) -> float | None:
    """Operations a second in a few steps of a run; None if it cannot be set up."""
    from relssl.engine import Engine
    from relssl.train.estimate import step_flops, time_steps, timed
    from relssl.train.pretrain import build

    quick = dataclasses.replace(timed(run.config), log=dataclasses.replace(run.config.log, knn_every=0))
    try:
        engine = Engine(quick.engine)
        with engine.running():
            trainer = build(quick, engine)
            trainer.compile()
            steps = time_steps(trainer, _STEPS, limit=_SECONDS).steps
    except (RelsslError, RuntimeError, ValueError) as error:
        say(f"{run.row.name}: time unknown: {str(error).splitlines()[0]}")
        return None
    # The median, as a busy machine stalls now and then.
    return sum(step_flops(run.config).values()) * run.config.batch_size / statistics.median(steps)


# What stays of an evaluation's record; its card and which images were right are in RUN/evaluations.
_KEPT = ("protocol", "network", "data", "setting", "main", "figures", "intervals", "notes", "seconds")


class Asked(KeyboardInterrupt):
    """A signal between steps, where nothing has to be saved; no handler of errors takes it for one."""

    def __init__(self, code: int) -> None:
        self.code = code


class Watch:
    """Ends what goes on outside of training at SIGINT and SIGTERM, and knows how much time is left.

    Training listens for itself, as it saves first; its handlers take the place of these meanwhile.

    Args:
        minutes: for everything together; None: no limit.
    """

    def __init__(self, minutes: float | None) -> None:
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Watch:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @staticmethod
    def _receive(number: int, frame: FrameType | None) -> None:
        raise Asked(128 + number)

    def minutes(self) -> float:
        """What is left, infinite without a limit.

        Raises:
            Interrupted: if nothing is.
        """
        left = (self._end - time.monotonic()) / 60
        if left <= 0:
            raise Interrupted(REASONS[TIME_LIMIT], TIME_LIMIT)
        return left


def perform(run: Run, watch: Watch) -> None:
    """Bring a run to its end from wherever it stands, and write its note.

    A failure of this row alone is noted as {"error": {"kind", "message", "exit_code"}} and raised no further.

    Raises:
        Interrupted, Asked: when asked to stop; the run goes on from there the next time.
        StorageError, LockedError: which the next row would meet as well.
    """
    try:
        found = _perform(run, watch)
    except (Interrupted, StorageError, LockedError):
        raise
    except Exception as error:
        known = isinstance(error, RelsslError)
        message = str(error) if known else f"{type(error).__name__}: {error}"
        found = {
            "error": {"kind": getattr(error, "kind", "bug"), "message": message, "exit_code": getattr(error, "exit_code", 1)}
        }
    run.note.parent.mkdir(parents=True, exist_ok=True)
    write_json(run.note, {"row": run.row.name, "seed": run.seed} | found)


def _perform(run: Run, watch: Watch) -> dict[str, Any]:
    from relssl.evaluation.evaluate import evaluate
    from relssl.train.pretrain import pretrain, resume

    left = watch.minutes()
    if state(run) == "new":
        # The limit is this command's, not the run's: only what is left of it is written down.
        limited = None if math.isinf(left) else left
        pretrain(settings=dataclasses.replace(run.config, time_limit=limited), quiet=True)
    else:
        resume(run.folder, quiet=True, time_limit=left)
    watch.minutes()
    found = evaluate(run.folder, settings=run.evaluation)
    results = [{name: record[name] for name in _KEPT} for record in found["results"]]
    return {"evaluation": plain(run.evaluation), "results": results}


Say = Callable[[str], None]


def reproduce(
    table: str,
    scale: str = "small",
    *,
    seeds: int | None = None,
    only: Collection[str] = (),
    runs: str | Path | None = None,
    out: str | Path = "results",
    time_limit: float | None = None,
    plan_only: bool = False,
    say: Say | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Rerun a comparison: plan its runs, skip those that are done, go on with those that were stopped, and write the results.

    A run that fails is noted, and the next one begins. After each, OUT/TABLE-SCALE.json and .md are written anew from all run
    folders of the plan.

    Args:
        table, scale: names; `relssl reproduce` lists them.
        seeds: 0..seeds-1 are run; default: the scale's. Results tell of others what is there.
        only: names of the rows to run; results tell of the others what is there.
        runs: folder of the run folders; default: runs/reproduce/TABLE-SCALE.
        out: folder of the results.
        time_limit: minutes for all runs together; a run's evaluation that has begun is finished first.
        plan_only: run nothing and write nothing; the answer then is {"table", "scale", "rows": [{"row", "label", "runs", "done",
            "seconds"}, ...], "seconds", "basis"}, seconds of what is left to do.
        say: told of progress, a line each; default: nobody.
        overrides: settings for all runs, by name; `epochs` makes it a rehearsal, whose results say so and have a name of their own.

    Returns:
        The results as written to the JSON file; see docs/reproduce.md for what they hold.

    Raises:
        ConfigError: for unknown names, settings that cannot be used, and folders that hold something else.
        Interrupted: on a signal or at the time limit, after what was found so far is written.
        StorageError, LockedError: if a folder cannot be written, or another process writes it.
    """
    study = Study(read_table(table), read_scale(scale), seeds, only, runs, Path(out), overrides)
    chosen = choose(study.table.at(scale), only)
    if time_limit is not None and not time_limit > 0:
        raise ConfigError(f"time_limit: must be above 0 minutes, got {time_limit:g}")
    count = study.scale.seeds if seeds is None else seeds
    asked = [run for run in study.runs if run.row.name in chosen and run.seed < count]
    if not plan_only:
        study.check_out()
    costs = _plan(study, asked, say or (lambda line: None), measure=plan_only or any(state(run) != "done" for run in asked))
    if plan_only:
        return costs
    _work(study, asked, time_limit, say or (lambda line: None))
    return study.write()


def _plan(study: Study, asked: Sequence[Run], say: Say, *, measure: bool) -> dict[str, Any]:
    """Tell what will run and what it will cost."""
    done = [run for run in asked if state(run) == "done"]
    rows = list(dict.fromkeys(run.row.name for run in asked))
    say(f"{study.name}: {len(rows)} rows, {len(asked)} runs, {len(done)} of them done")
    if study.scale.name == "smoke" or study.rehearsal:
        say("its numbers mean nothing: runs are cut short to show that everything works")
    if not measure:
        return {}
    pass

    found = {(row, seed): one for row, seeds in study.outcomes().items() for seed, one in seeds.items()}
    costs = cost(asked, found, say)
    listed = []
    for name in rows:
        own = [run for run in asked if run.row.name == name]
        ended, seconds = sum(run in done for run in own), costs.seconds[name]
        time = "unknown" if seconds is None else "nothing" if ended == len(own) else f"about {duration(seconds)}"
        say(f"  {name:22} {len(own) - ended} of {len(own)} runs to do, {time}  ({own[0].row.label})")
        listed.append({"row": name, "label": own[0].row.label, "runs": len(own), "done": ended, "seconds": seconds})
    known = [value for value in costs.seconds.values() if value is not None]
    say(f"{f'about {duration(costs.total)}' if known else 'unknown time'} in all, {costs.basis}")
    return {
        "table": study.table.name,
        "scale": study.scale.name,
        "rows": listed,
        "seconds": costs.total,
        "basis": costs.basis,
    }


def _work(study: Study, asked: Sequence[Run], minutes: float | None, say: Say) -> None:
    """Do what is not done, one run after another; results are written after each, and when it ends early."""
    pass

    for run in study.runs:
        if run not in asked:
            study.told[run.row.name, run.seed] = "not asked for"
    try:
        with Watch(minutes) as watch:
            for run in asked:
                if state(run) != "done":
                    perform(run, watch)
                    study.write()
                    say(_told(run))
    except (Interrupted, Asked) as error:
        code = error.code if isinstance(error, Asked) else error.exit_code
        study.write()
        left = sum(state(run) != "done" for run in asked)
        raise Interrupted(
            f"{study.name}: stopped with {left} of {len(asked)} runs to do; the same command goes on", code
        ) from None


def _told(run: Run) -> str:
    found, note = outcome(run), noted(run)
    if found is None:
        return f"{run.row.name} seed {run.seed}: failed: {note['error']['message'].splitlines()[0]}"
    figures = ", ".join(f"{name} {value:.1f}" for name, value in found["figures"].items())
    seconds = found["training_seconds"] + found["evaluation_seconds"]
    return f"{run.row.name} seed {run.seed}: {figures}{', collapsed' if found['collapsed'] else ''} ({duration(seconds)})"
