"""Some of a data set's images: the few that are labelled, a sample that identifies the set, those that are on both sides."""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from relssl.data.draws import Slot, uniforms
from relssl.data.folder import shown
from relssl.data.images import Files, Images, Pixels
from relssl.errors import DataError

Rows = npt.NDArray[np.int64]

_SAMPLE = 64  # files whose beginnings count,
_BEGINNING = 1 << 20  # and bytes of each


def stratified(labels: Rows, *, fraction: float | None = None, per_class: int | None = None, seed: int = 0) -> Rows:
    """Draw the same share, or number, of images of each class, without replacement: int64 positions, ascending.

    Each image has a random number that depends on the seed and its position alone, and a class gives those with the lowest. So
    of one seed a smaller subset lies in a larger one: the 1 % are among the 10 %.

    Args:
        labels: int64 [N]; images of label -1 are never drawn.
        fraction: above 0 and at most 1; of n images of a class n * fraction rounded are drawn, and at least one.
        per_class: at least 1; a class that has fewer gives all.
        seed: another gives an independent draw.

    Raises:
        ValueError: unless exactly one of `fraction` and `per_class` is given, and in its range.
    """
    if (fraction is None) == (per_class is None) or not (0 < (fraction or 0) <= 1 or (per_class or 0) >= 1):
        raise ValueError(f"give a fraction above 0 and at most 1, or per_class at least 1, got {fraction} and {per_class}")
    lots = uniforms(seed, 0, np.arange(len(labels)), Slot.SUBSET, 1)[:, 0]
    drawn = [np.empty(0, np.int64)]
    for word in np.unique(labels[labels >= 0]):
        rows = np.flatnonzero(labels == word)
        count = per_class if fraction is None else max(1, round(len(rows) * fraction))
        drawn.append(rows[np.argsort(lots[rows], kind="stable")[:count]])
    return np.sort(np.concatenate(drawn))


def from_index(path: str, images: Images) -> Rows:
    """Return the images that a file names, a line each, by position, counted from 0, or by name: int64 positions, ascending.

    A name is a file's path, or the end of it from a folder's or the file's own name on, such as `n01440764_10043.JPEG` in the
    1 % and 10 % lists of ImageNet that came with SimCLR, or `n01440764/n01440764_10043.JPEG`. A line of digits alone is a
    position; images in memory have no names. Empty lines are skipped.

    Raises:
        DataError: if the file cannot be read or is empty; if lines name no image, several, or one that another line has named.
    """
    try:
        text = Path(path).read_text("utf-8", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read ({error.strerror}); give a text file with one image a line") from error
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise DataError(f"{shown(path)}: names no image; give one a line, by name or position")
    rows: dict[str, list[int]] = {line: [] for line in lines}
    by_base: dict[str, list[str]] = defaultdict(list)
    for line in rows:
        if not (line.isascii() and line.isdigit() and len(line) < 19):
            by_base[posixpath.basename(line)].append(line)
        elif int(line) < len(images):
            rows[line].append(int(line))
    for row in range(0 if images.in_memory or not by_base else len(images)):
        name = images.source.name(row)
        for line in by_base.get(posixpath.basename(name), ()):
            if f"/{name}".endswith(f"/{line}"):
                rows[line].append(row)
    chosen: set[int] = set()
    for line in lines:
        if len(rows[line]) != 1 or rows[line][0] in chosen:
            fault = ("none", "again one")[len(rows[line])] if len(rows[line]) < 2 else "several"
            kind = "images (in memory, so they have positions alone)" if images.in_memory else "images"
            raise DataError(
                f"{shown(path)}: {shown(line)} names {fault} of the {len(images)} {kind} of {images.name}; correct it"
            )
        chosen.add(rows[line][0])
    return np.array(sorted(chosen), np.int64)


def fingerprint(rows: Rows) -> str:
    """Compute 16 hex digits of the SHA-256 of positions, for protocol cards."""
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:16]


def identity(images: Images) -> str:
    """Compute 16 hex digits of a set for caches: of its fingerprint, and of the beginnings of a sample of its files.

    Uncompressed images of two sets may agree in names and sizes, which are all that the fingerprint of files looks at.
    """
    digest = hashlib.sha256(images.fingerprint().encode())
    for row in [] if images.in_memory else spread(0, len(images), _SAMPLE):
        digest.update(_beginning(images.source.name(row)))
    return digest.hexdigest()[:16]


def spread(start: int, stop: int, count: int) -> list[int]:
    """Return at most `count` of the positions from `start` to `stop`, evenly spread."""
    return [int(row) for row in np.linspace(start, stop - 1, min(count, stop - start)).astype(np.int64)]


def shared(bank: Images, test: Images) -> int:
    """Count the test images that are in the bank too: the same pixels; of files, the same name, size and beginning."""
    if isinstance(bank.source, Pixels) and isinstance(test.source, Pixels):
        known = set(_pixel_marks(bank.source))
        return sum(mark in known for mark in _pixel_marks(test.source))
    if not (isinstance(bank.source, Files) and isinstance(test.source, Files)):
        return 0
    by_mark: dict[bytes, list[int]] = defaultdict(list)
    for row, mark in enumerate(_file_marks(test.source)):
        by_mark[mark].append(row)
    common: set[int] = set()
    for row, mark in enumerate(_file_marks(bank.source)):  # the larger side is gone through without being held
        for other in set(by_mark.get(mark, ())) - common:
            if _beginning(bank.source.name(row)) == _beginning(test.source.name(other)):
                common.add(other)
    return len(common)


def _pixel_marks(pixels: Pixels) -> Iterator[bytes]:
    return (hashlib.blake2b(image.data, digest_size=12).digest() for image in pixels.tensor.numpy())


def _file_marks(files: Files) -> Iterator[bytes]:
    """Base name and size of each file."""
    return (name.rpartition(b"/")[2] + b"/%d" % size for name, size in zip(files.names(), files.sizes.tolist(), strict=True))


def _beginning(file: str) -> bytes:
    try:
        with open(file, "rb") as opened:
            return hashlib.sha256(opened.read(_BEGINNING)).digest()
    except OSError:
        return b"unreadable " + os.fsencode(file)
