"""Images that were decoded and shrunk beforehand: raw pixels in one file, and a table of what lies where in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from relssl.data.decode import BadImage
from relssl.data.folder import read_arrays, write_arrays

LAYOUT = "shrunk 1"
PIXELS, TABLE = "pixels", "table"


class Shrunk:
    """The first n images of a set, or all, in the set's order.

    The pixels are mapped into memory when the first image is asked for: all processes of a machine share what of it lies in
    the system's page cache, and a copy sent to another process maps the file anew.

    Args:
        folder: where the two files lie.
        sizes: int32 [n, 2], height and width of each image; 0, 0 if it cannot be read.
        bad: {position: reason} of those.

    Attributes:
        total: bytes of all pixels.
    """

    def __init__(self, folder: Path, sizes: np.ndarray, bad: dict[int, str]) -> None:
        self.folder, self.sizes, self.bad = folder, sizes, bad
        self._ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(3 * sizes.astype(np.int64).prod(1))])
        self._pixels: np.ndarray | None = None

    @classmethod
    def open(cls, folder: Path) -> Shrunk:
        """What the table of a folder says; no image if there is no table, it is damaged, or pixels are missing."""
        found = read_arrays(folder / TABLE, LAYOUT)
        if found is not None:
            facts, arrays = found
            made = cls(folder, arrays["sizes"], {int(position): reason for position, reason in facts["bad"].items()})
            path = folder / PIXELS
            if path.is_file() and path.stat().st_size >= made.total:
                return made
        return cls(folder, np.zeros((0, 2), np.int32), {})

    def save(self) -> None:
        """Write the table, whose pixels must be safe on the disk.

        Raises:
            StorageError: if it cannot be written; an older one is still there then.
        """
        write_arrays(self.folder / TABLE, LAYOUT, {"bad": self.bad}, {"sizes": self.sizes})

    @property
    def total(self) -> int:
        return int(self._ends[-1])

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, position: int) -> Image.Image:
        """The RGB image at a position.

        Raises:
            BadImage: with the reason that its file could not be read for.
        """
        if position in self.bad:
            raise BadImage(self.bad[position])
        if self._pixels is None:
            self._pixels = np.memmap(self.folder / PIXELS, np.uint8, "r", shape=(self.total,))
        start, end = self._ends[position : position + 2]
        return Image.fromarray(self._pixels[start:end].reshape(*self.sizes[position], 3))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pixels": None}
