"""A data set: images from one source, in memory, as files, or as files that were shrunk beforehand, and their labels.

Names of files lie in a few blocks of memory: objects of Python would take ten times the room, and loader processes that count
references to them would copy them.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, islice
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

import numpy as np
from PIL import Image

from relssl.data.decode import BadImage, Opened, open_image

if TYPE_CHECKING:  # DATA is checked before torch is imported
    from torch import Tensor

Channels = tuple[float, ...]  # a figure a channel
Fault = tuple[str, str]  # the name of an image, and why it cannot be used

BEGINNING = 1 << 20
IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)
_ROWS = 1 << 14  # of a table that are Python objects at a time


class Source(Protocol):
    """The pixels of N images, wherever they lie: `Pixels`, `Files`, `shards.Shards`, `hub.Hub`, `own.Items` or `cache.Shrunk`."""

    def __len__(self) -> int: ...

    def take(self, rows: np.ndarray) -> Source:
        """Return the images at these positions, int64 [M], in this order."""

    def fingerprint(self) -> str:
        """Compute 16 hex digits that change with the images."""

    def name(self, row: int) -> str:
        """Return the name of one image, by which messages and tables speak of it; of files, the path."""

    def beginning(self, row: int) -> bytes:
        """Return the first `BEGINNING` bytes of one image as it is stored, by which copies are known; of an unreadable one, something."""

    def open(self, row: int, max_pixels: int) -> AbstractContextManager[Opened]:
        """Open one image; BadImage, without its name, if it cannot be read, or if a file has more than `max_pixels` pixels."""


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

    def beginning(self, row: int) -> bytes:
        return self.tensor[row].numpy().tobytes()

    def open(self, row: int, max_pixels: int) -> AbstractContextManager[Opened]:
        return nullcontext(Opened.of_bands(self.tensor[row].numpy()))


@dataclass(frozen=True, eq=False)
class Names:
    """N strings of bytes."""

    block: np.ndarray  # uint8, all of them without anything between
    ends: np.ndarray  # int64 [N+1], where each one ends; the first is 0

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, row: int) -> bytes:
        return self.block[self.ends[row] : self.ends[row + 1]].tobytes()

    def take(self, rows: np.ndarray) -> Names:
        """Return those at positions int64 [M], in this order."""
        return table(((self[row],) for row in rows.tolist()), 0)[0]


def table(rows: Iterable[tuple[bytes, *tuple[int, ...]]], columns: int) -> tuple[Names, list[np.ndarray]]:
    """Read rows of a name and so many numbers each, as they come: the names, and each column, int64 [N]."""
    block, ends, numbers, source = bytearray(), array("q", [0]), [array("q") for _ in range(columns)], iter(rows)
    while some := list(islice(source, _ROWS)):
        names, *others = zip(*some, strict=True)
        ends.extend(islice(accumulate(map(len, names), initial=len(block)), 1, None))
        block += b"".join(names)
        for column, values in zip(numbers, others, strict=True):
            column.extend(values)
    arrays = [np.frombuffer(each, np.int64) for each in numbers]
    return Names(np.frombuffer(block, np.uint8), np.frombuffer(ends, np.int64)), arrays


def class_labels(words: Iterable[bytes], numbers: np.ndarray) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Return labels int64 [N], -1 for none, of positions [N] in distinct words, and the classes; None and None if no word labels anything.

    Classes are sorted, by value where all are whole numbers. Words that differ in blanks around them or in their Unicode form
    alone are one; an empty one labels nothing.
    """
    titles = [unicodedata.normalize("NFC", word.strip().decode("utf-8", "backslashreplace")) for word in words]
    if not (distinct := {*titles} - {""}):
        return None, None
    numeric = all(word.isascii() and word.isdigit() and len(word) < 19 for word in distinct)
    classes = tuple(sorted(distinct, key=lambda word: (int(word), word) if numeric else (0, word)))
    rank = {word: position for position, word in enumerate(classes)} | {"": -1}
    return np.array([rank[title] for title in titles], np.int64)[numbers], classes


@dataclass(frozen=True, eq=False)
class Stored:
    """N images that are kept as the bytes of image files; the base of `Files`, `shards.Shards` and `hub.Hub`.

    A subclass names the columns, arrays [N] or `Names`, that hold something of each image, and says how an image is called and read.
    """

    names: Names
    sizes: np.ndarray  # int64 [N], in bytes; 0: not known
    times: np.ndarray  # int64, when the files were changed, in ns, as far as that is looked at

    columns: ClassVar[tuple[str, ...]] = ("names", "sizes")

    def __len__(self) -> int:
        return len(self.sizes)

    def take(self, rows: np.ndarray) -> Self:
        return replace(self, **{name: getattr(self, name).take(rows) for name in self.columns})

    def fingerprint(self) -> str:
        """Compute 16 hex digits of names, order and sizes; where the images lie does not count."""
        digest = hashlib.sha256(f"{type(self).__name__.lower()} {len(self)} ".encode())
        for part in (self.names.ends, self.names.block, self.sizes):
            digest.update(part.data)
        return digest.hexdigest()[:16]

    def name(self, row: int) -> str:
        raise NotImplementedError

    def read(self, row: int, at_most: int | None = None) -> bytes:
        """Return the first bytes of an image as it is stored, None: all; BadImage or OSError if there are none."""
        raise NotImplementedError

    def beginning(self, row: int) -> bytes:
        with suppress(BadImage, OSError):
            return self.read(row, BEGINNING)
        return b"unreadable " + os.fsencode(self.name(row))

    def open(self, row: int, max_pixels: int) -> AbstractContextManager[Opened]:
        return open_image(partial(self.read, row), max_pixels)


@dataclass(frozen=True, eq=False)
class Files(Stored):
    """N image files, each below one folder or anywhere; `times` has one of each, 0: not looked at.

    Names are paths, relative to the folder or absolute. Those that are no text keep their bytes (`surrogateescape`), so every file can
    be opened again.
    """

    folder: bytes
    columns = ("names", "sizes", "times")

    @staticmethod
    def of(folder: str, entries: Iterable[tuple[bytes, int] | tuple[bytes, int, int]]) -> Files:
        """Return the files of entries, each a name and a size, maybe with a time of change."""
        names, (sizes, times) = table(((*entry, 0)[:3] for entry in entries), 2)
        return Files(names, sizes, times, os.fsencode(folder))

    def name(self, row: int) -> str:
        return os.fsdecode(os.path.join(self.folder, self.names[row]))

    def read(self, row: int, at_most: int | None = None) -> bytes:
        with open(self.name(row), "rb") as file:
            return file.read(at_most)

    def open(self, row: int, max_pixels: int) -> AbstractContextManager[Opened]:
        return open_image(self.name(row), max_pixels)
