"""ReSSL: a student, its momentum teacher and the memory, and the step that joins them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from relssl.method.encoder import Encoder
from relssl.method.memory import Memory
from relssl.method.relation import info_nce, relational_loss


@dataclass
class Step:
    """What one step, or one accumulated part of it, computed.

    Attributes:
        loss: scalar with the gradient's graph.
        queries: [V, B, D] the student's embeddings, detached.
        keys: [B, D] the teacher's.
    """

    loss: Tensor
    queries: Tensor
    keys: Tensor


class ReSSL(nn.Module):
    """Weak-augmentation-guided relational self-supervised learning.

    One optimizer step of training is

        step(...)  once for each accumulated part, then backward
        push(...)  the step's keys, after its loss has seen the memory without them
        follow()   the teacher moves towards the student the optimizer has just changed

    The papers write the teacher's update at the head of the next step. Nothing happens in between, and at the very
    first step teacher and student are equal, so every loss is the same; done here, a step that turns out non-finite
    can be dropped whole, with teacher and memory as they were.

    Args:
        student: the encoder to train; the teacher is its frozen copy without the predictor.
        memory_size: K.
        dim: D, the dimension of the student's embeddings.
        generator: source of the memory's first, random keys.
    """

    def __init__(self, student: Encoder, memory_size: int, dim: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.student: nn.Module = student
        self.teacher = student.teacher()
        self.memory = Memory(memory_size, dim, generator)

    def step(
        self,
        weak: Tensor,
        strong: Sequence[Tensor],
        *,
        student_temperature: float,
        teacher_temperature: float,
        warmup_mix: float = 0.0,
        info_nce_temperature: float = 0.1,
    ) -> Step:
        """Algorithm 1 of the paper, up to the loss.

        Args:
            weak: [B, C, H, W], one weak view of each sample.
            strong: V views [B, C, h, w] of the same samples; a single crop is a list of one.
            warmup_mix: share of InfoNCE in the loss, 0 to 1.
        """
        with torch.no_grad():
            keys = self.teacher([weak])[0]  # [B, D]
        queries = self.student(strong)  # [V, B, D]
        memory = self.memory.keys  # [K, D], from before this step: no sample meets itself

        loss = queries.new_zeros(())
        if warmup_mix < 1:
            loss = loss + (1 - warmup_mix) * relational_loss(
                queries, keys, memory, student_temperature=student_temperature, teacher_temperature=teacher_temperature
            )
        if warmup_mix > 0:
            loss = loss + warmup_mix * info_nce(queries, keys, memory, temperature=info_nce_temperature)
        return Step(loss, queries.detach(), keys)

    def push(self, keys: Tensor, ids: Tensor) -> None:
        """Put the step's keys [N, D] and sample ids [N], of all ranks and parts, into the memory."""
        self.memory.push(keys, ids)

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, parameters only and in fp32.

        Batch-norm statistics are not averaged: the teacher runs in training mode and keeps its own (official code).
        """
        student = dict(unwrapped(self.student).named_parameters())
        names = [name for name, _ in self.teacher.named_parameters()]
        teacher = dict(self.teacher.named_parameters())
        torch._foreach_lerp_([teacher[n] for n in names], [student[n] for n in names], 1 - momentum)


def unwrapped(student: nn.Module) -> Encoder:
    """The encoder inside an engine's wrappers (Fabric's, DDP's)."""
    while not isinstance(student, Encoder):
        student = student.module  # type: ignore[assignment]
    return student
