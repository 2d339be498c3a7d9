"""Rerunning one of the paper's comparisons, from the plan to the page of results; torch is imported once runs start."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from relssl.errors import TIME_LIMIT, ConfigError, DataError, Interrupted, LockedError, RelsslError, StorageError
from relssl.files import duration, read_json, storing, write_json
from relssl.reproduction.plan import Plan, Run, options, plain, plan
from relssl.reproduction.results import outcome, write_results
from relssl.reproduction.tables import read_table
from relssl.settings.run import derive

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

    A run that fails is noted, and the next one begins. OUT/TABLE-SCALE.json and .md are written anew after each.

    Args:
        table, scale: names, which `relssl reproduce` lists; a table may be a YAML file of one's own.
        seeds: 0..seeds-1 are run; default: the scale's.
        only: names of the rows to run; results include all that was run before.
        runs, out: folders of the run folders, default: runs/reproduce/TABLE-SCALE, and of the results.
        time_limit: minutes for all runs together; a run's evaluation that has begun is finished first.
        plan_only: run and write nothing; return {"table", "scale", "rows": [{"row", "label", "runs", "done", "seconds"}, ...],
            "seconds", "basis"}, seconds of what is left to do.
        say: called with lines on the progress.
        overrides: settings for all runs, by name; `epochs` makes it a rehearsal, whose results say so and have a name of their own.

    Returns:
        The results as written to the JSON file; see docs/reproduce.md for what they hold.

    Raises:
        ConfigError: for unknown names, settings that cannot be used, and folders that hold something else.
        Interrupted: on SIGINT, on SIGTERM while training, or at the time limit, after the results so far are written.
        StorageError, LockedError: if a folder cannot be written, or another process writes it.
    """
    planned = plan(read_table(table, scale), seeds=seeds, only=only, runs=runs, overrides=overrides)
    tell = say or (lambda line: None)
    if time_limit is not None and not time_limit > 0:
        raise ConfigError(f"time_limit: must be above 0 minutes, got {time_limit:g}")
    if plan_only:
        return _costs(planned, tell)
    _check_out(planned, Path(out))
    end = time.monotonic() + 60 * (math.inf if time_limit is None else time_limit)
    if say and any(run.state() != "done" for run in planned.chosen):
        _costs(planned, say)
    try:
        for run in (run for run in planned.chosen if run.state() != "done"):
            _perform(run, end)
            write_results(planned, Path(out))
            tell(f"{run.row.name} seed {run.seed}: {_summary(run)}")
    except (Interrupted, KeyboardInterrupt) as error:
        write_results(planned, Path(out))
        left = sum(run.state() != "done" for run in planned.chosen)
        stopped = f"{planned.name}: stopped with {left} of {len(planned.chosen)} runs to do; the same command goes on"
        raise Interrupted(stopped, getattr(error, "exit_code", 130)) from None
    return write_results(planned, Path(out))


def _check_out(planned: Plan, out: Path) -> None:
    """Refuse to write over results of other settings, and make the folder."""
    file, here = out / f"{planned.name}.json", planned.overrides
    if (there := read_json(file).get("overrides", here)) != here:
        words = f"{options(there) or 'none'} there, {options(here) or 'none'} now"
        raise ConfigError(f"{file}: holds results of other settings ({words}); give another --out")
    with storing(file):
        out.mkdir(parents=True, exist_ok=True)


def _perform(run: Run, end: float) -> None:
    """Bring a run to its end from wherever it stands, by the time `end` of `time.monotonic`, and write its note.

    A failure of this row alone is noted as {"error": {"kind", "message", "exit_code"}} and raised no further; StorageError and
    LockedError, which the next row would meet as well, are.
    """
    left = _minutes(end)
    from relssl.evaluation.evaluate import evaluate
    from relssl.train.pretrain import pretrain, resume

    note: dict[str, Any] = {"row": run.row.name, "seed": run.seed}
    try:
        if run.state() == "new":
            # The limit is this command's, not the run's: only what is left of it is written down.
            pretrain(settings=dataclasses.replace(run.config, time_limit=None if math.isinf(left) else left), quiet=True)
        else:
            resume(run.folder, quiet=True, time_limit=left)
        _minutes(end)
        note |= evaluate(run.folder, settings=run.evaluation) | {"evaluation": plain(run.evaluation)}
    except (Interrupted, StorageError, LockedError):
        raise
    except Exception as error:
        message = str(error) if isinstance(error, RelsslError) else f"{type(error).__name__}: {error}"
        note["error"] = {"kind": getattr(error, "kind", "bug"), "message": message, "exit_code": getattr(error, "exit_code", 1)}
    run.note.parent.mkdir(parents=True, exist_ok=True)
    write_json(run.note, note)


