"""Logistic regression on cached features: what a linear classifier can read off a frozen backbone, without augmentation.

After the field's probes on cached features (CLIP, Radford et al. 2021, appendix A.3: L-BFGS, the L2 penalty swept on held-out
images), on standardised features, with the penalty of `evaluation.logistic`.

Legend: N bank images, M test images, F feature dimensions, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from relssl.errors import ConfigError
from relssl.evaluation.classes import check_labels, counts, named, places
from relssl.evaluation.features import require_varied
from relssl.evaluation.findings import Finding
from relssl.evaluation.logistic import ARRIVED, Scale, fit, measure, predict
from relssl.evaluation.metrics import (
    Bootstrap,
    accuracies,
    accuracy_intervals,
    average_precision,
    map_samples,
    percentiles,
    ranks,
)
from relssl.evaluation.rows import Rows
from relssl.protocols import ProbeConfig

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
