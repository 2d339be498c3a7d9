"""Classification from few images a class by linear SVMs, drawn several times.

After the low-shot benchmark of VISSL (Goyal et al. 2019) as PCL (Li et al. 2021, "Prototypical Contrastive Learning") reports
it: features of unit norm, five independent draws. For images with several labels, as in VOC07, each class has a machine of its
own from n images of the class and (C - 1) n others, those of the class weighing double, as VISSL draws them, and the figure is
the mean average precision with interpolated precision. The code of both quotes the cost that does best on the test images; here
it is chosen by cross-validation on the drawn images, which no test image has a say in.

Legend: N bank images, M test images, F feature dimensions, C classes, n shots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from relssl.errors import ConfigError, DataError
from relssl.evaluation.features import Rows, full_precision, require_varied, unit
from relssl.evaluation.findings import Finding
from relssl.evaluation.metrics import (
    ITERATIONS,
    PLAIN_COST,
    Bootstrap,
    Floats_svm,
    Ints,
    Machine,
    Problem,
    Score,
    accuracies,
    average_precision,
    choose_cost,
    map_samples,
    mean_interval,
    percentiles,
    ranks,
    train,
)
from relssl.evaluation.pairs import check_labels, counts, named, places
from relssl.settings.evaluation import LowshotConfig

_TWICE = {0: 1.0, 1: 2.0}


def lowshot(
    bank: Tensor,
    bank_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    classes: int,
    settings: LowshotConfig,
    bootstrap: Bootstrap,
    seed: int,
    chunk: int = 4096,
) -> list[Finding]:
    """Train on n images of each class, classify the test images; for every n, over several draws.

    A draw puts the images of each class in an order of its own and n shots are its first n: draws are independent of each other,
    the shots of a draw contain those of fewer. All images (n = 0, or no class has more than n) are one draw. The drawn images are
    held in fp64. Where no cost can be chosen, as with one image a class, it is 1.

    Args:
        bank, test: [N,F] and [M,F] fp32; may be memory-mapped.
        bank_labels, test_labels: int64 in 0..C-1; or int8 [N,C] and [M,C] (1 yes, 0 no, -1 not told).
        seed: of the draws.
        chunk: test images at a time.

    Returns:
        A finding for every n, {"shots": n}: the mean over draws of top1, top5 and mean_per_class, or of map, and, with two draws
        or more, top1_deviation or map_deviation (of draws - 1). Intervals are those of the mean over the same draws: what other
        test images would change. `details` has the figure and the cost of each draw.

    Raises:
        NumericError: for NaN, Inf or constant features. DataError: for a bank of one class, or without test labels.
        ConfigError: without shots or costs.
    """
    if not (settings.shots and settings.cost):
        raise ConfigError("lowshot: shots and cost must not be empty; give at least one of each")
    notes = check_labels(bank_labels, test_labels, classes)
    require_varied(bank, "bank")
    require_varied(test, "test")
    labels, truth = bank_labels.cpu(), test_labels.cpu()
    make = _several if labels.dim() == 2 else _single
    findings = []
    for shots in dict.fromkeys(settings.shots):
        draws = [make(bank, labels, classes, order, shots, settings) for order in _orders(labels, seed, settings.draws, shots)]
        scores = [_scores(Rows("test", test), draw, chunk) for draw in draws]
        findings.append(_finding(shots, draws, scores, truth, bootstrap, notes + _short(labels, classes, shots)))
    return findings


@dataclass(frozen=True)
class _Draw:
    """A classifier: weights fp32 [C,F], biases [C], the cost (None if it could not be chosen), machines that did not converge."""

    weight: Tensor
    bias: Tensor
    cost: float | None
    stuck: int


def _orders(labels: Tensor, seed: int, draws: int, shots: int) -> list[Ints]:
    """The orders of the bank in which each draw takes images; a single one where every draw would take them all."""
    if not shots or (labels.dim() == 1 and shots >= int(labels.bincount().max())):
        return [np.arange(len(labels))]
    return [np.random.Generator(np.random.PCG64([seed, draw])).permutation(len(labels)) for draw in range(draws)]


def _short(labels: Tensor, classes: int, shots: int) -> list[str]:
    have = counts(labels, classes)
    notes = []
    if few := places((have > 0) & (have < shots)):
        notes.append(f"Fewer than {shots} bank images of {named(few)}: all of them were used.")
    if labels.dim() == 2 and (lone := places((have == 0) | ((labels == 0).sum(dim=0) == 0))):
        notes.append(f"The bank has no images both of {named(lone)} and not, so nothing was learnt there.")
    return notes


def _single(bank: Tensor, labels: Tensor, classes: int, order: Ints, shots: int, settings: LowshotConfig) -> _Draw:
    """One machine for all classes, each against the rest."""
    own = labels.numpy()[order]
    ends = np.cumsum(counts(labels, classes).numpy())[:-1]
    rows = np.concatenate([some[: shots or None] for some in np.split(order[own.argsort(kind="stable")], ends)])
    problem = Problem(_gather(bank, rows), np.arange(len(rows)), labels.numpy()[rows])
    cost = _cost([problem], settings, _right)
    machine = train(problem, cost or PLAIN_COST)
    weight, bias = torch.zeros(classes, bank.shape[1]), torch.full((classes,), -torch.inf)  # what has no image is never said
    weight[machine.classes] = torch.from_numpy(machine.weight).float()
    bias[machine.classes] = torch.from_numpy(machine.bias).float()
    return _Draw(weight, bias, cost, int(not machine.converged))


def _several(bank: Tensor, labels: Tensor, classes: int, order: Ints, shots: int, settings: LowshotConfig) -> _Draw:
    """A machine for each class: of it, or not."""
    ranked = labels.numpy()[order]
    taken = {}
    for own in range(classes):
        yes, no = order[ranked[:, own] == 1], order[ranked[:, own] == 0]
        if len(yes) and len(no):
            taken[own] = np.concatenate([yes[: shots or None], no[: (classes - 1) * shots or None]])
    if not taken:
        raise DataError("labels: no class has bank images that are of it and others that are not; nothing can be learnt")
    union = np.unique(np.concatenate(list(taken.values())))
    features = _gather(bank, union)
    problems = {
        own: Problem(features, np.searchsorted(union, rows), labels.numpy()[rows, own].astype(np.int64), _TWICE)
        for own, rows in taken.items()
    }
    cost = _cost(list(problems.values()), settings, _precision)
    weight, bias, stuck = torch.zeros(classes, bank.shape[1]), torch.zeros(classes), 0
    for own, problem in problems.items():
        machine = train(problem, cost or PLAIN_COST)
        weight[own], bias[own] = torch.from_numpy(machine.weight[1]).float(), float(machine.bias[1])
        stuck += not machine.converged
    return _Draw(weight, bias, cost, stuck)


def _gather(bank: Tensor, rows: Ints) -> Floats_svm:
    """Some rows of the bank, fp64 of unit norm."""
    return np.asarray(unit(bank[torch.from_numpy(rows)]).double().cpu().numpy())


def _cost(problems: list[Problem], settings: LowshotConfig, score: Score) -> float | None:
    return settings.cost[0] if len(settings.cost) == 1 else choose_cost(problems, settings.cost, score)


def _right(machine: Machine, out: Problem) -> float:
    """The share labelled right."""
    said = machine.classes[machine.decide(out.features[out.rows]).argmax(axis=1)]
    return float((said == out.truth).mean())


def _precision(machine: Machine, out: Problem) -> float:
    """Average precision."""
    scores = torch.from_numpy(machine.decide(out.features[out.rows])[:, 1:])
    return float(average_precision(scores, torch.from_numpy(out.truth[:, None]), interpolated=True)[0])


def _scores(test: Rows, draw: _Draw, chunk: int) -> Tensor:
    """[M,C] fp32 on the CPU."""
    device = test.features.device
    weight, bias = draw.weight.to(device), draw.bias.to(device)
    with full_precision(device):
        return torch.cat([torch.addmm(bias, rows, weight.T).cpu() for _, rows in test.units(chunk, device)])


def _finding(
    shots: int, draws: list[_Draw], scores: list[Tensor], truth: Tensor, bootstrap: Bootstrap, notes: list[str]
) -> Finding:
    several = truth.dim() == 2
    classes = len(draws[0].bias)
    figures: list[dict[str, float]]
    if several:
        figures = [{"map": 100 * float(np.nanmean(average_precision(some, truth, interpolated=True)))} for some in scores]
        samples = np.mean([map_samples(some, truth, bootstrap, interpolated=True) for some in scores], axis=0)
        intervals, right = {"map": percentiles(100 * samples)}, None
    else:
        place = [ranks(some, truth) for some in scores]
        figures = [accuracies(rank, truth, classes) for rank in place]
        among = {"top1": 1, "top5": min(5, classes)}
        hits = {name: torch.stack([rank < best for rank in place]).double().mean(dim=0) for name, best in among.items()}
        intervals = {name: mean_interval(100 * share.numpy(), bootstrap) for name, share in hits.items()}
        right = (place[0] == 0).numpy() if len(draws) == 1 else None
    main = next(iter(figures[0]))
    mean = {name: float(np.mean([each[name] for each in figures])) for name in figures[0]}
    if len(draws) > 1:
        mean[f"{main}_deviation"] = float(np.std([each[main] for each in figures], ddof=1))
    each = [{main: round(own[main], 4), "cost": draw.cost or PLAIN_COST} for own, draw in zip(figures, draws, strict=True)]
    setting = {"shots": shots} | ({"average_precision": "interpolated"} if several else {})
    return Finding(setting, main, mean, intervals, (*notes, *_remarks(draws)), {"draws": each}, right)


def _remarks(draws: list[_Draw]) -> list[str]:
    notes = []
    if any(draw.cost is None for draw in draws):
        notes.append(f"With so few images a class there is no cross-validation, so the cost was {PLAIN_COST:g}.")
    if stuck := sum(draw.stuck for draw in draws):
        notes.append(f"{stuck} of the support vector machines had not converged after {ITERATIONS} iterations.")
    return notes
