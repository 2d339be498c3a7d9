"""Pretrain on a folder of photos, then let the backbone say which of them look alike.

    python examples/own_photos.py photos/                                    # resnet18 at 224 pixels, as long as the recipe says
    python examples/own_photos.py photos/ --image_size 96 --epochs 20 --out runs/quick

Writes FOLDER/features.npz (a row for each photo), FOLDER/alike.jpg (some photos, and beside each the six most similar ones) and prints the
most similar pairs, which are near-duplicates if there are any. Labels are neither needed nor used.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import relssl

SIDE, GAP, NEAREST = 96, 6, 6


def most_similar(features: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `count` nearest others of every row [N, count], and their cosine similarities."""
    centred = features - features.mean(axis=0)  # all features point a common way, which tells nothing
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True).clip(1e-12)
    nearest, similarity = [], []
    for start in range(0, len(unit), 1024):  # never all N x N at once
        block = unit[start : start + 1024] @ unit.T
        block[np.arange(len(block)), start + np.arange(len(block))] = -np.inf  # not itself
        order = np.argsort(-block, axis=1)[:, :count]
        nearest.append(order)
        similarity.append(np.take_along_axis(block, order, axis=1))
    return np.concatenate(nearest), np.concatenate(similarity)


def sheet(names: np.ndarray, rows: np.ndarray, nearest: np.ndarray) -> Image.Image:
    """Draw a row for each of `rows`: the photo, a gap, and its nearest."""
    step = SIDE + GAP
    drawn = Image.new("RGB", (step * (nearest.shape[1] + 1) + 3 * GAP, step * len(rows) + GAP), "white")
    for line, row in enumerate(rows):
        for column, index in enumerate([row, *nearest[row]]):
            with Image.open(str(names[index])) as photo:
                small = ImageOps.fit(ImageOps.exif_transpose(photo).convert("RGB"), (SIDE, SIDE))
            drawn.paste(small, (GAP + step * column + (2 * GAP if column else 0), GAP + step * line))
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/photos"))
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--image_size", type=int, default=224, help="pixels of the views; fewer are faster and see less")
    parser.add_argument("--epochs", type=int, default=200)
    args = parser.parse_args()

    run = {"out": args.out, "backbone": args.backbone, "epochs": args.epochs, "image_size": args.image_size}
    relssl.pretrain(args.photos, resume="auto", **run)  # goes on after a stop

    relssl.embed(args.out, args.photos, args.out / "features.npz")
    with np.load(args.out / "features.npz") as stored:
        features, names = stored["features"], stored["names"]
    nearest, similarity = most_similar(features, min(NEAREST, len(names) - 1))
    rows = np.linspace(0, len(names) - 1, min(8, len(names))).astype(int)
    sheet(names, rows, nearest).save(args.out / "alike.jpg")

    print("\nthe most similar pairs:")
    best = np.argsort(-similarity[:, 0])
    for row in [row for row in best if row < nearest[row, 0] or nearest[nearest[row, 0], 0] != row][:5]:  # a mutual pair once
        print(f"{similarity[row, 0]:.3f}  {names[row]}  {names[nearest[row, 0]]}")
    print(f"\n{args.out / 'features.npz'}: {features.shape[0]} x {features.shape[1]}\n{args.out / 'alike.jpg'}")


if __name__ == "__main__":
    main()
