"""Figures of merit with 95 % bootstrap intervals: test images drawn again with replacement, as many as there are.

Legend: M test images, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Interval = tuple[float, float]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are drawn: the resamples, and their seed."""

    resamples: int = 1000
    seed: int = 0

    def generator(self) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(self.seed))


def ranks(scores: Tensor, truth: Tensor) -> Tensor:
    """How many classes come before the true one: [M,C] scores, [M] int64 classes -> [M] int64; ties go to the lower class."""
    own = scores.gather(1, truth[:, None])
    lower = torch.arange(scores.shape[1], device=scores.device) < truth[:, None]
    rank: Tensor = ((scores > own) | ((scores == own) & lower)).sum(dim=1)
    return rank


def accuracies(rank: Tensor, truth: Tensor, classes: int) -> dict[str, float]:
    """Percent of test images labelled right.

    Args:
        rank: [M] as of `ranks`; at least one.
        truth: [M] int64 in 0..C-1.
        classes: C.

    Returns:
        `top1`; `top5`, right among the best min(5, C); `mean_per_class`, the mean of top-1 over the classes that occur.
    """
    right = (rank == 0).double()
    count = torch.bincount(truth, minlength=classes)
    per_class = torch.bincount(truth, weights=right, minlength=classes)[count > 0] / count[count > 0]
    top5 = (rank < min(5, classes)).double().mean()
    return {
        "top1": 100 * float(right.mean()),
        "top5": 100 * float(top5),
        "mean_per_class": 100 * float(per_class.mean()),
    }


def accuracy_intervals(rank: Tensor, truth: Tensor, classes: int, bootstrap: Bootstrap) -> dict[str, Interval]:
    """The intervals of `accuracies`.

    Only how often an image of each class is drawn, and right, matters: that is one multinomial draw a resample instead of M.
    """
    place = (rank >= 5).long() + (rank >= 1).long()  # 0: first, 1: among five, 2: beyond
    cells = torch.bincount(truth * 3 + place, minlength=3 * classes).double().numpy()
    total = int(cells.sum())
    drawn = bootstrap.generator().multinomial(total, cells / total, size=bootstrap.resamples).reshape(-1, classes, 3)
    count, right = drawn.sum(axis=2), drawn[:, :, 0]
    with np.errstate(invalid="ignore"):
        shares = right / count  # NaN for a class that a resample has none of
    top5 = drawn[:, :, :2].sum(axis=(1, 2)) if classes > 5 else np.full(len(drawn), total)
    return {
        "top1": percentiles(100 * right.sum(axis=1) / total),
        "top5": percentiles(100 * top5 / total),
        "mean_per_class": percentiles(100 * np.nanmean(shares, axis=1)),
    }


def mean_interval(values: npt.ArrayLike, bootstrap: Bootstrap) -> Interval:
    """The interval of the mean of one value a test image, [M]."""
    values = np.asarray(values, np.float64)
    generator, count = bootstrap.generator(), len(values)
    means = [values[generator.integers(0, count, count)].mean() for _ in range(bootstrap.resamples)]
    return percentiles(np.array(means))


def percentiles(samples: Floats) -> Interval:
    """The middle 95 %."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)
