"""The table that an evaluation ends with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from relssl.evaluation.transfer import not_run

_WIDTH = 120  # characters a line where nobody's screen sets it


class _Line(NamedTuple):
    """A line of the table: what was measured how, and what came out."""

    protocol: str
    network: str
    setting: str
    figure: str
    value: str
    interval: str
    notes: tuple[str, ...]


def show(record: dict[str, Any]) -> None:
    """Print a record of `evaluate`: a line for each result, for transfer one for each data set; what to know of them below.

    Args:
        record: {"source", "data", "results": [{"protocol", "network", "setting": {name: value}, "main", "figures": {name:
            percent}, "intervals": {name: [low, high]}, "notes": [sentence], "details"}]}.
    """
    console = _console()
    table = _table(f"{record['source']} on {record['data']}", ("protocol", "network", "setting", "figure"), ("%",))
    table.add_column("notes", overflow="fold")
    numbers: dict[str, int] = {}
    before = None
    for result in record["results"]:
        if before not in (None, result["protocol"]):
            table.add_section()
        before = result["protocol"]
        for line in _lines(result):
            marks = sorted({numbers.setdefault(note, len(numbers) + 1) for note in line.notes})
            table.add_row(*(Text(cell) for cell in (*line[:-1], " ".join(map(str, marks)))))
    console.print(table)
    if numbers:
        console.print()
    for note, number in numbers.items():
        console.print(Text(f"{number:>2}  {note}"), soft_wrap=True)


def show_comparison(rows: list[dict[str, Any]]) -> None:
    """Print what `compare` found, a line for each pair of findings.

    Args:
        rows: {"protocol", "network": [name, name], "setting", "figure", "first", "second", "difference", "interval"?, "allowed"}.
    """
    table = _table("second less first", ("protocol", "network", "setting", "figure"), ("first", "second", "difference"))
    for row in rows:
        names = " / ".join(dict.fromkeys(row["network"]))
        setting = ", ".join(f"{name} {_plain(value)}" for name, value in row["setting"].items())
        values = (f"{row['first']:.2f}", f"{row['second']:.2f}", f"{row['difference']:+.2f}", _range(row.get("interval")))
        table.add_row(*(Text(cell) for cell in (row["protocol"], names, setting, row["figure"], *values)))
    console = _console()
    console.print(table)
    if allowed := sorted({field for row in rows for field in row["allowed"]}):
        console.print(Text(f"\nallowed to differ: {', '.join(allowed)}"))


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH)


def _table(title: str, words: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    """A table with columns of text, then of numbers, then of intervals."""
    table = Table(
        title=Text(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)
    )
    for name in words:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("95 % interval", justify="right", no_wrap=True)
    return table


def _lines(result: dict[str, Any]) -> Iterator[_Line]:
    """The lines of one result."""
    notes = tuple(result.get("notes", ()))
    rows = result.get("details", {}).get("rows", ()) if result["protocol"] == "transfer" else ()
    for row in rows:
        if "not_run" in row:
            yield _Line(result["protocol"], result["network"], row["data"], "not run", "", "", (not_run(row),))
        else:
            yield _Line(
                *(result["protocol"], result["network"], row["data"], row["metric"]),
                *(f"{row['value']:.2f}", _range(row["interval"]), ()),
            )
    main = result["main"]
    setting = "all that ran" if rows else ", ".join(f"{name} {_plain(value)}" for name, value in result["setting"].items())
    value, interval = result["figures"][main], result.get("intervals", {}).get(main)
    yield _Line(result["protocol"], result["network"], setting, main, f"{value:.2f}", _range(interval), notes)


def _plain(value: Any) -> str:
    """A setting's value: numbers short, lists by their elements."""
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(map(_plain, value)) if isinstance(value, (list, tuple)) else str(value)


def _range(interval: Any) -> str:
    return f"{interval[0]:.2f} to {interval[1]:.2f}" if interval else ""
