"""Compare methods on the same images, network and seeds: kNN and a linear probe of each, and what is beyond chance.

    python examples/compare_methods.py                                                  # digits: minutes on two CPU cores
    python examples/compare_methods.py cifar10 --methods ressl,moco,simclr --epochs 200 --seeds 3

Each run takes the recipe that its method has for the data. Run folders that are there already are gone on with, so the same command
continues after a stop, and raising --seeds adds runs.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import relssl

FIGURES = {"knn": "kNN", "probe": "probe"}


def measure(folder: Path, data: str) -> dict[str, float]:
    """Evaluate the student of a run: percent of the test images by each protocol."""
    one = {"k": [20], "temperature": [0.07]}
    record = relssl.evaluate(folder, data, protocol="knn,probe", network="student", knn=one)
    return {result["protocol"]: result["figures"][result["main"]] for result in record["results"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="digits", help="a named set, or a folder with train/CLASS/ and val/CLASS/")
    parser.add_argument("--methods", default="ressl,moco,simclr")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, help="default: as the recipes say")
    parser.add_argument("--max_images", type=int, help="train on this many images alone; default: on all")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    args = parser.parse_args()
    methods = args.methods.split(",")
    limits = {name: vars(args)[name] for name in ("epochs", "max_images") if vars(args)[name] is not None}

    figures: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for seed in range(args.seeds):  # every method has one run before any has two
        for method in methods:
            folder = args.out / f"{method}-{seed}"
            relssl.pretrain(
                args.data, out=folder, method=method, seed=seed, resume="auto", quiet=True, log={"report": False}, **limits
            )
            figures[method].append(measure(folder, args.data))
            last = ", ".join(f"{FIGURES[name]} {value:.1f}" for name, value in figures[method][-1].items())
            print(f"{method} seed {seed}: {last}", flush=True)

    print(f"\n{'method':10}" + "".join(f"{title:>16}" for title in FIGURES.values()))
    for method in methods:
        columns = [[one[name] for one in figures[method]] for name in FIGURES]
        cells = [f"{statistics.mean(each):.1f} +- {statistics.stdev(each) if len(each) > 1 else 0:.1f}" for each in columns]
        print(f"{method:10}" + "".join(f"{cell:>16}" for cell in cells))

    print(f"\nprobe of seed 0, image by image, minus that of {methods[0]}, with the 95 % interval:")
    for other in methods[1:]:
        first, second = (next((args.out / f"{method}-0/evaluations").glob("probe-*.json")) for method in (methods[0], other))
        for row in relssl.compare(first, second):
            low, high = row["interval"]
            print(f"{other:10} {row['difference']:+.1f} [{low:+.1f}..{high:+.1f}]")


if __name__ == "__main__":
    main()
