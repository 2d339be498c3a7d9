"""Backbone features of whole data sets, by one fixed view an image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from relssl.config import Config
from relssl.data.plain import batches
from relssl.data.sources import Images
from relssl.errors import DataError


@dataclass
class Features:
    """Features [N, F] fp32 on the CPU, the rows of the data set they belong to, and what could not be read."""

    vectors: Tensor
    rows: np.ndarray
    bad: list[tuple[str, str]] = field(default_factory=list)


@torch.no_grad()
def stream(
    backbone: nn.Module,
    images: Images,
    config: Config,
    device: torch.device,
    autocast: AbstractContextManager[object] | None = None,
) -> Iterator[tuple[np.ndarray, Tensor, list[tuple[str, str]]]]:
    """(rows, features [B, F] fp32 on the CPU, unreadable files) batch by batch.

    The backbone runs in eval mode and is put back as it was, so measuring never changes what is measured.
    """
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        for rows, views, bad in batches(images, config):
            with autocast or nullcontext():
                made = backbone(views.to(device).contiguous(memory_format=torch.channels_last)) if len(rows) else views
            yield rows, made.float().cpu(), bad
    finally:
        for module, training in modes:
            module.training = training


def extract(
    backbone: nn.Module,
    images: Images,
    config: Config,
    device: torch.device,
    autocast: AbstractContextManager[object] | None = None,
) -> Features:
    """All features of a data set, in memory."""
    vectors: list[Tensor] = []
    rows: list[np.ndarray] = []
    bad: list[tuple[str, str]] = []
    for some, made, faults in stream(backbone, images, config, device, autocast):
        bad += faults
        if len(some):
            rows.append(some)
            vectors.append(made)
    if not vectors:
        raise DataError(f"{images.name}: none of its {len(images)} images can be read")
    return Features(torch.cat(vectors), np.concatenate(rows), bad)
