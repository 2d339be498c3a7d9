"""The results of a plan's runs: figures over seeds, differences beyond noise or within it, and their page. Plain numbers, no torch."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from relssl.errors import CheckpointError
from relssl.files import duration, read_json, read_rows, write_file, write_json
from relssl.reproduction.plan import Plan, Run, options
from relssl.reproduction.tables import REPORTED, Row
from relssl.settings.reading import nest
from relssl.settings.run import derive
from relssl.train.figures import COLLAPSES, alarms

# Figures of the relations in a run's last row, and their names on the page; methods without a memory or a teacher have not all.
ENDS = {"teacher_neighbours": "effective neighbours", "embedding_std": "spread of embeddings", "effective_rank": "effective rank"}
# Overrides that leave a setting the paper's own: where and how fast it runs, and what is logged.
_NEUTRAL = ("engine.", "loader.", "log.", "checkpoint.", "data_root", "compile", "method.loss_form")

Values = Mapping[int, float]  # by seed
Outcome = Mapping[str, Any]
Outcomes = Mapping[str, Mapping[int, Outcome]]  # by row and seed


def outcome(run: Run) -> dict[str, Any] | None:
    """Read what a finished run left, {"figures": {"knn student": percent, ...}, "ends": {name: value},
    "curve": [[epoch, kNN top-1 of the student while it trained], ...], "collapsed": bool,
    "images_per_second", "training_seconds", "evaluation_seconds", "environment"}; None while it is not done.

    Raises:
        CheckpointError: if what it left is damaged.
    """
    if run.state() != "done":
        return None
    try:
        evaluated = read_json(run.note)["results"]
        every = read_rows(run.folder / "metrics.jsonl")
        rows = [row for row in every if "loss" in row]
        ends = {name: rows[-1][name] for name in ENDS if rows[-1].get(name) is not None}
        # What a stop made undone is not in the rows. Speeds are rounded to a tenth.
        samples = np.diff([0, *(row["samples"] for row in rows)])
        seconds = float((samples / np.maximum([row["images_per_second"] for row in rows], 0.05)).sum())
        return {
            "figures": {f"{each['protocol']} {each['network']}": each["figures"][each["main"]] for each in evaluated},
            "ends": ends,
            "curve": [[row["epoch"], row["knn_top1"]] for row in every if "knn_top1" in row],
            "collapsed": not alarms([ends], run.config).keys().isdisjoint(COLLAPSES),
            "images_per_second": rows[-1]["samples"] / seconds,
            "training_seconds": seconds,
            "evaluation_seconds": sum(each["seconds"] for each in evaluated),
            "environment": json.loads((run.folder / "environment.json").read_text()),
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{run.folder}: this finished run's note, metrics.jsonl or environment.json is damaged ({type(error).__name__}); "
            f"move {run.folder} and {run.note.name} away, and it runs again"
        ) from error


def write_results(plan: Plan, out: Path) -> dict[str, Any]:
    """Write OUT/NAME.json, its page, OUT/NAME.md, and if kNN was measured on the way its figure, OUT/NAME.svg; returns what is in
    the first."""
    content = results(plan)
    write_json(out / f"{plan.name}.json", content)
    write_file(out / f"{plan.name}.md", page(content).encode("utf-8", "backslashreplace"))
    if drawing := curves(content):
        write_file(out / f"{plan.name}.svg", drawing.encode())
    return content


def results(plan: Plan) -> dict[str, Any]:
    """Collect everything the runs of a plan have come to, as plain values."""
    table, reference = plan.table, plan.table.reference
    outcomes: dict[str, dict[int, Outcome]] = {row.name: {} for row in table.rows}
    for run in plan.runs:
        if (content := outcome(run)) is not None:
            outcomes[run.row.name][run.seed] = content
    data = {run.row.name: run.config.data for run in plan.runs}
    backward = {run.row.name: derive(run.config).backward for run in plan.runs}
    figures = {name: by_name(seeds, "figures") for name, seeds in outcomes.items()}
    beside = {one: figures[reference] if one == data.get(reference) else {} for one in data.values()}
    # Only runs in the paper's own setting have its numbers to reach.
    published = table.scale == "paper" and all(
        name.startswith(_NEUTRAL) or (name == "recipe" and value in {f"nips/{each}" for each in data.values()})
        for name, value in plan.overrides.items()
    )
    rows = [
        {
            **{"row": row.name, "label": row.label, "settings": nest(row.settings), "data": data[row.name]},
            "paper": against_paper(row, data[row.name], figures[row.name] if published else {}),
            "ours": {name: spread(values) for name, values in figures[row.name].items()},
            # Figures of one data set say nothing beside those of another.
            "beside_reference": paired(figures[row.name], beside[data[row.name]]) if row.name != reference else {},
            "ends": {name: spread(values) for name, values in by_name(outcomes[row.name], "ends").items()},
            "backward": backward[row.name],
            "seconds": spread({seed: one["training_seconds"] for seed, one in outcomes[row.name].items()}),
            "collapsed": [seed for seed, one in outcomes[row.name].items() if one["collapsed"]],
        }
        for row in table.rows
        if row.name in data
    ]
    return {
        **{"name": plan.name, "table": table.name, "title": table.title, "shows": table.shows, "source": table.source},
        **{"scale": table.scale, "about": table.about, "rehearsal": plan.rehearsal, "overrides": plan.overrides},
        **{"reference": reference, "rows": rows, "order": order(table.rows, data, figures)},
        "expected": [each | {"verdicts": verdicts(each, outcomes)} for each in table.expected],
        "runs": [
            {"row": run.row.name, "seed": run.seed, "commands": run.commands(), **outcomes[run.row.name][run.seed]}
            for run in plan.runs
            if run.seed in outcomes[run.row.name]
        ],
        "missing": _missing(plan, outcomes),
    }


def _missing(plan: Plan, outcomes: Outcomes) -> list[dict[str, Any]]:
    """List the runs without a result, and why; those of rows that cannot be set up last."""
    missing = []
    for run in (run for run in plan.runs if run.seed not in outcomes[run.row.name]):
        error = read_json(run.note).get("error", {})
        why = {"begun": "stopped on the way", "trained": "not evaluated yet"}.get(run.state(), "not run yet")
        why = f"failed: {error['message']}" if error else why if run in plan.chosen else "not asked for"
        missing.append({"row": run.row.name, "seed": run.seed, "why": why, "exit_code": error.get("exit_code")})
    seeds, planned = sorted({run.seed for run in plan.runs}), {run.row.name for run in plan.runs}
    why = "not asked for, and its settings cannot be used yet"
    unplanned = [(row.name, seed) for row in plan.table.rows if row.name not in planned for seed in seeds]
    return missing + [{"row": row, "seed": seed, "why": why, "exit_code": None} for row, seed in unplanned]


def spread(values: Values) -> dict[str, Any]:
    """Return {"mean", "std" (sample standard deviation, None of one), "min", "max", "seeds": {seed: value}}; {} of none."""
    if not values:
        return {}
    numbers, seeds = list(values.values()), {str(seed): value for seed, value in values.items()}
    std = statistics.stdev(numbers) if len(numbers) > 1 else None
    return {"mean": statistics.fmean(numbers), "std": std, "min": min(numbers), "max": max(numbers), "seeds": seeds}


def by_name(outcomes: Mapping[int, Outcome], part: str) -> dict[str, dict[int, float]]:
    """Return {"knn student": {seed: value}} of a row's outcomes; `part` is figures or ends."""
    names = _union(one[part] for one in outcomes.values())
    return {name: {seed: one[part][name] for seed, one in outcomes.items() if name in one[part]} for name in names}


