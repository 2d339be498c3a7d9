"""From plain mappings (YAML, command line, keyword arguments) to frozen dataclasses, with every fault reported at once.

YAML is read with all scalars as strings and each value is then read by the type of the field it lands in, so `1e-3` is a
number, `no` is a word where a word is wanted and `010` is ten: the file means what its reader thinks it means.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from reprlib import repr as show
from typing import Any

import yaml

from relssl.errors import ConfigError

_INT = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_SIGNS = {"gt": (">", operator.gt), "ge": (">=", operator.ge), "lt": ("<", operator.lt), "le": ("<=", operator.le)}
NULL = {"null", "none", "~", ""}
_MAX_YAML_BYTES = 1 << 20


def setting(
    default: Any,
    help: str,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field with its help text and its allowed range, stated once for `--help`, validation and the docs."""
    metadata = {"help": help, "gt": gt, "ge": ge, "lt": lt, "le": le, "choices": choices}
    if dataclasses.is_dataclass(default) or isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def leaves(cls: Any, prefix: str = "") -> dict[str, tuple[Any, dataclasses.Field[Any]]]:
    """Every setting below `cls` as {dotted name: (type, field)}."""
    found: dict[str, tuple[Any, dataclasses.Field[Any]]] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, kind = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(kind):
            found |= leaves(kind, name + ".")
        else:
            found[name] = (kind, field)
    return found


def build(cls: Any, raw: Mapping[str, Any]) -> Any:
    """Make a `cls` of a nested mapping.

    Raises:
        ConfigError: with one line for each unknown key, wrong type and value out of range.
    """
    faults: list[str] = []
    made = _build(cls, raw, "", faults, leaves(cls))
    if faults:
        raise ConfigError(*faults)
    return made


def _build(cls: Any, raw: Mapping[str, Any], prefix: str, faults: list[str], known: Mapping[str, Any]) -> Any:
    hints, values = typing.get_type_hints(cls), {}
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key, value in raw.items():
        name = f"{prefix}{key}"
        if key not in fields:
            faults.append(f"{name}: unknown key; the nearest is {nearest(name, known)}")
        elif dataclasses.is_dataclass(hints[key]):
            if isinstance(value, Mapping):
                values[key] = _build(hints[key], value, name + ".", faults, known)
            else:
                faults.append(f"{name}: is a section, got {show(value)}; set its keys, for example {_first_key(known, name)}")
        else:
            try:
                values[key] = _check(coerce(value, hints[key]), fields[key].metadata)
            except ValueError as fault:
                faults.append(f"{name}: {fault}")
    return None if faults else cls(**values)


def _first_key(known: Mapping[str, Any], section: str) -> str:
    return next(name for name in known if name.startswith(section + "."))


def nearest(name: str, known: Mapping[str, Any]) -> str:
    """The known dotted name closest to `name`; the help's opening words count too, so `lerning_rate` finds `optimizer.lr`."""

    def closeness(candidate: str) -> float:
        spoken = known[candidate][1].metadata["help"].lower().split()
        leaf = name.rsplit(".", 1)[-1]
        forms = [candidate, candidate.rsplit(".", 1)[-1], "_".join(spoken[: leaf.count("_") + 1])]
        return max(difflib.SequenceMatcher(None, a, b).ratio() for a in (name, leaf) for b in forms)

    return max(known, key=closeness)


def nearest_word(word: str, words: Iterable[str]) -> str:
    """The closest of `words`, for refusals that name what was probably meant."""
    return max(words, key=lambda candidate: difflib.SequenceMatcher(None, word, candidate).ratio())


