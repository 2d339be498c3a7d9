"""Logistic regression on cached features: what a linear classifier can read off a frozen backbone, without augmentation.

After the field's probes on cached features (CLIP, Radford et al. 2021, appendix A.3: L-BFGS, the L2 penalty swept on held-out
images), on standardised features, with the penalty of `evaluation.logistic`.

Legend: N bank images, M test images, F feature dimensions, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits
from torch import Tensor

from relssl.errors import ConfigError
from relssl.evaluation.features import Rows, full_precision, require_varied
from relssl.evaluation.findings import Finding
from relssl.evaluation.metrics import (
    Bootstrap,
    accuracies,
    accuracy_intervals,
    average_precision,
    map_samples,
    percentiles,
    ranks,
)
from relssl.evaluation.pairs import check_labels, counts, named, places
from relssl.settings.evaluation import ProbeConfig

# scikit-learn's is 1e-4; with fp32 products the largest entry of the gradient comes down to some millionths.
_GRADIENT = 1e-5
_DECREASE = 1e-12
# What counts as arrived where L-BFGS gives up because rounding hides any further decrease.
ARRIVED = 1e-4
# Bytes of centred features that are kept through a fit; more are centred anew in every pass.
_HELD = 1 << 30


@dataclass(frozen=True)
class Scale:
    """Mean fp32 [F] of each dimension, and fp64 [F] the inverse of its deviation, 0 where that is rounding alone."""

    mean: Tensor
    inverse: Tensor

    def centred(self, part: Tensor) -> Tensor:
        """Before any product: a mean far larger than the deviation would leave little of fp32 for what varies."""
        return part.float() - self.mean


@dataclass(frozen=True)
class Fit:
    """A solution of `fit`.

    Attributes:
        flat: fp64 [C * F + C], weights on standardised features and biases, to start another fit from.
        iterations: of L-BFGS.
        gradient: largest magnitude of the gradient's entries at the end.
        converged: whether that, or the decrease of the objective, is small enough.
    """

    flat: npt.NDArray[np.float64]
    iterations: int
    gradient: float
    converged: bool


def measure(rows: Rows, device: torch.device, chunk: int) -> Scale:
    """Mean and deviation (of N, not N - 1) of each dimension, summed in fp64."""
    total = torch.zeros(2, rows.features.shape[1], dtype=torch.float64, device=device)
    first = next(rows.chunks(1, device))[1][0].double()  # sums of differences: squares of a large mean would drown the deviation
    for _, part in rows.chunks(chunk, device):
        off = part.double() - first
        total += torch.stack([off.sum(dim=0), off.square().sum(dim=0)])
    shift, square = total / rows.count
    deviation = (square - shift.square()).clamp_min(0).sqrt()
    mean = first + shift
    varied = deviation > 1e-6 * mean.abs()
    return Scale(mean.float(), torch.where(varied, 1 / deviation.where(varied, 1), 0))


def fit(
    rows: Rows,
    labels: Tensor,
    classes: int,
    strength: float,
    scale: Scale,
    *,
    iterations: int,
    start: npt.NDArray[np.float64] | None = None,
    gradient: float = _GRADIENT,
    device: torch.device,
    chunk: int,
) -> Fit:
    """Minimise mean cross-entropy + strength / 2 * |W|^2 over weights W [C,F] on standardised features and free biases [C].

    With labels [N] the cross-entropy is that of a softmax over the classes; this is scikit-learn's `LogisticRegression` at
    C = 1 / (strength * N) after a `StandardScaler` (for two classes, where scikit-learn has one row of weights and not two,
    at C = 2 / (strength * N)). With int8 labels [N,C] it is the sum over the classes of the binary cross-entropy, each the
    mean of its N_c told images: C regressions at once, each scikit-learn's at C = 1 / (strength * N_c).

    Args:
        labels: of the kept rows.
        start: where to begin, as in `Fit.flat`; zeros if not given.
        gradient: the largest magnitude of the gradient's entries at which to stop.
    """
    objective = _Objective(rows, labels, classes, strength, scale, device, chunk)
    begin = np.zeros(classes * (rows.features.shape[1] + 1)) if start is None else start
    # As in scikit-learn; `maxfun`, which counts all evaluations, must never end a fit before `iterations` does.
    options = {"maxiter": iterations, "maxfun": 50 * iterations, "maxls": 50, "gtol": gradient, "ftol": _DECREASE}
    # scipy's own little products on many threads would take turns with torch's threads, and most of the time wait for them.
    with full_precision(device), threadpool_limits(1, user_api="blas"):
        found = minimize(objective, begin, jac=True, method="L-BFGS-B", options=options)
    reached = float(np.abs(found.jac).max())
    return Fit(found.x, int(found.nit), reached, bool(found.success) or reached <= ARRIVED)


def predict(rows: Rows, found: Fit, classes: int, scale: Scale, device: torch.device, chunk: int) -> Tensor:
    """The logits, fp32 [n,C] on the CPU."""
    weight, bias = unpack(found.flat, classes, device)
    folded, offset = (weight * scale.inverse).float(), bias.float()
    with full_precision(device):
        parts = rows.chunks(chunk, device)
        return torch.cat([torch.addmm(offset, scale.centred(part), folded.T).cpu() for _, part in parts])


def unpack(flat: npt.NDArray[np.float64], classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights on standardised features fp64 [C,F], and biases fp64 [C]."""
    both = torch.from_numpy(flat).to(device)
    return both[:-classes].view(classes, -1), both[-classes:]


