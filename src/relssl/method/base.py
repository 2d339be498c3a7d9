"""Base of all methods: a student, and for most a teacher that follows it and a memory of the teacher's keys."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from relssl.errors import ConfigError
from relssl.method.batchnorm import shuffled
from relssl.method.encoder import Encoder
from relssl.method.memory import Memory
from relssl.method.relation import Target, balance, logits, objective
from relssl.method.tiled import tiled_objective


@dataclass
class Step:
    """The outcome of one step, or of one accumulated part of it."""

    loss: Tensor  # scalar with the gradient's graph
    queries: Tensor  # [V, B, D], the student's embeddings that are matched to the keys, detached
    keys: Tensor  # [B, D], what they are matched to; with a teacher, its embeddings of `weak`, which go into the memory
    features: Tensor | None = None  # [B, F], unit norm: its backbone's features, where the memory keeps them beside the keys


def _own(rows: Tensor) -> Tensor:
    return rows


@dataclass(frozen=True)
class World:
    """The R processes that share a batch out, each with B of its samples, and how the teacher sees it. By default one process alone."""

    rank: int = 0  # this process, 0 to R - 1
    # Joins the rows [B, ...] of all processes in rank order, [R B, ...]; gradients flow back to where rows came from.
    gather: Callable[[Tensor], Tensor] = _own
    order: Tensor | None = None  # int64 [R B], in which the batch passes through the teacher (see `shuffled`); None: as it is


ALONE = World()
# The forms of one and the same loss.
OBJECTIVES: dict[str, Callable[..., Tensor]] = {"plain": objective, "tiled": tiled_objective}


# What the schedules say of each step, which it may take.
SCHEDULED = ("teacher_temperature", "teacher_momentum", "warmup_mix")


class Method(nn.Module):
    """Student, teacher and memory; a subclass adds a `step` from views of B samples to a loss. So may yours: docs/own-parts.md.

    One optimizer step of training is

        step(...)  once for each accumulated part, then backward
        push(...)  the step's keys, after its loss has seen the memory without them
        follow()   the teacher moves towards the student that the optimizer has just changed

    The papers put the teacher's update at the head of the next step. Nothing happens in between, and at the very first step teacher and
    student are equal, so every loss is the same; but so a step that turns out non-finite can be dropped whole.

    Args:
        student: the encoder to train; the teacher is its frozen copy without the predictor.
        memory_size: K, how many of the teacher's keys are kept; 0: none.
        dim: D, the dimension of the student's embeddings.
        generator: source of the memory's first, random keys.
        loss_form: plain, or tiled: the same loss over the memory in less memory and time.
        symmetric: teacher and student see both views, and each is matched to the other, where a method leaves that open.
        features: F, of the backbone's features, if the teacher's relation is theirs; 0: its embeddings'. ReSSL's option.
        sinkhorn_iterations: which balance the teacher's relations over the memory; 0: none. ReSSL's option.
        given: a teacher that is given instead: views to embeddings [T, B, D] as Encoder, and never changed; see `FrozenTeacher`.
    """

    has_teacher: ClassVar[bool] = True
    # A settings.methods.Traits; None: those of the class that it is made from, else a memory if there is a teacher.
    traits: ClassVar[Any] = None
    # Names of the settings that `step` takes: constants of `method`, and what its schedules say of a step.
    constants: ClassVar[tuple[str, ...]] = ()
    scheduled: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        student: Encoder,
        memory_size: int = 0,
        dim: int = 0,
        generator: torch.Generator | None = None,
        loss_form: str = "plain",
        symmetric: bool = False,
        given: nn.Module | None = None,
        features: int = 0,
        sinkhorn_iterations: int = 0,
    ) -> None:
        super().__init__()
        self.student: nn.Module = student
        self.given = given
        self.teacher = student.teacher() if self.has_teacher and given is None else None
        self.memory = Memory(memory_size, dim, generator, features) if memory_size else None
        self.objective, self.symmetric = OBJECTIVES[loss_form], symmetric
        self.features, self.sinkhorn_iterations = features, sinkhorn_iterations

    def step(self, *views: Any, **settings: Any) -> Step:
        """step(weak, strong, world, **settings): views to a loss.

        Args:
            weak: [B, C, H, W], the teacher's view of each sample, or the first of two equal ones.
            strong: V views [B, C, h, w] of the same samples; a single crop is a list of one.
            world: the processes that share the batch out.
            settings: those named in `constants` and `scheduled`; labels [B] for a method that trains on them.
        """
        raise NotImplementedError

    def forward(self, *views: Any, **settings: Any) -> Step:
        """Make a `step`, and check what it returns.

        Raises:
            ConfigError: if that is no Step, or one of other shapes, or without a gradient.
        """
        step: Any = self.step(*views, **settings)
        got, samples, dim = f"a {type(step).__name__}", len(views[0]), self.memory.keys.shape[1] if self.memory else 0
        if isinstance(step, Step):
            loss, queries, keys = ([*tensor.shape] for tensor in (step.loss, step.queries, step.keys))
            fits = len(queries) == 3 and queries[1] == samples and keys[:1] == [samples] and keys[1:] == [dim or keys[-1]]
            if fits and not loss and step.loss.requires_grad:
                return step
            got = f"a loss {loss}{' without gradient' * (not step.loss.requires_grad)}, queries {queries} and keys {keys}"
        needs = f"needs a Step of a scalar loss with its gradient, queries [V, {samples}, D] and keys [{samples}, {dim or 'D'}]"
        raise ConfigError(f"method.name: the step of {type(self).__name__} returns {got}; {needs}")

    @property
    def past(self) -> Tensor:
        """The memory's keys [K, D], from before this step: no sample meets itself."""
        assert self.memory is not None
        return self.memory.keys

    @torch.no_grad()
    def keys(self, views: Sequence[Tensor], world: World = ALONE) -> Tensor:
        """The teacher's embeddings of T views, [T, B, D], where relations are of features with these behind them, [T, B, D + F]."""
        given = self.given if self.teacher is None else self.teacher
        assert given is not None
        teacher = (lambda views: torch.cat(given(views, "features"), dim=-1)) if self.features else given
        if world.order is None:
            keys: Tensor = teacher(views)
            return keys
        return torch.stack([shuffled(lambda x: teacher([x])[0], view, world.order, world.rank, world.gather) for view in views])

    def target(self, keys: Tensor, features: Tensor | None, temperature: float, world: World = ALONE) -> Target | None:
        """Return the teacher's side of the relation of keys [B, D] and features [B, F] of this rank; None: the keys' own.

        Args:
            temperature: the teacher's, at which its relations are balanced: over the samples of all ranks.
        """
        if features is None and not self.sinkhorn_iterations:
            return None
        assert self.memory is not None
        rows, past = (keys, self.memory.keys) if features is None else (features, self.memory.features)
        assert past is not None
        if not self.sinkhorn_iterations:
            return Target(rows, past)
        return Target(rows, past, balance(logits(world.gather(rows), past, temperature), self.sinkhorn_iterations))

    def matched(self, weak: Tensor, strong: Sequence[Tensor], world: World, symmetric: bool) -> list[tuple[Tensor, Tensor]]:
        """The student's queries [V, B, D] of `strong` with the teacher's keys [B, D] of `weak`, to which they are matched.

        If symmetric, there is one strong view, and the queries of `weak` with the keys of `strong` come second. Each network makes one
        pass over all that it sees of one size.
        """
        assert len(strong) == 1 or not symmetric
        views = [*strong, weak] if symmetric else strong
        keys = self.keys([weak, *strong] if symmetric else [weak], world)  # [T, B, D]
        queries = self.student(views)  # [V, B, D]
        return [(queries[:1], keys[0]), (queries[1:], keys[1])] if symmetric else [(queries, keys[0])]

    def push(self, keys: Tensor, ids: Tensor, when: Tensor | None = None, features: Tensor | None = None) -> None:
        """Put the step's keys [N, D], sample ids [N] and features [N, F], of all ranks and parts, into the memory, if `when` []
        says so."""
        if self.memory is not None:
            self.memory.push(keys, ids, when, features)

    @torch.no_grad()
    def follow(self, momentum: float, when: Tensor | None = None) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, parameters only and in fp32, if `when` [] says so.

        Batch-norm statistics are not averaged: the teacher runs in training mode and keeps its own (official code). `when` is read on
        the device: no step waits for it. A teacher that was given stays.
        """
        if self.teacher is None:
            return
        student, teacher = dict(unwrapped(self.student).named_parameters()), dict(self.teacher.named_parameters())
        share = 1 - momentum if when is None else [when * (1 - momentum)] * len(teacher)
        torch._foreach_lerp_(list(teacher.values()), [student[name] for name in teacher], share)  # type: ignore[arg-type]


def unwrapped(student: nn.Module) -> Encoder:
    """The encoder inside an engine's wrappers (Fabric's, DDP's)."""
    while not isinstance(student, Encoder):
        student = student.module  # type: ignore[assignment]
    return student
