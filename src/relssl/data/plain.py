"""The plain view: the deterministic view of an image on which a network is evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler
from torchvision.transforms.functional import InterpolationMode, center_crop, pil_to_tensor, resize

from relssl.data.batched import normalise
from relssl.data.decode import BadImage
from relssl.data.images import Fault, Images, Pixels
from relssl.data.loader import fitting, read_batches
from relssl.data.own import open_item
from relssl.errors import ConfigError
from relssl.settings.run import LoaderConfig, ViewsConfig


@dataclass(frozen=True)
class PlainView:
    """Scaling with antialiasing, a centre crop, and normalisation."""

    size: int  # side of the view in pixels
    margin: float  # shorter side before the centre crop, in sizes
    interpolation: str  # bilinear or bicubic
    mean: tuple[float, ...]  # of each channel that the network sees, in 0..1; that of a single one makes colours grey
    std: tuple[float, ...]

    @staticmethod
    def of(views: ViewsConfig) -> PlainView:
        """Return the plain view of a run whose data has filled in its statistics; ConfigError if they or the margin are null."""
        if empty := [name for name in ("margin", "mean", "std") if getattr(views, name) is None]:
            raise ConfigError(*(f"views.{name}: is null; what the network sees is not known without it" for name in empty))
        assert views.margin is not None
        return PlainView(views.weak.size, views.margin, views.interpolation, *views.statistics())

    @property
    def channels(self) -> int:
        """Channels that the network sees."""
        return len(self.mean)

    @property
    def shorter_side(self) -> int:
        """The shorter side, in pixels, before the centre crop."""
        return round(self.size * self.margin)

    def __str__(self) -> str:
        """The view in words, for protocol cards."""
        channels = {1: ", grey", 3: ""}.get(self.channels, f", {self.channels} channels")
        scaling = f"centre crop {self.size}, {self.interpolation} with antialias{channels}"
        return f"resize shorter side to {self.shorter_side}, {scaling}"

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise images of the view's size: uint8, or floats in 0..1, [B,C,S,S] to fp32 [B,channels,S,S]."""
        return normalise(images, self.mean, self.std)

    def pixels(self, image: Image.Image | np.ndarray) -> Tensor:
        """Return the view of an RGB image, or of uint8 [C,H,W], not yet normalised, as uint8 [C,S,S]; BadImage if it is too narrow."""
        width, height = image.size if isinstance(image, Image.Image) else image.shape[:0:-1]
        if max(width, height) * self.shorter_side**2 > LoaderConfig().max_pixels * min(width, height):
            raise BadImage(f"has {height} x {width} pixels, too narrow to be scaled to a shorter side of {self.shorter_side}")
        whole = torch.from_numpy(image) if isinstance(image, np.ndarray) else image
        view = center_crop(resize(whole, self.shorter_side, InterpolationMode(self.interpolation)), [self.size] * 2)
        return view if isinstance(view, Tensor) else pil_to_tensor(view)

    def __call__(self, image: Any) -> Tensor:
        """Return the normalised view [C,S,S] of an image as PIL opens it, or an array or tensor, as evaluations see it in a data set.

        BadImage if they refuse it.
        """
        with open_item(image, LoaderConfig().max_pixels) as opened:
            return self.normalise(self.pixels(opened.whole())[None])[0]


@dataclass(frozen=True)
class Reader:
    """The way an evaluation reads images."""

    view: PlainView
    workers: int = 0  # loader processes, for files
    max_pixels: int = LoaderConfig().max_pixels  # files with larger images count as unreadable
    mirrored: bool = True  # so that classifiers are trained on mirrored images too; false where pretraining mirrors none

    def batches(self, images: Images, size: int = 256) -> Iterator[tuple[np.ndarray, Tensor, list[Fault]]]:
        """Yield (rows, normalised views [B,C,S,S] on the CPU, unreadable files) over a data set, in its order, `size` images each."""
        fitting(self.view.channels, images)
        requests = BatchSampler(range(len(images)), size, drop_last=False)
        in_memory = isinstance(images.source, Pixels)
        for rows, pixels, bad in read_batches(partial(self._read, images), requests, 0 if in_memory else self.workers):
            yield rows, self.view.normalise(pixels), bad

    def _read(self, images: Images, rows: list[int]) -> tuple[np.ndarray, Tensor, list[Fault]]:
        """Return which of these images can be read, their views, and the others."""
        if isinstance(images.source, Pixels):
            return np.array(rows), plain_batch(images.source.tensor[rows[0] : rows[-1] + 1], self.view), []
        views, bad = dict[int, Tensor](), list[Fault]()
        for row in rows:
            try:
                views[row] = self.view.pixels(images.read(row, self.max_pixels))
            except BadImage as fault:
                bad.append((images.source.name(row), str(fault)))
        pixels = torch.stack([*views.values()]) if views else torch.empty(0, images.channels, 1, 1)
        return np.array([*views], np.int64), pixels, bad


def plain_batch(pixels: Tensor, view: PlainView) -> Tensor:
    """Return the plain views of uint8 images [B,C,H,W], not yet normalised, as floats in 0..1 [B,C,S,S]."""
    images = pixels.float() / 255
    height, width = images.shape[-2:]
    scale = view.shorter_side / min(height, width)
    target = (round(height * scale), round(width * scale))
    if target != (height, width):
        images = F.interpolate(images, target, mode=view.interpolation, antialias=True).clamp(0, 1)
    cropped: Tensor = center_crop(images, [view.size] * 2)
    return cropped