def _minutes(end: float) -> float:
    if (left := (end - time.monotonic()) / 60) <= 0:
        raise Interrupted("at its time limit", TIME_LIMIT)
    return left


def _summary(run: Run) -> str:
    if (result := outcome(run)) is None:
        return f"failed: {read_json(run.note)['error']['message'].splitlines()[0]}"
    figures = ", ".join(f"{name} {value:.1f}" for name, value in result["figures"].items())
    seconds = result["training_seconds"] + result["evaluation_seconds"]
    return f"{figures}{', collapsed' if result['collapsed'] else ''} ({duration(seconds)})"


def _costs(planned: Plan, say: Say) -> dict[str, Any]:
    """Tell what is left to do and how long it takes: rows by their operations, at the pace of finished runs or of a few steps."""
    rows = {run.row.name: [each for each in planned.chosen if each.row is run.row] for run in planned.chosen}
    finished = [(run.row.name, one) for run in planned.chosen if (one := outcome(run))]
    say(f"{planned.name}: {len(rows)} rows, {len(planned.chosen)} runs, {len(finished)} of them done")
    if planned.table.scale == "smoke" or planned.rehearsal:
        say("its numbers mean nothing: runs are cut short to show that everything works")
    work: dict[str, tuple[float, float]] = {}
    unknown: dict[str, list[str]] = {}
    rate, evaluation, basis = 0.0, None, "as no row can be set up here"  # operations a second, and seconds
    for name, (first, *_) in rows.items():
        try:
            work[name] = _operations(first)
            if not rate and not finished:
                rate = work[name][0] / _training_seconds(first)
                basis = f"from a few steps of {name}, the other rows by their operations; without the probe's own time"
        except (RelsslError, RuntimeError, ValueError) as error:  # its run will fail with the same
            unknown.setdefault(str(error).splitlines()[0], []).append(name)
    for reason, names in unknown.items():
        say(f"{', '.join(names)}: time unknown: {reason}")
    if timed := [(work[name][0], one) for name, one in finished if name in work]:
        rate = statistics.fmean(training / one["training_seconds"] for training, one in timed)
        evaluation = statistics.fmean(one["evaluation_seconds"] for _, one in timed)
        basis = f"from {len(timed)} runs that are done"
    costs: list[dict[str, Any]] = []
    for name, runs in rows.items():
        states, seconds = [run.state() for run in runs], None
        todo = len(runs) - states.count("done")
        if name in work and rate:
            training, features = (operations / rate for operations in work[name])
            seconds = todo * (evaluation or features) + (todo - states.count("trained")) * training
        left = "unknown" if seconds is None else f"about {duration(seconds)}" if todo else "nothing"
        say(f"  {name:22} {todo} of {len(runs)} runs to do, {left}  ({runs[0].row.label})")
        costs.append({"row": name, "label": runs[0].row.label, "runs": len(runs), "done": len(runs) - todo, "seconds": seconds})
    total = sum(each["seconds"] or 0.0 for each in costs)
    say(f"{f'about {duration(total)}' if rate else 'unknown time'} in all, {basis}")
    return {"table": planned.table.name, "scale": planned.table.scale, "rows": costs, "seconds": total, "basis": basis}


def _training_seconds(run: Run) -> float:
    """Return the seconds of a run's training, extrapolated from a few steps."""
    from relssl.train.estimate import estimate

    config = dataclasses.replace(run.config, log=dataclasses.replace(run.config.log, knn_every=0))
    return estimate(settings=config, steps=5, quiet=True).training_seconds


def _operations(run: Run) -> tuple[float, float]:
    """Return the operations of a run's training and of the features for its evaluation, two for a multiply-add."""
    from relssl.data.named import at_hand, load
    from relssl.train.estimate import step_flops

    config, derived, flops = run.config, derive(run.config), step_flops(run.config)
    if not at_hand(config.data, config.data_root):
        raise DataError(f"{config.data} is not under data_root, which a plan does not download; its runs do")
    images = len(load(config.data, config.data_root, "bank" if derived.traits.labels else "train"))
    steps = config.steps(min(images, config.max_images or images))
    # A classifier trained on augmented images passes them through the frozen network again in each epoch.
    passes = 1 + (run.evaluation.linear.epochs if "linear" in run.evaluation.protocol else 0)
    evaluated = min(images, (run.evaluation.images or (images,))[0])
    return float(sum(flops.values()) * steps * config.batch_size), passes * evaluated * flops["student"] / derived.backward
