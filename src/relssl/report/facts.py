"""The facts about a run in the files of its folder, whatever is missing there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from relssl.errors import ConfigError, RelsslError
from relssl.files import duration, read_json, read_rows
from relssl.report.tables import facts as figures
from relssl.settings.reading import flat, read_yaml
from relssl.settings.run import Config
from relssl.train.figures import at_the_end, describe
from relssl.train.pretrain import Result
from relssl.weights.opening import load_run

_POINTS = 800  # of a curve at most
_BASELINES = {"knn_raw_pixels": "raw pixels", "knn_top1": "untrained"}
_PLACES = ("step", "epoch", "samples", *_BASELINES)  # columns that are no curves of their own
# Settings that say nothing of what was learned.
_ASIDE = ("out", "data_root", "recipe", "time_limit", "log.", "checkpoint.", "loader.")


def run_facts(folder: Path) -> dict[str, Any]:
    """Return what is known of a run, as plain JSON; `missing` says what is not.

    Raises:
        ConfigError: if the folder holds no run.
    """
    missing: list[str] = []
    settings, config = _settings(folder, missing)
    status, where = (read_json(folder / name) for name in ("status.json", "environment.json"))
    missing += [
        f"{name} is missing or damaged" for name, known in (("status.json", status), ("environment.json", where)) if not known
    ]
    rows = read_rows(folder / "metrics.jsonl")
    if not rows:
        missing.append("metrics.jsonl has no row yet: there is nothing to judge or to draw")
    state = status.get("state", "unknown")
    if state != "complete":
        missing.append(f"the run is not complete ({_state(status)}): all that follows is of the time when this page was written")
    images = (where.get("data") or {}).get("images")
    epoch = images // settings["batch_size"] if images and isinstance(settings.get("batch_size"), int) else 0
    trained = [row for row in rows if "loss" in row]
    return {
        "name": folder.resolve().name,
        "state": state,
        "settings": settings,
        "what": _what(settings, status, where, rows, images),
        "verdict": _verdict(folder, rows, config),
        "curves": _curves(rows, epoch),
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
        return flat(json.loads(json.dumps(dataclasses.asdict(config)))), config
    except ConfigError as error:
        if not (folder / "config.yaml").is_file():
            raise
        missing.append(f"this version of relssl does not read its settings, so there are no pictures: {error}")
    with contextlib.suppress(RelsslError):
        return flat(read_yaml(folder / "config.yaml")), None
    return {}, None


def _state(status: dict[str, Any]) -> str:
    error = status.get("error") or {}
    return f"{status.get('state', 'unknown')} at step {status.get('step', '?')}" + (
        f": {error['message']}" if error.get("message") else ""
    )


def _what(
    settings: dict[str, Any], status: dict[str, Any], where: dict[str, Any], rows: list[dict[str, Any]], images: Any
) -> dict[str, str]:
    """Return what was run on what, in words."""
    seconds, before = 0.0, 0
    for row in rows:
        if row.get("images_per_second"):
            seconds, before = seconds + (row["samples"] - before) / row["images_per_second"], row["samples"]
    step, size = rows[-1]["step"] if rows else 0, settings.get("views.weak.size")
    cores = f", {where['cores']} cores" if where.get("cores") else ""
    words = {
        "recipe": str(settings.get("recipe") or ""),
        "method": str(settings.get("method.name") or ""),
        "network": f"{settings.get('backbone')}, stem {settings.get('encoder.stem')}",
        "data": f"{Path(str(settings.get('data'))).name}" + (f", {images:,} images" if images else ""),
        "views": f"{size} x {size} pixels",
        "length": f"{settings.get('epochs')} epochs of batches of {settings.get('batch_size')}; {step:,} steps made",
        "state": _state(status),
        "hardware": f"{where.get('engine', '')}; {where.get('processor', '')}{cores}" if where else "",
        "time in steps": duration(seconds) if seconds else "",
        "versions": ", ".join(f"{name} {version}" for name, version in where.get("versions", {}).items()),
        "revision": (where.get("git") or "")[:12],
    }
    return {name: text for name, text in words.items() if text}


def _verdict(folder: Path, rows: list[dict[str, Any]], config: Config | None) -> dict[str, Any]:
    """Return {"word": learning, flat, collapsing or unknown, "lines": why, "bars": [[what, percent]], "figures": [[what, figure]]}."""
    trained = [row for row in rows if "loss" in row]
    if config is None or not trained:
        return {"word": "unknown", "lines": ["Nothing can be said yet."], "bars": [], "figures": []}
    try:
        known, first, last = figures(Result(folder, folder, rows), config), trained[0], trained[-1]
    except LookupError as error:  # rows of another version
        return {"word": "unknown", "lines": [f"Its rows lack {error}, which a verdict needs."], "bars": [], "figures": []}
    word, lines = known["word"], known["verdict"]
    lines[0] = lines[0].partition(": ")[2].capitalize() if word in ("learning", "flat") else lines[0].partition(": ")[2]
    if word == "healthy":
        moved = _moved(first, last)
        word = "learning" if moved else "flat"
        lines[0] = (
            f"No sign of a collapse; {'; '.join(moved)}."
            if moved
            else "No sign of a collapse, and none of progress since the first row."
        )
    bars = {"raw_pixels": "raw pixels", "untrained": "untrained network", "student": "student", "teacher": "teacher"}
    return {
        "word": word,
        "lines": lines,
        "bars": [[words, known[f"knn_{name}"]] for name, words in bars.items() if known[f"knn_{name}"] is not None],
        "figures": [*map(list, at_the_end(last, config.method.memory_size).values())],
    }


def _moved(first: dict[str, Any], last: dict[str, Any]) -> list[str]:
    """Return what of the relations has clearly changed for the better between two rows, in words."""
    signs: tuple[tuple[str, str, Callable[[float, float], bool]], ...] = (
        ("agreement", "the same nearest neighbour for {0} of samples, before {1}", lambda new, old: new > old + 0.05),
        ("teacher_neighbours", "{0} effective neighbours, before {1}", lambda new, old: new < 0.8 * old),
        ("effective_rank", "an effective rank of {0}, before {1}", lambda new, old: new > 1.1 * old),
    )
    return [
        words.format(_short(last[name]), _short(first[name]))
        for name, words, better in signs
        if last.get(name) is not None and first.get(name) is not None and better(last[name], first[name])
    ]


def _short(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.3g}"


def _curves(rows: list[dict[str, Any]], epoch: int) -> list[dict[str, Any]]:
    """Return the curves of all columns, at most `_POINTS` points a line; those without `about` matter less."""
    known = [*describe()]
    named = {*_PLACES, *(column for each in known for column in each["columns"])}
    others = sorted({name for row in rows for name, value in row.items() if isinstance(value, int | float)} - named)
    known += [{"title": column.replace("_", " ").capitalize(), "columns": {column: "value"}} for column in others]
    curves = []
    for each in known:
        lines = []
        for column, name in each["columns"].items():
            points = [[row["step"] / (epoch or 1), row[column]] for row in rows if row.get(column) is not None]
            stride = max(1, math.ceil(len(points) / _POINTS))
            lines += [{"name": name, "points": points[(len(points) - 1) % stride :: stride]}] if points else []
        start = rows[0] if "knn_top1" in each["columns"] and rows and rows[0]["step"] == 0 else {}
        levels = [[name, start[column]] for column, name in _BASELINES.items() if start.get(column) is not None]
        if each.get("about") or len({y for line in lines for _, y in line["points"]}) > 1:  # schedules that stay are settings
            curve = {"title": each["title"], "about": each.get("about", ""), "log": "teacher_neighbours" in each["columns"]}
            curves += [curve | {"lines": lines, "levels": levels}] if lines else []
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
    names = dict.fromkeys(name for run in runs for name in run["settings"])
    rows = []
    for name in names:
        values = [json.dumps(run["settings"].get(name)) for run in runs]
        if len(set(values)) > 1 and not name.startswith(_ASIDE):
            rows.append([name, *(value.strip('"') for value in values)])
    return rows
