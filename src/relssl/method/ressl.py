"""ReSSL: a student, its momentum teacher and the memory, and the step that joins them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from relssl.method.encoder import Encoder
from relssl.method.memory import Memory
from relssl.method.relation import objective
from relssl.method.tiled import tiled_objective

# The forms of one and the same loss.
OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "plain": objective,
    "tiled": tiled_objective,
    "triton": partial(tiled_objective, fused=True),
}


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
        loss_form: one of OBJECTIVES, all of which give the same loss: plain; tiled, in less memory and time; triton, tiled with
            a kernel for GPUs.
    """

    def __init__(
        self,
        student: Encoder,
        memory_size: int,
        dim: int,
        generator: torch.Generator | None = None,
        loss_form: str = "plain",
    ) -> None:
        super().__init__()
        if loss_form not in OBJECTIVES:
            raise ValueError(f"loss_form must be one of {', '.join(OBJECTIVES)}, got {loss_form!r}")
        self.objective = OBJECTIVES[loss_form]
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

        loss = self.objective(
            queries,
            keys,
            memory,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            warmup_mix=warmup_mix,
            info_nce_temperature=info_nce_temperature,
        )
        return Step(loss, queries.detach(), keys)

    def push(self, keys: Tensor, ids: Tensor, when: Tensor | None = None) -> None:
        """Put the step's keys [N, D] and sample ids [N], of all ranks and parts, into the memory, if `when` [] says so."""
        self.memory.push(keys, ids, when)

    @torch.no_grad()
    def follow(self, momentum: float, when: Tensor | None = None) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, parameters only and in fp32.

        Batch-norm statistics are not averaged: the teacher runs in training mode and keeps its own (official code).

        Args:
            when: a truth value on the device [], read there: no step waits for it. None: yes.
        """
        student = dict(unwrapped(self.student).named_parameters())
        teacher = dict(self.teacher.named_parameters())
        share = 1 - momentum if when is None else [when * (1 - momentum)] * len(teacher)
        torch._foreach_lerp_(list(teacher.values()), [student[name] for name in teacher], share)  # type: ignore[arg-type]


def unwrapped(student: nn.Module) -> Encoder:
    """The encoder inside an engine's wrappers (Fabric's, DDP's)."""
    while not isinstance(student, Encoder):
        student = student.module  # type: ignore[assignment]
    return student
