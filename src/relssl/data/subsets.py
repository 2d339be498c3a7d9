"""Which few images of a data set are labelled: drawn class by class by a seed, or named by a file."""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from relssl.data.draws import Slot, uniforms
from relssl.data.folder import Files, shown
from relssl.data.images import Images, Pixels
from relssl.errors import DataError

Rows = npt.NDArray[np.int64]


def stratified(labels: Rows, *, fraction: float | None = None, per_class: int | None = None, seed: int = 0) -> Rows:
    """The same share, or number, of images of each class, without replacement.

    Each image has a random number that depends on the seed and its position alone, and a class gives those with the lowest. So
    of one seed a smaller subset lies in a larger one: the 1 % are among the 10 %.

    Args:
        labels: int64 [N]; images of label -1 are never drawn.
        fraction: above 0 and at most 1; of n images of a class n * fraction rounded are drawn, and at least one.
        per_class: at least 1; a class that has fewer gives all.
        seed: another gives an independent draw.

    Returns:
        int64 positions, ascending.

    Raises:
        ValueError: unless exactly one of `fraction` and `per_class` is given, and in its range.
    """
    if (fraction is None) == (per_class is None):
        raise ValueError("give either a fraction or a number per class")
    if (fraction is not None and not 0 < fraction <= 1) or (per_class is not None and per_class < 1):
        raise ValueError(f"fraction must be above 0 and at most 1, per_class at least 1, got {fraction} and {per_class}")
    lots = uniforms(seed, 0, np.arange(len(labels)), Slot.SUBSET, 1)[:, 0]
    drawn = []
    for word in np.unique(labels[labels >= 0]):
        rows = np.flatnonzero(labels == word)
        count = per_class if fraction is None else max(1, round(len(rows) * fraction))
        drawn.append(rows[np.argsort(lots[rows], kind="stable")[:count]])
    return np.sort(np.concatenate(drawn)) if drawn else np.empty(0, np.int64)


def from_index(path: str, images: Images) -> Rows:
    """The images that a file names, a line each: by position, counted from 0, or by name.

    A name is a file's path, or the end of it from a folder's or the file's own name on, such as `n01440764_10043.JPEG` in the
    1 % and 10 % lists of ImageNet that came with SimCLR, or `n01440764/n01440764_10043.JPEG`. A line of digits alone is a
    position; images in memory have no names. Empty lines are skipped.

    Returns:
        int64 positions, ascending.

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
    named = _named(
        [line for line in lines if not _is_position(line)],
        () if images.in_memory else [images.source.name(row) for row in range(len(images))],
    )
    found = {line: [int(line)] if _is_position(line) and int(line) < len(images) else named.get(line, []) for line in lines}
    _refuse(path, images, "names none", [line for line in lines if not found[line]])
    _refuse(path, images, "names several", [line for line in lines if len(found[line]) > 1])
    rows = np.array([found[line][0] for line in lines], np.int64)
    first = np.unique(rows, return_index=True)[1]
    _refuse(path, images, "names once more one", [lines[place] for place in np.setdiff1d(np.arange(len(rows)), first)])
    return np.sort(rows)


def fingerprint(rows: Rows) -> str:
    """16 hex digits of the SHA-256 of positions, for protocol cards."""
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:16]


def _is_position(line: str) -> bool:
    return line.isascii() and line.isdigit() and len(line) < 19


def _named(wanted: Iterable[str], files: Sequence[str]) -> dict[str, list[int]]:
    """The positions of the files that each name fits, in one pass over the files."""
    by_base = defaultdict(list)
    for name in dict.fromkeys(wanted):
        by_base[posixpath.basename(name)].append(name)
    found = defaultdict(list)
    for row, file in enumerate(files):
        for name in by_base.get(posixpath.basename(file), ()):
            if file == name or file.endswith(f"/{name}"):
                found[name].append(row)
    return found


def _refuse(path: str, images: Images, fault: str, lines: Sequence[str]) -> None:
    if lines:
        kind = "images" if not images.in_memory else "images (which are in memory and have positions alone)"
        raise DataError(
            f"{shown(path)}: {shown(lines[0])} {fault} of the {len(images)} {kind} of {images.name}; "
            f"{len(lines)} such line{'s' if len(lines) > 1 else ''}; correct the file"
        )


# Files whose beginnings count, and how much of each.
_SAMPLE = 64
_BEGINNING = 1 << 20


def identity(images: Images) -> str:
    """16 hex digits of a set for caches: its fingerprint, and the beginnings of a sample of its files.

    Uncompressed images of two sets may agree in names and sizes, which are all that the fingerprint of files looks at.
    """
    digest = hashlib.sha256(images.fingerprint().encode())
    if not images.in_memory:
        for row in spread(0, len(images), _SAMPLE):
            digest.update(_beginning(images.source.name(row)))
    return digest.hexdigest()[:16]


def spread(start: int, stop: int, count: int) -> list[int]:
    """At most `count` of the positions from `start` to `stop`, evenly spread."""
    return [int(row) for row in np.linspace(start, stop - 1, min(count, stop - start)).astype(np.int64)]


def shared(bank: Images, test: Images) -> int:
    """How many of the test images are in the bank too: the same pixels; of files, the same name, size and beginning."""
    if isinstance(bank.source, Pixels) and isinstance(test.source, Pixels):
        known = set(_pixel_hashes(bank.source.tensor))
        return sum(mark in known for mark in _pixel_hashes(test.source.tensor))
    if not isinstance(bank.source, Files) or not isinstance(test.source, Files):
        return 0
    # The larger side is gone through without being held.
    asked: dict[bytes, list[int]] = {}
    for row, mark in enumerate(_file_marks(test.source)):
        asked.setdefault(mark, []).append(row)
    found = set()
    for row, mark in enumerate(_file_marks(bank.source)):
        for other in asked.get(mark, ()):
            if other not in found and _beginning(bank.source.name(row)) == _beginning(test.source.name(other)):
                found.add(other)
    return len(found)


def _pixel_hashes(pixels: Tensor) -> Iterator[bytes]:
    return (hashlib.blake2b(image.data, digest_size=12).digest() for image in pixels.numpy())


def _file_marks(files: Files) -> Iterator[bytes]:
    """Base name and size of each file."""
    for name, size in zip(files.names(), files.sizes.tolist(), strict=True):
        yield name.rpartition(b"/")[2] + b"/%d" % size


def _beginning(file: str) -> bytes:
    try:
        with open(file, "rb") as opened:
            return hashlib.sha256(opened.read(_BEGINNING)).digest()
    except OSError:
        return b"unreadable " + os.fsencode(file)
