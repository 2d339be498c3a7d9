"""The named networks: parameters, GFLOPs, and one training step of ReSSL, timed in turns.

    python benchmarks/networks.py [--size 224] [--batch 8] [--crops 1] [--rounds 5] [--only NAME ...] [--out results/networks.json]

A step is the teacher's and the student's forward pass, the loss over 4096 keys, backward, and the updates of student, memory and
teacher; on noise, in fp32. With --crops 5 the student sees sides of 224, 192, 160, 128 and 96 pixels, or those shares of --size. The
first round warms up and is left out; of the others the median and the range are told.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from relssl.method import Encoder, ReSSL
from relssl.method.backbones import NAMED, create_backbone, feature_width, measure

SHARES = (1, 192 / 224, 160 / 224, 128 / 224, 96 / 224)
PATCH = 16  # sides are multiples of it, as transformers need


def training_step(name: str, sizes: list[int], batch: int, device: torch.device) -> Callable[[], float]:
    """A function that makes one step and says what it took, in seconds."""
    torch.manual_seed(0)
    backbone = create_backbone(name, size=sizes[0])
    model = ReSSL(Encoder(backbone, feature_width(backbone, sizes[0])), 4096, 128, loss_form="tiled").to(device).train()
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.01, momentum=0.9)
    weak = torch.randn(batch, 3, sizes[0], sizes[0], device=device)
    strong = [torch.randn(batch, 3, size, size, device=device) for size in sizes]
    ids = torch.arange(batch, device=device)

    def step() -> float:
        _wait(device)
        begun = time.perf_counter()
        made = model.step(weak, strong, student_temperature=0.1, teacher_temperature=0.04)
        made.loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.push(made.keys, ids)
        model.follow(0.99)
        _wait(device)
        return time.perf_counter() - begun

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crops", type=int, default=1, choices=(1, 2, 3, 4, 5))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(NAMED), metavar="NAME")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    sizes = [max(PATCH, round(args.size * share / PATCH) * PATCH) for share in SHARES[: args.crops]]
    steps = {name: training_step(name, sizes, args.batch, device) for name in args.only}
    rounds = [{name: step() for name, step in steps.items()} for _ in range(args.rounds + 1)][1:]
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    rows: list[dict[str, Any]] = []
    for name in args.only:
        seconds = sorted(turn[name] for turn in rounds)
        row = asdict(measure(name, sizes[0])) | {
            "sizes": sizes,
            "batch": args.batch,
            "device": where,
            "step_seconds": [round(value, 4) for value in (statistics.median(seconds), seconds[0], seconds[-1])],
            "rounds": args.rounds,
        }
        print("{name:32} {0:6.1f} M {gflops:6.2f} GFLOPs  step {1:.3f} s [{2:.3f}..{3:.3f}]".format(
            row["parameters"] / 1e6, *row["step_seconds"], **row), flush=True)  # fmt: skip
        rows.append(row)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
