"""Many file paths, held small."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import overload

import numpy as np


class Paths(Sequence[str]):
    """The paths of N files below one folder, with their sizes.

    They are held in one block of bytes, not as N strings: loader workers share it with their parent, where counting the
    references of a million strings would copy them into each worker. Names that are no text keep their bytes
    (`surrogateescape`), so every file can be opened again.

    Args:
        folder: what the names are relative to.
        names: path of each file below `folder`, or absolute.
        sizes: bytes of each file.
    """

    def __init__(self, folder: str, names: Sequence[bytes], sizes: Sequence[int]) -> None:
        self.folder = os.fsencode(folder)
        self.sizes = np.array(sizes, np.int64)
        self._block = b"".join(names)
        self._ends = np.cumsum([0, *map(len, names)], dtype=np.int64)

    @classmethod
    def from_arrays(cls, folder: str, arrays: Mapping[str, np.ndarray]) -> Paths:
        """The paths that `to_arrays` gave, below any folder."""
        made = cls(folder, [], [])
        made.sizes, made._ends, made._block = arrays["sizes"], arrays["ends"], arrays["names"].tobytes()
        return made

    @classmethod
    def of(cls, files: Sequence[str]) -> Paths:
        """Files anywhere, whose sizes are looked up; OSError if one is gone."""
        return cls("", [os.fsencode(file) for file in files], [os.stat(file).st_size for file in files])

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All but the folder: the "names" joined, uint8, where they end, "ends" int64 [N+1], and "sizes" int64 [N]."""
        return {"names": np.frombuffer(self._block, np.uint8), "ends": self._ends, "sizes": self.sizes}

    def __len__(self) -> int:
        return len(self.sizes)

    def names(self) -> Iterator[bytes]:
        """The names of all files, relative to the folder."""
        return (self._block[start:end] for start, end in itertools.pairwise(self._ends.tolist()))

    def name(self, index: int) -> bytes:
        """The name of one file, relative to the folder."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self._block[self._ends[index] : self._ends[index + 1]]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Paths: ...
    def __getitem__(self, index: int | slice) -> str | Paths:
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        return os.fsdecode(os.path.join(self.folder, self.name(index)))

    def take(self, indices: Sequence[int] | np.ndarray) -> Paths:
        """The files at these positions, in this order."""
        rows = [int(index) for index in indices]
        return Paths(os.fsdecode(self.folder), [self.name(row) for row in rows], [int(self.sizes[row]) for row in rows])

    def fingerprint(self) -> str:
        """16 hex digits that change with the count, order, names or sizes of the files, but not with where the folder lies."""
        digest = hashlib.sha256(f"files {len(self)} ".encode())
        for part in (self._ends.astype("<i8").tobytes(), self._block, self.sizes.astype("<i8").tobytes()):
            digest.update(part)
        return digest.hexdigest()[:16]


def shown(path: str) -> str:
    """A path for a message: as it is if that is one line of plain text, else with escapes."""
    return path if path.isprintable() else ascii(path)
