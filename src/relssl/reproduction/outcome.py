"""What the runs of a plan came to, and what that says: figures over seeds, differences, verdicts. Plain numbers, no torch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from relssl.errors import CheckpointError
from relssl.reproduction.plan import Run, noted, state
from relssl.reproduction.tables import REPORTED, Expectation, Row, Table
from relssl.train.journal import read_rows

# Figures of the relations in a run's last row; methods without a memory or a teacher have not all of them.
ENDS = ("teacher_neighbours", "embedding_std", "effective_rank")
# Collapsed: embeddings that hardly spread, or a relation over nearly all of the memory; method/health.py warns at the same.
_NO_SPREAD, _UNIFORM = 0.1, 0.9

Values = Mapping[int, float]


def outcome(run: Run) -> dict[str, Any] | None:
    """What a finished run came to; None while it is not done.

    Returns:
        {"figures": {"knn student": percent, ...}, "ends": {name: value}, "collapsed": bool, "images_per_second",
        "training_seconds", "evaluation_seconds", "environment"}.

    Raises:
        CheckpointError: if what the run left is damaged.
    """
    if state(run) != "done":
        return None
    try:
        return _outcome(run)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{run.folder}: what this finished run left beside it or in metrics.jsonl or environment.json is damaged "
            f"({type(error).__name__}); move {run.folder} and {run.note.name} away, and it runs again"
        ) from error


def _outcome(run: Run) -> dict[str, Any]:
    results = noted(run)["results"]
    rows = [row for row in read_rows(run.folder / "metrics.jsonl") if "loss" in row]
    ends = {name: rows[-1][name] for name in ENDS if rows[-1].get(name) is not None}
    seconds = _seconds(rows)
    return {
        "figures": {f"{found['protocol']} {found['network']}": found["figures"][found["main"]] for found in results},
        "ends": ends,
        "collapsed": ends.get("embedding_std", 1.0) < _NO_SPREAD
        or ends.get("teacher_neighbours", 0.0) > _UNIFORM * run.config.method.memory_size,
        "images_per_second": rows[-1]["samples"] / seconds,
        "training_seconds": seconds,
        "evaluation_seconds": sum(found["seconds"] for found in results),
        "environment": json.loads((run.folder / "environment.json").read_text()),
    }


def _seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    """Time spent on training steps, all sittings together; what a stop made undone is not in the rows. Speeds are rounded to a tenth."""
    before = [0, *(row["samples"] for row in rows)]
    pairs = zip(rows, before[:-1], strict=True)
    return float(sum((row["samples"] - start) / max(row["images_per_second"], 0.05) for row, start in pairs))


def spread(values: Values) -> dict[str, Any]:
    """{"mean", "std" (sample standard deviation, None of one), "min", "max", "seeds": {seed: value}}."""
    numbers = list(values.values())
    return {
        "mean": statistics.fmean(numbers),
        "std": statistics.stdev(numbers) if len(numbers) > 1 else None,
        "min": min(numbers),
        "max": max(numbers),
        "seeds": {str(seed): value for seed, value in values.items()},
    }


def by_figure(found: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """{"knn student": {seed: value}} of a row's outcomes by seed."""
    figures: dict[str, dict[int, float]] = {}
    for seed, one in found.items():
        for name, value in one["figures"].items():
            figures.setdefault(name, {})[seed] = value
    return figures


def against_paper(row: Row, data: str, figures: Mapping[str, Values], own_setting: bool) -> list[dict[str, Any]]:
    """The published numbers of a row on that data, each with ours and the difference where the setting is the paper's own."""
    numbers = []
    for number in row.paper:
        if number.data != data:
            continue
        ours = figures.get(" ".join(REPORTED[number.figure])) if own_setting else None
        mean = statistics.fmean(ours.values()) if ours else None
        said = {"figure": number.figure, "value": number.value, "sure": number.sure, "by": number.by}
        numbers.append(said | {"difference": None if mean is None else mean - number.value})
    return numbers


