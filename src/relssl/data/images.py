"""What a data set is: images from one source, in memory, as files, or as files that were shrunk beforehand, and their labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from relssl.data.decode import Decoded, Opened
from relssl.data.folder import Bad

Channels = tuple[float, float, float]

IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)


class Source(Protocol):
    """The pixels of N images, wherever they lie: `Pixels`, `folder.Files` or `shrunk.Shrunk`."""

    def __len__(self) -> int: ...

    def take(self, rows: np.ndarray) -> Source:
        """Return the images at these positions, int64 [M], in this order."""

    def fingerprint(self) -> str:
        """Compute 16 hex digits that change with the images."""

    def name(self, row: int) -> str:
        """Return the name of one image, by which messages and tables speak of it; of files, the path."""

    def open(self, row: int, max_pixels: int) -> Opened | Decoded:
        """Open one image, as a context manager: its `size` is then known, `rgb` reads its pixels.

        Args:
            row: position of the image.
            max_pixels: refuse files with more pixels than this before they are decoded.

        Raises:
            BadImage: if it cannot be read; its message is the reason, without the name.
        """


@dataclass(frozen=True, eq=False)
class Pixels:
    """Images in memory.

    Attributes:
        tensor: uint8 [N, 3, H, W], contiguous, on the CPU.
        title: what the name of each image begins with; its position follows.
    """

    tensor: torch.Tensor
    title: str = "image"

    def __post_init__(self) -> None:
        assert self.tensor.dtype == torch.uint8 and self.tensor.is_contiguous()

    def __len__(self) -> int:
        return len(self.tensor)

    def take(self, rows: np.ndarray) -> Pixels:
        """Return a copy of the images at these positions."""
        return Pixels(self.tensor[torch.from_numpy(rows)], self.title)

    def fingerprint(self) -> str:
        """Compute 16 hex digits of the SHA-256 of shape and values."""
        digest = hashlib.sha256(f"pixels {tuple(self.tensor.shape)} ".encode())
        digest.update(self.tensor.numpy().data)
        return digest.hexdigest()[:16]

    def name(self, row: int) -> str:
        """Return the title and the position."""
        return f"{self.title}/{row:06}"

    def open(self, row: int, max_pixels: int) -> Decoded:
        """Return one image as Pillow has it."""
        return Decoded(Image.fromarray(self.tensor[row].permute(1, 2, 0).numpy()))


@dataclass(frozen=True, eq=False)
class Images:
    """A set of N images.

    Attributes:
        name: for messages.
        source: where the pixels are.
        labels: int64 [N], -1 = none; for reporting, and to train on for supervised learning alone.
        classes: what the labels stand for.
        mean, std: of the channels, for pixels scaled to 0..1.
        bad: (file, reason) of what listing the files already showed to be unusable; not counted in N.
        targets: int8 [N, C] of images with several labels each: 1 yes, 0 no, -1 unknown; `labels` is then None.
    """

    name: str
    source: Source
    labels: np.ndarray | None = None
    classes: tuple[str, ...] | None = None
    mean: Channels = IMAGENET_MEAN
    std: Channels = IMAGENET_STD
    bad: Bad = field(default_factory=list)
    targets: np.ndarray | None = None

    def __post_init__(self) -> None:
        assert self.labels is None or (self.labels.dtype == np.int64 and len(self.labels) == len(self))
        assert self.targets is None or (self.targets.dtype == np.int8 and len(self.targets) == len(self) and self.labels is None)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def in_memory(self) -> bool:
        """Whether the source is `Pixels`."""
        return isinstance(self.source, Pixels)

    @property
    def class_count(self) -> int:
        """Number of classes that one label an image tells apart, those without an image included; 0 if an image has no label."""
        if self.labels is None or self.labels.min() < 0:
            return 0
        return max(len(self.classes or ()), int(self.labels.max()) + 1)

    def subset(self, indices: Sequence[int] | np.ndarray) -> Images:
        """Return the images at these positions, in this order."""
        rows = np.asarray(indices, np.int64)
        labels, targets = (each if each is None else each[rows] for each in (self.labels, self.targets))
        return replace(self, source=self.source.take(rows), labels=labels, targets=targets)

    def read(self, row: int, max_pixels: int) -> Image.Image:
        """Return one image whole, upright 8-bit RGB; BadImage if its file cannot be read."""
        with self.source.open(row, max_pixels) as opened:
            return opened.rgb()

    def fingerprint(self) -> str:
        """Compute 16 hex digits of the pixels, or of the files' names and sizes; labels do not count."""
        return self.source.fingerprint()
