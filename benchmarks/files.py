"""Photographs in files at 224 pixels: the loader alone, and whole steps with ResNet-18, against the conventional pipeline.

The files are those of a folder, or JPEGs made here: 500 x 375, as in ImageNet, and 3000 x 2000, as cameras give. All contenders
have as many loader workers. Images per second of a core count the processor time of all of a contender's processes, so they do
not depend on how many cores were free.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import conventional
import ours
from options import Options
from pictures import Source, write_folder
from relssl.engine import fast_bf16
from rounds import Contender, Record, compare, peak, show, spread, times
from small import TINY

# Each fast path of ours with its switch turned the other way.
SWITCHES: dict[str, Any] = {
    "loader.reduced_decode": False,
    "loader.cache": 256,
}
BASES = {"conventional, Pillow": conventional.pillow, "conventional, tensors": conventional.tensors}


def settings(options: Options, batch: int) -> dict[str, Any]:
    """The recipe for folders, with a network that a processor can train."""
    size = {"views.weak.size": 32, "views.strong.size": 32} if options.tiny else {}
    return {
        "recipe": "folder",
        "backbone": "resnet18",
        "engine.threads": options.threads,
        **(TINY if options.tiny else {}),
        **size,
        "batch_size": batch,
        "loader.workers": options.workers,
    }


def measure(options: Options) -> dict[str, Any]:
    """Compare, print and return the records."""
    with tempfile.TemporaryDirectory() as folder:
        if options.images is not None:
            sets = {options.images.name: (str(options.images), 32)}
        else:
            count = options.pick(512, 16)
            width, height, large = (500, 375, (3000, 2000)) if not options.tiny else (100, 75, (200, 150))
            sets = {
                f"{width} x {height}": (write_folder(Path(folder, "small"), count, width, height), options.pick(32, 8)),
                f"{large[0]} x {large[1]}": (
                    write_folder(Path(folder, "large"), options.pick(64, 8), *large, different=8),
                    options.pick(8, 4),
                ),
            }
        found: dict[str, Any] = {
            f"loader, {name}": _loader(options, name, source, batch) for name, (source, batch) in sets.items()
        }
        name, (source, batch) = next(iter(sets.items()))
        return found | {f"steps, {name}": _steps(options, name, source, batch)}


def _loader(options: Options, name: str, source: Source, batch: int) -> dict[str, Record]:
    base = settings(options, batch)
    shared = {"settings": base, "source": source}
    contenders = [
        Contender(label, conventional.loading, shared | {"style": style, "workers": options.workers})
        for label, style in BASES.items()
    ]
    contenders.append(Contender("relssl", ours.loading, shared))
    with tempfile.TemporaryDirectory() as cache:
        for setting, value in SWITCHES.items():
            more = base | {setting: value} | ({"loader.cache_folder": cache} if setting == "loader.cache" else {})
            contenders.append(Contender(f"relssl, {setting} {value}", ours.loading, shared | {"settings": more}))
        records = compare(contenders, options.rounds, units=options.pick(16 if batch > 8 else 8, 1))
    _table(f"Files, loader alone: {name}, {options.workers} workers", records, "images_per_core_second")
    return records


def _steps(options: Options, name: str, source: Source, batch: int) -> dict[str, Record]:
    base = settings(options, batch)
    precision = "bf16" if fast_bf16("cpu") else "fp32"
    shared = {"settings": base, "source": source}
    more = {"precision": precision, "workers": options.workers, "threads": options.threads}
    contenders = [Contender(label, conventional.training, shared | more | {"style": style}) for label, style in BASES.items()]
    contenders.append(Contender("relssl", ours.training, {"settings": base | {"engine.precision": precision}, "source": source}))
    records = compare(contenders, options.rounds, units=options.pick(4, 1))
    _table(f"Files, training steps: {name}, ResNet-18, {precision}", records, "images_per_second")
    return records


def _table(title: str, records: dict[str, Record], figure: str) -> None:
    """Print the records, their ratios taken of `figure`."""
    rows = []
    for name, record in records.items():
        record["times"] = {base: times(records, name, base, figure) for base in BASES}
        rows.append(
            [
                name,
                spread(record.get("images_per_second"), 1),
                spread(record.get("images_per_core_second"), 1),
                *(spread(record["times"][base]) for base in BASES),
                peak(record),
            ]
        )
    unit = "a core," if figure == "images_per_core_second" else "images/s,"
    heads = ["pipeline", "images/s", "images/s a core", *(f"{unit} times {base}" for base in BASES), "peak MiB"]
    show(title, heads, rows)
