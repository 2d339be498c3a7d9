"""Plain mappings (YAML, command line, keyword arguments) to frozen pydantic dataclasses, with every fault reported at once.

YAML is read with all scalars as text, and each value is then read by the type of the setting it belongs to, so `1e-3` is a
number, `no` is a word where a word is wanted and `010` is ten: the file means what its reader thinks it means.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from reprlib import repr as show
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from relssl.errors import ConfigError

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
NULL = {"null", "none", "~", ""}
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_MAX_YAML_BYTES = 1 << 20
_WORDS = {"missing": "is too short", "too_short": "is too short", "too_long": "is too long"}  # where pydantic's say less


def _not_empty(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError("must be text")
    return text


def _rising(bounds: Any) -> Any:
    if bounds[-2] > bounds[-1]:
        raise ValueError("the first bound must not exceed the second")
    return bounds


Text = Annotated[str, AfterValidator(_not_empty)]  # pydantic's own limits on text would refuse paths that are not UTF-8
RISING = AfterValidator(_rising)


def setting(default: Any, description: str, **limits: float) -> Any:
    """Return a field with its default, help text and limits (gt, ge, lt, le): one place for checks, `--help` and the docs."""
    return Field(default=default, description=description, **limits)  # type: ignore[call-overload]


def leaves(cls: Any, prefix: str = "") -> dict[str, FieldInfo]:
    """Return every setting below a dataclass of settings as {dotted name: field}."""
    fields: dict[str, FieldInfo] = {}
    for name, field in cls.__pydantic_fields__.items():
        inner = dataclasses.is_dataclass(field.annotation)
        fields |= leaves(field.annotation, f"{prefix}{name}.") if inner else {prefix + name: field}
    return fields


def choices(field: FieldInfo) -> tuple[str, ...]:
    """Return the words that a setting may be, none if it may be any."""
    return typing.get_args(field.annotation) if typing.get_origin(field.annotation) is typing.Literal else ()


def build(cls: Any, raw: Mapping[str, Any], retired: Mapping[str, str] | None = None, known: Any = None, prefix: str = "") -> Any:
    """Make a `cls` of a nested mapping; ConfigError with a line for each unknown key, wrong type and value out of range.

    `retired` holds settings ("loader.index") and values ("method.loss_form triton") that are no more, with a few words on what to
    do instead. Within a section, `known` are all settings there are, and `prefix` is the section's name with a dot.
    """
    retired, known = retired or {}, known or leaves(cls)
    faults: list[str] = []
    values: dict[str, Any] = {}
    for key, value in raw.items():
        name, field = f"{prefix}{key}", cls.__pydantic_fields__.get(key)
        if field is None:
            faults.append(f"{name}: {retired.get(name) or f'unknown key; the nearest is {nearest(name, known)}'}")
        elif not dataclasses.is_dataclass(field.annotation):
            values[key] = _typed(value, field.annotation)
        elif isinstance(value, Mapping):
            try:
                values[key] = build(field.annotation, value, retired, known, f"{name}.")
            except ConfigError as error:
                faults += error.faults
        else:
            example = next(each for each in known if each.startswith(f"{name}."))
            faults.append(f"{name}: is a section, got {show(value)}; set its keys, for example {example}")
    try:
        settings = cls(**values)
    except ValidationError as error:
        for fault in error.errors(include_url=False, include_context=False):
            key, value = str(fault["loc"][0]), fault["input"]
            words = _WORDS.get(fault["type"]) or fault["msg"].removeprefix("Value error, ").replace("Input should", "must")
            name, options = f"{prefix}{key}", choices(cls.__pydantic_fields__[key])
            guess = f" (nearest: {nearest_word(value, options)})" if options and isinstance(value, str) else ""
            faults.append(f"{name}: {retired.get(f'{name} {value}') or f'{words}, got {show(value)}{guess}'}")
    if faults:
        raise ConfigError(*faults)
    return settings


def nearest(name: str, known: Mapping[str, FieldInfo]) -> str:
    """Return the known dotted name closest to `name`; the help's opening words count too: `lerning_rate` is `optimizer.lr`."""

    def closeness(candidate: str) -> float:
        spoken = (known[candidate].description or "").lower().split()
        leaf = name.rsplit(".", 1)[-1]
        forms = [candidate, candidate.rsplit(".", 1)[-1], "_".join(spoken[: leaf.count("_") + 1])]
        return max(difflib.SequenceMatcher(None, a, b).ratio() for a in (name, leaf) for b in forms)

    return max(known, key=closeness)


def nearest_word(word: str, words: Iterable[str]) -> str:
    """Return the closest of `words`, for refusals that name what was probably meant."""
    return max(words, key=lambda candidate: difflib.SequenceMatcher(None, word, candidate).ratio())


def _typed(value: Any, kind: Any) -> Any:
    """Read text by the type of its setting; what does not fit stays as it is, for pydantic to refuse."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _typed(value, args[0])
    if origin in (types.UnionType, typing.Union):
        return None if isinstance(value, str) and value.lower() in NULL else _typed(value, args[0])
    if origin in (tuple, dict) and isinstance(value, str):
        with contextlib.suppress(yaml.YAMLError, RecursionError):
            value = yaml.load(value if value.startswith(("[", "{")) or origin is dict else f"[{value}]", _Loader)
    if origin is tuple:
        value = [value] if args[-1] is Ellipsis and isinstance(value, (int, float)) else value  # one of several
        if not isinstance(value, (list, tuple)):
            return value
        return tuple(map(_typed, value, args[:1] * len(value) if args[-1] is Ellipsis else args + args[-1:] * len(value)))
    if origin is dict:
        return plain(value)
    if isinstance(value, str) and kind in (bool, int, float):
        return plain(value.strip())
    return str(value) if isinstance(value, Path) else value


def plain(value: Any) -> Any:
    """Read the number or truth value that a text looks like; mappings and lists item by item, all else stays as it is."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, str) or len(value) > 40 or not _NUMBER.fullmatch(value):
        return value
    return float(value) if set(value) & set(".eE") else int(value)


class _Loader(yaml.BaseLoader):
    """All scalars stay text; a key given twice, an anchor or an alias is refused instead of silently winning or growing."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not read here", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file, all scalars as text; ConfigError if there is none, or none of a readable size."""
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: no such file")
        if path.stat().st_size > _MAX_YAML_BYTES:
            raise ConfigError(f"{path}: is larger than {_MAX_YAML_BYTES} bytes, which no config is")
        loaded = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except (yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        where = f" line {mark.line + 1}:" if mark else ""
        raise ConfigError(f"{path}:{where} cannot be read: {' '.join(str(problem).split())}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: holds no settings; needs lines of the form `key: value`")
    return loaded


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"optimizer.lr": 1} -> {"optimizer": {"lr": 1}}; nested input passes through."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        for part in reversed(name.split(".")):
            value = {part: value}
        tree = merge(tree, value)
    return tree


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `over` on `base`; mappings are merged key by key, all else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged
