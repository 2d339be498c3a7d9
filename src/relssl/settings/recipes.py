"""Named recipes: YAML files that state only what differs from the defaults, and where each setting comes from.

A recipe may have a `base`, one or a list, later ones above earlier ones and the recipe's own settings above all. A file whose name
begins with _ is no recipe, only a base. That of a method, `_NAME.yaml`, says as `traits` what the method needs.
"""

import contextlib
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as show
from typing import Any

import yaml

from relssl.errors import ConfigError
from relssl.settings.reading import flat, nearest_word, parse_yaml, read_yaml, spell

_FOLDER = Path(__file__).parent / "recipes"
# All files by their names, those without a folder first; a base is not listed.
_FILES = {
    path.relative_to(_FOLDER).with_suffix("").as_posix(): path
    for path in sorted(_FOLDER.rglob("*.yaml"), key=lambda path: (path.parent, path.stem != "_ressl", path.stem))
}
NAMES = tuple(name for name in _FILES if name[0] != "_")
BY_NAME = ("method", "optimizer", "views.weak", "views.strong")  # sections that may be given by the name that they start from


@functools.cache
def _shipped(name: str) -> dict[str, Any]:
    if name not in _FILES:
        guess = nearest_word(name, NAMES)
        raise ConfigError(f"recipe: {name!r} is unknown; the nearest is {guess} (`relssl recipes` lists all)")
    return read_yaml(_FILES[name])


def find(name: str) -> dict[str, str]:
    """Return {"name", "about": one line, "source": of its settings} of a recipe of the package; ConfigError if there is none."""
    return {"name": name, **{part: " ".join(_shipped(name)[part].split()) for part in ("about", "source")}}


def traits() -> dict[str, dict[str, Any]]:
    """Return what the base recipes say that each method needs, by the method's name, ReSSL first."""
    return {name[1:]: _shipped(name)["traits"] for name in _FILES if name[0] == "_" and "traits" in _shipped(name)}


def public_name(name: str | None) -> str:
    """Return what to call a run's recipe where paths of this machine are nobody's business: its name, or that of its file."""
    return name if name in NAMES else Path(name or "").name


def for_run(data: str, method: str = "ressl") -> str:
    """Return the recipe of a run: METHOD/DATA, else METHOD/folder, else the one of its data's name, else `folder`."""
    return next(name for name in (f"{method}/{data}", f"{method}/folder", data, "folder") if name in NAMES)


def read(name: str, above: tuple[str, ...] = (), data: str = "folder") -> dict[str, Any]:
    """Read the settings of a recipe, by name or as a YAML file, with those of its bases below its own, as {dotted name: text}.

    Args:
        above: the recipes that are based on this one.
        data: the recipe of the run's data, which recipes may be based on under the name `data`.

    Raises:
        ConfigError: if there is no such recipe, or it is a base of itself.
    """
    if name in above:
        raise ConfigError(f"recipe: {' is based on '.join((*above, name))}, which never ends")
    raw = read_yaml(Path(os.path.expanduser(name))) if name.endswith((".yaml", ".yml")) else _shipped(name)
    bases = raw.get("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"recipe {name}: base: needs the name of a recipe or a list of names, got {show(bases)}")
    own = spell_out({key: value for key, value in raw.items() if key not in ("about", "source", "base", "traits")})
    return functools.reduce(layer, [*(read(data if base == "data" else base, (*above, name), data) for base in bases), own], {})


def spell_out(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by their dotted names; `method: moco` stands for `method: {name: moco}`, and so for each view; so does a part.

    `batch_size: auto` is `fit_batch: true`; `log.tensorboard: false`, as older runs have it, is `log.to: []`. Arguments of the backbone
    that are text are added to others, as those in a mapping are; `{}` as text takes the others' place.

    Raises:
        ConfigError: if two names give one setting two values.
    """
    own = spell(flat(raw))
    names = {
        f"{name}.name" if name in BY_NAME and (isinstance(value, str) or callable(value)) else name: value
        for name, value in own.items()
    }
    if isinstance(text := names.get("backbone_args"), str):
        with contextlib.suppress(yaml.YAMLError, UnicodeError, RecursionError):  # such text is refused once settings are built
            if isinstance(arguments := parse_yaml(text), dict) and arguments:
                del names["backbone_args"]
                for name, value in flat({"backbone_args": arguments}).items():
                    before = names.setdefault(name, value)
                    if value != (parse_yaml(before) if isinstance(before, str) else before):
                        raise ConfigError(f"{name}: is given twice, as {show(value)} and as {show(names[name])}; give it once")
    if str(names.get("batch_size")).lower() == "auto":
        names = {name: value for name, value in names.items() if name != "batch_size"} | {"fit_batch": True}
    if (board := names.pop("log.tensorboard", None)) is not None:
        names = {"log.to": {"true": ["tensorboard"], "false": []}.get(str(board).lower(), board)} | names
    return names


def layer(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Lay `over` on `base`, both spelled out; arguments that were meant for another backbone stay behind."""
    meant = base.get("backbone")
    other = meant is not None and str(over.get("backbone", meant)) != str(meant)
    return {name: value for name, value in base.items() if not (other and name.startswith("backbone_args"))} | over
