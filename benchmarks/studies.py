"""Studies worth repeating: how a step's time grows, and what the named networks cost.

    python benchmarks/studies.py growth [--rounds 3] [--out FILE]
    python benchmarks/studies.py networks [--size 224] [--batch 8] [--crops 1] [--networks NAME ...] [--out results/networks.json]

`networks`: a step of ReSSL on noise, over 4096 keys, in fp32.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from contenders import TINY, Contender, Noise, Record, Work, compare, show_records, training, write
from relssl.engine import available_cores
from relssl.method import Encoder, ReSSL
from relssl.method.backbones import NAMED, create_backbone, feature_width, measure
from relssl.train.run_folder import environment

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHARES = (1, 192 / 224, 160 / 224, 128 / 224, 96 / 224)  # of the first view's side: the official five crops
PATCH = 16  # sides are multiples of it, as transformers need


def study_growth(args: argparse.Namespace) -> Record:
    """Measure how a step's time grows with the batch, the memory, the number of views and the size of the images."""
    batches, memories = ((16, 32), (64, 128)) if args.tiny else ((64, 128, 256), (4096, 16384, 65536))
    sizes, views = ((32,), (1, 2)) if args.tiny else ((32, 48, 64), (1, 2, 4))
    axes: dict[str, dict[str, Record]] = {
        "batch": {str(batch): {"batch_size": batch} for batch in batches},
        "memory": {str(memory): {"method.memory_size": memory} for memory in memories},
        "views": {str(count): {"views.crops": [[32, 0.2, 1.0]] * count} for count in views},
        "size": {str(size): {"views.weak.size": size, "views.strong.size": size} for size in sizes},
    }
    start = {"recipe": "cifar10", "engine.threads": args.threads} | (TINY if args.tiny else {})
    start |= {"batch_size": batches[0], "method.memory_size": memories[0]}
    results: Record = {"machine": environment()}
    for axis, points in axes.items():
        contenders = []
        for point, change in points.items():
            settings: Record = start | change
            source = Noise(4 * settings["batch_size"], settings.get("views.weak.size", 32))
            contenders.append(Contender(point, training, {"settings": settings, "source": source}))
        results[axis], first = compare(contenders, args.rounds, units=1 if args.tiny else 3), next(iter(points))
        show_records(f"Growth with the {axis}, times {axis} {first}", results[axis], [first], "seconds_per_unit")
    return results


def network_work(name: str, sizes: list[int], batch: int) -> Work:
    """Return a step as work: both forward passes, the loss, backward, and the updates of student, memory and teacher."""
    torch.manual_seed(0)
    backbone = create_backbone(name, size=sizes[0])
    model = ReSSL(Encoder(backbone, feature_width(backbone, sizes[0])), 4096, 128, loss_form="tiled").to(DEVICE).train()
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.01, momentum=0.9)
    weak, *strong = (torch.randn(batch, 3, size, size, device=DEVICE) for size in (sizes[0], *sizes))
    ids = torch.arange(batch, device=DEVICE)

    def run(count: int) -> None:
        for _ in range(count):
            step = model.step(weak, strong, student_temperature=0.1, teacher_temperature=0.04)
            step.loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            model.push(step.keys, ids)
            model.follow(0.99)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return Work(run, batch)


def study_networks(args: argparse.Namespace) -> list[Record]:
    """Measure parameters, GFLOPs and a step of the named networks."""
    sizes = [max(PATCH, round(args.size * share / PATCH) * PATCH) for share in SHARES[: args.crops]]
    names = args.networks or list(NAMED)
    contenders = [Contender(name, network_work, {"name": name, "sizes": sizes, "batch": args.batch}) for name in names]
    records = compare(contenders, args.rounds, units=1)
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {args.threads} threads"
    rows = []
    for name in names:
        seconds = sorted(records[name].get("seconds_per_unit", [float("nan")]))
        row = asdict(measure(name, sizes[0])) | {"sizes": sizes, "batch": args.batch, "device": where, "rounds": args.rounds}
        rows.append(row | {"step_seconds": [statistics.median(seconds), seconds[0], seconds[-1]]})
    show_records("Named networks", records, [])
    return rows


def main() -> None:
    """Carry out one study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("growth", "networks"))
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (default: 3)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="threads of each (default: the cores)")
    parser.add_argument("--size", type=int, default=224, help="side of the first view, for networks")
    parser.add_argument("--batch", type=int, default=8, help="images a step, for networks")
    parser.add_argument("--crops", type=int, default=1, choices=(1, 2, 3, 4, 5), help="the student's views, for networks")
    parser.add_argument("--networks", nargs="+", metavar="NAME")
    parser.add_argument("--tiny", action="store_true", help="try the code in seconds; the figures mean nothing")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    results: Any = study_growth(args) if args.study == "growth" else study_networks(args)
    if args.out is not None:
        write(args.out, results)


if __name__ == "__main__":
    main()
