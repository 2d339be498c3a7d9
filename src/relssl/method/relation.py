"""The mathematics of ReSSL: relations to a memory, and the two losses over them. Pure functions.

Shapes: V strong views, B samples, K keys in the memory, D dimensions. All embeddings are unit vectors.
NIPS = "ReSSL: Relational Self-Supervised Learning with Weak Augmentation" (2021); TPAMI = its extension (2024).
"""

from __future__ import annotations

import torch
from torch import Tensor


def logits(embeddings: Tensor, memory: Tensor, temperature: float) -> Tensor:
    """Similarities to the memory over the temperature: [..., D] and [K, D] -> [..., K], never below fp32.

    At a temperature of 0.04 half precision would round a similarity by more than the relation's finest differences, so
    autocast is switched off here whatever the networks run in.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        wide = torch.promote_types(embeddings.dtype, torch.float32)
        return embeddings.to(wide) @ memory.to(wide).T / temperature


def relation(embeddings: Tensor, memory: Tensor, temperature: float) -> Tensor:
    """A sample's relation to other instances (NIPS, eq. 2 and 3).

    Args:
        embeddings: [B, D], unit norm.
        memory: [K, D], unit norm.
        temperature: above 0; lower is sharper.

    Returns:
        [B, K], each row a distribution over the memory's keys.
    """
    return logits(embeddings, memory, temperature).softmax(dim=-1)


def relational_loss(
    queries: Tensor, keys: Tensor, memory: Tensor, *, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Cross-entropy of the student's relations under the teacher's sharpened ones, averaged (NIPS, eq. 4).

    It equals the KL divergence plus the teacher's entropy, which carries no gradient.

    Args:
        queries: [V, B, D], the student's embeddings of V strong views.
        keys: [B, D], the teacher's embeddings of the weak view; every strong view is matched to them.
        memory: [K, D], past keys; none of this batch.

    Returns:
        A scalar, the mean over views and samples. Gradient flows through `queries` alone.
    """
    target = relation(keys.detach(), memory.detach(), teacher_temperature)
    log_relation = logits(queries, memory.detach(), student_temperature).log_softmax(dim=-1)
    return -(target * log_relation).sum(dim=-1).mean()


def info_nce(queries: Tensor, keys: Tensor, memory: Tensor, *, temperature: float) -> Tensor:
    """InfoNCE with the memory as negatives (MoCo): each query has to pick its own key out of itself and the memory.

    TPAMI warms up with an InfoNCE term; its exact form is not published, this one is the usual form.

    Args:
        queries: [V, B, D].
        keys: [B, D], the positives.
        memory: [K, D], the negatives.

    Returns:
        A scalar, the mean over views and samples. Gradient flows through `queries` alone.
    """
    return -log_choice(queries, keys, memory, temperature)[..., 0].mean()


def log_choice(queries: Tensor, keys: Tensor, memory: Tensor, temperature: float) -> Tensor:
    """log of the softmax over a query's own key, which comes first, and the memory: [V, B, D], [B, D], [K, D] -> [V, B, 1 + K]."""
    negatives = logits(queries, memory.detach(), temperature)
    positives = (queries.to(negatives.dtype) * keys.detach().to(negatives.dtype)).sum(dim=-1, keepdim=True) / temperature
    return torch.cat([positives, negatives], dim=-1).log_softmax(dim=-1)


def objective(
    queries: Tensor,
    keys: Tensor,
    memory: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    warmup_mix: float = 0.0,
    info_nce_temperature: float = 0.1,
) -> Tensor:
    """Compute the loss of a step: the relational loss, and InfoNCE's share of it while that warms up (TPAMI).

    Args:
        warmup_mix: share of InfoNCE, 0 to 1.

    Returns:
        A scalar.
    """
    temperatures = {"student_temperature": student_temperature, "teacher_temperature": teacher_temperature}
    loss = queries.new_zeros(())
    if warmup_mix < 1:
        loss = loss + (1 - warmup_mix) * relational_loss(queries, keys, memory, **temperatures)
    if warmup_mix > 0:
        loss = loss + warmup_mix * info_nce(queries, keys, memory, temperature=info_nce_temperature)
    return loss