def coerce(value: Any, kind: Any) -> Any:
    """Read `value`, a string or an already typed object, as `kind`; ValueError says what was wanted."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None or (isinstance(value, str) and value.lower() in NULL):
            return None
        return coerce(value, next(a for a in args if a is not type(None)))
    if origin is tuple:
        return _coerce_tuple(value, args)
    if origin is dict:
        value = _parse_flow(value) if isinstance(value, str) else value
        if not isinstance(value, Mapping):
            raise ValueError(f"needs a mapping such as {{name: value}}, got {show(value)}")
        return {str(key): free(item) for key, item in value.items()}
    readers = {bool: _read_bool, int: _read_int, float: _read_float, str: _read_str}
    return readers[kind](value)


def _coerce_tuple(value: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, str):
        value = _parse_flow(value if value.startswith("[") else f"[{value}]")
    if args[-1] is Ellipsis and isinstance(value, (int, float)):
        value = [value]  # one of several
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"needs a list, got {show(value)}")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(coerce(item, args[0]) for item in value)
    if len(value) != len(args):
        raise ValueError(f"needs {len(args)} values, got {len(value)}: {value!r}")
    return tuple(coerce(item, arg) for item, arg in zip(value, args, strict=True))


def free(value: Any) -> Any:
    """A value whose type nobody declared (arguments for timm): numbers, true, false and lists as they look."""
    if isinstance(value, (list, tuple)):
        return [free(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): free(item) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    if _INT.fullmatch(value):
        return int(value)
    return float(value) if _FLOAT.fullmatch(value) else value


def _read_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError(f"needs true or false, got {show(value)}")


def _read_int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str) and _INT.fullmatch(value.strip()) and len(value) < 20:
        number = int(value)
    else:
        raise ValueError(f"needs a whole number, got {show(value)}")
    if abs(number) >= 1 << 63:
        raise ValueError(f"needs a whole number of 63 bits at most, got {show(value)}")
    return number


def _read_float(value: Any) -> float:
    if (isinstance(value, (int, float)) and not isinstance(value, bool)) or (
        isinstance(value, str) and _FLOAT.fullmatch(value.strip()) and len(value) < 40
    ):
        number = float(value)
    else:
        raise ValueError(f"needs a number, got {show(value)}")
    if not math.isfinite(number):
        raise ValueError(f"needs a finite number, got {show(value)}")
    return number


def _read_str(value: Any) -> str:
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"needs text, got {show(value)}")
    return value


def _check(value: Any, rule: Mapping[str, Any]) -> Any:
    """Hold `value`, or each number in it, to the field's range and choices."""
    if isinstance(value, tuple):
        for item in value:
            _check(item, rule)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        if any(rule[name] is not None and not holds(value, rule[name]) for name, (_, holds) in _SIGNS.items()):
            raise ValueError(f"must be {_range(rule)}, got {value}")
    elif isinstance(value, str) and rule["choices"] and value not in rule["choices"]:
        guess = nearest_word(value, rule["choices"])
        raise ValueError(f"must be one of {', '.join(rule['choices'])}, got {show(value)} (nearest: {guess})")
    return value


def _range(rule: Mapping[str, Any]) -> str:
    return " and ".join(f"{sign} {rule[name]:g}" for name, (sign, _) in _SIGNS.items() if rule[name] is not None)


class _Loader(yaml.BaseLoader):
    """All scalars stay strings; a key given twice, an anchor or an alias is refused instead of silently winning or growing."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not read here", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, "a key is not a word", node.start_mark)
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _parse_flow(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"cannot be read as YAML: {text!r}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, all scalars as strings.

    Raises:
        ConfigError: if the file is missing, not a regular file, larger than 1 MiB, not UTF-8, or not a mapping.
    """
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: no such file" if not path.exists() else f"{path}: is not a file")
        if path.stat().st_size > _MAX_YAML_BYTES:
            raise ConfigError(f"{path}: is larger than {_MAX_YAML_BYTES} bytes, which no config is")
        loaded = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        what = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{path}:{where} {what}") from error
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: holds no settings; needs lines of the form `key: value`")
    return loaded


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"optimizer.lr": 1} -> {"optimizer": {"lr": 1}}; nested input passes through."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *sections, leaf = name.split(".")
        inner: dict[str, Any] = {leaf: value}
        for section in reversed(sections):
            inner = {section: inner}
        tree = merge(tree, inner)
    return tree


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` on top; mappings are merged key by key, all else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged
