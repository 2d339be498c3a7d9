"""Small images: CIFAR-shaped, ResNet-18 with a 3x3 stem; whole training steps against the conventional pipeline.

Ours runs as `relssl pretrain cifar10` would; the conventional pipeline has the same network, memory and batch. Both are
measured in fp32 and in bf16, each in a process of its own, as our setting of the allocator would speed up the other as well.
"""

from __future__ import annotations

from typing import Any

import conventional
import ours
from options import Options
from pictures import Noise
from rounds import Contender, compare, peak, show, spread, times

# A network of a few thousand weights, for trials.
TINY = {
    "backbone_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "zero_init_last": False},
    "encoder.projector_hidden": 32,
    "encoder.dim": 16,
    "batch_size": 16,
    "method.memory_size": 64,
}
PRECISIONS = ("fp32", "bf16")


def settings(options: Options, **more: Any) -> dict[str, Any]:
    """The recipe cifar10 on random images."""
    made = {"recipe": "cifar10", "engine.threads": options.threads} | (TINY if options.tiny else {})
    if options.memory is not None:
        made["method.memory_size"] = options.memory
    return made | more


def measure(options: Options) -> dict[str, Any]:
    """Compare, print and return the records."""
    base, source = settings(options), Noise(options.pick(20 * 256, 64), 32)
    more = {"source": source, "workers": options.workers, "threads": options.threads}
    contenders = [
        Contender(f"conventional {precision}", conventional.training, {"settings": base, "precision": precision} | more)
        for precision in PRECISIONS
    ]
    for precision in PRECISIONS:
        shared = {"settings": base | {"engine.precision": precision}, "source": source}
        contenders.append(Contender(f"relssl {precision}", ours.training, shared))
        contenders.append(Contender(f"floor {precision}", ours.floor, shared | {"seconds": options.pick(100, 5) / 100}))
    records = compare(contenders, options.rounds, units=options.pick(4, 1))
    bases = [f"{name} {precision}" for name in ("conventional", "floor") for precision in PRECISIONS]
    rows = []
    for name, record in records.items():
        record["times"] = {other: times(records, name, other) for other in bases}
        cells = [spread(record["times"][other]) for other in bases[:2]]
        share = spread(record["times"][f"floor {name.split()[-1]}"])
        rows.append([name, spread(record.get("images_per_second"), 1), *cells, share, peak(record)])
    heads = ["pipeline", "images/s", *(f"times {other}" for other in bases[:2]), "share of its floor", "peak MiB"]
    show(f"Small images: training steps, {options.threads} threads", heads, rows)
    return {"settings": base, "records": records}
