"""Figures of merit with 95 % bootstrap intervals: test images drawn again with replacement, as many as there are.

Legend: M test images, C classes, R resamples.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from relssl.errors import NumericError

Interval = tuple[float, float]
Floats = npt.NDArray[np.float64]
_CELLS = 1 << 22  # images drawn at a time, over all resamples


class Bootstrap(NamedTuple):
    """The draws behind intervals: the number of resamples R, and their seed."""

    resamples: int = 1000
    seed: int = 0

    def generator(self) -> np.random.Generator:
        """Create the generator that every interval starts from."""
        return np.random.Generator(np.random.PCG64(self.seed))


def percentiles(samples: Floats) -> Interval:
    """Return the bounds of the middle 95 %."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def mean_interval(values: npt.ArrayLike, bootstrap: Bootstrap) -> Interval:
    """Return the interval of the mean of one value a test image, [M]."""
    values = np.asarray(values, np.float64)
    generator, count = bootstrap.generator(), len(values)
    return percentiles(np.array([values[generator.integers(0, count, count)].mean() for _ in range(bootstrap.resamples)]))


def ranks(scores: Tensor, truth: Tensor) -> Tensor:
    """Count the classes that come before the true one: [M,C] scores, [M] int64 classes -> [M] int64; ties go to the lower class.

    NumericError for NaN, which comes after nothing: every image would count as right.
    """
    _require_numbers(scores)
    own = scores.gather(1, truth[:, None])
    lower = torch.arange(scores.shape[1], device=scores.device) < truth[:, None]
    rank: Tensor = ((scores > own) | ((scores == own) & lower)).sum(dim=1)
    return rank


def accuracies(rank: Tensor, truth: Tensor, classes: int) -> dict[str, float]:
    """Return the percentages of test images labelled right, from `ranks` [M] and the true classes [M] in 0..C-1.

    `top1`; `top5`, right among the best min(5, C); `mean_per_class`, the mean of top-1 over the classes that occur.
    """
    right, count = (rank == 0).double(), torch.bincount(truth, minlength=classes)
    per_class = torch.bincount(truth, weights=right, minlength=classes)[count > 0] / count[count > 0]
    top5 = (rank < min(5, classes)).double()
    return {name: 100 * float(each.mean()) for name, each in (("top1", right), ("top5", top5), ("mean_per_class", per_class))}


def accuracy_intervals(rank: Tensor, truth: Tensor, classes: int, bootstrap: Bootstrap) -> dict[str, Interval]:
    """Return the intervals of `accuracies`: one multinomial draw a resample of how often each class is drawn, and right."""
    place = (rank >= 5).long() + (rank >= 1).long()  # 0: first, 1: among five, 2: beyond
    cells = torch.bincount(truth * 3 + place, minlength=3 * classes).double().numpy()
    total = int(cells.sum())
    drawn = bootstrap.generator().multinomial(total, cells / total, size=bootstrap.resamples).reshape(-1, classes, 3)
    right, top5 = drawn[:, :, 0], drawn[:, :, :2] if classes > 5 else drawn
    with np.errstate(invalid="ignore"):
        per_class = np.nanmean(right / drawn.sum(axis=2), axis=1)  # NaN for a class that a resample has none of
    shares = {"top1": right.sum(axis=1) / total, "top5": top5.sum(axis=(1, 2)) / total, "mean_per_class": per_class}
    return {name: percentiles(100 * samples) for name, samples in shares.items()}


def average_precision(
    scores: Tensor, targets: Tensor, counts: npt.NDArray[np.int64] | None = None, *, interpolated: bool = False
) -> Floats:
    """Compute the average precision of each class over the images that are known to be of it or not.

    It is scikit-learn's `average_precision_score`, for all resamples at once. Interpolated, precision at a recall is the best at
    that recall or beyond: the area that PASCAL VOC measures since 2010, and with which VISSL and PCL report VOC07 (not the 11
    points of 2007 itself).

    Args:
        scores, targets: [M,C], higher for more likely, NumericError for NaN; int8 [M,C], 1 yes, 0 no, -1 unknown.
        counts: [R,M], how often each image counts; None: once.

    Returns [C], or [R,C] with counts, in 0..1; NaN for a class that no image is of.
    """
    _require_numbers(scores)
    weights = np.ones((1, len(scores)), np.int64) if counts is None else counts
    columns = np.full((len(weights), scores.shape[1]), np.nan)
    for own, (column, target) in enumerate(zip(scores.cpu().numpy().T, targets.cpu().numpy().T, strict=True)):
        known = (target >= 0).nonzero()[0]
        order = known[np.argsort(-column[known], kind="stable")]
        if not len(order):
            continue
        ends = np.append((np.diff(column[order]) != 0).nonzero()[0], len(order) - 1)  # the last of each run of equal scores
        hits = np.cumsum(weights[:, order] * (target[order] > 0), axis=1)[:, ends]
        precision = hits / np.maximum(np.cumsum(weights[:, order], axis=1)[:, ends], 1)
        if interpolated:
            precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        with np.errstate(invalid="ignore"):
            columns[:, own] = (precision * np.diff(hits, axis=1, prepend=0)).sum(axis=1) / hits[:, -1]
    return columns[0] if counts is None else columns


def map_samples(scores: Tensor, targets: Tensor, bootstrap: Bootstrap, *, interpolated: bool = False) -> Floats:
    """Compute the mean of `average_precision` over the classes that occur in each resample, [R] in 0..1.

    A resample depends on the bootstrap and M alone, so those of several classifiers can be averaged one by one.
    """
    generator, images, means = bootstrap.generator(), len(scores), []
    step = max(1, _CELLS // images)
    for start in range(0, bootstrap.resamples, step):
        counts = generator.multinomial(images, np.full(images, 1 / images), size=min(step, bootstrap.resamples - start))
        each = average_precision(scores, targets, counts, interpolated=interpolated)
        means.append(np.nansum(each, axis=1) / np.maximum((~np.isnan(each)).sum(axis=1), 1))
    return np.concatenate(means)


def _require_numbers(scores: Tensor) -> None:
    if bool(scores.isnan().any()):
        raise NumericError("the scores of test images hold NaN; check the weights, the features and the learning rate")
