"""ReSSL: the student's relation to a memory is matched to the one its teacher sees in a weak view."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from relssl.method.base import ALONE, Method, Step, World
from relssl.method.encoder import Encoder
from relssl.method.relation import objective
from relssl.method.tiled import tiled_objective

# The forms of one and the same loss.
OBJECTIVES: dict[str, Callable[..., Tensor]] = {"plain": objective, "tiled": tiled_objective}


class ReSSL(Method):
    """Weak-augmentation-guided relational self-supervised learning (NIPS, TPAMI).

    Args:
        student: the encoder to train; the teacher is its frozen copy without the predictor.
        memory_size: K.
        dim: D, the dimension of the student's embeddings.
        generator: source of the memory's first, random keys.
        loss_form: plain, or tiled: the same loss in less memory and time.
    """

    constants = ("student_temperature", "info_nce_temperature")
    scheduled = ("teacher_temperature", "warmup_mix")

    def __init__(
        self, student: Encoder, memory_size: int, dim: int, generator: torch.Generator | None = None, loss_form: str = "plain"
    ) -> None:
        super().__init__(student, teacher=True, memory_size=memory_size, dim=dim, generator=generator)
        self.objective = OBJECTIVES[loss_form]

    def step(self, weak: Tensor, strong: Sequence[Tensor], world: World = ALONE, **settings: float) -> Step:
        """Algorithm 1 of the paper, up to the loss.

        Args:
            weak: [B, C, H, W], one weak view of each sample.
            strong: V views [B, C, h, w] of the same samples; a single crop is a list of one.
            world: the processes that share the batch out.
            settings: as for `relation.objective`: temperatures, and InfoNCE's share of the loss.
        """
        keys = self.keys([weak], world)[0]  # [B, D]
        queries = self.student(strong)  # [V, B, D]
        memory = self.past  # [K, D], from before this step: no sample meets itself
        return Step(self.objective(queries, keys, memory, **settings), queries.detach(), keys)