def against_paper(row: Row, data: str, figures: Mapping[str, Values]) -> list[dict[str, Any]]:
    """Return the published numbers of a row on that data, each with the difference of our mean where `figures` has one."""
    ours = {name: statistics.fmean(figures[own].values()) for name, own in REPORTED.items() if figures.get(own)}
    numbers = [(each, each["figure"]) for each in row.paper if each["data"] == data]
    return [each | {"difference": ours[name] - each["value"] if name in ours else None} for each, name in numbers]


def paired(figures: Mapping[str, Values], reference: Mapping[str, Values]) -> dict[str, Any]:
    """Return the spread of a row's difference to the reference row, seed by seed where both have it."""
    differences = {
        name: {seed: value - reference[name][seed] for seed, value in values.items() if seed in reference.get(name, {})}
        for name, values in figures.items()
    }
    return {name: spread(values) for name, values in differences.items() if values}


def verdicts(expected: Mapping[str, Any], outcomes: Outcomes) -> dict[str, dict[str, Any]]:
    """Judge an expectation by the numbers alone: {figure: {"verdict", ...}}, of collapse and sound {"collapsed": ...}.

    `above` is judged by each figure: the difference of the two means against the deviation of a difference of two runs,
    sqrt(s1^2 + s2^2) with the two rows' standard deviations over seeds. A difference within that is noise; with one seed of
    either row there is nothing to compare it with, and only the direction is given.
    """
    measured = [outcomes.get(name, {}) for name in expected["rows"]]
    if not all(measured):
        return {}
    if expected["kind"] != "above":
        collapsed = [bool(one["collapsed"]) for one in measured[0].values()]
        hits = collapsed.count(expected["kind"] == "collapse")
        word = "holds" if hits == len(collapsed) else "holds for some seeds" if hits else "does not hold"
        return {"collapsed": {"verdict": word, "collapsed": sum(collapsed), "seeds": len(collapsed)}}
    better, worse = ({name: spread(values) for name, values in by_name(one, "figures").items()} for one in measured)
    return {name: _judge(better[name], worse[name]) for name in better if name in worse}


