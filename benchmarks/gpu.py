"""All that is to be run when a GPU is there, in one command; results are written as they come.

    python benchmarks/gpu.py [--only equal,small,...] [--limit 540] [--data_root FOLDER] [--out results/gpu.json]
    python benchmarks/gpu.py --tiny      the same code on a processor, in a minute or two; the figures mean nothing

`equal`: the losses of a run's first steps in fp32, on the GPU and on the processor. `small` and the names of networks: training steps
on random images in the device's memory, speed-ups added one at a time, beside the floor, the rate at which the device could do a
step's products were there nothing else. `run`: CIFAR-10 from start to end. One section that fails leaves the others alone; at the
limit everything ends, so that one that hangs does not hold the GPU, and the sections before it are in the file.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import threading
import time
from functools import partial
from typing import Any

import contenders
import relssl
from contenders import Contenders, Measures, Record, compare, floor, measure_parts, settings_of, show, show_records, training

NETWORKS = ("resnet50", "efficientnet_b0", "mobilenetv3_large_100")
# Speed-ups one after another; each row has those above it as well.
STEPS: dict[str, Record] = {
    "none": {"compile": "off", "loader.views_ahead": 1},
    "8 steps' views in one go": {"loader.views_ahead": 8},
    "compiled": {"compile": "on"},
}
OFFICIAL_CROPS = [[224, 0.2, 1], [192, 0.172, 0.86], [160, 0.143, 0.715], [128, 0.114, 0.571], [96, 0.086, 0.429]]


def measure_equal(args: argparse.Namespace) -> Record:
    """Compare the losses of the first steps on both devices."""
    losses: Record = {}
    settings: Record = {"engine.precision": "fp32", "max_images": 1024, "epochs": 2, "log.every": 1, "quiet": True}
    for name, device in (("cpu", "cpu"), ("gpu", "cpu" if args.tiny else "cuda")):
        with tempfile.TemporaryDirectory() as folder:
            run = relssl.pretrain("digits", out=f"{folder}/run", **settings | {"engine.device": device})
        assert run is not None
        losses[name] = [row["loss"] for row in run.rows if "loss" in row]
    difference = max(abs(one / other - 1) for one, other in zip(*losses.values(), strict=True))
    show("Losses on the GPU and on the processor", ["steps", "largest relative difference"], [[len(losses["cpu"]), difference]])
    return {"losses": losses, "difference": difference}


def measure_small(args: argparse.Namespace) -> Record:
    """Measure steps of CIFAR-shaped images, the conventional pipeline among them."""
    settings, source = settings_of(args, recipe="cifar10"), (64 if args.tiny else 50_000, 32)
    first = {"conventional": partial(contenders.conventional_training, settings | {"engine.precision": "bf16"}, source)}
    return {"one view": _climb(args, "small", settings, source, first)}


def measure_network(args: argparse.Namespace, network: str) -> Record:
    """Measure steps of ImageNet's recipe with another network, by one view and by the official five."""
    size, crops = (64, [[64, 0.2, 1], [32, 0.1, 0.5]]) if args.tiny else (224, OFFICIAL_CROPS)
    settings = settings_of(args, recipe="imagenet", backbone=network, batch_size=256)
    settings |= {"backbone_args": {"zero_init_last": False} if network.startswith("resnet") else {}}
    settings |= {"views.weak.size": size, "views.strong.size": size}
    source = (64, 80) if args.tiny else (2048, 256)
    five = _climb(args, f"{network}, {len(crops)} views", settings | {"views.crops": crops}, source, {})
    return {"one view": _climb(args, f"{network}, one view", settings, source, {}), f"{len(crops)} views": five}


def _climb(args: argparse.Namespace, title: str, settings: Record, source: tuple[int, int], first: Contenders) -> Record:
    """Measure with no speed-up, then with one more at a time, and the floor; one after another, as two may not fit the device."""
    rows, changes, records = dict(first), dict[str, Any](), dict[str, Record]()
    for name, change in STEPS.items():
        if not (args.tiny and name == "compiled"):  # which takes a processor minutes
            changes |= change
            rows[name] = partial(training, settings | changes, source)
    rows["floor"] = partial(floor, settings, source)
    for name, create in rows.items():
        records |= compare({name: create}, args.rounds, units=1 if args.tiny else 16)
    show_records(title, records, ["floor"])
    return {"settings": settings, "records": records}


def measure_run(args: argparse.Namespace) -> Record:
    """Pretrain on CIFAR-10 for 200 epochs, then evaluate student and teacher."""
    settings: Record = {"data": "cifar10", "recipe": "cifar10", "data_root": args.data_root}
    if args.tiny:
        settings = settings_of(args, data="digits", recipe="digits", backbone="resnet18", max_images=64, epochs=1)
        settings |= {"log.knn_images": (64, 64)}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run = relssl.pretrain(out=f"{folder}/run", quiet=True, **settings)
        assert run is not None
        seconds, row = time.perf_counter() - start, run.rows[-1]
        images = (64, 64) if args.tiny else None
        results = relssl.evaluate(run.folder, protocol="knn,probe", images=images, data_root=args.data_root)["results"]
    figures = {f"{each['protocol']}, {each['network']}": each["figures"][each["main"]] for each in results}
    show("A run from start to end", ["seconds", *figures], [[round(seconds), *figures.values()]])
    return {"seconds": seconds, "images_per_second": row["samples"] / seconds, "top1": figures, "last_row": row}


def stop(limit: float) -> None:
    """End everything, whatever the main thread waits for: a hanging contender, or the device."""
    print(f"gpu.py: stopped at the limit of {limit:g} s; what was measured before is in the file", flush=True)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(1)


def main() -> None:
    """Measure section by section; the run comes last, as it takes the longest."""
    networks = {name: partial(measure_network, network=name) for name in NETWORKS}
    measures: Measures = {"equal": measure_equal, "small": measure_small, **networks, "run": measure_run}
    parser = contenders.options(__doc__, measures, "results/gpu.json")
    parser.add_argument("--limit", type=float, default=540, help="seconds after which everything ends (default: nine minutes)")
    parser.add_argument("--data_root", help="where CIFAR-10 lies (default: as relssl has it)")
    args = parser.parse_args()
    watch = threading.Timer(args.limit, stop, [args.limit])
    watch.daemon = True
    watch.start()
    args.threads = args.workers = 1 if args.tiny else args.threads
    measure_parts(args, measures)


if __name__ == "__main__":
    main()
