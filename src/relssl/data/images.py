"""A data set: images from one source, in memory, as files, or as files that were shrunk beforehand, and their labels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image

from relssl.data.decode import Opened, open_image

if TYPE_CHECKING:  # DATA is checked before torch is imported
    from torch import Tensor

Channels = tuple[float, ...]  # a figure a channel
Fault = tuple[str, str]  # the name of an image, and why it cannot be used

IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)


class Source(Protocol):
    """The pixels of N images, wherever they lie: `Pixels`, `Files` or `cache.Shrunk`."""

    def __len__(self) -> int: ...

    def take(self, rows: np.ndarray) -> Source:
        """Return the images at these positions, int64 [M], in this order."""

    def fingerprint(self) -> str:
        """Compute 16 hex digits that change with the images."""

    def name(self, row: int) -> str:
        """Return the name of one image, by which messages and tables speak of it; of files, the path."""

    def open(self, row: int, max_pixels: int) -> AbstractContextManager[Opened]:
        """Open one image; BadImage, without its name, if it cannot be read, or if a file has more than `max_pixels` pixels."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """Images in memory."""

    tensor: Tensor  # uint8 [N, C, H, W], contiguous, on the CPU
    title: str = "image"  # what the name of each image begins with; its position follows

    def __len__(self) -> int:
        return len(self.tensor)

    def take(self, rows: np.ndarray) -> Pixels:
        return Pixels(self.tensor[rows], self.title)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"pixels {tuple(self.tensor.shape)} ".encode())
        digest.update(self.tensor.numpy().data)
        return digest.hexdigest()[:16]

    def name(self, row: int) -> str:
        return f"{self.title}/{row:06}"

    def open(self, row: int, max_pixels: int) -> AbstractContextManager[Opened]:
        return nullcontext(Opened.of_bands(self.tensor[row].numpy()))


class Files:
    """The paths of N image files, each below one folder or absolute, with their sizes in bytes.

    The names lie in one block of bytes, not as N strings: loader workers share it with their parent, where counting the
    references of a million strings would copy them into each worker. Names that are no text keep their bytes
    (`surrogateescape`), so every file can be opened again.

    Args:
        folder: that folder.
        entries: the path of each file, relative to the folder or absolute, and its size.
        times: when each was changed, in ns; 0: not looked at.
    """

    def __init__(self, folder: str, entries: Sequence[tuple[bytes, int]], times: Sequence[int] | np.ndarray = ()) -> None:
        self.folder = os.fsencode(folder)
        self.sizes = np.array([size for _, size in entries], np.int64)
        self.times = np.array(times, np.int64) if len(times) else np.zeros(len(entries), np.int64)
        self._block = b"".join(name for name, _ in entries)
        self._ends = np.cumsum([0, *(len(name) for name, _ in entries)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[str]:
        return map(self.name, range(len(self)))

    def name(self, row: int) -> str:
        return os.fsdecode(os.path.join(self.folder, self.relative(row)))

    def relative(self, row: int) -> bytes:
        """Return the path of one file, relative to the folder."""
        return self._block[self._ends[row] : self._ends[row + 1]]

    def take(self, rows: np.ndarray) -> Files:
        return Files(os.fsdecode(self.folder), [(self.relative(row), self.sizes[row]) for row in rows], self.times[rows])

    def fingerprint(self) -> str:
        """Compute 16 hex digits of names, order and sizes; where the folder lies does not count."""
        digest = hashlib.sha256(f"files {len(self)} ".encode())
        for part in (self._ends.astype("<i8").tobytes(), self._block, self.sizes.astype("<i8").tobytes()):
            digest.update(part)
        return digest.hexdigest()[:16]

    def open(self, row: int, max_pixels: int) -> AbstractContextManager[Opened]:
        return open_image(self.name(row), max_pixels)


@dataclass(frozen=True, eq=False)
class Images:
    """A set of N images."""

    name: str  # for messages
    source: Source
    labels: np.ndarray | None = None  # int64 [N], -1 = none; for reporting, and to train on for supervised learning alone
    classes: tuple[str, ...] | None = None  # of the labels, or of the columns of targets
    mean: Channels = IMAGENET_MEAN  # of the channels, for pixels scaled to 0..1
    std: Channels = IMAGENET_STD
    bad: list[Fault] = field(default_factory=list)  # unusable files that listing already showed; not counted in N
    notes: tuple[str, ...] = ()  # what of DATA is not in this set, or in an unexpected way, a line each
    targets: np.ndarray | None = None  # int8 [N,C] of images with several labels each: 1 yes, 0 no, -1 unknown; labels are None

    def __len__(self) -> int:
        return len(self.source)

    @property
    def in_memory(self) -> bool:
        """True for `Pixels`, which need no loader processes."""
        return isinstance(self.source, Pixels)

    @property
    def channels(self) -> int:
        """Channels of the images: 3, but for arrays and items of other ones."""
        return self.source.tensor.shape[1] if isinstance(self.source, Pixels) else getattr(self.source, "channels", 3)

    @property
    def class_count(self) -> int:
        """The number of classes, those without an image included; 0 if not every image has one label."""
        if self.labels is None or self.labels.min() < 0:
            return 0
        return max(len(self.classes or ()), int(self.labels.max()) + 1)

    def subset(self, indices: Sequence[int] | np.ndarray) -> Images:
        """Return the images at these positions, in this order."""
        rows = np.asarray(indices, np.int64)
        labels, targets = (each if each is None else each[rows] for each in (self.labels, self.targets))
        return replace(self, source=self.source.take(rows), labels=labels, targets=targets)

    def read(self, row: int, max_pixels: int) -> Image.Image | np.ndarray:
        """Return one image whole: 8-bit RGB, or uint8 [C,H,W] of other channels; BadImage if it cannot be read."""
        with self.source.open(row, max_pixels) as opened:
            return opened.whole()

    def fingerprint(self) -> str:
        """Compute 16 hex digits of the pixels, or of the files' names and sizes; labels do not count."""
        return self.source.fingerprint()
