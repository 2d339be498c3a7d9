"""Named recipes: YAML files that state only what differs from the defaults, and where each setting comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relssl.errors import ConfigError
from relssl.schema import nearest_word, read_yaml

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """A recipe's name, one line on what it is for, and the source of its settings."""

    name: str
    about: str
    source: str


def names() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def listing() -> list[Recipe]:
    """All recipes with what they say of themselves."""
    found = []
    for name in names():
        raw = read_yaml(_FOLDER / f"{name}.yaml")
        found.append(Recipe(name, " ".join(raw["about"].split()), " ".join(raw["source"].split())))
    return found


def for_data(data: str) -> str:
    """The recipe for a data set: the one of its name, else `folder`."""
    return data if data in names() else "folder"


def read(name: str) -> dict[str, Any]:
    """The raw settings of a recipe, by name or as a YAML file.

    Raises:
        ConfigError: if there is no recipe of that name.
    """
    if name.endswith((".yaml", ".yml")):
        raw = read_yaml(Path(name))
    elif name in names():
        raw = read_yaml(_FOLDER / f"{name}.yaml")
    else:
        guess = nearest_word(name, names())
        raise ConfigError(f"recipe: {name!r} is unknown; the nearest is {guess} (all: {', '.join(names())})")
    return {key: value for key, value in raw.items() if key not in ("about", "source")}
