"""Retrieval: each test image asks for images of its class among others, by cosine similarity of frozen features.

Recall@k as in metric learning (Song et al. 2016, "Deep Metric Learning via Lifted Structured Feature Embedding"): a hit if any
of the k nearest is of the class. mAP as in instance retrieval (Philbin et al. 2007): the mean over the queries of the average
precision of the whole ranking.

Legend: N gallery images, M queries, F feature dimensions, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from relssl.errors import ConfigError, DataError
from relssl.evaluation.features import Rows, full_precision, require_varied
from relssl.evaluation.findings import Finding
from relssl.evaluation.metrics import Bootstrap, mean_interval
from relssl.evaluation.pairs import check_labels
from relssl.settings.evaluation import RetrievalConfig

_HELD = 1 << 26  # similarities at a time: 256 MiB
_SORTED = 1 << 22  # of those, what is ranked at a time: some 40 bytes each


def retrieval(
    bank: Tensor,
    bank_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    classes: int,
    settings: RetrievalConfig,
    bootstrap: Bootstrap,
    seed: int,
    chunk: int = 1024,
    gallery_chunk: int = 16384,
) -> list[Finding]:
    """Rank the gallery for every test image; exact, in bounded memory.

    With several labels an image, those that share one with the query are sought. Equally similar images rank by their place in
    the gallery, lower first; that holds for similarities equal in fp32. Nothing is drawn, so `seed` changes nothing.

    The whole ranking of each query is needed: M * N * F products and M sorts of N. The gallery is read once for every
    2^26 / N queries (`chunk` at most), which for a million images is 67.

    Args:
        bank, test: [N,F] and [M,F]; may be memory-mapped. The work is done on the device of `test`.
        bank_labels, test_labels: int64 in 0..C-1; or int8 [N,C] and [M,C] (1 yes, 0 no, -1 not told).
        chunk: queries at a time, at most.
        gallery_chunk: gallery images at a time.

    Returns:
        One finding, {"gallery": ...}: map and a recall_at_k for each k. Queries without any image to be found are left out.

    Raises:
        NumericError: for NaN, Inf or constant features. DataError: if no query has an image to be found, or the gallery is of one
            class. ConfigError: without a k.
    """
    if not settings.at:
        raise ConfigError("retrieval.at: is empty; give at least one k")
    require_varied(test, "test")
    itself = settings.gallery == "test"
    if not itself:
        require_varied(bank, "bank")
    gallery, labels = (test, test_labels) if itself else (bank, bank_labels)
    check_labels(labels, test_labels, classes)  # of one class, whatever is found is right
    sought = _sought(labels.cpu(), test_labels.cpu(), classes, itself)
    asked = sought.nonzero().flatten()
    if not len(asked):
        raise DataError(f"labels: no test image has another of its class in the gallery ({settings.gallery}); none can be found")
    at = [min(k, len(gallery) - itself) for k in settings.at]
    queries, all_of_it = Rows("test", test, asked), Rows(settings.gallery, gallery)
    hits, precision = [], []
    for found in _rankings(queries, all_of_it, test_labels, labels, itself, chunk, gallery_chunk):
        hits.append(torch.stack([found[:, :k].any(dim=1) for k in at], dim=1).double().cpu())
        precision.append(_average_precision(found).cpu())
    values = {"map": torch.cat(precision)} | {
        f"recall_at_{k}": column for k, column in zip(settings.at, torch.cat(hits).unbind(dim=1), strict=True)
    }
    notes = []
    if left := len(test) - len(asked):
        notes.append(f"{left} of {len(test)} test images have no other of their class in the gallery and were left out.")
    if max(settings.at) > max(at):
        notes.append(f"The gallery has {max(at)} images; recall beyond that many is recall at that many.")
    return [
        Finding(
            {"gallery": settings.gallery},
            "map",
            {name: 100 * float(each.mean()) for name, each in values.items()},
            {name: mean_interval(100 * each.numpy(), bootstrap) for name, each in values.items()},
            tuple(notes),
            {"queries": len(asked), "gallery": len(gallery) - itself},
        )
    ]


def _sought(labels: Tensor, asked: Tensor, classes: int, itself: bool) -> Tensor:
    """Whether the gallery has an image that shares a class with each query, the query itself aside; bool [M]."""
    if labels.dim() == 1:
        return torch.bincount(labels, minlength=classes)[asked] > int(itself)
    yes = (asked > 0).float()
    return ((yes @ (labels > 0).sum(dim=0).float()) - itself * yes.sum(dim=1)) > 0


def _rankings(
    queries: Rows, gallery: Rows, asked: Tensor, labels: Tensor, itself: bool, chunk: int, gallery_chunk: int
) -> Iterator[Tensor]:
    """Whether the images found are of the query's class, nearest first: bool [m,N] for a few queries at a time.

    A query that is in the gallery itself is put last, as not of its class.
    """
    device, count = queries.features.device, gallery.count
    assert queries.kept is not None
    labels, asked = labels.to(device), asked.to(device)
    with full_precision(device):
        for start, some in queries.units(max(1, min(chunk, _HELD // count)), device):
            places = queries.kept[start : start + len(some)].to(device)
            similarity = torch.empty(len(some), count, device=device)
            for first, rows in gallery.units(gallery_chunk, device):
                torch.matmul(some, rows.T, out=similarity[:, first : first + len(rows)])
            if itself:
                similarity.scatter_(1, places[:, None], -torch.inf)
            step = max(1, _SORTED // count)
            for near, own in zip(torch.split(similarity, step), torch.split(places, step), strict=True):
                order = near.sort(dim=1, descending=True, stable=True).indices
                same = _alike(asked[own], labels)
                if itself:
                    same.scatter_(1, own[:, None], False)
                yield same.gather(1, order)


def _alike(asked: Tensor, labels: Tensor) -> Tensor:
    """Whether queries [m] or [m,C] and gallery images [N] or [N,C] share a class, bool [m,N]."""
    if labels.dim() == 1:
        return asked[:, None] == labels
    return (asked > 0).float() @ (labels > 0).float().T > 0


def _average_precision(found: Tensor) -> Tensor:
    """The mean over the images sought of the precision down to each, fp64 [m] of bool [m,N]; one is sought at least."""
    rank = torch.arange(1, found.shape[1] + 1, device=found.device)
    so_far = found.cumsum(dim=1)
    precision: Tensor = ((so_far / rank.double()) * found).sum(dim=1) / so_far[:, -1]
    return precision
