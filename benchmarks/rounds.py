"""Contenders measured in turns (A B C, A B C, ...), so that whatever disturbs the machine disturbs all of them alike.

Absolute speeds drift from minute to minute; a ratio is taken within each round and quoted as its median [least..most].
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from processes import Elsewhere, Failed
from usage import MIB, cpu_seconds, forget_peak, memory, peak_memory

Record = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What a contender does.

    Attributes:
        run: makes this many units of work and returns when they are done, on the device as well; None, or the seconds
            that count in place of the clock's.
        images: images in a unit.
        facts: for the record, such as the precision it runs in.
    """

    run: Callable[[int], float | None]
    images: int
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """One row of a comparison: `make(**arguments)` gives its Work, in a process of its own."""

    name: str
    make: Callable[..., Work]
    arguments: Mapping[str, Any]


def compare(contenders: Sequence[Contender], rounds: int, units: int, deadline: float | None = None) -> dict[str, Record]:
    """Measure the contenders in turns.

    Args:
        rounds: turns of each.
        units: units of work in a turn, after one that is not measured.
        deadline: time.monotonic() after which whoever's turn it is fails, and those after it; None: never.

    Returns:
        By contender: images_per_second, images_per_core_second (processor time, workers included) and seconds_per_unit,
        each a list by rounds; memory_mib, [before the first unit, at the peak]; images in a unit; facts. One that fails has `failed`, the reason, and drops out.
    """
    records: dict[str, Record] = {contender.name: {"laps": []} for contender in contenders}
    with ExitStack() as stack:
        processes = {c.name: stack.enter_context(Elsewhere(_timed, contender=c)) for c in contenders}
        for turn in range(rounds + 1):
            for name, process in processes.items():
                if "failed" in records[name]:
                    continue
                try:
                    lap = process("lap", 1 if turn == 0 else units, timeout=left(deadline))
                    if turn > 0:
                        records[name]["laps"].append(lap)
                    if turn == rounds:
                        records[name] |= process("end", 0, timeout=left(deadline))
                except Failed as error:
                    records[name]["failed"] = str(error)
                    print(f"{name}: {error}", flush=True)
    return {name: _summed(record) for name, record in records.items()}


def left(deadline: float | None) -> float | None:
    """Seconds until then, at least none."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _timed(contender: Contender) -> Callable[[str, int], Any]:
    """What answers in a contender's process: the time of some units, at the end what else there is to know."""
    work = contender.make(**contender.arguments)
    forget_peak()
    before = memory()

    def answer(what: str, units: int) -> Any:
        if what == "end":
            held = [round(before / MIB), round(peak_memory() / MIB)]
            return {"memory_mib": held, "images": work.images, "facts": dict(work.facts)}
        begun, used = time.perf_counter(), cpu_seconds()
        seconds = work.run(units)
        passed = time.perf_counter() - begun
        return {"units": units, "seconds": passed if seconds is None else seconds, "cpu_seconds": cpu_seconds() - used}

    return answer


def _summed(record: Record) -> Record:
    if "failed" in record:
        return {"failed": record["failed"]}
    laps, images = record.pop("laps"), record["images"]
    return record | {
        "images_per_second": [round(images * lap["units"] / lap["seconds"], 2) for lap in laps],
        # A clock that has not ticked would divide by zero; it ticks every hundredth.
        "images_per_core_second": [round(images * lap["units"] / max(lap["cpu_seconds"], 0.01), 2) for lap in laps],
        "seconds_per_unit": [round(lap["seconds"] / lap["units"], 5) for lap in laps],
    }


def times(records: Mapping[str, Record], name: str, base: str, figure: str = "images_per_second") -> list[float] | None:
    """How many times `base` a contender reaches, by rounds; None if either failed."""
    if figure not in records[name] or figure not in records[base]:
        return None
    return [mine / other for mine, other in zip(records[name][figure], records[base][figure], strict=True)]


def peak(record: Record) -> str:
    """The peak of a contender's memory in MiB, or why there is none."""
    return str(record["failed"] if "failed" in record else record["memory_mib"][1])


def spread(values: Sequence[float] | None, digits: int = 2) -> str:
    """median [least..most], or a dash for nothing."""
    if not values:
        return "-"
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} [{low:.{digits}f}..{high:.{digits}f}]"


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table, its columns aligned."""
    cells = [[str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(columns))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    print(f"\n{title}\n\n" + "\n".join([lines[0], rule, *lines[1:]]), flush=True)
