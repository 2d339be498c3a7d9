"""Retrieval: each test image asks for images of its class among others, by cosine similarity of frozen features.

Recall@k as in metric learning (Song et al. 2016, "Deep Metric Learning via Lifted Structured Feature Embedding"): a hit if any
of the k nearest is of the class. mAP as in instance retrieval (Philbin et al. 2007): the mean over the queries of the average
precision of the whole ranking.

Legend: N gallery images, M queries, F feature dimensions, C classes.
"""

from __future__ import annotations

import torch

from relssl.errors import DataError
from relssl.evaluation.features import LabelledFeatures, full_precision, unit
from relssl.evaluation.metrics import Bootstrap, mean_interval
from relssl.evaluation.result import Finding
from relssl.settings.evaluation import RetrievalConfig


def retrieval(sides: LabelledFeatures, settings: RetrievalConfig, bootstrap: Bootstrap, *, cells: int = 1 << 24) -> list[Finding]:
    """Rank the gallery for every test image: M * N * F products and M sorts of N; exact, and nothing is drawn.

    With several labels an image, those that share one with the query are sought. Images that are equally similar in fp32 rank by
    their place in the gallery, lower first. Queries without any image to be found are left out; DataError if none is left.
    `cells` similarities are ranked at a time, which takes some 40 bytes each.
    """
    itself, test = settings.gallery == "test", sides.test
    gallery, labels = (test, sides.test_labels) if itself else (sides.bank, sides.bank_labels)
    gallery = unit(gallery, test.device)
    labels, truth = labels.to(test.device), sides.test_labels.to(test.device)
    at, hits, precision = [min(k, len(gallery) - itself) for k in settings.at], [], []
    rank = torch.arange(1, len(gallery) + 1, device=test.device, dtype=torch.float64)
    with full_precision(test.device):
        for rows in torch.split(torch.arange(len(test), device=test.device), max(1, cells // len(gallery))):
            near, wanted = unit(test[rows]) @ gallery.T, truth[rows]
            alike = (wanted > 0).float() @ (labels > 0).float().T > 0 if sides.several else wanted[:, None] == labels
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
