"""Some of a data set's images: the few that are labelled, a sample that identifies the set, those that are on both sides."""

import contextlib
import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from relssl.data.decode import BadImage
from relssl.data.draws import Slot, uniforms
from relssl.data.folder import shown
from relssl.data.images import Images, Source, Stored
from relssl.errors import DataError

Rows = npt.NDArray[np.int64]

_SAMPLE = 64  # images whose beginnings count
_MOST = 20_000  # images of a user's own making that are compared with each other


def stratified(labels: Rows, fraction: float, seed: int) -> Rows:
    """Draw the same share of the images of each class, without replacement: int64 positions, ascending.

    Each image has a random number that depends on the seed and its position alone, and a class gives those with the lowest. So
    of one seed a smaller subset lies in a larger one: the 1 % are among the 10 %.

    Args:
        labels: int64 [N]; images of label -1 are never drawn.
        fraction: above 0 and at most 1; of n images of a class n * fraction rounded are drawn, and at least one.
    """
    lots = uniforms(seed, 0, np.arange(len(labels)), Slot.SUBSET, 1)[:, 0]
    drawn = [np.empty(0, np.int64)]
    for word in np.unique(labels[labels >= 0]):
        rows = np.flatnonzero(labels == word)
        drawn.append(rows[np.argsort(lots[rows], kind="stable")[: max(1, round(len(rows) * fraction))]])
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
    base_names = {os.path.basename(line) for line in lines}
    paths: dict[str, list[tuple[int, str]]] = defaultdict(list)  # by base name
    for row in range(0 if images.in_memory else len(images)):
        if (base := os.path.basename(name := images.source.name(row))) in base_names:
            paths[base].append((row, f"/{name}"))
    chosen: set[int] = set()
    for line in lines:
        rows = [row for row, name in paths[os.path.basename(line)] if name.endswith(f"/{line}")]
        if line.isascii() and line.isdigit() and len(line) < 19:
            rows = [int(line)] if int(line) < len(images) else []
        if len(rows) != 1 or rows[0] in chosen:
            fault = "several" if len(rows) > 1 else "again one" if rows else "none"
            advice = "give positions, as images in memory have no names" if images.in_memory else "correct it"
            raise DataError(f"{shown(path)}: {shown(line)} names {fault} of the {len(images)} images of {images.name}; {advice}")
        chosen.add(rows[0])
    if not chosen:
        raise DataError(f"{shown(path)}: names no image; give one a line, by name or position")
    return np.array(sorted(chosen), np.int64)


def fingerprint(rows: Rows) -> str:
    """Compute 16 hex digits of the SHA-256 of positions, for protocol cards."""
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:16]


def identity(images: Images) -> str:
    """Compute 16 hex digits of a set for caches: of its fingerprint, when its files were changed, and the beginnings of a sample of them.

    Uncompressed images of two sets may agree in names and sizes, which are all that the fingerprint of files looks at.
    """
    digest = hashlib.sha256(images.fingerprint().encode())
    if isinstance(images.source, Stored):
        digest.update(images.source.times.astype("<i8").tobytes())
    digest.update(getattr(images.source, "marks", bytes)())
    for row in [] if images.in_memory else spread(0, len(images), _SAMPLE):
        digest.update(hashlib.sha256(images.source.beginning(row)).digest())
    return digest.hexdigest()[:16]


def check_variety(images: Images, max_pixels: int) -> None:
    """Check that a sample of the images shows more than one picture, or one colour; DataError if not."""
    pictures, readable = set[bytes](), 0
    for row in spread(0, len(images), 16):
        with contextlib.suppress(BadImage), images.source.open(row, max_pixels) as opened:
            pictures.add(opened.rgb(opened.reductions[-1]).resize((16, 16)).tobytes())
            readable += 1
    if readable > 1 and len(pictures) == 1:
        alike = f"{readable} images looked at all show the same"
        raise DataError(f"{images.name}: {alike}, so nothing can be learned; check the files")


def spread(start: int, stop: int, count: int) -> list[int]:
    """Return at most `count` of the positions from `start` to `stop`, evenly spread."""
    return [int(row) for row in np.linspace(start, stop - 1, min(count, stop - start)).astype(np.int64)]


def shared(bank: Images, test: Images) -> int | None:
    """Count the test images that are in the bank too: the same beginning as stored; of files and tables, the same name and size besides.

    None for over 20,000 images that a user's code makes, all of which would have to be made.
    """
    if len(bank) + len(test) > _MOST and not all(side.in_memory or isinstance(side.source, Stored) for side in (bank, test)):
        return None
    alike: dict[bytes, list[int]] = defaultdict(list)  # of the test images; the larger side is gone through without being held
    for row, mark in enumerate(_marks(test.source)):
        alike[mark].append(row)
    pairs = ((row, other) for row, mark in enumerate(_marks(bank.source)) for other in alike.get(mark, ()))
    return len({other for row, other in pairs if bank.source.beginning(row) == test.source.beginning(other)})


def _marks(source: Source) -> Iterator[bytes]:
    """Yield base name and size of each file, a hash of each other image's beginning."""
    if isinstance(source, Stored):
        return (os.path.basename(source.names[row]) + b"/%d" % size for row, size in enumerate(source.sizes.tolist()))
    return (hashlib.blake2b(source.beginning(row), digest_size=12).digest() for row in range(len(source)))