def _judge(better: Mapping[str, Any], worse: Mapping[str, Any]) -> dict[str, Any]:
    difference, deviations = better["mean"] - worse["mean"], (better["std"], worse["std"])
    if None in deviations:
        word = "as expected, one seed" if difference > 0 else "not as expected, one seed"
        return {"verdict": word, "difference": difference, "noise": None}
    noise = math.hypot(*deviations)
    word = "within noise" if abs(difference) <= noise else "holds" if difference > 0 else "does not hold"
    return {"verdict": word, "difference": difference, "noise": noise}


def order(rows: Iterable[Row], data: Mapping[str, str], figures: Mapping[str, Mapping[str, Values]]) -> dict[str, list[str]]:
    """Sort rows with a number of the paper's own, best first: by the paper and by each of our figures, each data set by itself."""
    means: dict[str, dict[str, dict[str, float]]] = {one: {} for one in data.values()}  # by data set, figure and row
    for row in (row for row in rows if figures[row.name] and row.name in data):
        own = ("linear", "the paper", data[row.name])
        paper = [each["value"] for each in row.paper if (each["figure"], each["by"], each["data"]) == own]
        for name, values in {"paper": dict(enumerate(paper)), **figures[row.name]}.items() if paper else ():
            means[own[2]].setdefault(name, {})[row.name] = statistics.fmean(values.values())
    return {
        (f"{one}, " if len(means) > 1 else "") + name: sorted(each, key=each.__getitem__, reverse=True)
        for one, names in means.items()
        for name, each in names.items()
        if len(names["paper"]) > 1
    }


def page(content: Mapping[str, Any]) -> str:
    """Return the Markdown page of what `reproduce` returns."""
    rows = content["rows"]
    text: str = _template("page.md.jinja", content).render(
        content,
        figures=_union(row["ours"] for row in rows),
        beside=_union(row["beside_reference"] for row in rows),
        ends={name: words for name, words in ENDS.items() if any(name in row["ends"] for row in rows)},
        compared=any(number["difference"] is not None for row in rows for number in row["paper"]),
        drawn=bool(curves(content)),
    )
    return text.strip() + "\n"


def curves(content: Mapping[str, Any]) -> str:
    """Return the SVG figure of the student's kNN over epochs, a line for each run and a colour for each row; empty without figures.

    Args:
        content: what `reproduce` returns.
    """
    runs = [run for run in content["runs"] if len(run.get("curve", [])) > 1]
    points = np.array([point for run in runs for point in run["curve"]]).reshape(-1, 2)
    if not runs or not points[:, 0].max():
        return ""
    (_, low), (last, high) = points.min(axis=0), points.max(axis=0)
    step = next(each for each in (1, 2, 5, 10, 20) if (high - low) / each <= 8)
    levels = [*range(math.floor(low / step) * step, math.ceil(high / step) * step + 1, step)]
    names = _union({run["row"]: None} for run in runs)
    drawing: str = _template("curves.svg.jinja", content).render(runs=runs, names=names, levels=levels, last=last)
    return drawing


def _template(name: str, content: Mapping[str, Any]) -> Any:
    """Return a template of this folder, in which rows have their labels."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    trim: Any = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.do"]}
    pages = Environment(loader=PackageLoader("relssl.reproduction", "."), undefined=StrictUndefined, **trim)
    labels = {row["row"]: row["label"] for row in content["rows"]}
    pages.filters |= {"label": labels.__getitem__, "duration": duration, "options": options, "spread": _spread}
    return pages.get_template(name)


def _union(maps: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for one in maps for name in one))


def _spread(name: str, values: Mapping[str, Any], sign: str = "") -> str:
    """Return mean, standard deviation and range of a figure, in as many digits as tell something."""
    if (one := values.get(name)) is None:
        return ""
    digits = 2 if abs(one["mean"]) < 10 and not sign else 1
    mean = f"{one['mean']:{sign}.{digits}f}"
    if one["std"] is None:
        return mean
    return f"{mean} +- {one['std']:.{digits}f} ({one['min']:{sign}.{digits}f}..{one['max']:{sign}.{digits}f})"
