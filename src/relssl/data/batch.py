"""What a step is given: the views of one part of its batch, on the device."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from relssl.config import Config
from relssl.data import batched


@dataclass
class Batch:
    """One part of a step on this rank.

    Attributes:
        ids: [B] int64, the samples' positions in the data set.
        weak: [B, C, H, W] the teacher's view, normalised, on the device.
        strong: the student's views, each [B, C, h, w].
        bad: (file, reason) of images that could not be read and were replaced.
    """

    ids: Tensor
    weak: Tensor
    strong: list[Tensor]
    bad: list[tuple[str, str]] = field(default_factory=list)


def standardise(images: Tensor, config: Config) -> Tensor:
    """uint8 or 0..1 floats [B, 3, H, W] to the channels [B, C, H, W] that the networks see, with zero mean and unit deviation by
    the run's channel statistics."""
    if config.views.channels == 1:
        images = batched.luma(images / 255 if images.dtype == torch.uint8 else images)
    return batched.normalise(images, *config.views.statistics())
