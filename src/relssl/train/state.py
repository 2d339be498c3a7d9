"""The state that changes while a run goes on, and the judge that lets a step change it or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relssl.method.base import Method


class Guard:
    """Judges each step on the device, without waiting for it, and takes back what the forward passes of a bad step have changed.

    Those change the networks' buffers: the statistics of batch norms. Optimizer, memory and teacher get the verdict and stay.

    Attributes:
        streak: scalar int64 on the device, the non-finite steps in a row until now.
    """

    def __init__(self, networks: Sequence[nn.Module], device: torch.device) -> None:
        buffers = [buffer for network in networks for buffer in network.buffers()]
        self._kinds = [_Copies([each for each in buffers if each.dtype == kind]) for kind in {each.dtype for each in buffers}]
        self._judged = [bool(copies.note().isfinite()) for copies in self._kinds]  # others hold constants such as -inf
        self.streak = torch.zeros((), dtype=torch.int64, device=device)

    def watch(self) -> None:
        """Note the buffers before a step's forward passes."""
        for copies in self._kinds:
            torch._foreach_copy_(copies.before, copies.buffers)

    def take_back(self) -> None:
        """Put the buffers back."""
        for copies in self._kinds:
            torch._foreach_copy_(copies.buffers, copies.before)

    def doubt(self) -> Tensor | int:
        """Note the buffers after a step's forward passes. Return 0, or NaN if they are no longer finite: a batch norm's variance
        overflows long before the loss does."""
        sums = [copies.note() for copies in self._kinds]
        return 0 * sum(total for total, judged in zip(sums, self._judged, strict=True) if judged)

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Return [] on the device, true if loss and gradient norm are finite; if not, the buffers are put back."""
        good = torch.isfinite(loss) & torch.isfinite(norm)
        for copies in self._kinds:
            torch.where(good, copies.block_after, copies.block_before, out=copies.block_before)
        self.take_back()
        self.streak += 1
        self.streak *= ~good
        return good


class _Copies:
    """Buffers of one type and two copies of each, side by side in blocks, so that a choice between the copies is one kernel."""

    def __init__(self, buffers: list[Tensor]) -> None:
        self.buffers = buffers
        (self.block_before, self.before), (self.block_after, self.after) = (self._block() for _ in range(2))

    def note(self) -> Tensor:
        """Copy the buffers to the second block; return its sum [], which is finite if they are."""
        torch._foreach_copy_(self.after, self.buffers)
        return self.block_after.sum(dtype=torch.float32)

    def _block(self) -> tuple[Tensor, list[Tensor]]:
        block = self.buffers[0].new_empty(sum(buffer.numel() for buffer in self.buffers))
        parts = torch.split(block, [buffer.numel() for buffer in self.buffers])
        return block, [part.view(buffer.shape) for part, buffer in zip(parts, self.buffers, strict=True)]


@dataclass
class State:
    """All that changes while a run goes on; a checkpoint holds it, and the random generators besides."""

    model: Method  # student, teacher and memory
    optimizer: Optimizer  # of the student
    guard: Guard  # the judge of steps, with its count of bad ones
    step: int = 0  # optimizer steps so far
    best: dict[str, Any] | None = None  # {figure: value, "checkpoint"} of the best student so far, once one was measured
    neighbours: list[str] | None = None  # of the images that `Online` looks at, each a line, when they were last measured
    unmeasured: dict[str, Any] | None = None  # the present step's row, if a request to stop came before its kNN was done
    unreadable: set[str] = field(default_factory=set)  # files that could not be read so far
    infinite: set[str] = field(default_factory=set)  # tensors that are not finite from the start, such as masks
