"""Between the host and the device."""

from __future__ import annotations

import torch
from torch import Tensor


def send(values: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; to a GPU from page-locked memory, as the copy would wait for its other work otherwise."""
    host = device.type == "cuda" and values.device.type == "cpu"
    return (values.pin_memory() if host else values).to(device, non_blocking=True)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
