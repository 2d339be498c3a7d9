"""Follow a run with a hook: an object with any of on_start, on_row, on_evaluation, on_checkpoint and on_end.

python examples/hook.py [RUN]
"""

import sys
from pathlib import Path
from typing import Any

import relssl


class Notes:
    """Keeps the best evaluation, and says where the run was saved."""

    def __init__(self) -> None:
        self.best, self.losses = (0.0, 0), list[float]()

    def on_row(self, row: dict[str, Any]) -> None:
        self.losses += [row["loss"]] if "loss" in row else []

    def on_evaluation(self, row: dict[str, Any]) -> None:
        self.best = max(self.best, (row["knn_top1"], row["step"]))

    def on_checkpoint(self, path: Path) -> None:
        print(f"saved {path.name}")

    def on_end(self, result: Any) -> None:
        print(f"best kNN {self.best[0]:.1f} % at step {self.best[1]} of {result.rows[-1]['step']}")


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else "runs/hook"
    log = {"knn_every": 1, "knn_images": (200, 200)}
    relssl.pretrain("digits", backbone="resnet10t", max_images=512, epochs=2, log=log, out=folder, hooks=[Notes()])
