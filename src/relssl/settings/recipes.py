"""Named recipes, and how settings are laid over each other. Recipes are YAML files that state only what differs from the defaults, and
where each setting comes from.

A recipe may have a `base`, one or a list, later ones above earlier ones and the recipe's own settings above all. A file whose name
begins with _ is only there to be a base, and no recipe.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as show
from typing import Any

from relssl.errors import ConfigError
from relssl.settings.reading import merge, nearest_word, read_yaml

_FOLDER = Path(__file__).parent / "recipes"
_PARTS = tuple(path.stem for path in _FOLDER.glob("_*.yaml"))


@dataclass(frozen=True)
class Recipe:
    """A recipe's name, one line on what it is for, and the source of its settings."""

    name: str
    about: str
    source: str


@functools.cache
def names() -> tuple[str, ...]:
    """The names of the recipes that come with the package."""
    found = sorted(
        path.relative_to(_FOLDER).with_suffix("").as_posix() for path in _FOLDER.rglob("*.yaml") if path.name[0] != "_"
    )
    return tuple(sorted(found, key=lambda name: name.rpartition("/")[0]))  # those without a folder first


def spoken(name: str | None) -> str:
    """What to call a run's recipe where paths of this machine are nobody's business: its name, or that of its file."""
    return name if name in names() else Path(name or "").name


def find(name: str) -> Recipe:
    """What a recipe of that name says of itself; ConfigError if there is none."""
    found = {recipe.name: recipe for recipe in listing()}
    if name not in found:
        raise _unknown(name)
    return found[name]


def listing() -> list[Recipe]:
    """All recipes with what they say of themselves."""
    found = []
    for name in names():
        raw = _shipped(name)
        found.append(Recipe(name, " ".join(raw["about"].split()), " ".join(raw["source"].split())))
    return found


def for_run(data: str, method: str = "ressl") -> str:
    """The recipe of a run: the one of its data's name, else `folder`; for another method than ReSSL in that method's folder, if it
    has such a recipe."""
    plain = data if data in names() else "folder"
    return next((name for name in (f"{method}/{data}", f"{method}/folder") if name in names()), plain)


def read(name: str) -> dict[str, Any]:
    """The raw settings of a recipe, by name or as a YAML file; those of its bases lie below its own.

    Raises:
        ConfigError: if there is no recipe of that name, or recipes are based on each other in a circle.
    """
    return _read(name, ())


@functools.cache
def _shipped(name: str) -> dict[str, Any]:
    """The text of a recipe of the package; layers are laid over it and leave it as it is."""
    return read_yaml(_FOLDER / f"{name}.yaml")


def _read(name: str, above: tuple[str, ...]) -> dict[str, Any]:
    if name in above:
        raise ConfigError(f"recipe: {' is based on '.join((*above, name))}, which never ends")
    if name.endswith((".yaml", ".yml")):
        raw = read_yaml(Path(name))
    elif name in (*names(), *_PARTS):
        raw = _shipped(name)
    else:
        raise _unknown(name)
    bases = raw.get("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"recipe {name}: base: needs the name of a recipe or a list of names, got {show(bases)}")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = layer(merged, _read(base, (*above, name)))
    return layer(merged, spell_out({key: value for key, value in raw.items() if key not in ("about", "source", "base")}))


def spell_out(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`strong: contrastive` is short for `strong: {name: contrastive}`, `method: moco` for `method: {name: moco}`; spelled out,
    later layers can merge into it."""
    raw = {**raw, "method": {"name": raw["method"]}} if isinstance(raw.get("method"), str) else dict(raw)
    views = raw.get("views")
    if not isinstance(views, Mapping):
        return raw
    spelled = {
        side: {"name": view} if isinstance(view, str) and side in ("weak", "strong") else view for side, view in views.items()
    }
    return {**raw, "views": spelled}


def layer(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over` on top, both spelled out; arguments that were meant for another backbone stay behind."""
    if over.get("backbone", base.get("backbone")) != base.get("backbone"):
        base = {key: value for key, value in base.items() if key != "backbone_args"}
    return merge(base, over)


def _unknown(name: str) -> ConfigError:
    guess = nearest_word(name, names())
    return ConfigError(f"recipe: {name!r} is unknown; the nearest is {guess} (`relssl recipes` lists all)")
