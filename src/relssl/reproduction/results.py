"""What the runs of a plan came to, and what that says: figures over seeds, differences, verdicts. Plain numbers, no torch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from relssl.errors import CheckpointError
from relssl.reproduction.plan import Run, noted, state
from relssl.reproduction.tables import REPORTED, Expectation, Row, Table
from relssl.train.run_folder import read_rows
from relssl.units import duration

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


Found = Mapping[str, Any]

_WARNING = "**These numbers mean nothing.** {why}; the table shows that everything runs, not what the method can do."
_ENDS = {
    "teacher_neighbours": "effective neighbours",
    "embedding_std": "spread of embeddings",
    "effective_rank": "effective rank",
}


def page(found: Found) -> str:
    """The page of what `reproduce` returns."""
    parts = [f"# {found['title']}, at the {found['scale']} scale", found["shows"], _setting(found), _rows(found)]
    parts += [_beside(found), _orders(found), _expected(found), _missing(found), _machine(found), _commands(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _setting(found: Found) -> str:
    lines = [f"Scale: {found['about']}."]
    if found["overrides"]:
        given = " ".join(f"--{name} {value}" for name, value in found["overrides"].items())
        lines.append(f"All runs with `{given}`.")
    lines.append(f"Published numbers: {found['source']}")
    if found["rehearsal"]:
        lines.append(_WARNING.format(why=f"A rehearsal of {found['overrides']['epochs']} epochs"))
    elif found["scale"] == "smoke":
        lines.append(_WARNING.format(why="A few steps of a tiny network"))
    return "\n".join(lines)


def _rows(found: Found) -> str:
    """Published and own figures, mean +- standard deviation (least..most) over seeds."""
    figures = _union(row["ours"] for row in found["rows"])
    ends = [name for name in _ENDS if any(name in row["ends"] for row in found["rows"])]
    compared = any(number["difference"] is not None for row in found["rows"] for number in row["paper"])
    head = ["", "published", *([] if not compared else ["difference"]), *figures, *(_ENDS[name] for name in ends), "seeds"]
    lines = []
    for row in found["rows"]:
        cells = [row["label"], "; ".join(map(_published, row["paper"]))]
        if compared:
            told = [f"{n['difference']:+.2f} {n['figure']}" for n in row["paper"] if n["difference"] is not None]
            cells.append("; ".join(told))
        cells += [_spread(row["ours"].get(name)) for name in figures]
        cells += [_spread(row["ends"].get(name)) for name in ends]
        count = max((len(one["seeds"]) for one in row["ours"].values()), default=0)
        lines.append([*cells, f"{count}" + (f", {len(row['collapsed'])} collapsed" if row["collapsed"] else "")])
    note = "Top-1 in percent; mean +- standard deviation over seeds (least..most). Relations are those of the last logged step."
    return f"{_table(head, lines)}\n\n{note}"


def _published(number: Found) -> str:
    by = "" if number["by"] == "the paper" else f", {number['by']}"
    return f"{number['value']:.2f} {number['figure']} ({number['sure']}{by})"


def _beside(found: Found) -> str:
    """Differences to the reference row, seed by seed."""
    figures = _union(row["beside_reference"] for row in found["rows"])
    if not figures:
        return ""
    label = next(row["label"] for row in found["rows"] if row["row"] == found["reference"])
    head = [f"minus “{label}”, seed by seed", *figures]
    lines = [
        [row["label"], *(_spread(row["beside_reference"].get(name), sign="+") for name in figures)]
        for row in found["rows"]
        if row["beside_reference"]
    ]
    return _table(head, lines)


def _orders(found: Found) -> str:
    """Rows best first, in the paper's order and in ours."""
    if not found["order"]:
        return ""
    labels = {row["row"]: row["label"] for row in found["rows"]}
    return _table(
        ["by", "rows with a published number, best first"],
        [[name, " > ".join(labels[row] for row in rows)] for name, rows in found["order"].items()],
    )


def _expected(found: Found) -> str:
    """What was expected and whether it holds."""
    if not found["expected"]:
        return ""
    lines = []
    for each in found["expected"]:
        said = [_verdict(name, one) for name, one in each["verdicts"].items()]
        lines.append([each["says"], "; ".join(said) or "not measured"])
    note = "A difference counts where it exceeds the deviation of a difference of two runs, sqrt(s1^2 + s2^2) over seeds."
    return f"{_table(['expected', 'found'], lines)}\n\n{note}"


def _verdict(name: str, one: Found) -> str:
    if name == "collapsed":
        return f"**{one['verdict']}** ({one['collapsed']} of {one['seeds']} collapsed)"
    noise = "" if one["noise"] is None else f", noise {one['noise']:.2f}"
    return f"{name}: **{one['verdict']}** ({one['difference']:+.2f}{noise})"


def _missing(found: Found) -> str:
    if not found["missing"]:
        return ""
    by_why: dict[tuple[str, str], list[int]] = {}
    for each in found["missing"]:
        by_why.setdefault((each["row"], " ".join(each["why"].split())), []).append(each["seed"])
    lines = [f"- {row}, seed {', '.join(map(str, seeds))}: {why}" for (row, why), seeds in by_why.items()]
    return "Not run:\n\n" + "\n".join(lines)


def _machine(found: Found) -> str:
    """Where the runs were made, and what they took."""
    runs = found["runs"]
    if not runs:
        return ""
    made: dict[str, int] = {}
    for run in runs:
        here = run["environment"]
        versions = ", ".join(f"{name} {here['versions'][name]}" for name in ("relssl", "torch", "torchvision", "timm"))
        words = f"{here['engine']}; {here['cores']} cores of {here['processor']}; {versions}; revision {(here['git'] or 'unknown')[:12]}"
        made[words] = made.get(words, 0) + 1
    lines = [f"- {count} runs: {words}" for words, count in made.items()]
    training, after = (sum(run[name] for run in runs) for name in ("training_seconds", "evaluation_seconds"))
    each = [run["training_seconds"] for run in runs]
    took = f"{duration(training)} of training ({duration(min(each))} to {duration(max(each))} a run), {duration(after)} of evaluation"
    return "\n".join([f"Made in {took}, on", "", *lines])


def _commands(found: Found) -> str:
    """The commands of one run of each row."""
    first: dict[str, Found] = {}
    for run in found["runs"]:
        first.setdefault(run["row"], run)
    if not first:
        return ""
    lines = [line for run in first.values() for line in run["commands"]]
    note = f"Other seeds differ in `--seed` and `--out` alone; the commands of all runs are in `{found['name']}.json`."
    return "\n".join(["One run of each row:", "", "```", *lines, "```", "", note])


def _union(maps: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for one in maps for name in one))


def _spread(one: Found | None, sign: str = "") -> str:
    if one is None:
        return ""
    digits = 2 if abs(one["mean"]) < 10 and not sign else 1
    mean = f"{one['mean']:{sign}.{digits}f}"
    if one["std"] is None:
        return mean
    return f"{mean} +- {one['std']:.{digits}f} ({one['min']:{sign}.{digits}f}..{one['max']:{sign}.{digits}f})"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
