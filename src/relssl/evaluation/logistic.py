"""Logistic regression by L-BFGS on features that may be larger than memory: they are read in chunks, and kept if they are few.

Legend: N images, F feature dimensions, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits
from torch import Tensor

from relssl.evaluation.rows import Rows, full_precision

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
