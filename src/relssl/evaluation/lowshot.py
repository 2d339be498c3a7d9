"""Classification from few images a class by linear SVMs, drawn several times.

After the low-shot benchmark of VISSL (Goyal et al. 2019) as PCL (Li et al. 2021, "Prototypical Contrastive Learning") reports
it: features of unit norm, five independent draws. For images with several labels, as in VOC07, each class has a machine of its
own from n images of the class and (C - 1) n others, those of the class weighing double, as VISSL draws them, and the figure is
the mean average precision with interpolated precision. The code of both quotes the cost that does best on the test images; here
it is chosen by cross-validation on the drawn images, which no test image has a say in.

Legend: N bank images, M test images, F feature dimensions, C classes, n shots.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import PredefinedSplit, cross_val_score
from sklearn.svm import LinearSVC
from torch import Tensor

from relssl.errors import DataError
from relssl.evaluation.features import LabelledFeatures, unit
from relssl.evaluation.metrics import Bootstrap, accuracies, average_precision, map_samples, mean_interval, percentiles, ranks
from relssl.evaluation.pairs import class_counts, numbered
from relssl.evaluation.result import Finding
from relssl.settings.evaluation import LowshotConfig

Ints = npt.NDArray[np.int64]
_PARTS = 3  # of cross-validation
_COST = 1.0  # where there is nothing to choose it by
_ITERATIONS = 2000  # VISSL's and PCL's


class Draw(NamedTuple):
    """The outcome of one draw."""

    scores: Tensor  # fp32 [M,C]
    cost: float | None  # None: there was nothing to choose it by
    stuck: int  # machines that did not converge


def lowshot(sides: LabelledFeatures, settings: LowshotConfig, bootstrap: Bootstrap) -> list[Finding]:
    """Train on n images of each class, classify the test images; for every n, over several draws.

    A draw, which depends on the seed, puts the images of each class in an order of its own and n shots are its first n: draws are
    independent of each other, the shots of a draw contain those of fewer. All images (n = 0, or no class has more than n) are one
    draw. Where no cost can be chosen, as with one image a class, it is 1.

    Figures are means over the draws, of two or more with the deviation of the main one (of draws - 1). Intervals are those of the
    mean over the same draws: what other test images would change.
    """
    findings, every = [], sides.bank_labels.numpy()
    most = int(class_counts(sides.bank_labels, sides.classes).max())
    for shots in dict.fromkeys(settings.shots):
        seeds = [[bootstrap.seed, draw] for draw in range(settings.draws)]
        orders = [np.random.Generator(np.random.PCG64(each)).permutation(len(every)) for each in seeds]
        if not shots or (not sides.several and shots >= most):
            orders = [np.arange(len(every))]  # every draw would take them all
        taken = [drawn_rows(every, sides.classes, order, shots) for order in orders]
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # a note says it instead
            findings.append(_finding(shots, [_draw(sides, rows, settings) for rows in taken], sides, bootstrap))
    return findings


def drawn_rows(labels: npt.NDArray[np.int64 | np.int8], classes: int, order: Ints, shots: int) -> dict[int | None, Ints]:
    """Return the images of each machine: {None: those of the only one}, or {class: n of it and (C - 1) n others}."""
    ranked = labels[order]
    if labels.ndim == 1:
        return {None: np.concatenate([order[ranked == own][: shots or None] for own in range(classes)])}
    taken: dict[int | None, Ints] = {}
    for own in range(classes):
        yes, no = order[ranked[:, own] == 1], order[ranked[:, own] == 0]
        if len(yes) and len(no):
            taken[own] = np.concatenate([yes[: shots or None], no[: (classes - 1) * shots or None]])
    if not taken:
        raise DataError("labels: no class has bank images that are of it and others that are not; nothing can be learnt")
    return taken


def _draw(sides: LabelledFeatures, taken: dict[int | None, Ints], settings: LowshotConfig) -> Draw:
    """Train one machine for all classes, each against the rest; or one for each class: of it, or not."""
    labels, test = sides.bank_labels.numpy().astype(np.int64), _features(sides.test)
    single, stuck = not sides.several, 0
    problems = [(rows, labels[rows] if own is None else labels[rows, own]) for own, rows in taken.items()]
    cost = settings.cost[0] if len(settings.cost) == 1 else choose_cost(sides.bank, problems, settings.cost, single)
    scores = np.full((len(sides.test), sides.classes), -np.inf if single else 0, np.float32)  # without an image: never predicted
    for own, (rows, truth) in zip(taken, problems, strict=True):
        machine = _machine(cost or _COST, single).fit(_features(sides.bank[rows]), truth)
        stuck += int(machine.n_iter_ >= _ITERATIONS)
        decision = machine.decision_function(test)
        if own is None and decision.ndim == 1:  # two classes are opposites
            decision = np.stack([-decision, decision], axis=1)
        scores[:, machine.classes_ if own is None else own] = decision
    return Draw(torch.from_numpy(scores), cost, stuck)


def _machine(cost: float, single: bool) -> LinearSVC:
    """Create a machine; the bias is penalised like a weight. With several labels an image, yes weighs double."""
    weights = None if single else {0: 1.0, 1: 2.0}
    return LinearSVC(C=cost, class_weight=weights, max_iter=_ITERATIONS, dual="auto", random_state=0)


def _features(rows: Tensor) -> npt.NDArray[np.float64]:
    return unit(rows).double().cpu().numpy()


def choose_cost(bank: Tensor, problems: Sequence[tuple[Ints, Ints]], costs: Sequence[float], single: bool) -> float | None:
    """Return the cost with the best score on images left out, over all problems (rows [n] of the bank, classes [n]) and parts.

    The score is the share labelled right, or with several labels an image the interpolated average precision; of equals the
    smallest cost is taken. The images of a class take turns in three parts, each of which is left out once; the only image of a
    class is in all that is learnt from. None: there is nothing to choose by, as no part has images of two classes.
    """
    figures: dict[float, list[float]] = {cost: [] for cost in sorted(costs)}
    for rows, truth in problems:
        turn = np.full(len(truth), -1)
        for own, count in zip(*np.unique(truth, return_counts=True), strict=True):
            turn[truth == own] = np.arange(count) % _PARTS if count > 1 else -1
        splits = [sides for sides in PredefinedSplit(turn).split() if all(len(np.unique(truth[side])) > 1 for side in sides)]
        features, scoring = _features(bank[rows]), None if single else _precision
        for cost, scores in figures.items() if splits else ():
            scores += cross_val_score(_machine(cost, single), features, truth, cv=splits, scoring=scoring).tolist()
    means = {cost: np.mean(scores) for cost, scores in figures.items() if scores}
    return max(means, key=lambda cost: means[cost], default=None)


def _precision(machine: LinearSVC, features: npt.NDArray[np.float64], truth: Ints) -> float:
    decision = torch.from_numpy(machine.decision_function(features))[:, None]
    return float(average_precision(decision, torch.from_numpy(truth[:, None]), interpolated=True)[0])


def _finding(shots: int, draws: list[Draw], sides: LabelledFeatures, bootstrap: Bootstrap) -> Finding:
    truth, labels, notes, right = sides.test_labels, sides.bank_labels, [], None
    count, setting = class_counts(labels, sides.classes), dict[str, Any](shots=shots)
    if few := numbered((count > 0) & (count < shots)):
        notes.append(f"Fewer than {shots} bank images of {few}: all of them were used.")
    if sides.several:
        setting["average_precision"] = "interpolated"
        if lone := numbered((count == 0) | ((labels == 0).sum(dim=0) == 0)):
            notes.append(f"The bank has no images both of {lone} and not, so nothing was learnt there.")
        figures = [{"map": 100 * float(np.nanmean(average_precision(draw.scores, truth, interpolated=True)))} for draw in draws]
        samples = np.mean([map_samples(draw.scores, truth, bootstrap, interpolated=True) for draw in draws], axis=0)
        intervals = {"map": percentiles(100 * samples)}
    else:
        place = torch.stack([ranks(draw.scores, truth) for draw in draws])
        figures = [accuracies(rank, truth, sides.classes) for rank in place]
        best = {"top1": 1, "top5": min(5, sides.classes)}
        intervals = {name: mean_interval(100 * (place < k).double().mean(dim=0), bootstrap) for name, k in best.items()}
        right = (place[0] == 0).numpy() if len(draws) == 1 else None
    if any(draw.cost is None for draw in draws):
        notes.append(f"With so few images a class there is no cross-validation, so the cost was {_COST:g}.")
    if stuck := sum(draw.stuck for draw in draws):
        notes.append(f"{stuck} of the support vector machines had not converged after {_ITERATIONS} iterations.")
    main = next(iter(figures[0]))
    mean = {name: float(np.mean([each[name] for each in figures])) for name in figures[0]}
    if len(draws) > 1:
        mean[f"{main}_deviation"] = float(np.std([each[main] for each in figures], ddof=1))
    each = [{main: round(own[main], 4), "cost": draw.cost or _COST} for own, draw in zip(figures, draws, strict=True)]
    return Finding(setting, main, mean, intervals, tuple(notes), {"draws": each}, right)
