"""The plain view: what a network sees of an image when it is evaluated rather than trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import InterpolationMode, center_crop, pil_to_tensor, resize

from relssl.data.batched import luma, normalise
from relssl.data.decode import BadImage
from relssl.data.loader import read_image
from relssl.data.named import Images
from relssl.data.workers import hand_over, reset_signals, watch
from relssl.errors import ConfigError
from relssl.settings.run import LoaderConfig, ViewsConfig


@dataclass(frozen=True)
class PlainView:
    """The deterministic view of an image: scaled, cropped at the centre, normalised.

    Attributes:
        size: side S in pixels.
        margin: shorter side before the centre crop, in sizes.
        interpolation: bilinear or bicubic, with antialiasing.
        channels: C, 3 or 1 (grey).
        mean, std: of the C channels, of values in 0..1.
    """

    size: int
    margin: float
    interpolation: str
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @staticmethod
    def of(views: ViewsConfig) -> PlainView:
        """Return the plain view of a run whose data has filled in its margin and statistics.

        Raises:
            ConfigError: if one of them is still null.
        """
        if faults := [f"views.{name}: is null; name it" for name in ("margin", "mean", "std") if getattr(views, name) is None]:
            raise ConfigError(*faults)
        assert views.margin is not None
        return PlainView(views.weak.size, views.margin, views.interpolation, views.channels, *views.statistics())

    @property
    def shorter_side(self) -> int:
        """Pixels of the shorter side before the centre crop."""
        return round(self.size * self.margin)

    def describe(self) -> str:
        """Return the view in words, for cards."""
        grey = ", grey" if self.channels == 1 else ""
        return f"resize shorter side to {self.shorter_side}, centre crop {self.size}, {self.interpolation} with antialias{grey}"

    def crop(self, image: Image.Image) -> Tensor:
        """Scale and crop an RGB image to uint8 [3, S, S]."""
        scaled = resize(image, self.shorter_side, InterpolationMode(self.interpolation))
        view: Tensor = pil_to_tensor(center_crop(scaled, [self.size] * 2))
        return view

    def crop_batch(self, pixels: Tensor) -> Tensor:
        """Scale and crop uint8 images [B, 3, H, W] to floats in 0..1 [B, 3, S, S]."""
        images = pixels.float() / 255
        height, width = images.shape[-2:]
        scale = self.shorter_side / min(height, width)
        target = (round(height * scale), round(width * scale))
        if target != (height, width):
            images = F.interpolate(images, target, mode=self.interpolation, antialias=True).clamp(0, 1)
        cropped: Tensor = center_crop(images, [self.size] * 2)
        return cropped

    def normalise(self, images: Tensor) -> Tensor:
        """Turn uint8 or 0..1 floats [B, 3, H, W] into the channels [B, C, H, W] that the network sees."""
        if self.channels == 1:
            images = luma(images / 255 if images.dtype == torch.uint8 else images)
        return normalise(images, self.mean, self.std)

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the normalised view [C, S, S] of a PIL image."""
        return self.normalise(self.crop(image.convert("RGB"))[None])[0]


@dataclass(frozen=True)
class Reader:
    """How an evaluation reads images.

    Attributes:
        view: what the network sees of each.
        workers: processes that read files.
        max_pixels: larger images are skipped.
        mirrored: whether classifiers that are trained on images see them mirrored, too; not where pretraining never mirrors, as
            with digits.
    """

    view: PlainView
    workers: int = 0
    max_pixels: int = LoaderConfig().max_pixels
    mirrored: bool = True

    def batches(self, images: Images, batch_size: int = 256) -> Iterator[tuple[np.ndarray, Tensor, list[tuple[str, str]]]]:
        """Yield (rows, normalised images [B, C, S, S] on the CPU, unreadable files) over a data set, in its order."""
        view = self.view
        if images.pixels is not None:
            for start in range(0, len(images), batch_size):
                pixels = images.pixels[start : start + batch_size]
                yield np.arange(start, start + len(pixels)), view.normalise(view.crop_batch(pixels)), []
            return
        loader = DataLoader(
            _Plain(images, self),
            batch_size=batch_size,
            num_workers=self.workers,
            collate_fn=partial(hand_over, list),
            worker_init_fn=reset_signals,
            generator=torch.Generator(),  # evaluating draws nothing from the run's own
        )
        for samples in watch(loader):
            good = [(row, view) for row, view, _ in samples if view is not None]
            bad = [fault for _, _, fault in samples if fault is not None]
            views = torch.stack([view for _, view in good]) if good else torch.empty(0, 3, 1, 1)
            yield np.array([row for row, _ in good], np.int64), view.normalise(views), bad


class _Plain(Dataset[tuple[int, Tensor | None, tuple[str, str] | None]]):
    def __init__(self, images: Images, reader: Reader) -> None:
        self.images, self.reader = images, reader

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[int, Tensor | None, tuple[str, str] | None]:
        assert self.images.files is not None
        try:
            image = read_image(self.images, row, self.reader.max_pixels)
        except BadImage as fault:
            return row, None, (self.images.files[row], str(fault))
        return row, self.reader.view.crop(image), None
