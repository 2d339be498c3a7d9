"""The comparisons that can be rerun, read from `tables/*.yaml`, each at scales of `tables/scales/*.yaml`; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relssl.errors import ConfigError
from relssl.settings.reading import nearest_word, nest, read_yaml

FOLDER = Path(__file__).parent / "tables"
SCALES = ("smoke", "small", "paper")
# How sure a published number is: read in its source, quoted by a third party, or recalled and not checked; from best to worst.
SURE = ("read", "third party", "recalled, high", "recalled, medium", "recalled, low")
# Figures that papers report, and ours that they are compared with.
REPORTED = {"linear": "linear student", "knn": "knn student"}


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: for folders and options; `label`: for people.
        settings: those of its runs besides the scale's.
        paper: published numbers, {"data", "figure": a key of `REPORTED`, "value": percent, "sure": one of `SURE`, "by"}.
    """

    name: str
    label: str
    settings: dict[str, Any]
    scales: tuple[str, ...]
    paper: list[dict[str, Any]]


@dataclass(frozen=True)
class Table:
    """A comparison.

    Attributes:
        reference: name of the row that others are paired with, where the scale has it.
        scales: the table's own settings at each scale.
        expected: what the paper leads one to expect, {"says", "kind", "rows"}; the kind is above (two rows, the better one
            first), collapse or sound (one row).
    """

    name: str
    title: str
    shows: str
    source: str
    reference: str
    scales: dict[str, dict[str, Any]]
    rows: tuple[Row, ...]
    expected: list[dict[str, Any]]

    def at(self, scale: str) -> tuple[Row, ...]:
        """Return the rows at a scale."""
        return tuple(row for row in self.rows if scale in row.scales)


@dataclass(frozen=True)
class Scale:
    """What all tables share at one size: the settings of runs and of their evaluation, and the usual number of seeds."""

    name: str
    about: str
    seeds: int
    settings: dict[str, Any]
    evaluation: dict[str, Any]


def names() -> list[str]:
    """Return the names of all tables."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def known(what: str, word: str, words: Iterable[str]) -> str:
    """Return `word` if it is one of `words`, else raise a ConfigError that names the nearest, and all."""
    words = list(words)
    if word not in words:
        raise ConfigError(f"{what}: {word!r} is unknown; the nearest is {nearest_word(word, words)} (all: {', '.join(words)})")
    return word


def read_table(name: str) -> Table:
    """Read a table by its name, or a YAML file of one's own; a ConfigError names the nearest of an unknown name."""
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{known('table', name, names())}.yaml"
    raw = read_yaml(path)
    scales = {scale: nest(settings or {}) for scale, settings in raw["scales"].items()}
    expected = [_expectation(**entry) for entry in raw["expected"]]
    shows, source = (" ".join(raw[name].split()) for name in ("shows", "source"))
    return Table(path.stem, raw["title"], shows, source, raw["reference"], scales, tuple(map(_row, raw["rows"])), expected)


def read_scale(name: str) -> Scale:
    """Read a scale by its name; a ConfigError names the nearest."""
    raw = read_yaml(FOLDER / "scales" / f"{known('scale', name, SCALES)}.yaml")
    return Scale(name, raw["about"], int(raw["seeds"]), nest(raw["settings"]), raw["evaluation"])


def _row(raw: dict[str, Any]) -> Row:
    paper = [
        {"data": entry["data"], "figure": name, "value": float(entry[name]), "sure": entry["sure"]}
        | {"by": entry.get("by", "the paper")}
        for entry in raw.get("paper", [])
        for name in REPORTED
        if name in entry
    ]
    return Row(raw["name"], raw["label"], nest(raw["settings"]), tuple(raw.get("scales", SCALES)), paper)


def _expectation(says: str, **judged: Any) -> dict[str, Any]:
    ((kind, rows),) = judged.items()
    return {"says": says, "kind": kind, "rows": [rows] if isinstance(rows, str) else rows}
