"""All that is to be run when a GPU is there, in one command; results are written as they come.

    python benchmarks/gpu.py [--only equal,small,...] [--limit 540] [--data_root FOLDER] [--out results/gpu.json]
    python benchmarks/gpu.py --tiny      the same code on a processor, in a minute or two; the figures mean nothing

`equal`: the losses of a run's first steps in fp32, on the GPU and on the processor. `extension` and `ressl`: CIFAR-10 over 200 epochs with
the recipes `cifar10` and `nips/cifar10`, by kNN and the linear protocol. `small` and the names of networks: training steps on random
images in the device's memory, speed-ups added one at a time, beside the floor, the rate at which the device could do a step's
products were there nothing else. One section that fails leaves the others alone; at the limit everything ends, so that one that hangs
does not hold the GPU. The sections before it are in the file, and a run goes on with the next call from where it stood.
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

import torch

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
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]  # its default, TF32, differs by a thousandth
    settings: Record = {"engine.precision": "fp32", "max_images": 1024, "epochs": 2, "log": {"every": 1, "report": False}}
    for name, device in (("cpu", "cpu"), ("gpu", "cpu" if args.tiny else "cuda")):
        with tempfile.TemporaryDirectory() as folder:
            run = relssl.pretrain("digits", out=f"{folder}/run", quiet=True, **settings | {"engine.device": device})
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


def measure_row(args: argparse.Namespace, row: str) -> Record:
    """Train a row of the papers' CIFAR-10 table over its 200 epochs and evaluate it, by kNN and the linear protocol.

    It stops at the limit with everything saved, and the same command goes on with it.
    """
    left, scale = args.limit - (time.monotonic() - args.start) - 30, "smoke" if args.tiny else "paper"
    where: Record = {"runs": args.out.with_name(f"{args.out.stem}-runs"), "out": args.out.parent, "data_root": args.data_root}
    results = relssl.reproduce("baselines", scale, only=[row], time_limit=max(left, 1) / 60, **where)
    run = next(each for each in results["runs"] if each["row"] == row)
    times = {name: run[name] for name in ("training_seconds", "evaluation_seconds", "images_per_second")}
    show(f"A run from start to end: {row}", [*times, *run["figures"]], [[*times.values(), *run["figures"].values()]])
    return times | {"top1": run["figures"], "curve": run["curve"]}


def stop(limit: float) -> None:
    """End everything, whatever the main thread waits for: a hanging contender, or the device."""
    print(f"gpu.py: stopped at the limit of {limit:g} s; what was measured before is in the file", flush=True)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(1)


def main() -> None:
    """Measure section by section, what is most wanted first."""
    rows = {name: partial(measure_row, row=name) for name in ("extension", "ressl")}
    networks = {name: partial(measure_network, network=name) for name in NETWORKS}
    measures: Measures = {"equal": measure_equal, **rows, "small": measure_small, **networks}
    parser = contenders.options(__doc__, measures, "results/gpu.json")
    parser.add_argument("--limit", type=float, default=540, help="seconds after which everything ends (default: nine minutes)")
    parser.add_argument("--data_root", help="where CIFAR-10 lies (default: as relssl has it)")
    args = parser.parse_args()
    args.start = time.monotonic()
    watch = threading.Timer(args.limit, stop, [args.limit])
    watch.daemon = True
    watch.start()
    args.threads = args.workers = 1 if args.tiny else args.threads
    measure_parts(args, measures)


if __name__ == "__main__":
    main()
