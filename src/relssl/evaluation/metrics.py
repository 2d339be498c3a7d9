"""Figures of merit with 95 % bootstrap intervals: test images drawn again with replacement, as many as there are.

Legend: M test images, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC
from torch import Tensor

from relssl.errors import NumericError

Interval = tuple[float, float]
Floats = npt.NDArray[np.float64]
_CELLS = 1 << 22  # images drawn at a time, over all resamples


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are drawn: the resamples, and their seed."""

    resamples: int = 1000
    seed: int = 0

    def generator(self) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(self.seed))


def ranks(scores: Tensor, truth: Tensor) -> Tensor:
    """How many classes come before the true one: [M,C] scores, [M] int64 classes -> [M] int64; ties go to the lower class.

    Raises:
        NumericError: for NaN, which comes after nothing: every image would count as right.
    """
    _require_numbers(scores)
    own = scores.gather(1, truth[:, None])
    lower = torch.arange(scores.shape[1], device=scores.device) < truth[:, None]
    rank: Tensor = ((scores > own) | ((scores == own) & lower)).sum(dim=1)
    return rank


def _require_numbers(scores: Tensor) -> None:
    if bool(scores.isnan().any()):
        raise NumericError("the scores of test images hold NaN; check the weights, the features and the learning rate")


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


def average_precision(scores: Tensor, targets: Tensor, *, interpolated: bool = False) -> Floats:
    """Average precision of each class over the images that are told to be of it or not; [C] in 0..1.

    Precision is taken at each distinct score, so equal scores count as one step, as in scikit-learn's
    `average_precision_score`. Interpolated, precision at a recall is the best at that recall or beyond: the area that PASCAL VOC
    measures since 2010, and with which VISSL and PCL report VOC07 (not the 11 points of 2007 itself).

    Args:
        scores: [M,C], higher for more likely; finite.
        targets: int8 [M,C], 1 yes, 0 no, -1 not told.

    Returns:
        NaN for a class that no image is told to be of.

    Raises:
        NumericError: for NaN scores.
    """
    once = np.ones((1, len(scores)), np.int64)
    return np.array([_precision(curve, once[:, curve.order], interpolated)[0] for curve in _curves(scores, targets)])


