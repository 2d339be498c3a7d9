"""The weighted k-nearest-neighbour classifier: what frozen features know, without a single trained weight.

After InstDisc (Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section 3.4): the k
nearest bank features by cosine similarity vote for their class with weight exp(similarity / temperature).

Legend: N bank features, M queries, D dimensions, C classes, k neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from relssl.errors import ConfigError
from relssl.evaluation.features import Rows, full_precision
from relssl.evaluation.findings import Finding
from relssl.evaluation.metrics import Bootstrap, accuracies, accuracy_intervals, ranks
from relssl.evaluation.pairs import check_labels
from relssl.settings.evaluation import KnnConfig

# InstDisc and the papers' small sets use (200, 0.1), DINO and solo-learn (20, 0.07).
SETTINGS = ((200, 0.1), (20, 0.07))

_LOW = 0xFFFFFFFF


def knn_classify(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    *,
    k: int,
    temperature: float,
    classes: int,
    chunk: int = 1024,
    bank_chunk: int = 16384,
) -> Tensor:
    """The share of the vote that each class gets: exact search, bounded memory.

    Args:
        bank: [N,D] of any real dtype, on any device; normalised here, in fp32.
        bank_labels: [N] in 0..C-1, or -1 for features that take no part.
        queries: [M,D]; the work is done on their device.
        k: neighbours, at most the labelled bank features.
        temperature: above 0.
        classes: C, at least 2.
        chunk: queries at a time; chunk x bank_chunk similarities are held at once.
        bank_chunk: bank features at a time. Other chunks change a similarity by its last bit at most.

    Returns:
        [M,C] fp32 scores that sum to 1 in a row; argmax is the prediction.

    Ties go to the lower index, among neighbours as among classes. That holds for similarities that are equal in fp32; those of
    identical features can differ in the last bit, as a matrix product may sum in another order at another place.

    Raises:
        ValueError: for shapes, labels, k, temperature or classes out of range, a bank of a single class, or NaN or Inf features.
    """
    rows, labels = _labelled("bank", bank, bank_labels, classes)
    _check(rows, labels, queries, [k], [temperature])
    similarity, index = _neighbours(rows, Rows("query", queries), k, chunk, bank_chunk)
    scores = torch.empty(len(queries), classes)
    votes = _votes(similarity, labels[index], temperature, classes, chunk)
    for part, place in zip(votes, torch.split(scores, chunk), strict=True):
        place.copy_(part)
    return scores.to(queries.device)


def knn(
    bank: Tensor,
    bank_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    classes: int,
    settings: KnnConfig,
    bootstrap: Bootstrap,
    seed: int,
) -> list[Finding]:
    """Weighted kNN at every k and temperature of the settings, from one pass over the bank; nothing is drawn but intervals.

    Args:
        bank, bank_labels, test, test_labels: features [N,F] and [M,F], int64 labels in 0..classes-1.
        seed: for protocols that draw; kNN does not.

    Raises:
        ConfigError: for images with several labels. DataError: for a bank of one class. ValueError: as `knn_classify`.
    """
    if bank_labels.dim() > 1:
        raise ConfigError("protocol: knn votes for one class, these images have several labels; use probe, lowshot or retrieval")
    unknown = check_labels(bank_labels, test_labels, classes)
    grid = [(k, temperature) for k in settings.k for temperature in settings.temperature]
    findings: dict[tuple[int, float], Finding] = {}
    for (k_asked, temperature), k, rank, truth in _ranks(bank, bank_labels, test, test_labels, classes, grid, cap=True):
        notes = (*unknown, f"k lowered from {k_asked} to {k}, the images of the bank") if k < k_asked else tuple(unknown)
        findings[k, temperature] = Finding(
            {"k": k, "temperature": temperature},
            "top1",
            accuracies(rank, truth, classes),
            accuracy_intervals(rank, truth, classes, bootstrap),
            notes,
            correct=(rank == 0).numpy(),
        )
    return list(findings.values())


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    classes: int,
    settings: Sequence[tuple[int, float]] = SETTINGS,
    cap: bool = False,
    chunk: int = 1024,
    bank_chunk: int = 16384,
) -> list[dict[str, Any]]:
    """How often the neighbours are right, for several (k, temperature) from one pass over the bank.

    Args:
        bank, bank_labels, queries, classes, chunk, bank_chunk: as in `knn_classify`.
        query_labels: [M] in 0..C-1, or -1 for queries that are left out.
        settings: pairs (k, temperature).
        cap: lower a k beyond the bank to the bank's size instead of refusing it.

    Returns:
        One dict for each setting, in order: `k` (the one used), `k_asked`, `temperature`, and in percent `top1`, `top5` (right
        among the best min(5, C); where C > 5, a class without a vote is not among them) and `mean_per_class` (the mean of the
        top-1 shares of the queries' classes).

    Raises:
        ValueError: as `knn_classify`, or without a setting or a labelled query.
    """
    found = _ranks(bank, bank_labels, queries, query_labels, classes, settings, cap=cap, chunk=chunk, bank_chunk=bank_chunk)
    return [
        {"k": k, "k_asked": asked[0], "temperature": asked[1], **accuracies(rank, truth, classes)}
        for asked, k, rank, truth in found
    ]


def _ranks(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    classes: int,
    settings: Sequence[tuple[int, float]],
    *,
    cap: bool,
    chunk: int = 1024,
    bank_chunk: int = 16384,
) -> Iterator[tuple[tuple[int, float], int, Tensor, Tensor]]:
    """For each setting: it, the k used, how many classes come before the true one [M], and the true ones [M]."""
    rows, labels = _labelled("bank", bank, bank_labels, classes)
    asked, truth = _labelled("query", queries, query_labels, classes)
    if not settings or not len(truth):
        raise ValueError("kNN needs at least one (k, temperature) and one labelled query")
    used = [min(k, len(labels)) if cap else k for k, _ in settings]
    _check(rows, labels, queries, used, [temperature for _, temperature in settings])
    similarity, index = _neighbours(rows, asked, max(used), chunk, bank_chunk)
    near = labels[index]
    for k, setting in zip(used, settings, strict=True):
        votes = _votes(similarity[:, :k], near[:, :k], setting[1], classes, chunk)
        rank = torch.cat([_rank(part, own) for part, own in zip(votes, torch.split(truth, chunk), strict=True)])
        yield setting, k, rank, truth


def _labelled(name: str, features: Tensor, labels: Tensor, classes: int) -> tuple[Rows, Tensor]:
    """The rows that have a label, and their labels on the CPU."""
    if classes < 2:
        raise ValueError(f"kNN needs at least 2 classes, got {classes}")
    labels = labels.cpu()
    if labels.is_floating_point() or labels.shape != features.shape[:1]:
        raise ValueError(f"{name} labels must be integers [{len(features)}], got {labels.dtype} {list(labels.shape)}")
    labels = labels.long()
    if len(labels) and not -1 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"{name} labels must lie in -1..{classes - 1}, got {int(labels.min())}..{int(labels.max())}")
    kept = (labels >= 0).nonzero().flatten()
    return Rows(name, features, kept if len(kept) < len(labels) else None), labels[kept]


def _check(rows: Rows, labels: Tensor, queries: Tensor, ks: list[int], temperatures: list[float]) -> None:
    if queries.shape[1:] != rows.features.shape[1:]:
        raise ValueError(f"queries {list(queries.shape)} do not fit a bank of {list(rows.features.shape)}")
    if not len(labels):
        raise ValueError("the bank has no labelled features")
    if min(ks) < 1 or max(ks) > rows.count:
        wrong = max(ks) if min(ks) > 0 else min(ks)
        raise ValueError(f"k must lie in 1..{rows.count}, the labelled features of the bank, got {wrong}")
    if not all(t > 0 and math.isfinite(t) for t in temperatures):
        raise ValueError(f"the temperature must be above 0, got {min(temperatures)}")
    if int(labels.min()) == int(labels.max()):
        raise ValueError(f"all features of the bank are of the single class {int(labels[0])}, so kNN can only answer that")


def _neighbours(bank: Rows, queries: Rows, k: int, chunk: int, bank_chunk: int) -> tuple[Tensor, Tensor]:
    """Similarities [M,k], falling, and places in the bank [M,k] of the nearest, on the CPU."""
    device = queries.features.device
    best = torch.full((queries.count, k), torch.iinfo(torch.int64).min, device=device)
    with full_precision(device):
        for first, rows in bank.units(bank_chunk, device):
            for start, part in queries.units(chunk, device):
                place = best[start : start + len(part)]
                place.copy_(torch.cat([place, _nearest(part @ rows.T, first, k)], dim=1).topk(k, dim=1).values)
    return _similarity(best).cpu(), (_LOW - (best & _LOW)).cpu()


def _nearest(similarity: Tensor, first: int, k: int) -> Tensor:
    """Keys of the k largest (or all) in each row of [m,n], whose columns are the bank's from `first` on."""
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
    """int64 keys that order by similarity, then by lower index (below 2^32): no two are equal, so their top k is unique."""
    bits = (similarity + 0.0).view(torch.int32).long()  # -0.0 becomes 0.0
    return (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32) | (_LOW - index)


def _similarity(keys: Tensor) -> Tensor:
    bits = keys >> 32
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).int().view(torch.float32)


def _votes(similarity: Tensor, labels: Tensor, temperature: float, classes: int, chunk: int) -> Iterator[Tensor]:
    """[M,k] -> fp64 shares of the vote [m,C], a chunk at a time. On the CPU, where the sum has one order."""
    for near, own in zip(torch.split(similarity, chunk), torch.split(labels, chunk), strict=True):
        near = near.double()
        weights = ((near - near[:, :1]) / temperature).exp()  # the first is the largest: no overflow, and no sum of zero
        scores = torch.zeros(len(near), classes, dtype=torch.float64).scatter_add_(1, own, weights)
        yield scores / scores.sum(dim=1, keepdim=True)


def _rank(scores: Tensor, truth: Tensor) -> Tensor:
    """`ranks`, but that among more than five classes one without a vote comes last."""
    rank = ranks(scores, truth)
    voted = scores.gather(1, truth[:, None])[:, 0] > 0
    return rank if scores.shape[1] <= 5 else torch.where(voted, rank, scores.shape[1])
