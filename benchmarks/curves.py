"""The rows of a run that a results page quotes, as a Markdown table.

python benchmarks/curves.py RUN/metrics.jsonl [--steps 0 19 209 418]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from relssl.train.run_folder import read_rows

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path)
    parser.add_argument("--steps", type=int, nargs="*", help="rows to show; default: those with kNN")
    args = parser.parse_args()
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for row in read_rows(args.metrics):
        if row["step"] in args.steps if args.steps else "knn_top1" in row:
            cells = (shape.format(row[name]) if row.get(name) is not None else "" for name, shape in COLUMNS.items())
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