class _Objective:
    """The objective and its gradient at a point, in one pass over the features."""

    def __init__(
        self, rows: Rows, labels: Tensor, classes: int, strength: float, scale: Scale, device: torch.device, chunk: int
    ) -> None:
        self.rows, self.labels, self.classes, self.strength, self.scale = rows, labels, classes, strength, scale
        self.device, self.chunk = device, chunk
        told = (labels >= 0).sum(dim=0) if labels.dim() == 2 else torch.tensor(len(labels))
        self.told = told.clamp_min(1).to(device)
        self.loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = _binary if labels.dim() == 2 else _softmax
        self.held = list(self._read()) if 4 * rows.count * rows.features.shape[1] <= _HELD else None

    def _read(self) -> Iterator[tuple[int, Tensor]]:
        """The features a chunk at a time, centred."""
        return ((start, self.scale.centred(part)) for start, part in self.rows.chunks(self.chunk, self.device))

    def __call__(self, flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        weight, bias = unpack(flat, self.classes, self.device)
        folded, offset = (weight * self.scale.inverse).float(), bias.float()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        by_weight, by_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for start, part in self.held if self.held is not None else self._read():
            own = self.labels[start : start + len(part)].to(self.device)
            losses, slope = self.loss(torch.addmm(offset, part, folded.T), own)
            loss += (losses.double().sum(dim=0) / self.told).sum()
            slope = slope / self.told
            by_weight += slope.T @ part
            by_bias += slope.sum(dim=0)
        by_weight = by_weight * self.scale.inverse + self.strength * weight
        loss += self.strength / 2 * weight.square().sum()
        return float(loss), torch.cat([by_weight.flatten(), by_bias]).cpu().numpy()


def _softmax(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies [n] and their slopes [n,C]."""
    log = logits.log_softmax(dim=1)
    slope = log.exp()
    slope[torch.arange(len(labels), device=labels.device), labels] -= 1
    return -log.gather(1, labels[:, None])[:, 0], slope


def _binary(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropies [n,C] and their slopes [n,C], 0 where a label is not told."""
    told, yes = labels >= 0, labels.clamp_min(0).float()
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, yes, reduction="none")
    return losses * told, (logits.sigmoid() - yes) * told


# Weaker penalties that may in a row be no better than the best.
_PATIENCE = 2


def probe(
    bank: Tensor,
    bank_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    classes: int,
    settings: ProbeConfig,
    bootstrap: Bootstrap,
    seed: int,
    device: torch.device | None = None,
    chunk: int = 4096,
) -> list[Finding]:
    """Choose the L2 penalty on a held-out part of the bank, fit on the whole bank, classify the test images.

    The penalties are tried from the strongest to the weakest, each fit beginning where the last ended; of those equally good on
    the held-out images the strongest is taken, and after two in a row that are no better no weaker one is tried. Mean and
    deviation are those of the whole bank throughout.

    Args:
        bank, test: [N,F] and [M,F] fp32; may be memory-mapped.
        bank_labels, test_labels: int64 in 0..C-1; or int8 [N,C] and [M,C] (1 yes, 0 no, -1 not told) for one binary
            regression a class, all with the same penalty, chosen by their mean average precision.
        classes: C.
        seed: of the held-out part: a share of each class, of at least one image where it has two; of all images if they have
            several labels.
        device: where to compute, the test features' if not given; features elsewhere go there chunk by chunk, once an evaluation.
        chunk: images at a time.

    Returns:
        One finding: top1, top5 and mean_per_class, or map (plain average precision, as scikit-learn's); `details` with the penalty
        chosen and how each one did.

    Raises:
        NumericError: for NaN, Inf or constant features. DataError: for a bank of one class, or without test labels.
        ConfigError: without a penalty.
    """
    if not settings.strengths:
        raise ConfigError("probe.strengths: is empty; give at least one penalty")
    notes = check_labels(bank_labels, test_labels, classes)
    require_varied(bank, "bank")
    require_varied(test, "test")
    labels, where = bank_labels.cpu(), device or test.device
    held, own = hold_out(labels, classes, settings.held_out, seed)
    notes += own
    whole = Rows("bank", bank)
    scale = measure(whole, where, chunk)
    more: dict[str, Any] = {"iterations": settings.iterations, "device": where, "chunk": chunk}
    chosen, tried = _path(whole, labels, held, classes, settings, scale, more)
    notes += _choice_notes(chosen["strength"], tried, settings)
    final = fit(whole, labels, classes, chosen["strength"], scale, start=chosen.pop("start"), **more)
    if not final.converged:
        notes.append(
            f"The final fit had not converged after {final.iterations} iterations (largest slope {final.gradient:.1e}); "
            "raise probe.iterations."
        )
    scores = predict(Rows("test", test), final, classes, scale, where, chunk)
    details = {"strength": chosen["strength"], "held_out": int(held.sum()), "tried": tried, "iterations": final.iterations}
    return [_finding(scores, test_labels.cpu(), classes, bootstrap, notes, details)]


def hold_out(labels: Tensor, classes: int, share: float, seed: int) -> tuple[Tensor, list[str]]:
    """Which images of the bank the penalty is chosen on, bool [N], and notes on classes that have none among them."""
    generator = np.random.Generator(np.random.PCG64(seed))
    held = torch.zeros(len(labels), dtype=torch.bool)
    if labels.dim() == 2:
        some = min(max(1, round(share * len(labels))), len(labels) - 1)
        held[torch.from_numpy(generator.permutation(len(labels))[:some])] = True
        return held, []
    have = counts(labels, classes)
    for rows in torch.split(labels.argsort(stable=True), have.tolist()):
        some = min(max(1, round(share * len(rows))), len(rows) - 1)
        held[rows[torch.from_numpy(generator.permutation(len(rows))[: max(some, 0)])]] = True
    single = places(have == 1)
    return held, [f"With a single bank image each, {named(single)} took no part in choosing the penalty."] if single else []


def _path(
    whole: Rows, labels: Tensor, held: Tensor, classes: int, settings: ProbeConfig, scale: Scale, more: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The best penalty with its solution, and how each did on the held-out images; one penalty needs no choice."""
    strengths = sorted(set(settings.strengths), reverse=True)
    if len(strengths) == 1 or not bool(held.any()):
        return {"strength": strengths[len(strengths) // 2], "start": None}, []
    kept = (~held).nonzero().flatten()
    learnt, asked = Rows("bank", whole.features, kept), Rows("bank", whole.features, held.nonzero().flatten())
    best: dict[str, Any] = {"figure": -1.0}
    tried, start = [], None
    for strength in strengths:
        found = fit(learnt, labels[kept], classes, strength, scale, start=start, gradient=ARRIVED, **more)
        start = found.flat
        scores, truth = predict(asked, found, classes, scale, more["device"], more["chunk"]), labels[held]
        figure = _map(scores, truth) if labels.dim() == 2 else accuracies(ranks(scores, truth), truth, classes)["top1"]
        name = "map" if labels.dim() == 2 else "top1"
        tried.append({"strength": strength, name: round(figure, 4), "iterations": found.iterations, "converged": found.converged})
        if figure > best["figure"]:
            best = {"figure": figure, "strength": strength, "start": start, "place": len(tried)}
        elif len(tried) - best["place"] == _PATIENCE:
            break  # weaker ones take ever longer, and fit the noise
    del best["place"]
    return best, tried


def _choice_notes(strength: float, tried: list[dict[str, Any]], settings: ProbeConfig) -> list[str]:
    if len(set(settings.strengths)) == 1:
        return []
    if not tried:
        return [f"No image of the bank could be held out, so the middle penalty, {strength:g}, was taken."]
    if strength in (min(settings.strengths), max(settings.strengths)):
        return [f"The penalty chosen, {strength:g}, is at the edge of probe.strengths; try more on that side."]
    return []


def _map(scores: Tensor, truth: Tensor) -> float:
    found = average_precision(scores, truth)
    return 100 * float(np.nanmean(found)) if not np.isnan(found).all() else 0.0


def _finding(
    scores: Tensor, truth: Tensor, classes: int, bootstrap: Bootstrap, notes: list[str], details: dict[str, Any]
) -> Finding:
    if truth.dim() == 2:
        each = 100 * average_precision(scores, truth)
        details |= {"average_precision": [None if np.isnan(value) else round(float(value), 4) for value in each]}
        interval = percentiles(100 * map_samples(scores, truth, bootstrap))
        return Finding(
            {"average_precision": "plain"}, "map", {"map": _map(scores, truth)}, {"map": interval}, tuple(notes), details
        )
    rank = ranks(scores, truth)
    return Finding(
        {},
        "top1",
        accuracies(rank, truth, classes),
        accuracy_intervals(rank, truth, classes, bootstrap),
        tuple(notes),
        details,
        (rank == 0).numpy(),
    )