def paired(figures: Mapping[str, Values], reference: Mapping[str, Values]) -> dict[str, Any]:
    """What a row has more than the reference row, seed by seed where both have it; {} for what no seed has in common."""
    made = {}
    for name, values in figures.items():
        other = reference.get(name, {})
        common = {seed: value - other[seed] for seed, value in values.items() if seed in other}
        if common:
            made[name] = spread(common)
    return made


def verdict(expected: Expectation, rows: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """Whether an expectation holds, from the numbers alone.

    `above` is judged by each figure: the difference of the two means against the deviation of a difference of two runs,
    sqrt(s1^2 + s2^2) with the two rows' standard deviations over seeds. A difference within that is noise; with one seed of
    either row there is none to compare with, and only the direction is told.

    Args:
        rows: {row: {seed: outcome}}.

    Returns:
        {"says", "kind", "rows", "verdicts": {figure: {"verdict", ...}}}; of collapse and sound the figure is "collapsed".
    """
    said = {"says": expected.says, "kind": expected.kind, "rows": list(expected.rows)}
    measured = [rows.get(name, {}) for name in expected.rows]
    if not all(measured):
        return said | {"verdicts": {}}
    if expected.kind == "above":
        first, second = map(by_figure, measured)
        return said | {"verdicts": {name: above(first[name], second[name]) for name in first if name in second}}
    fallen = [bool(one["collapsed"]) for one in measured[0].values()]
    wanted = fallen if expected.kind == "collapse" else [not each for each in fallen]
    word = "holds" if all(wanted) else "does not hold" if not any(wanted) else "holds for some seeds"
    return said | {"verdicts": {"collapsed": {"verdict": word, "collapsed": sum(fallen), "seeds": len(fallen)}}}


def above(first: Values, second: Values) -> dict[str, Any]:
    """Whether the first row is above the second, and by what; see `verdict`."""
    a, b = spread(first), spread(second)
    difference = a["mean"] - b["mean"]
    if a["std"] is None or b["std"] is None:
        word = "as expected, one seed" if difference > 0 else "not as expected, one seed"
        return {"verdict": word, "difference": difference, "noise": None}
    noise = (a["std"] ** 2 + b["std"] ** 2) ** 0.5
    word = "within noise" if abs(difference) <= noise else "holds" if difference > 0 else "does not hold"
    return {"verdict": word, "difference": difference, "noise": noise}


def order(
    table: Table, scale: str, data: Mapping[str, str], rows: Mapping[str, Mapping[int, Mapping[str, Any]]]
) -> dict[str, list[str]]:
    """Rows with a number of the paper's own, best first: in the paper's order and in ours by each figure, each data set by itself."""
    sets = list(dict.fromkeys(data.values()))
    orders = {one: _order(table, scale, {row: name for row, name in data.items() if name == one}, rows) for one in sets}
    return {(f"{one}, {by}" if len(sets) > 1 else by): best for one, each in orders.items() for by, best in each.items()}


def _order(
    table: Table, scale: str, data: Mapping[str, str], rows: Mapping[str, Mapping[int, Mapping[str, Any]]]
) -> dict[str, list[str]]:
    paper = {
        row.name: number.value
        for row in table.at(scale)
        for number in row.paper
        if number.figure == "linear" and number.by == "the paper" and rows.get(row.name) and number.data == data.get(row.name)
    }
    if len(paper) < 2:
        return {}
    orders = {"paper": _ranked(paper)}
    for name in by_figure(rows[next(iter(paper))]):
        means = {row: statistics.fmean(by_figure(rows[row])[name].values()) for row in paper if name in by_figure(rows[row])}
        orders[name] = _ranked(means)
    return orders


def _ranked(values: Mapping[str, float]) -> list[str]:
    return sorted(values, key=lambda name: -values[name])
