"""The facts about a run in the files of its folder, whatever is missing there."""

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from relssl.errors import ConfigError, RelsslError
from relssl.files import read_json, read_rows
from relssl.report.tables import facts as figures
from relssl.settings.reading import flat, read_yaml
from relssl.settings.run import Config, to_mapping
from relssl.train.figures import at_the_end, describe
from relssl.train.pretrain import Result
from relssl.weights.opening import load_run

_POINTS = 800  # of a curve at most
_BASELINES = {"knn_raw_pixels": "raw pixels", "knn_top1": "untrained"}
_PLACES = ("step", "epoch", "samples", *_BASELINES)  # columns that are no curves of their own
# Settings that say nothing of what was learned.
_ASIDE = ("out", "data_root", "recipe", "time_limit", "log.", "checkpoint.", "loader.")
# Columns whose clear change for the better between two rows is progress, and in words.
_SIGNS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "agreement": (lambda new, old: new > old + 0.05, "the same nearest neighbour for {:.3g} of samples, before {:.3g}"),
    "teacher_neighbours": (lambda new, old: new < 0.8 * old, "{:.3g} effective neighbours, before {:.3g}"),
    "effective_rank": (lambda new, old: new > 1.1 * old, "an effective rank of {:.3g}, before {:.3g}"),
}
Row = dict[str, Any]


def run_facts(folder: Path) -> dict[str, Any]:
    """Return what is known of a run, as plain JSON; `missing` says what is not.

    Raises:
        ConfigError: if the folder holds no run.
    """
    missing: list[str] = []
    settings, config = _settings(folder, missing)
    status, where = read_json(folder / "status.json"), read_json(folder / "environment.json")
    missing += [
        f"{name} is missing or damaged" for name, known in {"status.json": status, "environment.json": where}.items() if not known
    ]
    rows, state = read_rows(folder / "metrics.jsonl"), status.get("state", "unknown")
    if not rows:
        missing.append("metrics.jsonl has no row yet: there is nothing to judge or to draw")
    reason = (status.get("error") or {}).get("message")
    stands = f"{state} at step {status.get('step', '?')}" + (f": {reason}" if reason else "")
    if state != "complete":
        missing.append(f"the run is not complete ({stands}): all that follows is of the time when this page was written")
    images, batch = (where.get("data") or {}).get("images"), settings.get("batch_size")
    epoch = images // batch if images and isinstance(batch, int) else 0
    trained = [row for row in rows if "loss" in row]
    return {
        "state": state,
        "settings": settings,
        "stands": stands,
        "where": where,
        "steps": rows[-1]["step"] if rows else 0,
        "seconds": _seconds(rows),
        "verdict": _verdict(folder, rows, config),
        "curves": _curves(rows, epoch, bool(settings.get("start"))),
        "axis": "epoch" if epoch else "step",
        "last": trained[-1] if trained else {},
        "evaluations": _evaluations(folder, missing),
        "bad": read_rows(folder / "bad_samples.jsonl")[:50],
        "missing": missing,
    }


def _settings(folder: Path, missing: list[str]) -> tuple[dict[str, Any], Config | None]:
    """Return all settings by dotted names, and as this version reads them, if it does."""
    try:
        config = load_run(folder).config
        return flat(json.loads(json.dumps(to_mapping(config)))), config
    except ConfigError as error:
        if not (folder / "config.yaml").is_file():
            raise
        missing.append(f"this version of relssl does not read its settings, so there are no pictures: {error}")
    with contextlib.suppress(RelsslError):
        return flat(read_yaml(folder / "config.yaml")), None
    return {}, None


def _seconds(rows: list[Row]) -> float:
    """Return the time that was spent in steps, by the speeds in a run's rows."""
    seconds, before = 0.0, 0
    for row in rows:
        if row.get("images_per_second"):
            seconds, before = seconds + (row["samples"] - before) / row["images_per_second"], row["samples"]
    return seconds


