"""What keeps a non-finite step from leaving a trace, without the host ever waiting for the device to find out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Non-finite steps in a row after which a run cannot be expected to recover.
PATIENCE = 10


class Guard:
    """Judges each step on the device and takes back what its forward passes have changed: the batch norms' statistics.

    Optimizer, memory and teacher are given the verdict and stay as they were.

    Args:
        networks: those whose buffers a forward pass changes, already on their device. The buffers are joined into one block
            of memory for each type, so that saving and taking back costs a few kernels and not a few hundred.

    Attributes:
        streak: scalar int64 on the device, the non-finite steps in a row until now.
        worst: the longest streak since `longest` was last called, likewise.
    """

    def __init__(self, networks: Sequence[nn.Module], device: torch.device) -> None:
        self._blocks = _join(networks)
        self._before = [block.clone() for block in self._blocks]
        self.streak = torch.zeros((), dtype=torch.int64, device=device)
        self.worst = self.streak.clone()

    def watch(self) -> None:
        """Note the statistics before a step's forward passes."""
        for before, block in zip(self._before, self._blocks, strict=True):
            before.copy_(block)

    def take_back(self) -> None:
        """Put the statistics back."""
        for before, block in zip(self._before, self._blocks, strict=True):
            block.copy_(before)

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether the step counts, [] on the device; if not, the statistics are put back."""
        good = torch.isfinite(loss) & torch.isfinite(norm)
        for before, block in zip(self._before, self._blocks, strict=True):
            torch.where(good, block, before, out=block)
        self.streak += 1
        self.streak *= ~good
        torch.maximum(self.worst, self.streak, out=self.worst)
        return good

    def longest(self) -> Tensor:
        """The longest streak since the last call, [] on the device."""
        found = self.worst.clone()
        self.worst.copy_(self.streak)
        return found


def _join(networks: Sequence[nn.Module]) -> list[Tensor]:
    """Lay the networks' buffers side by side, a block for each type; each buffer becomes a view of its block."""
    owners: dict[torch.dtype, list[tuple[nn.Module, str, Tensor]]] = {}
    for network in networks:
        for module in network.modules():
            for name, buffer in module.named_buffers(recurse=False):
                owners.setdefault(buffer.dtype, []).append((module, name, buffer))
    blocks = []
    for found in owners.values():
        block = torch.cat([buffer.reshape(-1) for _, _, buffer in found])
        views = torch.split(block, [buffer.numel() for _, _, buffer in found])
        for (module, name, buffer), view in zip(found, views, strict=True):
            module._buffers[name] = view.view(buffer.shape)
        blocks.append(block)
    return blocks
