"""All that is to be run when a GPU is there, in one command; results are written as they come.

    python benchmarks/gpu.py [--only equal,small,...] [--limit 540] [--data_root FOLDER] [--out results/gpu.json]
    python benchmarks/gpu.py --rehearse      the same code on a processor, in a minute or two; the figures mean nothing

`equal`: the losses of a run's first steps in fp32, on the GPU and on the processor. `small` and the names of networks: training steps
on random images in the device's memory, speed-ups added one at a time, beside the floor, the rate at which the device could do a
step's products were there nothing else. `run`: CIFAR-10 from start to end. One section that fails leaves the others alone; at the
limit everything ends, so that one that hangs does not hold the GPU, and the sections before it are in the file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

import relssl
from contenders import (
    TINY,
    Contender,
    Noise,
    Record,
    compare,
    conventional_training,
    floor,
    measure_parts,
    show,
    show_records,
    training,
)
from relssl.engine import available_cores
from relssl.train.run_folder import environment

NETWORKS = ("resnet50", "efficientnet_b0", "mobilenetv3_large_100")
# The run comes last: it takes the longest.
SECTIONS = ("equal", "small", *NETWORKS, "run")
# Speed-ups one after another; each row has those above it as well.
STEPS: dict[str, Record] = {
    "none": {"compile": "off", "loader.views_ahead": 1},
    "8 steps' views in one go": {"loader.views_ahead": 8},
    "compiled": {"compile": "on"},
}
OFFICIAL_CROPS = [[224, 0.2, 1], [192, 0.172, 0.86], [160, 0.143, 0.715], [128, 0.114, 0.571], [96, 0.086, 0.429]]


def measure_equal(args: argparse.Namespace) -> Record:
    """Compare the losses of the first steps on both devices."""
    losses: list[list[float]] = []
    settings: Record = {"engine.precision": "fp32", "max_images": 1024, "epochs": 2, "log.every": 1}
    for device in ("cpu", "cpu" if args.rehearse else "cuda"):
        with tempfile.TemporaryDirectory() as folder:
            settings["engine.device"] = device
            run = relssl.pretrain("digits", out=f"{folder}/run", quiet=True, **settings)
        assert run is not None
        losses.append([row["loss"] for row in run.rows if "loss" in row])
    difference = max(abs(one / other - 1) for one, other in zip(*losses, strict=True))
    show("Losses on the GPU and on the processor", ["steps", "largest relative difference"], [[len(losses[0]), difference]])
    return {"losses": dict(zip(("cpu", "gpu"), losses, strict=True)), "difference": difference}


def settings_of(args: argparse.Namespace, **more: Any) -> Record:
    """Return the recipe cifar10; a tiny network on a processor in a rehearsal."""
    return {
        "recipe": "cifar10",
        "engine.threads": args.threads,
        **(TINY | {"engine.device": "cpu"} if args.rehearse else {}),
    } | more


def measure_small(args: argparse.Namespace) -> Record:
    """Measure steps of CIFAR-shaped images, the conventional pipeline among them."""
    settings, source = settings_of(args), Noise(64 if args.rehearse else 50_000, 32)
    shared = {"settings": settings, "source": source, "precision": "bf16", "workers": args.threads, "threads": args.threads}
    return {"one view": _climb(args, "small", settings, source, Contender("conventional", conventional_training, shared))}


def measure_network(args: argparse.Namespace, network: str) -> Record:
    """Measure steps of ImageNet's recipe with another network, by one view and by the official five."""
    size, crops = (64, [[64, 0.2, 1], [32, 0.1, 0.5]]) if args.rehearse else (224, OFFICIAL_CROPS)
    settings = settings_of(args, recipe="imagenet", backbone=network, batch_size=16 if args.rehearse else 256)
    settings |= {"backbone_args": {"zero_init_last": False} if network.startswith("resnet") else {}}
    settings |= {"views.weak.size": size, "views.strong.size": size}
    source = Noise(64, 80) if args.rehearse else Noise(2048, 256)
    five = _climb(args, f"{network}, {len(crops)} views", settings | {"views.crops": crops}, source)
    return {"one view": _climb(args, f"{network}, one view", settings, source), f"{len(crops)} views": five}


def _climb(args: argparse.Namespace, title: str, settings: Record, source: Noise, *first: Contender) -> Record:
    """Measure with no speed-up, then with one more at a time, and the floor; one after another, as two may not fit the device."""
    contenders, changes = [*first], dict[str, Any]()
    for name, change in STEPS.items():
        if not (args.rehearse and name == "compiled"):  # which takes a processor minutes
            changes |= change
            contenders.append(Contender(name, training, {"settings": settings | changes, "source": source}))
    contenders.append(Contender("floor", floor, {"settings": settings, "source": source, "seconds": 1.0}))
    records: dict[str, Record] = {}
    for contender in contenders:
        records |= compare([contender], args.rounds, units=1 if args.rehearse else 16)
    show_records(title, records, ["floor"])
    return {"settings": settings, "records": records}


def measure_run(args: argparse.Namespace) -> Record:
    """Pretrain on CIFAR-10 for 200 epochs, then evaluate student and teacher."""
    settings: Record = {"data": "cifar10", "recipe": "cifar10", "data_root": args.data_root}
    if args.rehearse:
        settings = settings_of(args, data="digits", recipe="digits", backbone="resnet18", max_images=64, epochs=1)
        settings |= {"log.knn_images": (64, 64)}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run = relssl.pretrain(out=f"{folder}/run", quiet=True, **settings)
        assert run is not None
        seconds, row = time.perf_counter() - start, run.rows[-1]
        images = (64, 64) if args.rehearse else None
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
    """Measure section by section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each measurement (default: 3)")
    parser.add_argument("--limit", type=float, default=540, help="seconds after which everything ends (default: nine minutes)")
    parser.add_argument("--data_root", help="where CIFAR-10 lies (default: as relssl has it)")
    parser.add_argument("--out", type=Path, help="JSON file (default: results/gpu.json, or gpu-rehearsal.json)")
    parser.add_argument("--rehearse", action="store_true", help="try the code on a processor with tiny counts")
    args = parser.parse_args()
    watch = threading.Timer(args.limit, stop, [args.limit])
    watch.daemon = True
    watch.start()
    args.threads = 1 if args.rehearse else available_cores()
    out = args.out or Path("results/gpu-rehearsal.json" if args.rehearse else "results/gpu.json")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    results: Record = {"machine": json.loads(json.dumps(environment() | {"gpu": gpu}))}
    if out.exists() and (earlier := json.loads(out.read_text())).get("machine") == results["machine"]:
        results = earlier  # sections that another call has measured on this machine stay
    measures = {"equal": measure_equal, "small": measure_small, "run": measure_run}

    def section(name: str) -> Record:
        return measure_network(args, name) if name in NETWORKS else measures[name](args)

    measure_parts(args.only.split(","), section, results, out)


if __name__ == "__main__":
    main()
