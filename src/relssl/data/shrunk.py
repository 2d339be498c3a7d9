"""Images that were decoded and shrunk beforehand: raw pixels in one file, and a table of what lies where in it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from relssl.data.decode import BadImage, Decoded
from relssl.data.images import Files
from relssl.files import replacing, write_all

LAYOUT = "shrunk 1"
PIXELS, TABLE = "pixels", "table"
# Followed by the SHA-256 of the rest: 8 bytes of length, a header in JSON, then the arrays one after another.
_MAGIC = b"relssl arrays 1\n"


def write_arrays(path: Path, kind: str, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray], mode: int = 0o644) -> None:
    """Write arrays and JSON facts to `path`, over whatever lies there.

    Args:
        kind: what the file is and the version of its layout; only a reader that asks for the same gets it.
        mode: permissions of the file.

    Raises:
        StorageError: if it cannot be written; an older file is still there then.
    """
    packed = {name: np.ascontiguousarray(array, array.dtype.newbyteorder("<")) for name, array in arrays.items()}
    layout = {name: [array.dtype.str, list(array.shape)] for name, array in packed.items()}
    header = json.dumps({"kind": kind, "facts": facts, "arrays": layout}).encode("ascii")
    parts = [memoryview(len(header).to_bytes(8, "little") + header)]
    parts += [array.reshape(-1).view(np.uint8).data for array in packed.values()]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    with replacing(path, sum(map(len, parts)), mode) as file:
        for part in [memoryview(_MAGIC + digest.digest()), *parts]:
            write_all(file.fileno(), part)


def read_arrays(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """The facts and arrays of a file, read-only; None if there is none, it is damaged, or of another kind."""
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                return None
            digest, start = file.read(32), file.tell()
            if hashlib.file_digest(file, "sha256").digest() != digest:
                return None
            file.seek(start)
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            if header["kind"] != kind:
                return None
            arrays = {}
            for name, (kept, shape) in header["arrays"].items():
                dtype = np.dtype(kept)
                arrays[name] = np.frombuffer(file.read(dtype.itemsize * math.prod(shape)), dtype).reshape(shape)
            return header["facts"], arrays
    except OSError:
        return None


class Shrunk:
    """The first n images of a set, or all, in the set's order.

    The pixels are mapped into memory when the first image is asked for: all processes of a machine share what of it lies in
    the system's page cache, and a copy sent to another process maps the file anew.

    Args:
        folder: where the two files lie.
        files: those of the set, all of them.
        sizes: int32 [n, 2], height and width of each image; 0, 0 if it cannot be read.
        bad: {position: reason} of those.

    Attributes:
        total: bytes of all pixels.
    """

    def __init__(self, folder: Path, files: Files, sizes: np.ndarray, bad: dict[int, str]) -> None:
        self.folder, self.files, self.sizes, self.bad = folder, files, sizes, bad
        self._ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(3 * sizes.astype(np.int64).prod(1))])
        self._pixels: np.ndarray | None = None

    @classmethod
    def load(cls, folder: Path, files: Files) -> Shrunk:
        """What the table of a folder says; no image if there is no table, it is damaged, or pixels are missing."""
        found = read_arrays(folder / TABLE, LAYOUT)
        if found is not None:
            facts, arrays = found
            made = cls(folder, files, arrays["sizes"], {int(position): reason for position, reason in facts["bad"].items()})
            path = folder / PIXELS
            if path.is_file() and path.stat().st_size >= made.total:
                return made
        return cls(folder, files, np.zeros((0, 2), np.int32), {})

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

    def take(self, rows: np.ndarray) -> Files:
        """Return the files at these positions, int64 [M], not shrunk."""
        return self.files.take(rows)

    def fingerprint(self) -> str:
        """Return that of the files."""
        return self.files.fingerprint()

    def name(self, row: int) -> str:
        """Return the path of one file."""
        return self.files.name(row)

    def open(self, row: int, max_pixels: int) -> Decoded:
        """Return one RGB image; BadImage with the reason that its file could not be read for."""
        if row in self.bad:
            raise BadImage(self.bad[row])
        if self._pixels is None:
            self._pixels = np.memmap(self.folder / PIXELS, np.uint8, "r", shape=(self.total,))
        start, end = self._ends[row : row + 2]
        return Decoded(Image.fromarray(self._pixels[start:end].reshape(*self.sizes[row], 3)))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pixels": None}
