"""Is it learning? Figures of the relations themselves, from what the step has already computed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from relssl.method.relation import logits

# Bytes of one tile of similarities.
_TILE_BYTES = 64 << 20


@torch.no_grad()
def health(
    queries: Tensor, keys: Tensor, memory: Tensor, *, student_temperature: float, teacher_temperature: float
) -> dict[str, Tensor]:
    """The health of one step's relations, but for the keys' `effective_rank`.

    Computed a few samples at a time, so that it needs no more memory than the loss; nothing waits for the device.

    Args:
        queries: [V, B, D], unit norm.
        keys: [B, D], unit norm.
        memory: [K, D], as the step's loss saw it.

    Returns:
        Scalars on the device:
        teacher_entropy: mean entropy of the teacher's relation in nats, 0 to ln K.
        teacher_neighbours: exp of it, the effective number of neighbours, 1 to K.
        kl: mean divergence of the student's relation from the teacher's, at least 0.
        agreement: share of samples whose nearest key is the same for student and teacher, 0 to 1.
        embedding_std: mean over dimensions of the keys' standard deviation, times sqrt(D): about 1 when healthy, 0 when
            all embeddings are one.
    """
    rows = max(1, _TILE_BYTES // (4 * len(memory) * (len(queries) + 1)))
    parts = [
        _relations(queries[:, i : i + rows], keys[i : i + rows], memory, student_temperature, teacher_temperature)
        for i in range(0, len(keys), rows)
    ]
    entropy, kl, agreement = torch.stack(parts).sum(dim=0) / len(keys)
    return {
        "teacher_entropy": entropy,
        "teacher_neighbours": entropy.exp(),
        "kl": kl,
        "agreement": agreement,
        "embedding_std": spread(keys),
    }


def spread(keys: Tensor) -> Tensor:
    """`embedding_std` of keys [B, D]."""
    return keys.float().std(dim=0, correction=0).mean() * math.sqrt(keys.shape[1])


def _relations(queries: Tensor, keys: Tensor, memory: Tensor, student_temperature: float, teacher_temperature: float) -> Tensor:
    """Entropy, divergence and agreement of some samples, each a mean over views and a sum over samples: [3]."""
    target = logits(keys, memory, teacher_temperature).log_softmax(dim=-1)
    relation = logits(queries, memory, student_temperature).log_softmax(dim=-1)
    entropy = -(target.exp() * target).sum()
    kl = (target.exp() * (target - relation)).sum() / len(queries)
    agreement = (relation.argmax(dim=-1) == target.argmax(dim=-1)).float().sum() / len(queries)
    return torch.stack([entropy, kl, agreement])


def effective_rank(embeddings: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of [B, D] (RankMe, arXiv 2210.02885), 1 to min(B, D): how many
    directions the embeddings really use. On a GPU it waits for the device."""
    if not torch.isfinite(embeddings).all():
        return embeddings.new_tensor(torch.nan, dtype=torch.float32)  # which has no singular values
    values = torch.linalg.svdvals(embeddings.float())
    share = values / values.sum().clamp_min(1e-12)
    rank: Tensor = torch.special.entr(share).sum().exp()
    return rank


def verdict(figures: dict[str, float], memory_size: int, dim: int, *, warms: bool = True) -> str | None:
    """The collapse that the figures show, with what to try; None when they look healthy.

    Args:
        memory_size: K. dim: D, of the keys.
        warms: whether the method has an InfoNCE warm-up that could be longer.
    """
    longer = ", lengthen method.warmup_share" if warms else ""
    if figures["embedding_std"] < 0.1:
        return f"collapsed: all embeddings point one way; lower optimizer.lr{longer}" + (
            " or drop the predictor" if warms else ""
        )
    if figures.get("teacher_neighbours", 0) > 0.9 * memory_size:
        return f"collapsed: the teacher's relation is uniform; lower method.teacher_temperature{longer}"
    if figures["effective_rank"] < min(4.0, 0.1 * dim):
        return f"collapsing: the embeddings use under {min(4.0, 0.1 * dim):g} directions; lower optimizer.lr{longer}"
    return None
