"""Plain mappings (YAML, command line, keyword arguments) to frozen pydantic dataclasses, with every fault reported at once.

Settings lie on each other by dotted names, as {"optimizer.lr": value}, and are known by the names that other programs have for them as
well (names.yaml). YAML is read with all scalars as text, and each value is then read by the type of its setting, so `1e-3` is a number,
`no` is a word where a word is wanted and `010` is ten.
"""

import collections
import contextlib
import dataclasses
import difflib
import json
import os
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from operator import attrgetter
from pathlib import Path
from reprlib import repr as shortened
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from relssl.errors import ConfigError

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
NULL = {"null", "none", "~", ""}
_LONGEST = 4096  # characters of a text, as of a path
# Of a YAML file; the classes of a fine-tuned network may be tens of thousands.
_MAX_YAML_BYTES, _MAX_YAML_VALUES = 1 << 20, 50_000
_MOST_UNKNOWN = 20  # keys that are told, each with the nearest, which takes a while
_PARSER: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # libyaml is 30 times as fast, where it is there
_BYTES = re.compile(r"\\u[dD][89a-fA-F]")  # of paths that are no UTF-8, which libyaml writes and does not read


# Fields


def _not_empty(text: str) -> str:
    if not text or "\0" in text or len(text) > _LONGEST:
        raise ValueError(f"must be text of at most {_LONGEST} characters")
    return text


def path_text(text: str) -> str:
    """Return a path with the home folder for `~`, with or without a shell; ValueError for one that could not even be looked for."""
    path = os.path.expanduser(text)
    if any(len(os.fsencode(part)) > 255 for part in path.split("/")):
        raise ValueError("has a part of more than 255 bytes, which no file system takes")
    return path


def _rising(bounds: Any) -> Any:
    if bounds[-2] > bounds[-1]:
        raise ValueError("the first bound must not exceed the second")
    return bounds


Text = Annotated[str, AfterValidator(_not_empty)]  # pydantic's own limits on text would refuse paths that are not UTF-8
PathText = Annotated[Text, AfterValidator(path_text)]
RISING = AfterValidator(_rising)


def setting(default: Any, description: str, **limits: float) -> Any:
    """Return a field with its default, help text and limits (gt, ge, lt, le): one place for checks, `--help` and the docs."""
    return Field(default=default, description=description, **limits)  # type: ignore[call-overload]


def leaves(cls: Any, prefix: str = "") -> dict[str, FieldInfo]:
    """Return every setting below a dataclass of settings as {dotted name: field}."""
    fields: dict[str, FieldInfo] = {}
    for name, field in cls.__pydantic_fields__.items():
        if not field.exclude:
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


# Layers, and files of them


