"""Pretrain on data of your own: any data set with a length and items, here satellite-like images of four bands with labels.

    python examples/own_dataset.py [RUN]

From a command line, in this folder:

    relssl pretrain own_dataset:sides --backbone resnet10t --image_size 32 --epochs 1 --out runs/own-dataset
"""

import sys

import numpy as np
from torch.utils.data import Dataset

import relssl


class Fields(Dataset):
    """Red, green, blue and near infrared of made-up fields and lakes, 16 bits each."""

    def __init__(self, count: int, seed: int) -> None:
        self.seeds = range(seed, seed + count)
        self.targets = [number % 2 for number in self.seeds]  # for kNN while training; training itself never looks at them

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        rng, lake = np.random.default_rng(self.seeds[row]), self.targets[row]
        ground = rng.uniform(5_000, 60_000) * rng.uniform(0.2, 1, (40, 40, 4)) * rng.uniform(0.5, 1, 4)
        top, left = rng.integers(0, 25, 2)
        ground[top : top + 15, left : left + 15, 3] *= 1 - 0.8 * lake  # water takes up infrared
        return ground.astype(np.uint16), lake


def sides() -> dict[str, Dataset]:
    """Return both sides; without "test" there is no kNN."""
    return {"train": Fields(256, 0), "test": Fields(64, 1000)}


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else "runs/own-dataset"
    run = relssl.pretrain(sides(), backbone="resnet10t", image_size=32, epochs=1, log={"knn": (10, 0.1)}, out=folder)
    print(f"kNN {run.rows[0]['knn_top1']:.1f} % before, {run.rows[-1]['knn_top1']:.1f} % after")
    backbone = relssl.load_backbone(run.folder)
    print("features", list(backbone(backbone.transform(Fields(1, 0)[0][0])[None]).shape))
    relssl.embed(run.folder, sides(), f"{folder}/features.npz")
