"""Plain mappings (YAML, command line, keyword arguments) to frozen pydantic dataclasses, with every fault reported at once.

Settings lie on each other by dotted names, as {"optimizer.lr": value}. YAML is read with all scalars as text, and each value is then
read by the type of its setting, so `1e-3` is a number, `no` is a word where a word is wanted and `010` is ten.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from operator import attrgetter
from pathlib import Path
from reprlib import repr as shortened
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from relssl.errors import ConfigError
from relssl.settings.names import ELSEWHERE, words

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
NULL = {"null", "none", "~", ""}
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
PathText = Annotated[Text, AfterValidator(os.path.expanduser)]  # `~` is the home folder, with or without a shell
RISING = AfterValidator(_rising)


def setting(default: Any, description: str, **limits: float) -> Any:
    """Return a field with its default, help text and limits (gt, ge, lt, le): one place for checks, `--help` and the docs."""
    return Field(default=default, description=description, **limits)  # type: ignore[call-overload]


def leaves(cls: Any, prefix: str = "") -> dict[str, FieldInfo]:
    """Return every setting below a dataclass of settings as {dotted name: field}."""
    fields: dict[str, FieldInfo] = {}
    for name, field in cls.__pydantic_fields__.items():
        if field.exclude:
            continue
        inner = dataclasses.is_dataclass(field.annotation)
        fields |= leaves(field.annotation, f"{prefix}{name}.") if inner else {prefix + name: field}
    return fields


def changes(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    """Return {dotted name: (value before, value after)} of the settings in which two dataclasses of one kind differ."""
    pairs = {name: (attrgetter(name)(before), attrgetter(name)(after)) for name in leaves(type(before))}
    return {name: (old, new) for name, (old, new) in pairs.items() if old != new}


def choices(field: FieldInfo) -> tuple[str, ...]:
    """Return the words that a setting, or each element of it, may be; none if it may be any."""
    kinds = (field.annotation, *typing.get_args(field.annotation))
    return next((typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is typing.Literal), ())


def build(cls: Any, raw: Mapping[str, Any], retired: Mapping[str, str] | None = None) -> Any:
    """Make a `cls` of settings by name, dotted or nested; ConfigError with a line for each unknown key, wrong type and value out of range.

    `retired` holds settings ("loader.index") and values ("method.loss_form triton") that are no more, with a few words on what to
    do instead.
    """
    try:
        return cls(**_typed(nest(flat(raw)), cls))
    except ValidationError as error:
        known, faults = leaves(cls), error.errors(include_url=False, include_context=False)
        lines = [_line(fault, known, retired or {}) for fault in reversed(faults)]
        first = {line.partition(":")[0]: line for line in lines}  # where an element is wrong, the length seems to be, too
        raise ConfigError(*reversed(first.values())) from None


def _line(fault: Any, known: Mapping[str, FieldInfo], retired: Mapping[str, str]) -> str:
    name, value = ".".join(part for part in fault["loc"] if isinstance(part, str)), fault["input"]
    if fault["type"] == "unexpected_keyword_argument":
        advice = retired.get(name) or ELSEWHERE.get(name)
        return f"{name}: {advice or f'unknown key; the nearest is {nearest(name, known)}'}"
    if fault["type"] == "dataclass_type":
        example = next(each for each in known if each.startswith(f"{name}."))
        return f"{name}: is a section, got {show(value)}; set its keys, for example {example}"
    reason = _WORDS.get(fault["type"]) or fault["msg"].removeprefix("Value error, ").replace("Input should", "must")
    if fault["type"] == "string_type":
        reason = f"must be text ({known[name].description})"
    options = choices(known[name])
    guess = f" (nearest: {nearest_word(value, options)})" if options and isinstance(value, str) else ""
    return f"{name}: {retired.get(f'{name} {value}') or f'{reason}, got {show(value)}{guess}'}"


def nearest(name: str, known: Mapping[str, FieldInfo]) -> str:
    """Return the known dotted name closest to `name`, or all that end in it; other names count too: `lerning_rate` is `optimizer.lr`."""
    if same := [each for each in known if each.rpartition(".")[2] == name]:
        return " or ".join(same)
    leaf = name.rpartition(".")[2]

    def closeness(candidate: str) -> float:
        forms = [candidate, candidate.rpartition(".")[2], *words(candidate)]
        return max(difflib.SequenceMatcher(None, a, b).ratio() for a in (name, leaf) for b in forms)

    return max(known, key=closeness)


def show(value: Any) -> str:
    """Return a value for a message, shortened and in one line."""
    return " ".join(shortened(value).split())


def nearest_word(word: str, words: Iterable[str]) -> str:
    """Return the closest of `words`, for refusals that name what was probably meant."""
    return max(words, key=lambda candidate: difflib.SequenceMatcher(None, word, candidate).ratio())


def _typed(value: Any, kind: Any) -> Any:
    """Read text by the type of its setting, as far as pydantic does not; what does not fit stays as it is, to be refused."""
    origin, args, value = typing.get_origin(kind), typing.get_args(kind), _native(value)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        fields: Mapping[str, FieldInfo] = kind.__pydantic_fields__  # type: ignore[union-attr]
        return {key: _typed(item, fields[key].annotation) if key in fields else item for key, item in value.items()}
    if origin in (types.UnionType, typing.Union):
        return None if isinstance(value, str) and value.lower() in NULL else _typed(value, args[0])
    if origin is Annotated:
        return _typed(value, args[0])
    if origin is tuple and args[-1] is Ellipsis and isinstance(value, str) and value.lower() in NULL:
        return []
    if origin in (tuple, dict) and isinstance(value, str):
        with contextlib.suppress(yaml.YAMLError, RecursionError):
            value = yaml.load(value if value.startswith(("[", "{")) or origin is dict else f"[{value}]", _Loader)
    if origin is tuple and args[-1] is Ellipsis and isinstance(value, (int, float)):
        return [value]  # one of several
    if kind is int and isinstance(value, str) and re.fullmatch(r"[0-9]+([.][0-9]+)?[eE][+]?[0-9]{1,2}", value):
        return int(number) if (number := float(value)).is_integer() else value
    return _plain(value) if origin is dict else value


def _native(value: Any) -> Any:
    """Return the plain Python value of a path, of a number of numpy or torch, and of torch's names for devices and types."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return str(value).removeprefix("torch.") if type(value).__module__ == "torch" and not hasattr(value, "shape") else value


def _plain(value: Any) -> Any:
    """Read the numbers and truth values in an argument that may be anything; all else stays as it is."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        return json.loads(value.lower() if value in ("True", "False") else value)
    return value


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
        if not path.is_file() or path.stat().st_size > _MAX_YAML_BYTES:
            raise ValueError(f"no such file, or one of more than {_MAX_YAML_BYTES} bytes, which no config is")
        loaded = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
        if not isinstance(loaded, dict):
            raise ValueError("it holds no settings; needs lines of the form `key: value`")
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        where = f" line {mark.line + 1}:" if mark else ""
        raise ConfigError(f"{path}:{where} cannot be read: {' '.join(str(problem).split())}") from error
    return loaded


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optimizer": {"lr": 1}} -> {"optimizer.lr": 1}; dotted names pass through."""
    names: dict[str, Any] = {}
    for key, value in tree.items():
        names |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return names


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"optimizer.lr": 1} -> {"optimizer": {"lr": 1}}; later names win."""
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
