"""The comparisons that can be rerun, read from `tables/*.yaml`; imports no torch.

A table names its rows by the settings they differ in. Where it runs is a scale: `tables/scales/*.yaml` holds what all tables share
at each, the table what is its own there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relssl.errors import ConfigError
from relssl.settings.reading import nearest_word, nest, read_yaml

_FOLDER = Path(__file__).parent / "tables"
SCALES = ("smoke", "small", "paper")
# How sure a number is that stands for the paper's, from best to worst.
SURE = ("read", "third party", "recalled, high", "recalled, medium", "recalled, low")
# Figures that papers report, and ours that they are compared with: (protocol, network).
REPORTED = {"linear": ("linear", "student"), "knn": ("knn", "student")}


@dataclass(frozen=True)
class Number:
    """A published figure.

    Attributes:
        data: the data set it was measured on.
        figure: a key of `REPORTED`; `value` is in percent.
        sure: one of `SURE`: read in its source, in a third party that quotes it, or recalled and not checked.
        by: whose it is.
    """

    data: str
    figure: str
    value: float
    sure: str
    by: str


@dataclass(frozen=True)
class Row:
    """One line of a table: a run's settings, but for what the scale gives; `name` is for folders and options."""

    name: str
    label: str
    settings: dict[str, Any]
    scales: tuple[str, ...]
    paper: tuple[Number, ...]


@dataclass(frozen=True)
class Expectation:
    """What the paper leads one to expect: `kind` is above (two rows, the better first), collapse or sound (one row)."""

    says: str
    kind: str
    rows: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A comparison.

    Attributes:
        shows: what it is about; `source`: where its numbers come from.
        reference: name of the row that others are paired with, where the scale has it.
        scales: the table's own settings at each scale.
    """

    name: str
    title: str
    shows: str
    source: str
    reference: str
    scales: dict[str, dict[str, Any]]
    rows: tuple[Row, ...]
    expected: tuple[Expectation, ...]

    def at(self, scale: str) -> tuple[Row, ...]:
        """The rows at a scale."""
        return tuple(row for row in self.rows if scale in row.scales)


@dataclass(frozen=True)
class Scale:
    """What all tables share at one size: settings of runs and of their evaluation, and how many seeds unless told otherwise."""

    name: str
    about: str
    seeds: int
    settings: dict[str, Any]
    evaluation: dict[str, Any]


def names() -> list[str]:
    """The names of all tables."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def known(what: str, word: str, words: Iterable[str]) -> str:
    """`word`, if it is one of `words`.

    Raises:
        ConfigError: naming the nearest, and all.
    """
    words = list(words)
    if word not in words:
        raise ConfigError(f"{what}: {word!r} is unknown; the nearest is {nearest_word(word, words)} (all: {', '.join(words)})")
    return word


def read_table(name: str) -> Table:
    """A table by its name; ConfigError names the nearest."""
    raw = read_yaml(_FOLDER / f"{known('table', name, names())}.yaml")
    return Table(
        name=name,
        title=raw["title"],
        shows=" ".join(raw["shows"].split()),
        source=" ".join(raw["source"].split()),
        reference=raw["reference"],
        scales={scale: nest(settings or {}) for scale, settings in raw["scales"].items()},
        rows=tuple(map(_row, raw["rows"])),
        expected=tuple(map(_expectation, raw["expected"])),
    )


def read_scale(name: str) -> Scale:
    """A scale by its name; ConfigError names the nearest."""
    raw = read_yaml(_FOLDER / "scales" / f"{known('scale', name, SCALES)}.yaml")
    return Scale(name, raw["about"], int(raw["seeds"]), nest(raw["settings"]), raw["evaluation"])


def _row(raw: Mapping[str, Any]) -> Row:
    numbers = [
        Number(said["data"], figure, float(said[figure]), said["sure"], said.get("by", "the paper"))
        for said in raw.get("paper", [])
        for figure in REPORTED
        if figure in said
    ]
    return Row(raw["name"], raw["label"], nest(raw["settings"]), tuple(raw.get("scales", SCALES)), tuple(numbers))


def _expectation(raw: Mapping[str, Any]) -> Expectation:
    (kind,) = raw.keys() - {"says"}
    rows = raw[kind]
    return Expectation(raw["says"], kind, (rows,) if isinstance(rows, str) else tuple(rows))
