"""Telling image sets apart by their content, without reading all of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from relssl.data.paths import Paths
from relssl.data.sources import Images

# Files whose beginnings count, and how much of each.
_SAMPLE = 64
_BEGINNING = 1 << 20


def identity(images: Images) -> str:
    """16 hex digits of a set for caches: its fingerprint, and the beginnings of a sample of its files.

    Uncompressed images of two sets may agree in names and sizes, which are all that the fingerprint of files looks at.
    """
    digest = hashlib.sha256(images.fingerprint().encode())
    if images.files is not None:
        for row in spread(0, len(images), _SAMPLE):
            digest.update(_beginning(images.files[row]))
    return digest.hexdigest()[:16]


def spread(start: int, stop: int, count: int) -> list[int]:
    """At most `count` of the positions from `start` to `stop`, evenly spread."""
    return [int(row) for row in np.linspace(start, stop - 1, min(count, stop - start)).astype(np.int64)]


def shared(bank: Images, test: Images) -> int:
    """How many of the test images are in the bank too: the same pixels; of files, the same name, size and beginning."""
    if bank.pixels is not None and test.pixels is not None:
        known = set(_pixel_hashes(bank.pixels))
        return sum(mark in known for mark in _pixel_hashes(test.pixels))
    if bank.files is None or test.files is None:
        return 0
    # The larger side is gone through without being held.
    asked: dict[bytes, list[int]] = {}
    for row, mark in enumerate(_file_marks(test.files)):
        asked.setdefault(mark, []).append(row)
    found = set()
    for row, mark in enumerate(_file_marks(bank.files)):
        for other in asked.get(mark, ()):
            if other not in found and _beginning(bank.files[row]) == _beginning(test.files[other]):
                found.add(other)
    return len(found)


def _pixel_hashes(pixels: Tensor) -> Iterator[bytes]:
    return (hashlib.blake2b(image.data, digest_size=12).digest() for image in pixels.numpy())


def _file_marks(files: Sequence[str]) -> Iterator[bytes]:
    """Base name and size of each file."""
    held = files if isinstance(files, Paths) else Paths.of(files)
    for name, size in zip(held.names(), held.sizes.tolist(), strict=True):
        yield name.rpartition(b"/")[2] + b"/%d" % size


def _beginning(file: str) -> bytes:
    try:
        with open(file, "rb") as opened:
            return hashlib.sha256(opened.read(_BEGINNING)).digest()
    except OSError:
        return b"unreadable " + os.fsencode(file)
