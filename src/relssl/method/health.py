"""Is it learning? Figures of the relations themselves, from what the step has already computed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from relssl.method.relation import logits


@torch.no_grad()
def health(
    queries: Tensor, keys: Tensor, memory: Tensor, *, student_temperature: float, teacher_temperature: float
) -> dict[str, float]:
    """The health of one step's relations.

    Args:
        queries: [V, B, D], unit norm.
        keys: [B, D], unit norm.
        memory: [K, D], as the step's loss saw it.

    Returns:
        teacher_entropy: mean entropy of the teacher's relation in nats, 0 to ln K.
        teacher_neighbours: exp of it, the effective number of neighbours, 1 to K.
        kl: mean divergence of the student's relation from the teacher's, at least 0.
        agreement: share of samples whose nearest key is the same for student and teacher, 0 to 1.
        embedding_std: mean over dimensions of the keys' standard deviation, times sqrt(D): about 1 when healthy, 0 when
            all embeddings are one.
        effective_rank: exp of the entropy of the keys' singular values (RankMe, arXiv 2210.02885), 1 to min(B, D).
    """
    target = logits(keys, memory, teacher_temperature).log_softmax(dim=-1)
    relation = logits(queries, memory, student_temperature).log_softmax(dim=-1)
    entropy = -(target.exp() * target).sum(dim=-1).mean()
    kl = (target.exp() * (target - relation)).sum(dim=-1).mean()
    agreement = (relation.argmax(dim=-1) == target.argmax(dim=-1)).float().mean()
    std = keys.float().std(dim=0, correction=0).mean() * math.sqrt(keys.shape[1])
    figures = torch.stack([entropy, entropy.exp(), kl, agreement, std, effective_rank(keys)])
    names = ["teacher_entropy", "teacher_neighbours", "kl", "agreement", "embedding_std", "effective_rank"]
    return dict(zip(names, figures.tolist(), strict=True))


def effective_rank(embeddings: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of [B, D]: how many directions the embeddings really use."""
    if not torch.isfinite(embeddings).all():
        return embeddings.new_tensor(torch.nan, dtype=torch.float32)  # which has no singular values
    values = torch.linalg.svdvals(embeddings.float())
    share = values / values.sum().clamp_min(1e-12)
    rank: Tensor = torch.special.entr(share).sum().exp()
    return rank


def verdict(figures: dict[str, float], memory_size: int, dim: int) -> str | None:
    """The collapse that the figures show, with what to try; None when they look healthy."""
    if figures["embedding_std"] < 0.1:
        return "collapsed: all embeddings point one way; lower optimizer.lr, lengthen method.warmup_share or drop the predictor"
    if figures["teacher_neighbours"] > 0.9 * memory_size:
        return "collapsed: the teacher's relation is uniform; lower method.teacher_temperature or lengthen method.warmup_share"
    if figures["effective_rank"] < min(4.0, 0.1 * dim):
        return "collapsing: the embeddings use under 4 directions; lower optimizer.lr or lengthen method.warmup_share"
    return None
