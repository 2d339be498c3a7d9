"""Classification from few images a class by linear SVMs, drawn several times.

After the low-shot benchmark of VISSL (Goyal et al. 2019) as PCL (Li et al. 2021, "Prototypical Contrastive Learning") reports
it: features of unit norm, five independent draws. For images with several labels, as in VOC07, each class has a machine of its
own from n images of the class and (C - 1) n others, those of the class weighing double, as VISSL draws them, and the figure is
the mean average precision with interpolated precision. The code of both quotes the cost that does best on the test images; here
it is chosen by cross-validation on the drawn images, which no test image has a say in.

Legend: N bank images, M test images, F feature dimensions, C classes, n shots.
"""

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import PredefinedSplit, cross_val_score
from sklearn.svm import LinearSVC

from relssl.errors import DataError
from relssl.evaluation.features import LabelledFeatures, unit
from relssl.evaluation.metrics import Bootstrap, accuracies, average_precision, map_samples, mean_interval, percentiles, ranks
from relssl.evaluation.pairs import class_counts, named
from relssl.evaluation.result import Finding
from relssl.settings.evaluation import LowshotConfig

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_PARTS = 3  # of cross-validation
_COST = 1.0  # where there is nothing to choose it by
_ITERATIONS = 2000  # VISSL's and PCL's


def lowshot(sides: LabelledFeatures, settings: LowshotConfig, bootstrap: Bootstrap) -> list[Finding]:
    """Train on n images of each class, classify the test images; for every n, over several draws.

    A draw, which depends on the seed, puts the images of each class in an order of its own and n shots are its first n: draws are
    independent of each other, the shots of a draw contain those of fewer. All images (n = 0, or no class has more than n) are one
    draw. Where no cost can be chosen, as with one image a class, it is 1.

    Figures are means over the draws, of two or more with the deviation of the main one (of draws - 1). Intervals are those of the
    mean over the same draws: what other test images would change.
    """
    findings, labels, single = list[Finding](), sides.bank_labels.numpy().astype(np.int64), not sides.several
    bank, test = (unit(rows).double().cpu().numpy() for rows in (sides.bank, sides.test))
    count = class_counts(sides.bank_labels, sides.classes)
    for shots in dict.fromkeys(settings.shots):
        whole = not shots or (single and shots >= int(count.max()))  # every draw would take them all
        scores, costs, stuck, notes = list[torch.Tensor](), list[float | None](), 0, list[str]()
        for draw in range(1 if whole else settings.draws):
            generator = np.random.Generator(np.random.PCG64([bootstrap.seed, draw]))
            order = np.arange(len(labels)) if whole else generator.permutation(len(labels))
            taken = drawn_rows(labels, sides.classes, order, shots)
            problems = {own: (bank[rows], labels[rows] if single else labels[rows, own]) for own, rows in taken.items()}
            with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # a note says it instead
                costs.append(choose_cost([*problems.values()], settings.cost, single))
                machines = {own: _machine(costs[-1], single).fit(*problem) for own, problem in problems.items()}
            stuck += sum(int(machine.n_iter_ >= _ITERATIONS) for machine in machines.values())
            scores.append(torch.from_numpy(_scores(machines, test, sides.classes)))
        if few := named((count > 0) & (count < shots)):
            notes.append(f"Fewer than {shots} bank images of {few}: all of them were used.")
        if not single and (lone := named((count == 0) | ((sides.bank_labels == 0).sum(dim=0) == 0))):
            notes.append(f"The bank has no images both of {lone} and not, so nothing was learnt there.")
        if None in costs:
            notes.append(f"With so few images a class there is no cross-validation, so the cost was {_COST:g}.")
        if stuck:
            notes.append(f"{stuck} of the support vector machines had not converged after {_ITERATIONS} iterations.")
        truth, setting, right = sides.test_labels, dict[str, Any](shots=shots), None
        if sides.several:
            setting["average_precision"] = "interpolated"
            figures = [{"map": 100 * float(np.nanmean(average_precision(each, truth, interpolated=True)))} for each in scores]
            samples = np.mean([map_samples(each, truth, bootstrap, interpolated=True) for each in scores], axis=0)
            intervals = {"map": percentiles(100 * samples)}
        else:
            place = torch.stack([ranks(each, truth) for each in scores])
            figures = [accuracies(rank, truth, sides.classes) for rank in place]
            best = {"top1": 1, "top5": min(5, sides.classes)}
            intervals = {name: mean_interval(100 * (place < k).double().mean(dim=0), bootstrap) for name, k in best.items()}
            right = (place[0] == 0).numpy() if len(scores) == 1 else None
        main = next(iter(figures[0]))
        mean = {name: float(np.mean([each[name] for each in figures])) for name in figures[0]}
        if len(scores) > 1:
            mean[f"{main}_deviation"] = float(np.std([each[main] for each in figures], ddof=1))
        draws = [{main: round(own[main], 4), "cost": cost or _COST} for own, cost in zip(figures, costs, strict=True)]
        findings.append(Finding(setting, main, mean, intervals, tuple(notes), {"draws": draws}, right))
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


def _machine(cost: float | None, single: bool) -> LinearSVC:
    """Create a machine; the bias is penalised like a weight. With several labels an image, yes weighs double."""
    weights = None if single else {0: 1.0, 1: 2.0}
    return LinearSVC(C=cost or _COST, class_weight=weights, max_iter=_ITERATIONS, dual="auto", random_state=0)


def _scores(machines: dict[int | None, LinearSVC], test: Floats, classes: int) -> npt.NDArray[np.float32]:
    """Return [M,C] of the machine for all classes, each against the rest, or of one for each class: of it, or not."""
    # A class without an image is never predicted.
    scores = np.full((len(test), classes), -np.inf if None in machines else 0, np.float32)
    for own, machine in machines.items():
        decision = machine.decision_function(test)
        if own is None and decision.ndim == 1:  # two classes are opposites
            decision = np.stack([-decision, decision], axis=1)
        scores[:, machine.classes_ if own is None else own] = decision
    return scores


def choose_cost(problems: list[tuple[Floats, Ints]], costs: tuple[float, ...], single: bool) -> float | None:
    """Return the cost with the best score on images left out, over all problems (features [n,F], classes [n]) and parts.

    The score is the share labelled right, or with several labels an image the interpolated average precision; of equals the
    smallest cost is taken. The images of a class take turns in three parts, each of which is left out once; the only image of a
    class is in all that is learnt from. None: there is nothing to choose by, as no part has images of two classes.
    """
    if len(costs) == 1:
        return costs[0]
    scoring, scores = None if single else _precision, {cost: list[float]() for cost in sorted(costs)}
    for features, truth in problems:
        turn = np.full(len(truth), -1)
        for own, count in zip(*np.unique(truth, return_counts=True), strict=True):
            turn[truth == own] = np.arange(count) % _PARTS if count > 1 else -1
        splits = [sides for sides in PredefinedSplit(turn).split() if all(len(np.unique(truth[side])) > 1 for side in sides)]
        for cost in scores if splits else ():
            scores[cost] += cross_val_score(_machine(cost, single), features, truth, cv=splits, scoring=scoring).tolist()
    means = {cost: np.mean(each) for cost, each in scores.items() if each}
    return max(means, key=lambda cost: means[cost], default=None)


def _precision(machine: LinearSVC, features: Floats, truth: Ints) -> float:
    decision = torch.from_numpy(machine.decision_function(features))[:, None]
    return float(average_precision(decision, torch.from_numpy(truth[:, None]), interpolated=True)[0])
