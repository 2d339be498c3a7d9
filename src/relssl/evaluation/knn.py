"""The weighted k-nearest-neighbour classifier: what frozen features know, without a single trained weight.

After InstDisc (Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section 3.4): the k
nearest bank features by cosine similarity vote for their class with weight exp(similarity / temperature).

Legend: N bank features, M queries, D dimensions, C classes, k neighbours.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from relssl.errors import ConfigError
from relssl.evaluation.features import LabelledFeatures, full_precision, unit
from relssl.evaluation.metrics import Bootstrap, accuracies, ranks
from relssl.evaluation.result import Finding
from relssl.settings.evaluation import KnnConfig

_VOTERS = 4096  # queries whose votes are counted at a time


def knn(sides: LabelledFeatures, settings: KnnConfig, bootstrap: Bootstrap) -> list[Finding]:
    """Classify by weighted kNN at every k and temperature of the settings, from one pass over the bank; nothing is drawn.

    Raises:
        ConfigError: for images with several labels.
    """
    if sides.several:
        raise ConfigError("protocol: knn votes for one class, these images have several labels; use probe, lowshot or retrieval")
    most, findings = len(sides.bank), dict[tuple[int, float], Finding]()
    near = neighbours(sides.bank, sides.test, min(max(settings.k), most))
    for wanted, temperature in itertools.product(settings.k, settings.temperature):
        notes = (f"k lowered from {wanted} to {most}, the images of the bank",) if most < wanted else ()
        k, rank = min(wanted, most), _ranks(sides, *near, wanted, temperature)
        setting = {"k": k, "temperature": temperature}
        findings[k, temperature] = Finding.of_ranks(setting, rank, sides.test_labels, sides.classes, bootstrap, notes=notes)
    return list(findings.values())


def knn_accuracy(sides: LabelledFeatures, k: int, temperature: float) -> dict[str, float]:
    """Compute how often the k nearest neighbours, or all if there are fewer, are right: `metrics.accuracies`, in percent."""
    near = neighbours(sides.bank, sides.test, min(k, len(sides.bank)))
    return accuracies(_ranks(sides, *near, k, temperature), sides.test_labels, sides.classes)


def _ranks(sides: LabelledFeatures, similarity: Tensor, index: Tensor, k: int, temperature: float) -> Tensor:
    """Count the classes that come before the true one, [M], of the first k neighbours."""
    parts = []
    for rows in torch.split(torch.arange(len(index)), _VOTERS):
        truth = sides.test_labels[rows]
        scores = votes(similarity[rows, :k], sides.bank_labels[index[rows, :k]], temperature, sides.classes)
        rank, voted = ranks(scores, truth), scores.gather(1, truth[:, None])[:, 0] > 0
        # Among more than five classes, one without a vote is not among the first five.
        parts.append(rank if sides.classes <= 5 else torch.where(voted, rank, sides.classes))
    return torch.cat(parts)


def votes(similarity: Tensor, labels: Tensor, temperature: float, classes: int) -> Tensor:
    """Return the share of the vote that each class gets, fp64 [M,C], of neighbours' similarities and labels [M,k], nearest first.

    On the CPU, where the sum has one order; argmax is the prediction, of equal classes the lower one.
    """
    near = similarity.double()
    weights = ((near - near[:, :1]) / temperature).exp()  # the first is the largest: no overflow, and no sum of zero
    scores = torch.zeros(len(near), classes, dtype=torch.float64).scatter_add_(1, labels, weights)
    return scores / scores.sum(dim=1, keepdim=True)


def neighbours(bank: Tensor, queries: Tensor, k: int, *, cells: int = 1 << 25) -> tuple[Tensor, Tensor]:
    """Find the nearest bank features by cosine similarity; ties in fp32 go to the lower index.

    Args:
        bank, queries: [N,D] and [M,D] of any real dtype; the work is done on the queries' device, in fp32.
        k: 1..N.
        cells: similarities that are in memory at once, those of one query at least.

    Returns:
        Similarities [M,k], falling, and places in the bank [M,k], on the CPU; ValueError for another k, or NaN or Inf features.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must lie in 1..{len(bank)}, the features of the bank, got {k}")
    parts = []
    with full_precision(queries.device):
        bank = unit(bank, queries.device)
        for some in torch.split(queries, max(1, cells // len(bank))):
            near = unit(some) @ bank.T
            values, index = near.topk(k, dim=1)
            # topk picks any of the equal values at its end; where there are more than fit, the whole row is sorted.
            tied = ((near >= values[:, -1:]).sum(dim=1) > k).nonzero().flatten()
            for rows in torch.split(tied, 64):  # a few at a time: sorting takes several times the memory
                index[rows] = near[rows].sort(dim=1, descending=True, stable=True).indices[:, :k]
            index = index.sort(dim=1).values
            values, order = near.gather(1, index).sort(dim=1, descending=True, stable=True)
            parts.append((values.cpu(), index.gather(1, order).cpu()))
    similarity, places = zip(*parts, strict=True)
    return torch.cat(similarity), torch.cat(places)
