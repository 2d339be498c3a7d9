"""The comparisons that can be rerun, read from `tables/*.yaml`, each at scales of `tables/scales/*.yaml`; no torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relssl.errors import ConfigError
from relssl.settings.reading import flat, nearest_word, read_yaml
from relssl.settings.recipes import layer, spell_out

FOLDER = Path(__file__).parent / "tables"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SCALES = ("smoke", "small", "medium", "paper")
# How sure a published number is: read in its source, quoted by a third party, or recalled and not checked; from best to worst.
SURE = ("read", "third party", "recalled, high", "recalled, medium", "recalled, low")
# Figures that papers report, and ours that they are compared with.
REPORTED = {"linear": "linear student", "knn": "knn student"}


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    name: str  # for folders and options
    label: str  # for people
    settings: dict[str, Any]  # of its runs besides the table's, by dotted name
    paper: list[dict[str, Any]]  # published: {"data", "figure": a key of REPORTED, "value": percent, "sure": one of SURE, "by"}


@dataclass(frozen=True)
class Table:
    """A comparison at a scale, which all tables share."""

    name: str
    title: str
    shows: str
    source: str
    scale: str
    about: str  # the scale in words
    reference: str  # the row that others are paired with
    seeds: int  # usual number of runs of each row
    settings: dict[str, Any]  # of all runs, by dotted name
    evaluation: dict[str, Any]  # settings of their evaluation
    rows: list[Row]
    # By the paper: {"says", "kind", "rows"}; the kind is above (two rows, the better one first), collapse or sound (one row).
    expected: list[dict[str, Any]]


def known(what: str, word: str, words: Iterable[str]) -> str:
    """Return `word` if it is one of `words`, else raise a ConfigError that names the nearest, and all."""
    if word not in (words := list(words)):
        raise ConfigError(f"{what}: {word!r} is unknown; the nearest is {nearest_word(word, words)} (all: {', '.join(words)})")
    return word


def offered(scale: str) -> list[Table]:
    """Return the shipped tables that have this scale."""
    return [read_table(name, scale) for name in NAMES if scale in read_yaml(FOLDER / f"{name}.yaml")["scales"]]


def read_table(name: str, scale: str = "small") -> Table:
    """Read a table by its name, or a YAML file of one's own; a ConfigError names the nearest of an unknown name or scale."""
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{known('table', name, NAMES)}.yaml"
    raw, at = read_yaml(path), read_yaml(FOLDER / "scales" / f"{known('scale', scale, SCALES)}.yaml")
    each_needs = {"row": ("name", "label", "settings"), "table": ("title", "shows", "source", "reference", "scales", "rows")}
    for kind, own in [("table", raw), *(("row", row) for row in raw.get("rows", ()))]:
        if missing := [key for key in each_needs[kind] if key not in own]:
            raise ConfigError(f"{path}: a {kind} is without {missing[0]}; needs {', '.join(each_needs[kind])}")
    every = [row["name"] for row in raw["rows"]]
    if twice := {name for name in every if every.count(name) > 1}:
        raise ConfigError(f"{path}: {min(twice)} is the name of several rows; give each its own")
    if scale not in raw["scales"]:
        raise ConfigError(f"scale: {path.stem} has no {scale} scale; it has {', '.join(raw['scales'])}")
    rows = [_row(row) for row in raw["rows"] if scale in row.get("scales", SCALES)]
    if not rows:
        raise ConfigError(f"{path}: has no rows at the {scale} scale")
    names = [row.name for row in rows]
    expected = [
        {"says": each["says"], "kind": kind, "rows": [compared] if isinstance(compared, str) else compared}
        for each in raw.get("expected", ())
        for kind, compared in each.items()
        if kind != "says"
    ]
    for name in (raw["reference"], *(name for each in expected for name in each["rows"])):
        known(f"{path}: row", name, every)
    return Table(
        name=path.stem,
        title=raw["title"],
        shows=" ".join(raw["shows"].split()),
        source=" ".join(raw["source"].split()),
        scale=scale,
        about=at["about"],
        reference=raw["reference"] if raw["reference"] in names else names[0],
        seeds=int(at["seeds"]),
        settings=layer(spell_out(at["settings"]), spell_out(raw["scales"].get(scale) or {})),
        evaluation=flat(at["evaluation"]),
        rows=rows,
        expected=[each for each in expected if {*each["rows"]} <= {*names}],
    )


def _row(raw: dict[str, Any]) -> Row:
    paper = [
        {
            "data": each["data"],
            "figure": name,
            "value": float(each[name]),
            "sure": each["sure"],
            "by": each.get("by", "the paper"),
        }
        for each in raw.get("paper", [])
        for name in REPORTED.keys() & each.keys()
    ]
    return Row(raw["name"], raw["label"], spell_out(raw["settings"]), paper)