def _verdict(folder: Path, rows: list[Row], config: Config | None) -> dict[str, Any]:
    """Return {"word": learning, flat, collapsing or unknown, "lines": why, "bars": [[what, percent]], "figures": [[what, figure]]}."""
    trained, unknown = [row for row in rows if "loss" in row], {"word": "unknown", "bars": [], "figures": []}
    if config is None or not trained:
        return unknown | {"lines": ["Nothing can be said yet."]}
    try:
        known = figures(Result(folder, folder, rows), config)
    except LookupError as error:  # rows of another version
        return unknown | {"lines": [f"Its rows lack {error}, which a verdict needs."]}
    word, (line, *more) = known["word"], known["verdict"]
    line = line.partition(": ")[2]
    early = trained[-1]["epoch"] < 1 or len(trained) == 1
    if word == "collapsing" and trained[-1]["epoch"] < 1 and "not finite" not in line:
        word, line = "unknown", "It is too early to judge."
    elif word == "healthy" and "agreement" not in trained[-1]:  # neither a memory nor labels
        word, line = "unknown", "No sign of a collapse."
    elif word == "healthy":
        moved = _moved(trained[0], trained[-1])
        word = "learning" if moved else "unknown" if early else "flat"
        line = "It is too early to judge." if early else "No sign of a collapse, and none of progress since the first row."
        line = f"No sign of a collapse; {moved}." if moved else line
    elif word != "collapsing":
        line = line.capitalize()
    bars = {"raw_pixels": "raw pixels", "untrained": "untrained network", "start": "given weights"}
    bars |= {name: name for name in ("student", "teacher")}
    return {
        "word": word,
        "lines": [line, *more],
        "bars": [[words, known[f"knn_{name}"]] for name, words in bars.items() if known[f"knn_{name}"] is not None],
        "figures": [*map(list, at_the_end(trained[-1], config.method.memory_size).values())],
    }


def _moved(first: Row, last: Row) -> str:
    """Return what of the relations has clearly changed for the better between two rows, in words."""
    pairs = {name: (last[name], first[name]) for name in _SIGNS if None not in (last.get(name), first.get(name))}
    return "; ".join(_SIGNS[name][1].format(*pair) for name, pair in pairs.items() if _SIGNS[name][0](*pair))


def _curves(rows: list[Row], epoch: int, given: bool) -> list[dict[str, Any]]:
    """Return the curves of all columns, at most `_POINTS` points a line; those without `about` matter less."""
    known = [*describe()]
    named = {*_PLACES, *(column for each in known for column in each["columns"])}
    others = sorted({name for row in rows for name, value in row.items() if isinstance(value, int | float)} - named)
    known += [{"title": column.replace("_", " ").capitalize(), "columns": {column: "value"}} for column in others]
    start = rows[0] if rows and rows[0]["step"] == 0 else {}
    names = _BASELINES | ({"knn_top1": "given weights"} if given else {})
    levels = [[name, start[column]] for column, name in names.items() if start.get(column) is not None]
    curves = []
    for each in known:
        lines = []
        for column, name in each["columns"].items():
            points = [[row["step"] / (epoch or 1), row[column]] for row in rows if row.get(column) is not None]
            stride = max(1, math.ceil(len(points) / _POINTS))
            lines += [{"name": name, "points": points[(len(points) - 1) % stride :: stride]}] if points else []
        # Schedules that stay are settings.
        if lines and (each.get("about") or len({y for line in lines for _, y in line["points"]}) > 1):
            curve = {"title": each["title"], "about": each.get("about", ""), "log": "teacher_neighbours" in each["columns"]}
            curves.append(curve | {"lines": lines, "levels": levels if "knn_top1" in each["columns"] else []})
    return curves


def _evaluations(folder: Path, missing: list[str]) -> list[dict[str, Any]]:
    """Return the findings in RUN/evaluations, each with its card."""
    findings: list[dict[str, Any]] = []
    for path in sorted((folder / "evaluations").glob("*.json")):
        try:
            for each in json.loads(path.read_text())["results"]:
                low, high = each["intervals"].get(each["main"], (None, None))
                setting = ", ".join(f"{name} {value}" for name, value in each["setting"].items())
                row = {name: each[name] for name in ("protocol", "network", "data", "main", "notes", "card")}
                findings.append(row | {"setting": setting, "value": each["figures"][each["main"]], "low": low, "high": high})
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            missing.append(f"evaluations/{path.name} cannot be read")
    return findings


def differences(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Return the settings in which runs differ: [name, value of each]."""
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run["settings"]):
        values = [json.dumps(run["settings"].get(name), ensure_ascii=False) for run in runs]
        if len(set(values)) > 1 and not name.startswith(_ASIDE):
            rows.append([name, *(value.strip('"') for value in values)])
    return rows
