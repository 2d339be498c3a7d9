"""Logistic regression on cached features: what a linear classifier can read off a frozen backbone, without augmentation.

After the field's probes on cached features (CLIP, Radford et al. 2021, appendix A.3: L-BFGS, the L2 penalty swept on held-out
images), on standardised features.

Legend: N bank images, M test images, F feature dimensions, C classes.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from relssl.evaluation.features import LabelledFeatures, full_precision
from relssl.evaluation.metrics import Bootstrap, accuracies, average_precision, map_samples, percentiles, ranks
from relssl.evaluation.pairs import class_counts, named
from relssl.evaluation.result import Finding
from relssl.settings.evaluation import ProbeConfig

_GRADIENT = 1e-5  # scikit-learn's is 1e-4; with fp32 products the largest entry of the gradient comes down to some millionths
_ENOUGH = 1e-4  # to choose a penalty by, and to count as converged where rounding hides any further decrease
_PATIENCE = 2  # weaker penalties that may in a row be no better than the best
_ROWS = 4096  # images whose logits are held at a time


class Fit(NamedTuple):
    """Where L-BFGS ended."""

    weight: Tensor  # and biases, fp64 [C,F+1]
    iterations: int
    gradient: float  # the largest magnitude of its entries


def probe(sides: LabelledFeatures, settings: ProbeConfig, bootstrap: Bootstrap) -> list[Finding]:
    """Choose the L2 penalty on a held-out part of the bank, fit on the whole bank, classify the test images.

    The penalties are tried from the strongest to the weakest, each fit beginning where the last ended; of those equally good on
    the held-out images the strongest is taken, and after two in a row that are no better no weaker one is tried. Mean and
    deviation are those of the whole bank throughout. With several labels an image there is one binary regression a class, all
    with the same penalty, chosen by their mean average precision (the plain one, as scikit-learn's).
    """
    classes, test, truth = sides.classes, sides.test, sides.test_labels
    out, notes = hold_out(sides.bank_labels, classes, settings.held_out, bootstrap.seed)
    order, learnt = torch.argsort(out.int(), stable=True), len(out) - int(out.sum())  # what is held out comes last
    deviation, mean = (each.to(test.device) for each in torch.std_mean(sides.bank, dim=0, correction=0))
    rows = standardise(sides.bank[order].to(test.device), mean, deviation)
    labels = sides.bank_labels[order].to(test.device)

    strengths, tried = sorted(set(settings.strengths), reverse=True), list[dict[str, Any]]()
    strength, start, best, last, waited = strengths[len(strengths) // 2], None, -1.0, None, 0
    for each in strengths if len(strengths) > 1 and learnt < len(rows) else ():
        fitted = fit(rows[:learnt], labels[:learnt], classes, each, settings.iterations, start=last, gradient=_ENOUGH)
        last, converged = fitted.weight, fitted.gradient <= _ENOUGH
        name, figure = _figure(predict(rows[learnt:], last), labels[learnt:].cpu(), classes)
        tried.append({"strength": each, name: round(figure, 4), "iterations": fitted.iterations, "converged": converged})
        waited += 1
        if figure > best:
            strength, start, best, waited = each, last, figure, 0
        if waited == _PATIENCE:
            break  # weaker ones take ever longer, and fit the noise
    final = fit(rows, labels, classes, strength, settings.iterations, start=start)
    if len(strengths) > 1 and not tried:
        notes.append(f"No image of the bank could be held out, so the middle penalty, {strength:g}, was taken.")
    elif len(strengths) > 1 and strength in (strengths[0], strengths[-1]):
        notes.append(f"The penalty chosen, {strength:g}, is at the edge of probe.strengths; try more on that side.")
    if final.gradient > _ENOUGH:
        slope = f"largest slope {final.gradient:.1e}"
        notes.append(f"The final fit had not converged after {final.iterations} iterations ({slope}); raise probe.iterations.")

    scores = predict(standardise(test, mean, deviation), final.weight)
    details = {"strength": strength, "held_out": int(out.sum()), "tried": tried, "iterations": final.iterations}
    more: dict[str, Any] = {"notes": tuple(notes), "details": details}
    if not sides.several:
        return [Finding.of_ranks({}, ranks(scores, truth), truth, classes, bootstrap, **more)]
    each_class = average_precision(scores, truth)
    details["average_precision"] = [None if np.isnan(value) else round(float(100 * value), 4) for value in each_class]
    figures, samples = dict([_figure(scores, truth, classes)]), map_samples(scores, truth, bootstrap)
    return [Finding({"average_precision": "plain"}, "map", figures, {"map": percentiles(100 * samples)}, **more)]


def standardise(features: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Return features [n,F] less the mean, over the deviation; 0 in dimensions that vary by rounding alone."""
    return (features - mean).mul_(torch.where(deviation > 1e-6 * mean.abs(), 1 / deviation, 0))


def fit(
    rows: Tensor,
    labels: Tensor,
    classes: int,
    strength: float,
    iterations: int,
    start: Tensor | None = None,
    gradient: float = _GRADIENT,
) -> Fit:
    """Minimise mean cross-entropy + strength / 2 * |W|^2 over weights W [C,F] and free biases [C], by torch's L-BFGS.

    With labels [n] this is scikit-learn's `LogisticRegression` at C = 1 / (strength * n), or of two classes, where scikit-learn has
    one row of weights and not two, at C = 2 / (strength * n). With int8 labels [n,C] it is C regressions at once, each of a class
    or not on its n_c known images, at C = 1 / (strength * n_c).

    Args:
        rows: [n,F] fp32, standardised.
        start: weights and biases [C,F+1] to begin at; None: zeros.
        gradient: the largest magnitude of the gradient's entries at which to stop.
    """
    weight = rows.new_zeros(classes, rows.shape[1] + 1, dtype=torch.float64) if start is None else start.clone()
    optimizer = torch.optim.LBFGS(
        [weight.requires_grad_()],
        max_iter=iterations,
        max_eval=50 * iterations,  # which must never end a fit before `iterations` does
        tolerance_grad=gradient,
        history_size=10,
        line_search_fn="strong_wolfe",
    )
    targets, shares = labels.clamp_min(0).float(), (labels >= 0) / (labels >= 0).sum(dim=0).clamp_min(1)  # of several labels

    def objective() -> float:
        """Add up loss and gradient in fp64, from products in fp32."""
        optimizer.zero_grad()
        penalty = strength / 2 * weight[:, :-1].square().sum()
        penalty.backward()  # type: ignore[no-untyped-call]
        total = float(penalty.detach())
        for part in (slice(first, first + _ROWS) for first in range(0, len(rows), _ROWS)):
            logits = _logits(rows[part], weight)
            if labels.dim() == 2:
                each = F.binary_cross_entropy_with_logits(logits, targets[part], shares[part], reduction="none")
            else:
                each = F.cross_entropy(logits, labels[part], reduction="none") / len(rows)
            loss = each.sum(dtype=torch.float64)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    with full_precision(rows.device), torch.enable_grad():
        optimizer.step(objective)  # type: ignore[no-untyped-call]
        objective()  # the line search may have looked elsewhere last
    assert weight.grad is not None
    return Fit(weight.detach(), optimizer.state[weight]["n_iter"], float(weight.grad.abs().max()))


def predict(rows: Tensor, weight: Tensor) -> Tensor:
    """Return the logits, fp32 [n,C] on the CPU, of standardised features [n,F]."""
    with full_precision(rows.device):
        return _logits(rows, weight).cpu()


def _logits(rows: Tensor, weight: Tensor) -> Tensor:
    weight = weight.float()
    return torch.addmm(weight[:, -1], rows, weight[:, :-1].T)


def hold_out(labels: Tensor, classes: int, share: float, seed: int) -> tuple[Tensor, list[str]]:
    """Draw the images of the bank that the penalty is chosen on: bool [N], and notes on classes that have none among them.

    They are a share of each class, of at least one image where it has two; with several labels an image, of all images.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    out, notes = torch.zeros(len(labels), dtype=torch.bool), []
    groups: tuple[Tensor, ...] = (torch.arange(len(labels)),)
    if labels.dim() == 1:
        count = class_counts(labels, classes)
        groups = torch.split(labels.argsort(stable=True), count.tolist())
        if single := named(count == 1):
            notes.append(f"With a single bank image each, {single} took no part in choosing the penalty.")
    for rows in groups:
        some = min(max(1, round(share * len(rows))), len(rows) - 1)
        out[rows[torch.from_numpy(generator.permutation(len(rows))[: max(some, 0)])]] = True
    return out, notes


def _figure(scores: Tensor, truth: Tensor, classes: int) -> tuple[str, float]:
    """Return the name and the percentage of the figure that counts."""
    if truth.dim() == 1:
        return "top1", accuracies(ranks(scores, truth), truth, classes)["top1"]
    each = average_precision(scores, truth)
    return "map", 0.0 if np.isnan(each).all() else 100 * float(np.nanmean(each))
