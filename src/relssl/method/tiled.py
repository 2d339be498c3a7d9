"""The losses over the memory, a few samples at a time: loss and gradient in one go, no [V B, K] matrix ever held.

With p the teacher's relation and s the student's at temperature t, the relational loss of a query q is lse(q M / t) - <p, q M / t>
and its gradient (s - p) M / t: both come from the same tile of similarities, so nothing is kept for the backward pass. Equal to
the plain form in `relation` up to fp32 rounding.
"""

from typing import Any

import torch
from torch import Tensor

from relssl.method.relation import Target

# Bytes of a tile's similarities: larger ones feed the matrix products better, smaller ones stay in the cache.
TILE_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}


def tiled_objective(
    queries: Tensor,
    keys: Tensor,
    memory: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    warmup_mix: float = 0.0,
    info_nce_temperature: float = 0.1,
    target: Target | None = None,
    rows: int | None = None,
) -> Tensor:
    """`relation.objective`, computed in tiles.

    Args:
        rows: samples in a tile; None: as many as fit a few dozen megabytes.
    """
    if rows is None:
        sample = (len(queries) + 1) * len(memory) * 4
        rows = max(8, TILE_BYTES.get(queries.device.type, 64 << 20) // sample)
    temperatures = (student_temperature, teacher_temperature, info_nce_temperature)
    loss: Tensor = _Objective.apply(queries, keys.detach(), memory.detach(), temperatures, warmup_mix, rows, target)
    return loss


class _Objective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, memory: Tensor, temperatures: Any, mix: float, rows: int, given: Target | None
    ) -> Tensor:
        (t_student, t_teacher, t_nce), ctx.count = temperatures, queries.shape[0] * queries.shape[1]

        def tile(first: int) -> Tensor:
            """The summed loss of some queries q [V, R, D] against their keys k [R, D]; its gradient is added to theirs, `slope` [V, R, D]."""
            q, k, slope = wide_q[:, first : first + rows], wide_k[first : first + rows], gradient[:, first : first + rows]
            # One product for teacher and student where they relate to the same memory; the temperatures go on its small side.
            scaled = torch.cat([k[None] / t_teacher, q / t_student]) if given is None else q / t_student
            weights = _product(scaled.flatten(0, 1), past).view(*scaled.shape[:2], -1)
            if given is None:
                target, weights = weights[0], weights[1:]  # the logits of the teacher's relation [R, K]
            else:
                target = given.logits(t_teacher, first, first + rows)
            loss, scale = q.new_zeros(()), (1 - mix) / t_student
            if mix > 0:
                positive = (q * k).sum(dim=-1) / t_nce
                negatives = weights * (t_student / t_nce)
                among = _softmax_(negatives)
                every = torch.logaddexp(among, positive)
                loss = loss + mix * (every - positive).sum()
                negatives.mul_((among - every).exp()[..., None])  # shares among all, the positive included
                slope.add_((positive - every).expm1()[..., None] * k, alpha=mix / t_nce)
            if mix < 1:  # the cross-entropies [V, R]; weights become softmax(student) - softmax(target)
                _softmax_(target)
                matched = torch.linalg.vecdot(weights, target)
                loss = loss + (1 - mix) * (_softmax_(weights) - matched).sum()
                weights.sub_(target)
                if mix > 0:
                    weights.add_(negatives, alpha=mix / t_nce / scale)
            else:
                weights, scale = negatives, mix / t_nce
            slope.add_(_product(weights.view(-1, len(past)), past.T).view_as(q), alpha=scale)
            return loss

        with torch.autocast(queries.device.type, enabled=False):
            wide = torch.promote_types(queries.dtype, torch.float32)
            wide_q, wide_k, past = queries.to(wide), keys.to(wide), memory.to(wide)
            gradient = torch.zeros_like(wide_q)
            losses = [tile(first) for first in range(0, len(wide_k), rows)]
        ctx.save_for_backward(gradient.to(queries.dtype))
        loss: Tensor = torch.stack(losses).sum() / ctx.count
        return loss

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * (outer[0] / ctx.count), *[None] * 6


def _softmax_(logits: Tensor) -> Tensor:
    """Softmax over the last dimension, in place; returns the logsumexp."""
    peak = logits.amax(dim=-1)
    torch.softmax(logits, dim=-1, out=logits)
    return peak - logits.amax(dim=-1).log()  # the largest share is exp(peak - lse)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left [N, D] @ right [K, D].T. On CPUs through oneDNN where this torch has a way to it: its fp32 product is up to three times
    as fast as the one that `@` picks."""
    if left.device.type == "cpu" and left.dtype == torch.float32 and _ONEDNN is not None:
        product: Tensor = _ONEDNN(left, right, None, "none", [], "")
        return product
    return left @ right.T


# Not in torch's documented interface, hence looked up with care; it is what compiled models call.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None  # type: ignore[no-untyped-call]
