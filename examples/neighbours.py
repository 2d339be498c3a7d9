"""Draw a few images, each beside those whose features are nearest: what a run has learned to find alike, without a label.

    relssl pretrain digits --out runs/digits
    python examples/neighbours.py runs/digits digits neighbours.png

The first column holds images of the test split, drawn at random; then come the training images nearest to each by the cosine of
the features. Where there are labels, the share of neighbours of the same class is printed, over the whole test split.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

import relssl
from relssl.data.named import load


def unit_features(run: str, data: str, split: str, root: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return features [N, F] of unit length, the images' positions [N] and their labels [N], -1 where there are none."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "features.npz"
        relssl.embed(run, data, out, split=split, data_root=root)
        stored = np.load(out)
        features, ids = stored["features"], stored["ids"]
        labels = stored["labels"] if "labels" in stored else np.full(len(ids), -1)
    return features / np.linalg.norm(features, axis=1, keepdims=True), ids, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--data_root")
    parser.add_argument("--rows", type=int, default=10)
    parser.add_argument("--neighbours", type=int, default=12)
    parser.add_argument("--side", type=int, default=48, help="of a picture, in pixels")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    bank, bank_ids, bank_labels = unit_features(args.run, args.data, "train", args.data_root)
    test, test_ids, test_labels = unit_features(args.run, args.data, "test", args.data_root)
    nearest = np.concatenate([torch.from_numpy(part @ bank.T).topk(args.neighbours).indices for part in np.array_split(test, 64)])
    if (test_labels >= 0).all():
        same = (bank_labels[nearest] == test_labels[:, None]).mean()
        print(f"of the {args.neighbours} nearest, {same:.1%} are of the same class")

    images = [load(args.data, args.data_root, split) for split in ("test", "train")]
    side, gap = args.side, 4
    canvas = Image.new("RGB", ((args.neighbours + 1) * (side + gap) + 2 * gap, args.rows * (side + gap)), "white")
    for row, query in enumerate(np.random.default_rng(args.seed).choice(len(test), args.rows, replace=False)):
        places = [(images[0], test_ids[query]), *((images[1], bank_ids[each]) for each in nearest[query])]
        for column, (source, number) in enumerate(places):
            picture = ImageOps.fit(source.read(int(number), 10**8).convert("RGB"), (side, side))
            canvas.paste(picture, (column * (side + gap) + 2 * gap * (column > 0), row * (side + gap)))
    canvas.save(args.out)


if __name__ == "__main__":
    main()
