"""Studies worth repeating: how a step's time grows, what the named networks cost, the curve of a run.

    python benchmarks/studies.py growth [--rounds 3] [--out FILE]
    python benchmarks/studies.py networks [--size 224] [--batch 8] [--crops 1] [--networks NAME ...] [--out results/networks.json]
    python benchmarks/studies.py curves --metrics RUN/metrics.jsonl [--steps 0 19 209 418]

`networks`: a step of ReSSL on noise, over 4096 keys, in fp32.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import TINY, training
from conventional import Noise
from relssl.engine import available_cores
from relssl.method import Encoder, ReSSL
from relssl.method.backbones import NAMED, create_backbone, feature_width, measure
from relssl.train.run_folder import environment, read_rows
from turns import Contender, Record, Work, compare, show, show_records

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHARES = (1, 192 / 224, 160 / 224, 128 / 224, 96 / 224)  # of the first view's side: the official five crops
PATCH = 16  # sides are multiples of it, as transformers need
COLUMNS = {
    "step": "{:.0f}",
    "loss": "{:.3f}",
    "warmup_mix": "{:.2f}",
    "knn_top1": "{:.1f}",
    "knn_teacher_top1": "{:.1f}",
    "teacher_entropy": "{:.2f}",
    "teacher_neighbours": "{:.0f}",
    "kl": "{:.2f}",
    "agreement": "{:.2f}",
    "embedding_std": "{:.2f}",
    "effective_rank": "{:.0f}",
}


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
    results: Record = {}
    for axis, points in axes.items():
        contenders = []
        for point, change in points.items():
            settings: Record = start | change
            source = Noise(4 * settings["batch_size"], settings.get("views.weak.size", 32))
            contenders.append(Contender(point, training, {"settings": settings, "source": source}))
        results[axis] = compare(contenders, args.rounds, units=1 if args.tiny else 3)
        show_records(
            f"Growth with the {axis}, times {axis} {next(iter(points))}", results[axis], [next(iter(points))], "seconds_per_unit"
        )
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


def study_curves(args: argparse.Namespace) -> list[Record]:
    """Print the rows of a run that a results page quotes: those of `--steps`, or those with kNN."""
    rows = [row for row in read_rows(args.metrics) if (row["step"] in args.steps if args.steps else "knn_top1" in row)]
    cells = [[shape.format(row[n]) if row.get(n) is not None else "" for n, shape in COLUMNS.items()] for row in rows]
    show(str(args.metrics), list(COLUMNS), cells)
    return [{name: row.get(name) for name in COLUMNS} for row in rows]


STUDIES: dict[str, Callable[[argparse.Namespace], Any]] = {
    "growth": study_growth,
    "networks": study_networks,
    "curves": study_curves,
}


def main() -> None:
    """Carry out one study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (default: 3)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="threads of each (default: the cores)")
    parser.add_argument("--size", type=int, default=224, help="side of the first view, for networks")
    parser.add_argument("--batch", type=int, default=8, help="images a step, for networks")
    parser.add_argument("--crops", type=int, default=1, choices=(1, 2, 3, 4, 5), help="the student's views, for networks")
    parser.add_argument("--networks", nargs="+", metavar="NAME")
    parser.add_argument("--metrics", type=Path, help="metrics.jsonl, for curves")
    parser.add_argument("--steps", type=int, nargs="*", help="rows to show, for curves; default: those with kNN")
    parser.add_argument("--tiny", action="store_true", help="try the code in seconds; the figures mean nothing")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    results = STUDIES[args.study](args)
    if args.out is not None:
        content = {"machine": environment()} | results if isinstance(results, dict) else results
        args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