def map_samples(scores: Tensor, targets: Tensor, bootstrap: Bootstrap, *, interpolated: bool = False) -> Floats:
    """The mean of `average_precision` over the classes in each resample, [resamples] in 0..1.

    A resample is the same for all classes and depends on nothing but the bootstrap and M, so those of several classifiers can be
    averaged one by one. A class that a resample has no image of counts in none of its mean.
    """
    images = len(scores)
    curves, found = list(_curves(scores, targets)), []
    generator, step = bootstrap.generator(), max(1, _CELLS // images)
    for start in range(0, bootstrap.resamples, step):
        size = min(step, bootstrap.resamples - start)
        drawn = generator.multinomial(images, np.full(images, 1 / images), size=size)
        classes = np.stack([_precision(curve, drawn[:, curve.order], interpolated) for curve in curves])
        told = ~np.isnan(classes)
        found.append(np.where(told, classes, 0).sum(axis=0) / np.maximum(told.sum(axis=0), 1))
    return np.concatenate(found)


@dataclass(frozen=True)
class _Curve:
    """A class's told images by falling score."""

    order: npt.NDArray[np.int64]  # places among all images
    yes: Floats  # 1 for images of the class
    ends: npt.NDArray[np.int64]  # the last of each run of equal scores


def _curves(scores: Tensor, targets: Tensor) -> Iterator[_Curve]:
    _require_numbers(scores)
    for column, target in zip(scores.cpu().numpy().T, targets.cpu().numpy().T, strict=True):
        told = (target >= 0).nonzero()[0]
        order = told[np.argsort(-column[told], kind="stable")]
        ranked = column[order]
        ends = np.append((np.diff(ranked) != 0).nonzero()[0], len(order) - 1) if len(order) else np.empty(0, np.int64)
        yield _Curve(order, (target[order] > 0).astype(np.float64), ends)


def _precision(curve: _Curve, counts: npt.NDArray[np.int64], interpolated: bool) -> Floats:
    """Average precision [R] with the images of a curve taken `counts` [R,m] times each."""
    if not len(curve.ends):
        return np.full(len(counts), np.nan)
    hits = np.cumsum(counts * curve.yes, axis=1)[:, curve.ends]
    taken = np.cumsum(counts, axis=1)[:, curve.ends]
    precision = hits / np.maximum(taken, 1)
    if interpolated:
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    gained = np.diff(hits, axis=1, prepend=0)
    with np.errstate(invalid="ignore"):
        return np.asarray((precision * gained).sum(axis=1) / hits[:, -1], np.float64)


def percentiles(samples: Floats) -> Interval:
    """The middle 95 %."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


Floats_svm = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

PARTS = 3
# The cost where there is nothing to choose it by.
PLAIN_COST = 1.0
ITERATIONS = 2000  # VISSL's and PCL's


@dataclass(frozen=True)
class Problem:
    """What is to be told apart.

    Attributes:
        features: fp64 [U,F] of unit norm, shared by problems.
        rows: int64 [n], the images of this one.
        truth: int64 [n], their classes, at least two of them.
        weights: of each class in the loss; None for 1.
    """

    features: Floats_svm
    rows: Ints
    truth: Ints
    weights: dict[int, float] | None = None

    def part(self, which: npt.NDArray[np.bool_]) -> Problem:
        return Problem(self.features, self.rows[which], self.truth[which], self.weights)


@dataclass(frozen=True)
class Machine:
    """Weights fp64 [r,F] and biases [r], one row for each of `classes` int64 [r]; for two classes those are opposites."""

    weight: Floats_svm
    bias: Floats_svm
    classes: Ints
    converged: bool

    def decide(self, features: Floats_svm) -> Floats_svm:
        """[n,F] -> [n,r], higher for more likely."""
        return features @ self.weight.T + self.bias


# How good a machine is on a problem, higher for better.
Score = Callable[[Machine, Problem], float]


def train(problem: Problem, cost: float) -> Machine:
    """scikit-learn's LinearSVC, each class against the rest; the bias is penalised like a weight."""
    model = LinearSVC(C=cost, class_weight=problem.weights, max_iter=ITERATIONS, dual="auto", random_state=0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(problem.features[problem.rows], problem.truth)
    weight, bias = model.coef_, model.intercept_
    if len(weight) == 1:
        weight, bias = np.concatenate([-weight, weight]), np.concatenate([-bias, bias])
    converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in said)
    return Machine(weight, bias, model.classes_.astype(np.int64), converged)


def choose_cost(problems: Sequence[Problem], costs: Sequence[float], score: Score) -> float | None:
    """The cost with the best score on images left out, on average over all problems and parts; of equals the smallest.

    Each class of a problem is dealt out to three parts, each of which is left out once; the only image of a class is in all
    that is learnt from. Returns None if there is nothing to choose by: no part has images of two classes.
    """
    splits = [split for problem in problems for split in _splits(problem)]
    if not splits:
        return None
    figures = [np.mean([score(train(learnt, cost), out) for learnt, out in splits]) for cost in sorted(costs)]
    return float(sorted(costs)[int(np.argmax(figures))])


def _splits(problem: Problem) -> list[tuple[Problem, Problem]]:
    """(learnt from, left out) for each part."""
    part = deal(problem.truth)
    sides = [(problem.part(part != out), problem.part(part == out)) for out in range(PARTS)]
    return [pair for pair in sides if all(len(np.unique(side.truth)) > 1 for side in pair)]


def deal(truth: Ints) -> Ints:
    """The part of each image, [n] -> [n]: those of a class take turns; -1 for the only one of its class."""
    part = np.full(len(truth), -1)
    for kind in np.unique(truth):
        own = (truth == kind).nonzero()[0]
        if len(own) > 1:
            part[own] = np.arange(len(own)) % PARTS
    return part