class _Checked(yaml.constructor.BaseConstructor):
    """All scalars stay text; a key given twice is refused instead of silently winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        keys = collections.Counter(str(key.value) for key, _ in node.value)
        if twice := [key for key, count in keys.items() if count > 1]:
            raise yaml.MarkedYAMLError(problem=f"key {show(twice[0])} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_FAST, _PLAIN = (type("Loader", (_Checked, base), {}) for base in (_PARSER, yaml.BaseLoader))


def parse_yaml(text: str) -> Any:
    """Return what YAML text holds, all scalars as text; yaml.YAMLError, too, for what would grow: anchors, aliases, and too many values."""
    loader: Any = _PLAIN if _BYTES.search(text) else _FAST
    for count, event in enumerate(yaml.parse(text, Loader=loader)):
        if getattr(event, "anchor", None) or count > _MAX_YAML_VALUES:
            problem = f"anchors, aliases and more than {_MAX_YAML_VALUES} values are not read here"
            raise yaml.YAMLError(problem)
    return yaml.load(text, loader)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file, all scalars as text; ConfigError if there is none, or none of a readable size."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_YAML_BYTES:
            raise ValueError(f"no such file, or one of more than {_MAX_YAML_BYTES} bytes, which no config is")
        loaded = parse_yaml(path.read_text(encoding="utf-8-sig"))
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


def nest(raw: Mapping[str, Any]) -> dict[str, Any]:
    """{"optimizer.lr": 1} -> {"optimizer": {"lr": 1}}; later names win."""
    tree: dict[str, Any] = {}
    for name, value in flat(raw).items():
        node, (*above, leaf) = tree, name.split(".")
        for part in above:
            node[part] = node = node[part] if isinstance(node.get(part), dict) else {}
        if isinstance(value, Mapping):  # an empty one
            value = node[leaf] if isinstance(node.get(leaf), dict) else {}
        node[leaf] = value
    return tree


# Names

_NAMES = read_yaml(Path(__file__).with_name("names.yaml"))
_MEANT = {word: setting.split() for setting, words in _NAMES["words"].items() for word in words.split()}
_ELSEWHERE = {word: advice for words, advice in _NAMES["elsewhere"].items() for word in words.split()}
RETIRED: dict[str, str] = _NAMES["retired"]  # settings, "loader.index", and values, "method.loss_form triton"


def words(setting: str) -> list[str]:
    """Return the other names of a setting, the best one first."""
    return [word for word, settings in _MEANT.items() if setting in settings]


def meant(name: str, known: Collection[str]) -> list[str]:
    """Return the `known` settings that a name stands for, itself if it is one of them or none is known."""
    if name in known or name not in _MEANT:
        return [name]
    settings = [setting for setting in _MEANT[name] if setting in known]
    return settings or [word for word in words(_MEANT[name][0]) if word in known] or [name]


def spell(given: Mapping[str, Any], known: Collection[str] = ()) -> dict[str, Any]:
    """Return settings, by dotted names, under their own names among the `known`, by default those of a run.

    Raises:
        ConfigError: if two names give one setting two values.
    """
    known = known or [setting for settings in _MEANT.values() for setting in settings]
    spelled = dict[str, Any]()
    for name, value in given.items():
        for setting in meant(name, known):
            before = spelled.setdefault(setting, value)
            if before is not value and str(before) != str(value):
                raise ConfigError(f"{setting}: is given twice, as {show(before)} and as {show(value)} ({name}); give it once")
    return spelled


def nearest(name: str, known: Mapping[str, FieldInfo]) -> str:
    """Return the known dotted name closest to `name`, or all that end in it; other names count too: `lerning_rate` is `optimizer.lr`."""
    if same := [each for each in known if each.rpartition(".")[2] == name]:
        return " or ".join(same)

    def closeness(candidate: str) -> float:
        forms = [candidate, candidate.rpartition(".")[2], *words(candidate)]
        return max(_likeness(a, b) for a in (name, name.rpartition(".")[2]) for b in forms)

    return max(known, key=closeness)


def nearest_word(word: str, words: Iterable[str]) -> str:
    """Return the closest of `words`, for refusals that name what was probably meant."""
    return max(words, key=lambda candidate: _likeness(word, candidate))


def _likeness(word: str, other: str) -> float:
    return difflib.SequenceMatcher(None, word[:100], other).ratio()  # whose time grows with the square of the length


def show(value: Any) -> str:
    """Return a value for a message, shortened and in one line."""
    return " ".join(shortened(value).split())


# Values


def build(cls: Any, raw: Mapping[str, Any]) -> Any:
    """Make a `cls` of settings by name, dotted or nested; ConfigError with a line for each unknown key, wrong type and value out of range."""
    try:
        return cls(**_typed(nest(raw), cls))
    except ValidationError as error:
        known, faults = leaves(cls), reversed(error.errors(include_url=False, include_context=False))
        # Where an element is wrong, the length seems to be, too: the first fault of each setting counts.
        first = {".".join(part for part in fault["loc"] if isinstance(part, str)): fault for fault in faults}
        unknown = [name for name in reversed(first) if first[name]["type"] == "unexpected_keyword_argument"]
        more = set(unknown[_MOST_UNKNOWN:])
        lines = [f"{name}: {_reason(name, first[name], known)}" for name in reversed(first) if name not in more]
        raise ConfigError(*lines, *([f"and {len(more)} more unknown keys"] if more else [])) from None


def _reason(name: str, fault: Any, known: Mapping[str, FieldInfo]) -> str:
    """Say in words what pydantic has against a setting, and what to write instead."""
    kind, value = fault["type"], fault["input"]
    if kind == "unexpected_keyword_argument":
        return RETIRED.get(name) or _ELSEWHERE.get(name) or f"unknown key; the nearest is {nearest(name, known)}"
    if kind == "dataclass_type":
        example = next(each for each in known if each.startswith(f"{name}."))
        return f"is a section, got {show(value)}; set its keys, for example {example}"
    if advice := RETIRED.get(f"{name} {value}"):
        return advice
    reason = fault["msg"].removeprefix("Value error, ").replace("Input should", "must")
    reason = {"string_type": f"must be text ({known[name].description})", "too_long": "is too long"}.get(kind, reason)
    reason = "is too short" if kind in ("missing", "too_short") else reason
    options = choices(known[name])
    guess = f" (nearest: {nearest_word(value, options)})" if options and isinstance(value, str) else ""
    return f"{reason}, got {show(value)}{guess}"


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
        with contextlib.suppress(yaml.YAMLError, UnicodeError, RecursionError):
            value = parse_yaml(value if value.startswith(("[", "{")) or origin is dict else f"[{value}]")
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
