"""The plain view: what a network sees of an image when it is evaluated rather than trained."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import InterpolationMode, center_crop, pil_to_tensor, resize

from relssl.data.decode import BadImage
from relssl.data.images import Images, Pixels
from relssl.data.loader import standardise
from relssl.data.workers import hand_over, loader_workers, reset_signals, watch
from relssl.settings.run import Config, ViewsConfig


def describe(views: ViewsConfig) -> str:
    """The plain view in words, for protocol cards."""
    grey = ", grey" if views.channels == 1 else ""
    return f"resize shorter side to {enlarged(views)}, centre crop {views.weak.size}, {views.interpolation} with antialias{grey}"


def enlarged(views: ViewsConfig) -> int:
    """The shorter side, in pixels, before the centre crop."""
    assert views.margin is not None
    return round(views.weak.size * views.margin)


def plain_view(image: Image.Image, views: ViewsConfig) -> Tensor:
    """The plain view of an RGB image as uint8 [3, S, S]."""
    scaled = resize(image, enlarged(views), InterpolationMode(views.interpolation))
    view: Tensor = pil_to_tensor(center_crop(scaled, [views.weak.size] * 2))
    return view


def plain_batch(pixels: Tensor, views: ViewsConfig) -> Tensor:
    """The plain views of uint8 images [B, 3, H, W] as floats 0..1 [B, 3, S, S]."""
    images = pixels.float() / 255
    height, width = images.shape[-2:]
    scale = enlarged(views) / min(height, width)
    target = (round(height * scale), round(width * scale))
    if target != (height, width):
        images = F.interpolate(images, target, mode=views.interpolation, antialias=True).clamp(0, 1)
    cropped: Tensor = center_crop(images, [views.weak.size] * 2)
    return cropped


def batches(images: Images, config: Config, batch_size: int = 256) -> Iterator[tuple[np.ndarray, Tensor, list[tuple[str, str]]]]:
    """(rows, normalised images [B, C, S, S] on the CPU, unreadable files) over a data set, in its order."""
    if isinstance(images.source, Pixels):
        for start in range(0, len(images), batch_size):
            pixels = images.source.tensor[start : start + batch_size]
            yield np.arange(start, start + len(pixels)), standardise(plain_batch(pixels, config.views), config), []
        return
    loader = DataLoader(
        _Plain(images, config),
        batch_size=batch_size,
        num_workers=loader_workers(config),
        collate_fn=partial(hand_over, list),
        worker_init_fn=reset_signals,
        generator=torch.Generator(),  # evaluating draws nothing from the run's own
    )
    for samples in watch(loader):
        good = [(row, view) for row, view, _ in samples if view is not None]
        bad = [fault for _, _, fault in samples if fault is not None]
        views = torch.stack([view for _, view in good]) if good else torch.empty(0, 3, 1, 1)
        yield np.array([row for row, _ in good], np.int64), standardise(views, config), bad


class _Plain(Dataset[tuple[int, Tensor | None, tuple[str, str] | None]]):
    def __init__(self, images: Images, config: Config) -> None:
        self.images, self.config = images, config

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[int, Tensor | None, tuple[str, str] | None]:
        try:
            image = self.images.read(row, self.config.loader.max_pixels)
        except BadImage as fault:
            return row, None, (self.images.source.name(row), str(fault))
        return row, plain_view(image, self.config.views), None
