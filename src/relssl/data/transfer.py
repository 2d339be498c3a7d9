"""From the host to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def send(values: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device; to a GPU from page-locked memory, as the copy would wait for its other work otherwise."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)
