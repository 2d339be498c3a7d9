"""Rerunning one of the paper's comparisons, from the plan to the page of results; torch is imported once runs start."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from relssl.errors import ConfigError, Interrupted
from relssl.reproduction.outcome import outcome
from relssl.reproduction.plan import Run, choose, noted, state
from relssl.reproduction.study import Study
from relssl.reproduction.tables import read_scale, read_table
from relssl.units import duration

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
    from relssl.reproduction.cost import cost

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
    from relssl.reproduction.work import Asked, Watch, perform

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
