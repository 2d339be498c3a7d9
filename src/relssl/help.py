"""The help of commands that take settings: the ones that matter, or all, with what they would be in the run at hand; no torch."""

from __future__ import annotations

import itertools
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

from relssl.settings.names import words
from relssl.settings.reading import choices, leaves

_WIDTH, _LEFT = 80, 24


def page(usage: str, about: str, options: Mapping[str, Any], settings: Any, main: tuple[str, ...] | None, every: bool) -> str:
    """Return the help of a command.

    Args:
        options: its own options, as {name: arguments of argparse}.
        settings: those that it would run with.
        main: dotted names of the settings to list, by their short names; None: those outside of sections.
        every: list all of them instead, section by section.
    """
    fields, shown = leaves(type(settings)), main
    if shown is None:
        shown = tuple(name for name in fields if "." not in name)
    own: dict[str, Any] = {"--help-all": {"help": f"list all {len(fields)} settings, too"}, **options}
    rows = [
        (f"{name if name.startswith('-') else ''} {how.get('metavar') or ''}".strip(), how.get("help"))
        for name, how in own.items()
    ]
    lines = textwrap.wrap(" ".join(usage.split()), _WIDTH, subsequent_indent="       ")
    lines += ["", *textwrap.wrap(f"{about[0].upper()}{about[1:]}.", _WIDTH), "", *_rows(rows)]
    basis = f"what {settings.data} has with recipe {settings.recipe}" if hasattr(settings, "recipe") else "their defaults"
    if every:
        for section, group in itertools.groupby(
            (name for name in fields if name != "data"), lambda name: name.rpartition(".")[0]
        ):
            title = f"{section}: {attrgetter(section)(settings).__doc__}" if section else f"settings and {basis}:"
            lines += ["", *textwrap.wrap(" ".join(title.split()), _WIDTH)]
            lines += _rows((f"--{name} {_value(settings, name)}", _about(fields[name])) for name in group)
    elif shown:
        lines += ["", *textwrap.wrap(f"settings that matter and {basis}:", _WIDTH)]
        lines += _rows(
            (f"--{_short(name)} {_value(settings, name)}", _about(fields[name], brief=True)) for name in shown if name != "data"
        )
    return "\n".join(lines)


def _short(name: str) -> str:
    return name if "." not in name else next(iter(words(name)), name.removesuffix(".name"))


def _value(settings: Any, name: str) -> str:
    value = attrgetter(name)(settings)
    return value if isinstance(value, str) else json.dumps(value).strip("[]").replace(", ", ",").replace('"', "")


def _about(field: Any, brief: bool = False) -> str:
    """Return what a setting is and may be; in brief, the first of its clauses."""
    one_of = f"one of {', '.join(choices(field))}" if choices(field) else ""
    if brief:
        return one_of or re.split(r"; | [(]", field.description)[0]
    return f"{field.description}{f' ({one_of})' if one_of else ''}"


def _rows(rows: Any) -> Iterator[str]:
    """Yield (left, text) pairs as two columns; a left one that is too long stands in a line of its own."""
    for left, text in rows:
        first, *rest = textwrap.wrap(text or "", _WIDTH - _LEFT - 3, break_on_hyphens=False) or [""]
        if len(left) > _LEFT - 1:
            yield f"  {left}"
            left = ""
        yield f"  {left:<{_LEFT}}{first}".rstrip()
        yield from (" " * (_LEFT + 2) + line for line in rest)
