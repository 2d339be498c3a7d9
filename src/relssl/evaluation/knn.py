"""Nearest neighbours by cosine similarity: what frozen features know, without a single trained weight.

The weighted classifier is InstDisc's (Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
section 3.4): the k nearest bank features vote for their class with weight exp(similarity / temperature). In retrieval each test image
asks for images of its class; recall@k, as in metric learning (Song et al. 2016, "Deep Metric Learning via Lifted Structured Feature
Embedding"), is a hit if any of the k nearest is of it, and mAP, as in instance retrieval (Philbin et al. 2007), the mean over the
queries of the average precision of the whole ranking.

Legend: N bank or gallery features, M queries, D dimensions, C classes, k neighbours.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from relssl.errors import ConfigError, DataError
from relssl.evaluation.features import LabelledFeatures, full_precision, unit
from relssl.evaluation.metrics import Bootstrap, accuracies, mean_interval, ranks
from relssl.evaluation.result import Finding
from relssl.settings.evaluation import KnnConfig, RetrievalConfig

_VOTERS = 4096  # queries whose votes are counted at a time


def knn(sides: LabelledFeatures, settings: KnnConfig, bootstrap: Bootstrap) -> list[Finding]:
    """Classify by weighted kNN at every k and temperature of the settings, from one pass over the bank; nothing is drawn.

    ConfigError for images with several labels.
    """
    if sides.several:
        raise ConfigError("protocol: knn votes for one class, these images have several labels; use probe, lowshot or retrieval")
    most, findings = len(sides.bank), dict[tuple[int, float], Finding]()
    near = neighbours(sides.bank, sides.test, min(max(settings.k), most))
    for count, temperature in itertools.product(settings.k, settings.temperature):
        k = min(count, most)
        notes = (f"k lowered from {count} to {most}, the images of the bank",) if most < count else ()
        setting, rank = {"k": k, "temperature": temperature}, _ranks(sides, *near, k, temperature)
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


def _similarities(bank: Tensor, queries: Tensor, cells: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the places of some queries and their similarities to the whole bank, fp32, on the queries' device: at most `cells` at a
    time, or those of one query."""
    bank = unit(bank, queries.device)
    for rows in torch.split(torch.arange(len(queries), device=queries.device), max(1, cells // len(bank))):
        yield rows, unit(queries[rows]) @ bank.T


def neighbours(bank: Tensor, queries: Tensor, k: int, *, cells: int = 1 << 25) -> tuple[Tensor, Tensor]:
    """Find the k nearest, 1..N, of bank features [N,D] for queries [M,D] of any real dtype; ties in fp32 go to the lower index.

    Returns similarities [M,k], falling, and places in the bank [M,k], on the CPU; ValueError for another k, or NaN or Inf features.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must lie in 1..{len(bank)}, the features of the bank, got {k}")
    parts = []
    with full_precision(queries.device):
        for _, near in _similarities(bank, queries, cells):
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


def retrieval(sides: LabelledFeatures, settings: RetrievalConfig, bootstrap: Bootstrap, *, cells: int = 1 << 24) -> list[Finding]:
    """Rank the gallery for every test image: M * N * D products and M sorts of N; exact, and nothing is drawn.

    With several labels an image, those that share one with the query are sought. Images that are equally similar in fp32 rank by
    their place in the gallery, lower first. Queries without any image to be found are left out; DataError if none is left.
    `cells` similarities are ranked at a time, which takes some 40 bytes each.
    """
    itself, test = settings.gallery == "test", sides.test
    gallery, labels = (test, sides.test_labels) if itself else (sides.bank, sides.bank_labels)
    labels, truth = labels.to(test.device), sides.test_labels.to(test.device)
    at, hits, precision = [min(k, len(gallery) - itself) for k in settings.at], [], []
    rank = torch.arange(1, len(gallery) + 1, device=test.device, dtype=torch.float64)
    with full_precision(test.device):
        for rows, near in _similarities(gallery, test, cells):
            own = truth[rows]
            alike = (own > 0).float() @ (labels > 0).float().T > 0 if sides.several else own[:, None] == labels
            if itself:  # a query comes last in its own ranking, as not of its class
                near.scatter_(1, rows[:, None], -torch.inf)
                alike.scatter_(1, rows[:, None], False)
            right = alike.gather(1, near.sort(dim=1, descending=True, stable=True).indices)
            right = right[right.any(dim=1)]
            so_far = right.cumsum(dim=1)
            hits.append(torch.stack([so_far[:, k - 1] > 0 for k in at], dim=1).double().cpu())
            precision.append((((so_far / rank) * right).sum(dim=1) / so_far[:, -1]).cpu())
    values = {"map": torch.cat(precision)}
    if not (queries := len(values["map"])):
        raise DataError(f"labels: no test image has another of its class in the gallery ({settings.gallery}); none can be found")
    values |= {f"recall_at_{k}": column for k, column in zip(settings.at, torch.cat(hits).unbind(dim=1), strict=True)}
    notes = []
    if left := len(test) - queries:
        notes.append(f"{left} of {len(test)} test images have no other of their class in the gallery and were left out.")
    if max(settings.at) > max(at):
        notes.append(f"The gallery has {max(at)} images; recall beyond that many is recall at that many.")
    figures = {name: 100 * float(each.mean()) for name, each in values.items()}
    intervals = {name: mean_interval(100 * each.numpy(), bootstrap) for name, each in values.items()}
    details = {"queries": queries, "gallery": len(gallery) - itself}
    return [Finding({"gallery": settings.gallery}, "map", figures, intervals, tuple(notes), details)]
