"""Parts of a run from outside the package: named as `package.module:name`, or handed over as objects in Python.

A setting holds text in either case, so that settings can be stored and compared: the name, or `handed:` and what the object is. Whoever
needs the part asks `find` for it. Each part belongs to one setting: backbone, data, method.name, views.weak.name, views.strong.name.
"""

import contextlib
import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

from relssl.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")
SETTINGS = ("backbone", "data", "method.name", "views.weak.name", "views.strong.name")
HANDED = "handed:"
_PART = re.compile(r"(?!hf:|shards:)[A-Za-z_]\w*([.][A-Za-z_]\w*)*:[A-Za-z_]\w*")  # but for the prefixes of DATA
_NAMES = (str, os.PathLike, type(None))  # what is no object handed over
_AT_HAND: ContextVar[Mapping[str, Any]] = ContextVar("parts", default={})  # noqa: B039 - never changed in place


def is_part(value: Any) -> bool:
    """Return whether a setting's value names a part from outside, by the look of it alone."""
    return isinstance(value, str) and (is_handed(value) or _PART.fullmatch(value) is not None)


def named(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return settings, by dotted names, with a name in the place of each object that was handed over; and these objects, for `at_hand`.

    Raises:
        ConfigError: for several folders, or other names, as data.
    """
    parts = {name: settings[name] for name in SETTINGS if not isinstance(settings.get(name), _NAMES)}
    if isinstance(several := parts.get("data"), (list, tuple)) and several and all(isinstance(each, _NAMES) for each in several):
        raise ConfigError(f"data: takes one, got {len(several)}; put the folders below one, or list all their images in one file")
    return {**settings, **{name: name_of(part) for name, part in parts.items()}}, parts


def is_handed(value: str) -> bool:
    """Return whether a part was handed over as an object."""
    return value.startswith(HANDED)


def title(value: str) -> str:
    """Return what to call a part, or anything else that a setting names, in messages."""
    return value.removeprefix(HANDED)


def name_of(part: Any) -> str:
    """Return the text that stands in the settings for an object that is handed over."""
    named = part if hasattr(part, "__qualname__") else type(part)  # a class or function, else an object of a class
    return f"{HANDED}{named.__module__}.{named.__qualname__}"


def same_name(one: Any, other: Any) -> bool:
    """Return whether two objects handed over have the same name, in whatever module: a script's lie elsewhere once they are imported."""
    names = [str(each) for each in (one, other)]
    return all(map(is_handed, names)) and len({re.split("[:.]", name)[-1] for name in names}) == 1


@contextlib.contextmanager
def at_hand(parts: Mapping[str, Any]) -> Iterator[None]:
    """Let `find` return these objects, by the settings that they belong to, inside the context."""
    token = _AT_HAND.set({**_AT_HAND.get(), **parts})
    try:
        yield
    finally:
        _AT_HAND.reset(token)


def takes_data(function: Callable[P, T]) -> Callable[P, T]:
    """Let the argument `data` of a function be a data set in the place of its name, which the function gets."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        bound = signature.bind(*args, **kwargs)
        over, objects = named({"data": bound.arguments.get("data")})
        bound.arguments |= over
        with at_hand(objects):
            return function(*bound.args, **bound.kwargs)

    return call


def is_given(setting: str, value: str) -> bool:
    """Return whether the name of a setting's part, rather than the part, is at hand."""
    return bool(_AT_HAND.get().get(setting) == value)


def find(setting: str, value: str) -> Any:
    """Return the object that a setting's `value` names.

    Raises:
        ConfigError: if it was handed over to another process or another call, or cannot be imported, with the setting and the reason.
    """
    if is_handed(value):
        part = _AT_HAND.get().get(setting)
        # Which network it is shows by its weights, which are compared; a function makes one of another name.
        network = setting == "backbone" and not isinstance(part, str)
        if part is None or not (network or same_name(name_of(part), value)):
            argument = setting.removesuffix(".name").partition(".")[0]
            again = f'hand it over again in Python, {argument}=... or `with relssl.settings.parts.at_hand({{"{setting}": ...}})`'
            raise ConfigError(f"{setting}: {title(value)} was handed over in Python, and is not at hand here; {again}")
        return part
    module, _, name = value.partition(":")
    sys.path.insert(0, os.getcwd())  # where a user's own module lies, whatever the command that runs
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a module raises as it is imported
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"{setting}: {value} cannot be imported ({reason}); needs package.module:name") from error
    finally:
        sys.path.remove(os.getcwd())
