"""Pretrain on a table of Hugging Face's `datasets` library: parquet files of images, as most sets on the hub are kept.

    pip install 'relssl[hf]'
    python examples/hf_folder.py                     # writes the digits as parquet first, and needs no network
    python examples/hf_folder.py hf:uoft-cs/cifar10

`hf:FOLDER` is a folder of parquet, arrow or image files, `hf:NAME` a set of the hub. Where several columns hold images or classes,
those to use stand behind a #.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets

import relssl
from relssl.data.named import load


def write_table(folder: Path, count: int = 240) -> str:
    """Write digits as parquet files, train and test."""
    for split in ("train", "test"):
        images = load("digits", None, split).subset(range(count))
        rows = {"image": [images.read(row, 10**6) for row in range(count)], "label": images.labels}
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(images.classes)))
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"{split}.parquet")
    return f"hf:{folder}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="default: the digits, written as parquet below OUT")
    parser.add_argument("--out", type=Path, default=Path("runs/hf"))
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()

    data = args.data or write_table(args.out.with_name(args.out.name + "-table"))
    result = relssl.pretrain(data, recipe="digits", epochs=args.epochs, batch_size=64, out=args.out, views={"enlarge": True})
    if "knn_top1" in result.rows[-1]:  # there are classes, and a test split
        print(f"kNN of the test split: {result.rows[-1]['knn_top1']:.1f} %")


if __name__ == "__main__":
    main()
