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

_LOW = 0xFFFFFFFF
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


def neighbours(bank: Tensor, queries: Tensor, k: int, *, chunk: int = 1024, bank_chunk: int = 16384) -> tuple[Tensor, Tensor]:
    """Find the nearest bank features by cosine similarity; ties in fp32 go to the lower index.

    Args:
        bank, queries: [N,D] and [M,D] of any real dtype; the work is done on the queries' device, in fp32.
        k: 1..N.
        chunk, bank_chunk: queries and bank features at a time, whose similarities are in memory at once.

    Returns:
        Similarities [M,k], falling, and places in the bank [M,k], on the CPU; ValueError for another k, or NaN or Inf features.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must lie in 1..{len(bank)}, the features of the bank, got {k}")
    device = queries.device
    best = torch.full((len(queries), k), torch.iinfo(torch.int64).min, device=device)
    with full_precision(device):
        parts = [unit(part) for part in torch.split(queries, chunk)]
        for first in range(0, len(bank), bank_chunk):
            rows = unit(bank[first : first + bank_chunk].to(device))
            for part, place in zip(parts, torch.split(best, chunk), strict=True):
                nearest = _nearest(part @ rows.T, first, k)
                place.copy_(torch.cat([place, nearest], dim=1).topk(k, dim=1).values)
    bits = best >> 32
    similarity = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).int().view(torch.float32)
    return similarity.cpu(), (_LOW - (best & _LOW)).cpu()


def _nearest(similarity: Tensor, first: int, k: int) -> Tensor:
    """Return the keys of the k largest (or all) in each row of [m,n], whose columns are the bank's from `first` on."""
    k = min(k, similarity.shape[1])
    values, columns = similarity.topk(k, dim=1)
    keys = _keys(values, first + columns)
    # topk picks any of the equal values at its end; only in rows where there are more than fit do all keys have to be compared.
    tied = ((similarity >= values[:, -1:]).sum(dim=1) > k).nonzero().flatten()
    columns = torch.arange(first, first + similarity.shape[1], device=similarity.device)
    for rows in torch.split(tied, 64):  # a few at a time: keys take several times the memory
        keys[rows] = _keys(similarity[rows], columns).topk(k, dim=1).values
    return keys


def _keys(similarity: Tensor, index: Tensor) -> Tensor:
    """Return int64 keys that order by similarity, then by lower index (below 2^32): all differ, so their top k is unique."""
    bits = (similarity + 0.0).view(torch.int32).long()  # -0.0 becomes 0.0
    return (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32) | (_LOW - index)
