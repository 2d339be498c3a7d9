"""How a step's time grows with the batch, the memory, the number of views and the size of the images."""

from __future__ import annotations

import statistics
from typing import Any

import ours
from options import Options
from pictures import Noise
from rounds import Contender, Record, compare, peak, show, spread, times
from small import settings

# By axis: the setting, and the values it takes while the others stay at the first of theirs.
BATCHES, MEMORIES, VIEWS, SIZES = (64, 128, 256), (4096, 16384, 65536), (1, 2, 4), (32, 48, 64)


def measure(options: Options) -> dict[str, Any]:
    """Measure along each axis, print and return the records."""
    batches, memories = (16, 32) if options.tiny else BATCHES, (64, 128) if options.tiny else MEMORIES
    axes: dict[str, dict[str, dict[str, Any]]] = {
        "batch": {str(batch): {"batch_size": batch} for batch in batches},
        "memory": {str(memory): {"method.memory_size": memory} for memory in memories},
        "views": {str(views): {"views.crops": [[32, 0.2, 1.0]] * views} for views in VIEWS},
        "size": {str(size): {"views.weak.size": size, "views.strong.size": size} for size in SIZES},
    }
    start = settings(options, batch_size=batches[0]) | {"method.memory_size": memories[0]}
    return {axis: _along(axis, start, points, options) for axis, points in axes.items()}


def _along(axis: str, start: dict[str, Any], points: dict[str, dict[str, Any]], options: Options) -> dict[str, Record]:
    contenders = []
    for point, change in list(points.items())[: options.pick(3, 2)]:
        made = start | change
        source = Noise(4 * int(made["batch_size"]), int(made.get("views.weak.size", 32)))
        contenders.append(Contender(point, ours.training, {"settings": made, "source": source}))
    records = compare(contenders, options.rounds, units=options.pick(3, 1))
    first, rows = next(iter(points)), []
    for point, record in records.items():
        record["times"] = times(records, point, first, "seconds_per_unit")
        seconds = record.get("seconds_per_unit")
        each = "-" if not seconds else f"{1000 * statistics.median(seconds) / record['images']:.2f}"
        rows.append([point, spread(seconds, 3), spread(record["times"]), each, peak(record)])
    rest = ", ".join(f"{name.split('.')[-1]} {start[name]}" for name in ("batch_size", "method.memory_size"))
    heads = [axis, "seconds a step", f"times {axis} {first}", "ms an image", "peak MiB"]
    show(f"Growth with the {axis} ({rest} elsewhere)", heads, rows)
    return records
