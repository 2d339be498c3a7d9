"""Named recipes, and how settings are laid over each other. Recipes are YAML files that state only what differs from the defaults, and
where each setting comes from.

A recipe may have a `base`, one or a list, later ones above earlier ones and the recipe's own settings above all. A file whose name
begins with _ is no recipe, only a base. That of a method, `_NAME.yaml`, says as `traits` what the method needs.
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
_BASES = sorted((path.stem for path in _FOLDER.glob("_*.yaml")), key=lambda name: (name != "_ressl", name))


@dataclass(frozen=True)
class Recipe:
    """A recipe's name, one line on what it is for, and the source of its settings."""

    name: str
    about: str
    source: str


@functools.cache
def names() -> tuple[str, ...]:
    """Return the names of the recipes that come with the package, those without a folder first."""
    paths = (path.relative_to(_FOLDER).with_suffix("") for path in _FOLDER.rglob("*.yaml") if path.name[0] != "_")
    return tuple(path.as_posix() for path in sorted(paths, key=lambda path: (path.parent, path)))


def traits() -> dict[str, dict[str, Any]]:
    """Return what the base recipes say that each method needs, by the method's name, ReSSL first."""
    return {name[1:]: _shipped(name)["traits"] for name in _BASES if "traits" in _shipped(name)}


def public_name(name: str | None) -> str:
    """Return what to call a run's recipe where paths of this machine are nobody's business: its name, or that of its file."""
    return name if name in names() else Path(name or "").name


def find(name: str) -> Recipe:
    """Return a recipe that comes with the package; ConfigError if there is none of that name."""
    if name in _BASES:
        raise ConfigError(f"recipe: {name!r} is only a base of recipes (`relssl recipes` lists these)")
    raw = _shipped(name)
    return Recipe(name, " ".join(raw["about"].split()), " ".join(raw["source"].split()))


def for_run(data: str, method: str = "ressl") -> str:
    """Return the recipe of a run: the one of its data's name, else `folder`; for another method than ReSSL in that method's
    folder, if it has such a recipe."""
    own = data if data in names() else "folder"
    return next((name for name in (f"{method}/{data}", f"{method}/folder") if name in names()), own)


@functools.cache
def _shipped(name: str) -> dict[str, Any]:
    """Read a recipe or base of the package; layers are laid over it and leave it as it is."""
    if name not in (*names(), *_BASES):
        guess = nearest_word(name, names())
        raise ConfigError(f"recipe: {name!r} is unknown; the nearest is {guess} (`relssl recipes` lists all)")
    return read_yaml(_FOLDER / f"{name}.yaml")


def read(name: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read the raw settings of a recipe, by name or as a YAML file, with those of its bases below its own.

    Raises:
        ConfigError: if there is no such recipe, or it is a base of itself; `above` are the recipes that are based on this one.
    """
    if name in above:
        raise ConfigError(f"recipe: {' is based on '.join((*above, name))}, which never ends")
    raw = read_yaml(Path(name)) if name.endswith((".yaml", ".yml")) else _shipped(name)
    bases = raw.get("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"recipe {name}: base: needs the name of a recipe or a list of names, got {show(bases)}")
    own = spell_out({key: value for key, value in raw.items() if key not in ("about", "source", "base", "traits")})
    return functools.reduce(layer, [*(read(base, (*above, name)) for base in bases), own], {})


def spell_out(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Write short forms out, so that later layers can be merged into them: `strong: contrastive` stands for
    `strong: {name: contrastive}`, `method: moco` for `method: {name: moco}`."""

    def named(section: Mapping[str, Any], *keys: str) -> dict[str, Any]:
        return {key: {"name": value} if key in keys and isinstance(value, str) else value for key, value in section.items()}

    raw = named(raw, "method")
    return raw | {"views": named(raw["views"], "weak", "strong")} if isinstance(raw.get("views"), Mapping) else raw


def layer(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Lay `over` on `base`, both spelled out; arguments that were meant for another backbone stay behind."""
    if over.get("backbone", base.get("backbone")) != base.get("backbone"):
        base = {key: value for key, value in base.items() if key != "backbone_args"}
    return merge(base, over)
