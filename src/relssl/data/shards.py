"""Shards: images inside tar files in WebDataset's layout, each read where it lies, by an index that is made once.

A sample's members share the path up to the first dot of the base name: `a/7.jpg`, `a/7.cls` and `a/7.seg.png`. An image is a member whose
whole ending is that of one, its label the text of `.cls`, or `label` in `.json`.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import BinaryIO

import numpy as np

from relssl.data.decode import BadImage, Opened, open_image, open_regular
from relssl.data.folder import EXTENSIONS, TEST, TRAIN, cache_root, shown
from relssl.data.images import BEGINNING, Images
from relssl.data.names import Names, Words, table
from relssl.errors import DataError, StorageError
from relssl.files import locked, read_arrays, replacing

_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}  # how a file of each begins
_LABEL_BYTES = 1 << 16  # of a member that may hold a label
_OPEN = 128  # shards that a process keeps open


@dataclass(frozen=True, eq=False)
class Shards:
    """N images inside uncompressed tar files."""

    paths: tuple[str, ...]  # of the tar files
    versions: np.ndarray  # int64 [shards,2], size in bytes and time of change in ns of each
    names: Names  # of the members
    shards: np.ndarray  # int64 [N], the position of each image's tar file,
    offsets: np.ndarray  # where in it the image begins,
    sizes: np.ndarray  # and its size in bytes

    def __len__(self) -> int:
        return len(self.names)

    @property
    def times(self) -> np.ndarray:
        """When each shard was changed, in ns."""
        return self.versions[:, 1]

    def take(self, rows: np.ndarray) -> Shards:
        places = (self.shards[rows], self.offsets[rows], self.sizes[rows])
        return Shards(self.paths, self.versions, self.names.take(rows), *places)

    def fingerprint(self) -> str:
        """Compute 16 hex digits of the members' names, order and sizes, and how they are shared out; the shards' names do not count."""
        return self.names.digest("shards", self.sizes, self.shards)

    def name(self, row: int) -> str:
        return f"{self.paths[self.shards[row]]}/{os.fsdecode(self.names[row])}"

    def beginning(self, row: int) -> bytes:
        with contextlib.suppress(BadImage, OSError):
            return self._read(row, BEGINNING)
        return b"unreadable " + os.fsencode(self.name(row))

    def open(self, row: int, max_pixels: int) -> AbstractContextManager[Opened]:
        return open_image(partial(self._read, row), max_pixels)

    def _read(self, row: int, at_most: int | None = None) -> bytes:
        shard, size = self.shards[row], int(self.sizes[row])
        handle = _open(self.paths[shard], *self.versions[shard].tolist())
        count = min(size, at_most or size)
        data = os.pread(handle.descriptor, count, int(self.offsets[row]))
        if not data or len(data) < count:
            raise BadImage("is cut off, or empty")
        return data


class _Handle:
    """An open file; a process that was forked from this one may read it too, at any place."""

    def __init__(self, path: str, *version: int) -> None:
        self.descriptor = open_regular(path, os.O_RDONLY | os.O_CLOEXEC)
        if _version(os.fstat(self.descriptor)) != version:
            raise BadImage("lies in a shard that has changed since the run began")

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


_open = lru_cache(_OPEN)(_Handle)


def _version(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def listed(pattern: str) -> list[str]:
    """Return the tar files that a pattern names: with * and ?, {0000..0012}, or a folder, which stands for all in it.

    Raises:
        DataError: if there are none, if one of a range is missing, or if the first is compressed.
    """
    pattern = os.path.expanduser(pattern)
    pattern = os.path.join(glob.escape(pattern), "*.tar") if os.path.isdir(pattern) else pattern
    paths = list[str]()
    for each in _ranges(pattern):
        if not (some := sorted(glob.glob(each, recursive=True))):
            raise DataError(
                f"{shown(each)}: no such shard; shards are named as shards:FOLDER, or shards:'FOLDER/part-{{000..127}}.tar'"
            )
        paths += some
    _check_form(paths[0])  # the others when they are indexed
    return paths


def _check_form(path: str) -> None:
    """Refuse a file that is compressed, empty or cannot be read: DataError."""
    try:
        with open(path, "rb", opener=open_regular) as file:
            begins = file.read(6)
    except (OSError, BadImage) as error:
        raise DataError(f"{shown(path)}: {getattr(error, 'strerror', None) or error}; needs an uncompressed tar file") from error
    if tool := next((tool for magic, tool in _COMPRESSED.items() if begins.startswith(magic)), None):
        raise DataError(
            f"{shown(path)}: is compressed, so no image in it can be read without all before it; unpack it with {tool}"
        )


def _ranges(pattern: str) -> Iterator[str]:
    """Yield a pattern for each combination of the numbers in {first..last}."""
    if not (match := re.search(r"\{(\d+)\.\.(\d+)\}", pattern)):
        yield pattern
        return
    for number in range(int(match[1]), int(match[2]) + 1):
        yield from _ranges(f"{pattern[: match.start()]}{number:0{len(match[1])}}{pattern[match.end() :]}")


def read_shards(pattern: str, split: str) -> Images:
    """Read the images of one split of shards.

    Shards that have train in their names or folders are trained on, those with val (or valid, validation, test) tested; else all are
    trained on. Classes are those of all shards.

    Raises:
        DataError: if a shard is missing, is no tar file, or there is no test part.
    """
    paths = listed(pattern)
    shards, numbers, words, notes = _indexed(paths)
    images = Images(f"shards:{shown(pattern)}", shards, *words.labels(numbers), notes=tuple(notes))
    root = os.path.commonpath([*map(os.path.dirname, paths)])
    parts = [set(re.split("[^a-z]+", path[len(root) :].lower())) for path in paths]
    side = next((word for word in TEST if any(word in each for each in parts)), None)
    if side is None or not any(each & {*TRAIN} for each in parts):
        if split == "test":
            raise DataError(f"{images.name}: has no test images; have train and val in the names of the shards")
        return images
    chosen = [side in each if split == "test" else not each & {*TEST} for each in parts]
    notes += (
        [f"{sum(chosen)} of {len(paths)} shards are trained on; those of {side} are the test part"] if split == "train" else []
    )
    return replace(images.subset(np.flatnonzero(np.array(chosen)[shards.shards])), notes=tuple(notes))


def _indexed(paths: list[str]) -> tuple[Shards, np.ndarray, Words, list[str]]:
    """Return the images of shards, the number of each one's word, the words, and what to know of the shards.

    The index lies in `cache_root()`, under a key of the shards' paths, sizes and times of change. One process makes it.
    """
    versions = np.array([_version(os.stat(path)) for path in paths], np.int64)
    key = hashlib.sha256("\n".join(["1", *map(os.path.abspath, paths)]).encode("utf-8", "surrogateescape") + versions.tobytes())
    notes, stored = list[str](), None
    try:
        file = cache_root() / "shards" / f"{key.hexdigest()[:24]}.npz"
        with locked(file.with_suffix(".lock")):
            if (stored := read_arrays(file)) is None:
                stored = _index(paths)
                with replacing(file) as opened:
                    np.savez(opened, **stored)  # type: ignore[arg-type]
    except (StorageError, OSError) as error:
        notes = [f"the index of the shards is not kept: {error}"]
    stored = stored or _index(paths)
    words = Words(stored["words"].tobytes().split(b"\n"))
    shards = Shards(
        tuple(paths), versions, Names(stored["block"], stored["ends"]), stored["shards"], stored["offsets"], stored["sizes"]
    )
    return shards, stored["numbers"], words, [*notes, *stored["notes"].tolist()]


def _index(paths: list[str]) -> dict[str, np.ndarray]:
    """Read the headers of all members."""
    words, left, notes = Words(), Counter[str](), list[str]()

    def rows() -> Iterator[tuple[bytes, int, int, int, int]]:
        for number, path in enumerate(paths):
            _check_form(path)
            images, labels = list[tuple[str, str, int, int]](), dict[str, bytes]()
            with open(path, "rb") as file:
                try:
                    for name, key, ending, offset, size in _members(file):
                        if ending.encode() in EXTENSIONS:
                            images.append((name, key, offset, size))
                        elif ending in ("cls", "json") and size <= _LABEL_BYTES:
                            labels[key] = _label(ending, os.pread(file.fileno(), size, offset)) or labels.get(key, b"")
                        elif ending.rpartition(".")[2].encode() in EXTENSIONS:
                            left[ending] += 1
                except tarfile.TarError as error:
                    if not images:
                        raise DataError(f"{shown(path)}: {error}; needs an uncompressed tar file") from error
                    notes.append(f"{shown(path)}: is cut off or damaged; the {len(images)} images that are whole are used")
            for name, key, offset, size in images:
                yield os.fsencode(name), number, offset, size, words.number(labels.get(key, b""))

    names, (shards, offsets, sizes, numbers) = table(rows(), 4)
    if left:
        notes.append(
            f"left out, as the ending of each has several parts: {', '.join(f'{n} .{kind}' for kind, n in left.most_common(3))}"
        )
    columns = {"block": names.block, "ends": names.ends, "shards": shards, "offsets": offsets, "sizes": sizes, "numbers": numbers}
    return columns | {"words": np.frombuffer(b"\n".join(words), np.uint8), "notes": np.array(notes, str)}


def _members(file: BinaryIO) -> Iterator[tuple[str, str, str, int, int]]:
    """Yield name, key, ending, place and size of the files in a tar file that are whole; TarError behind them if it is cut off."""
    length = os.fstat(file.fileno()).st_size
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None and member.offset_data + member.size <= length:
            tar.members = []  # type: ignore[attr-defined]  # which would grow with the tar file
            folder, slash, base = member.name.rpartition("/")
            word, _, ending = base.partition(".")
            if word and member.isreg() and not member.issparse():
                yield member.name, folder + slash + word, ending.lower(), member.offset_data, member.size
        if member is not None or os.pread(file.fileno(), 1, tar.offset) != b"\0":  # a whole one ends in zeros
            raise tarfile.ReadError("is cut off")


def _label(ending: str, content: bytes) -> bytes:
    """Return the word that `.cls` or `.json` give as the label; an empty one for none."""
    if ending == "json":
        with contextlib.suppress(ValueError):
            label = fields.get("label") if isinstance(fields := json.loads(content), dict) else None
            return str(label).encode("utf-8", "surrogateescape") if isinstance(label, int | str) else b""
        return b""
    return b" ".join(content.split())
