"""All measurements of speed and memory in one command: prints tables, writes JSON.

    python benchmarks/bench.py [--only small,files,loss,growth] [--rounds 3] [--images FOLDER] [--out FILE]

Every contender runs in a process of its own and they take turns; ratios are taken within each turn. For figures worth quoting
the machine has to be quiet: absolute speeds drift with whatever else it does.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from options import Options
from relssl.engine import available_cores
from relssl.train.run_folder import environment

PARTS = ("small", "files", "loss", "growth")
# Measured only when asked for, as they need what is not installed with the package.
EXTRA = ("peers",)


def main() -> None:
    """Measure the parts asked for; one that fails does not lose the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = available_cores()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas (default: all but peers)")
    add_options(parser, cores)
    parser.add_argument("--out", type=Path, default=Path(f"results/bench-{device}-{cores}-cores.json"))
    args = parser.parse_args()
    parts = args.only.split(",")
    if unknown := set(parts) - {*PARTS, *EXTRA}:
        parser.error(f"--only: knows no {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS + EXTRA)}")
    if args.images is not None and not args.images.is_dir():
        parser.error(f"--images: {args.images} is no folder")
    sys.exit(run(parts, options_of(args), args.out))


def add_options(parser: argparse.ArgumentParser, cores: int) -> None:
    """The arguments that Options hold."""
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (default: 3)")
    parser.add_argument("--threads", type=int, default=cores, help="threads of a training process (default: the cores)")
    parser.add_argument("--workers", type=int, default=cores, help="loader processes of each contender (default: the cores)")
    parser.add_argument("--memory", type=int, help="keys in the memory of the small setting (default: the recipe's)")
    parser.add_argument("--images", type=Path, help="a folder of JPEGs for the files part (default: some are made)")
    parser.add_argument("--tiny", action="store_true", help="try the code in seconds; the figures mean nothing")


def options_of(args: argparse.Namespace) -> Options:
    """The Options among the arguments."""
    return Options(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Options)})


def run(parts: list[str], options: Options, out: Path) -> int:
    """Measure `parts`, modules with a `measure(options)`, and write what they return as they go; 1 if one failed, or a contender in it."""
    found: dict[str, Any] = {"machine": environment(), "options": {k: v for k, v in vars(options).items() if k != "images"}}
    failed = False
    for part in parts:
        begun = time.perf_counter()
        try:
            found[part] = importlib.import_module(part).measure(options)
            failed |= any_failed(found[part])
        except Exception as error:
            failed = True
            found[part] = {"failed": f"{type(error).__name__}: {error}"}
            print(f"{part}: failed: {error}", file=sys.stderr)
        print(f"\n{part}: {time.perf_counter() - begun:.0f} s", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {out}")
    return int(failed)


def any_failed(found: Any) -> bool:
    """Whether a contender failed anywhere in a tree of results."""
    return isinstance(found, dict) and ("failed" in found or any(any_failed(part) for part in found.values()))


if __name__ == "__main__":
    main()
