"""The mathematics of ReSSL: relations to a memory, and the two losses over them. Pure functions.

Shapes: V strong views, B samples, K keys in the memory, D dimensions. All embeddings are unit vectors.
NIPS = "ReSSL: Relational Self-Supervised Learning with Weak Augmentation" (2021); TPAMI = its extension (2024).
"""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Target:
    """The teacher's side of the relation, where that is not its embeddings and the memory of them alone."""

    rows: Tensor  # [B, F], unit norm: the teacher's embeddings, or its backbone's features
    memory: Tensor  # [K, F], unit norm: those of past samples
    offsets: Tensor | None = None  # [K], which are added to the logits; see `balance`

    def logits(self, temperature: float, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the relation's logits of the samples start to stop: [stop - start, K]."""
        similar = logits(self.rows[start:stop], self.memory, temperature)
        return similar if self.offsets is None else similar + self.offsets


@torch.no_grad()
def balance(similar: Tensor, iterations: int) -> Tensor:
    """Offsets of the memory's keys by which all of them are as much related to, over the samples (Sinkhorn and Knopp).

    Each iteration divides the matrix exp(similar) by the sums of its columns and then of its rows. All that is left of it are a
    factor a column and the last division by rows, which is the softmax. ReSA (2025) makes three on a batch's own features; here
    the columns are the memory.

    Args:
        similar: [B, K], logits of the samples of all ranks.
        iterations: at least 1.

    Returns:
        [K], to be added to the logits.
    """
    rows = similar.new_zeros(len(similar), 1)
    for _ in range(iterations):
        offsets = -(similar + rows).logsumexp(dim=0)
        rows = -(similar + offsets).logsumexp(dim=1, keepdim=True)
    return offsets


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
    queries: Tensor,
    keys: Tensor,
    memory: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    target: Target | None = None,
) -> Tensor:
    """Cross-entropy of the student's relations under the teacher's sharpened ones, averaged (NIPS, eq. 4).

    It equals the KL divergence plus the teacher's entropy, which carries no gradient.

    Args:
        queries: [V, B, D], the student's embeddings of V strong views.
        keys: [B, D], the teacher's embeddings of the weak view; every strong view is matched to them.
        memory: [K, D], past keys; none of this batch.
        target: what the teacher's relation is computed from; None: keys and memory.

    Returns:
        A scalar, the mean over views and samples. Gradient flows through `queries` alone.
    """
    sharp = (target or Target(keys.detach(), memory.detach())).logits(teacher_temperature).softmax(dim=-1)
    log_relation = logits(queries, memory.detach(), student_temperature).log_softmax(dim=-1)
    return -(sharp * log_relation).sum(dim=-1).mean()


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
    target: Target | None = None,
) -> Tensor:
    """Compute the loss of a step: the relational loss, and InfoNCE's share of it while that warms up (TPAMI).

    Args:
        warmup_mix: share of InfoNCE, 0 to 1.
        target: as for `relational_loss`.

    Returns:
        A scalar.
    """
    temperatures = {"student_temperature": student_temperature, "teacher_temperature": teacher_temperature}
    loss = queries.new_zeros(())
    if warmup_mix < 1:
        loss = loss + (1 - warmup_mix) * relational_loss(queries, keys, memory, **temperatures, target=target)
    if warmup_mix > 0:
        loss = loss + warmup_mix * info_nce(queries, keys, memory, temperature=info_nce_temperature)
    return loss
