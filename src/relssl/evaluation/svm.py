"""Linear support vector machines on few images, with their cost chosen by cross-validation.

As in the benchmark of VISSL (Goyal et al. 2019, "Scaling and Benchmarking Self-Supervised Visual Representation Learning"):
squared hinge loss, features of unit norm, three parts to choose the cost by.

Legend: U images at hand, n images of a problem, F feature dimensions, r rows of weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC

Floats = npt.NDArray[np.float64]
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

    features: Floats
    rows: Ints
    truth: Ints
    weights: dict[int, float] | None = None

    def part(self, which: npt.NDArray[np.bool_]) -> Problem:
        return Problem(self.features, self.rows[which], self.truth[which], self.weights)


@dataclass(frozen=True)
class Machine:
    """Weights fp64 [r,F] and biases [r], one row for each of `classes` int64 [r]; for two classes those are opposites."""

    weight: Floats
    bias: Floats
    classes: Ints
    converged: bool

    def decide(self, features: Floats) -> Floats:
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
