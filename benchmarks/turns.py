"""Contenders measured in turns (A B C, A B C, ...), each in a process of its own.

Whatever disturbs the machine disturbs all of them alike, and no setting of one (threads, allocator, compiled code) reaches another.
Absolute speeds drift from minute to minute; a ratio is taken within each round and quoted as its median [least..most].
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """A contender at work.

    Attributes:
        run: does so many units of work and returns when they are done, on the device as well; None, or the seconds that count in
            place of the clock's.
        images: images in a unit.
        facts: for the record, such as the precision it runs in.
    """

    run: Callable[[int], float | None]
    images: int
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """One row of a comparison: `make(**arguments)` returns its Work, in a process of its own."""

    name: str
    make: Callable[..., Work]
    arguments: Mapping[str, Any]


def compare(contenders: Sequence[Contender], rounds: int, units: int) -> dict[str, Record]:
    """Measure the contenders in turns.

    Args:
        rounds: turns of each.
        units: units of work in a turn, after one that is not measured.

    Returns:
        By contender: images_per_second, images_per_core_second (processor time, workers included) and seconds_per_unit, each a list
        by rounds; memory_mib, [before the first unit, at the peak]; images in a unit; facts. One that fails has `failed`, the
        reason, and drops out.
    """
    # A server that has done nothing but import the package forks itself: as clean as a new interpreter, and at once there.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["relssl.train.pretrain", "torchvision.transforms.v2"])
    records: dict[str, Record] = {contender.name: {"laps": []} for contender in contenders}
    with ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, context)) for _ in contenders]
        for turn in range(rounds + 1):
            for contender, pool in zip(contenders, pools, strict=True):
                record = records[contender.name]
                if "failed" in record:
                    continue
                try:
                    lap = pool.submit(_lap, contender, units if turn else 1).result()
                    record["laps"] += [lap] if turn else []
                except Exception as error:  # whatever a contender raises, the others go on
                    died = isinstance(error, BrokenProcessPool)
                    reason = "its process died" if died else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                    record["failed"] = reason
                    print(f"{contender.name}: {reason}", flush=True)
    return {name: _summed(record) for name, record in records.items()}


_work: Work | None = None
_before = 0


def _lap(contender: Contender, units: int) -> Record:
    """Some units of work of this process's contender, which the first call makes."""
    global _work, _before
    if _work is None:
        # Else what runs here, such as the workers of a loader, would be started as this process was.
        multiprocessing.set_start_method(None, force=True)  # type: ignore[arg-type]
        _work = contender.make(**contender.arguments)
        with suppress(OSError):  # count the peak from here on
            Path("/proc/self/clear_refs").write_text("5")
        _before = _memory("VmRSS")
    start, used = time.perf_counter(), _cpu_seconds()
    seconds = _work.run(units)
    passed = time.perf_counter() - start
    return {
        "units": units,
        "seconds": passed if seconds is None else seconds,
        "cpu_seconds": _cpu_seconds() - used,
        "memory_mib": [_before >> 20, _memory("VmHWM") >> 20],
        "images": _work.images,
        "facts": dict(_work.facts),
    }


def _cpu_seconds() -> float:
    """Processor seconds of this process and of all its children, ended or at work."""
    # Listed first, as this also collects the children that have ended, whose time then counts in os.times.
    children = multiprocessing.active_children()
    total = sum(os.times()[:4])
    for child in children:
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _memory(field: str) -> int:
    """Bytes now (VmRSS) or at the peak (VmHWM): on the GPU if one is in use, else of this process, without its workers'."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return int(torch.cuda.memory_allocated() if field == "VmRSS" else torch.cuda.max_memory_allocated())
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def _summed(record: Record) -> Record:
    if "failed" in record:
        return {"failed": record["failed"]}
    laps, last = record["laps"], record["laps"][-1]
    images = last["images"]
    return {
        "memory_mib": last["memory_mib"],
        "images": images,
        "facts": last["facts"],
        "images_per_second": [round(images * lap["units"] / lap["seconds"], 2) for lap in laps],
        # A clock that has not ticked would divide by zero; it ticks every hundredth.
        "images_per_core_second": [round(images * lap["units"] / max(lap["cpu_seconds"], 0.01), 2) for lap in laps],
        "seconds_per_unit": [round(lap["seconds"] / lap["units"], 5) for lap in laps],
    }


def times(records: Mapping[str, Record], name: str, base: str, figure: str = "images_per_second") -> list[float] | None:
    """Return how many times `base` a contender reaches, by rounds; None if either failed."""
    if figure not in records[name] or figure not in records[base]:
        return None
    return [mine / other for mine, other in zip(records[name][figure], records[base][figure], strict=True)]


def any_failed(records: Any) -> bool:
    """Return true if a contender failed anywhere in a tree of records."""
    return isinstance(records, dict) and ("failed" in records or any(any_failed(part) for part in records.values()))


def spread(values: Sequence[float] | None, digits: int = 2) -> str:
    """Return median [least..most], or a dash for nothing."""
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


def show_records(title: str, records: dict[str, Record], bases: Sequence[str], figure: str = "images_per_second") -> None:
    """Print images/s, the ratios to each of `bases`, which are also kept in the records, and the peak of memory."""
    rows = []
    for name, record in records.items():
        record["times"] = {base: times(records, name, base, figure) for base in bases}
        before, most = record.get("memory_mib", (0, 0))
        peak = record["failed"] if "failed" in record else f"{most} ({most - before} on top)"
        speeds = [spread(record.get(each), 1) for each in ("images_per_second", "images_per_core_second")]
        rows.append([name, *speeds, *(spread(record["times"][base]) for base in bases), peak])
    unit = "a core, times" if figure == "images_per_core_second" else "times"
    show(title, ["pipeline", "images/s", "images/s a core", *(f"{unit} {base}" for base in bases), "peak MiB"], rows)
