"""A cache of shrunk images: each decoded once, in worker processes, made no larger than a run needs, and kept as raw pixels.

Pixels are appended to one file, and a table names those that are safe on the disk. So a build that was killed goes on where the
table ends, and a cache is complete when its table names every image.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from relssl.data.decode import BadImage, Decoded, Opened
from relssl.data.folder import cache_root, shown
from relssl.data.images import Files, Images
from relssl.data.loader import read_batches, worker_count
from relssl.data.subsets import identity, spread
from relssl.errors import DataError, StorageError
from relssl.files import replacing, size, storing, sweep, write_all
from relssl.settings.run import LoaderConfig

LAYOUT = "shrunk 1"
PIXELS, TABLE = "pixels", "table"
# What a table begins with, before the SHA-256 of the rest: 8 bytes of length, a header in JSON, then the sizes.
_MAGIC = b"relssl arrays 1\n"
_BATCH = 8  # images a worker sends at once: a few MB, for shared memory is small in containers
_SAVE_EVERY = 30.0  # seconds between tables: what a kill costs
_SAMPLE = 64  # images by which the size of a cache is estimated


class Shrunk:
    """The first n images of a set of files, or all, shrunk; a source of `Images`.

    The pixels are mapped into memory when the first image is read: all processes of a machine share what of it lies in the
    system's page cache, and a copy sent to another process maps the file anew.

    Attributes:
        folder: where the two files of the cache lie.
        files: all files of the set.
        sizes: int32 [n,2], height and width of each image; 0, 0 if it cannot be read.
        bad: {position: reason} of those.
        total: bytes of all pixels.
    """

    def __init__(self, folder: Path, files: Files, sizes: np.ndarray, bad: dict[int, str]) -> None:
        self.folder, self.files, self.sizes, self.bad = folder, files, sizes, bad
        self._ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(3 * sizes.astype(np.int64).prod(1))])
        self.total = int(self._ends[-1])
        self._pixels: np.ndarray | None = None

    @classmethod
    def load(cls, folder: Path, files: Files) -> Shrunk:
        """Return what the table of a folder names: no image if there is no table, it is damaged, or pixels are missing."""
        with contextlib.suppress(OSError):
            table, start = (folder / TABLE).read_bytes(), len(_MAGIC) + 32
            if table.startswith(_MAGIC) and hashlib.sha256(table[start:]).digest() == table[len(_MAGIC) : start]:
                end = start + 8 + int.from_bytes(table[start : start + 8], "little")
                header = json.loads(table[start + 8 : end])
                sizes = np.frombuffer(table[end:], "<i4").reshape(-1, 2)
                shrunk = cls(folder, files, sizes, {int(row): reason for row, reason in header["facts"]["bad"].items()})
                if header["kind"] == LAYOUT and (folder / PIXELS).stat().st_size >= shrunk.total:
                    return shrunk
        return cls(folder, files, np.zeros((0, 2), np.int32), {})

    def save(self) -> None:
        """Write the table, whose pixels must be safe on the disk; StorageError if it cannot be, and an older one is kept then."""
        layout = {"sizes": ["<i4", list(self.sizes.shape)]}
        header = json.dumps({"kind": LAYOUT, "facts": {"bad": self.bad}, "arrays": layout}).encode("ascii")
        body = len(header).to_bytes(8, "little") + header + self.sizes.astype("<i4").tobytes()
        with replacing(self.folder / TABLE, len(body)) as file:
            file.write(_MAGIC + hashlib.sha256(body).digest() + body)

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
        """Return one RGB image; BadImage with the reason for which its file could not be read."""
        if row in self.bad:
            raise BadImage(self.bad[row])
        if self._pixels is None:
            self._pixels = np.memmap(self.folder / PIXELS, np.uint8, "r", shape=(self.total,))
        start, end = self._ends[row : row + 2]
        return Decoded(Image.fromarray(self._pixels[start:end].reshape(*self.sizes[row], 3)))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pixels": None}


class Progress(Protocol):
    """Where a long piece of work is reported."""

    def say(self, line: str) -> None:
        """Show one line."""

    def chore(self, what: str, done: int, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Surround the work; what it yields is called with how many items are done."""


def shrunken(images: Images, settings: LoaderConfig, progress: Progress, processes: int = 1) -> Shrunk:
    """Return the images with shorter sides of at most `loader.cache` pixels, from an earlier run's cache or made now.

    Processes that want the same at once agree: one makes it, the others wait. The workers of all training `processes` of this
    machine help.

    Raises:
        StorageError: if the disk has no room, or cannot be written.
        DataError: if a worker process dies, or a file cannot be read for a reason that may pass; the next call goes on there.
    """
    assert isinstance(images.source, Files) and settings.cache is not None
    folder, files = place(images, settings), images.source
    shrunk = Shrunk.load(folder, files)
    if len(shrunk) < len(images):
        try:
            with _locked(folder, progress):
                shrunk = Shrunk.load(folder, files)  # another process may have made it meanwhile
                if len(shrunk) < len(images):
                    sweep(folder)
                    shrunk = _extend(shrunk, settings, progress, processes)
        except StorageError as error:
            raise StorageError(f"{error}, or set loader.cache_folder to another place") from error
    progress.say(
        f"cache: {len(images)} images in {size(shrunk.total)}, {shown(str(folder))}; shorter sides are "
        f"{settings.cache} pixels at most"
    )
    return shrunk


def place(images: Images, settings: LoaderConfig) -> Path:
    """Return the folder of a cache: another one for other images, another side or what else decides about the pixels."""
    key = f"{LAYOUT} {identity(images)} {settings.cache} {settings.max_pixels} {settings.reduced_decode}"
    return root(settings) / f"shrunk-{settings.cache}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def root(settings: LoaderConfig) -> Path:
    """Return the folder that caches lie in."""
    return Path(settings.cache_folder).expanduser() if settings.cache_folder else cache_root() / "shrunk"


class _Small(Dataset[np.ndarray | BadImage]):
    """Each image shrunk, uint8 [H,W,3], or the reason why it cannot be read."""

    def __init__(self, files: Files, settings: LoaderConfig) -> None:
        self.files, self.settings, self.side = files, settings, settings.cache or 0

    def __getitem__(self, row: int) -> np.ndarray | BadImage:
        try:
            with Opened(self.files.name(row), self.settings.max_pixels) as opened:
                # The filter still gets twice the side, as in Pillow's own thumbnails.
                reductions = opened.reductions if self.settings.reduced_decode else ()
                reduction = max((each for each in reductions if min(opened.size) >= 2 * self.side * each), default=1)
                return np.asarray(shrink(opened.rgb(reduction), self.side))
        except BadImage as fault:
            return fault if fault.lasting else BadImage(f"{shown(self.files.name(row))}: {fault}", lasting=False)


def shrink(image: Image.Image, side: int) -> Image.Image:
    """Scale an image to a shorter side of `side` pixels, its shape kept; return it as it is if it is no larger."""
    shorter = min(image.size)
    if shorter <= side:
        return image
    width, height = (round(length * side / shorter) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _join(images: list[np.ndarray | BadImage]) -> tuple[torch.Tensor, list[tuple[int, ...]], list[BadImage | None]]:
    """Join all pixels, uint8 in one row, with the height and width of each image, and the reasons."""
    pixels = [image.reshape(-1) for image in images if isinstance(image, np.ndarray)]
    sizes = [image.shape[:2] if isinstance(image, np.ndarray) else (0, 0) for image in images]
    reasons = [image if isinstance(image, BadImage) else None for image in images]
    return torch.from_numpy(np.concatenate([np.zeros(0, np.uint8), *pixels])), sizes, reasons


@contextlib.contextmanager
def _locked(folder: Path, progress: Progress) -> Iterator[None]:
    """Only one process writes; the lock goes with it, however it ends. Where the file system has no locks, users must see to it."""
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.say(f"cache: waiting for the process that makes {shown(str(folder))}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            progress.say(f"cache: {shown(str(folder))} cannot be locked; let no other run make it at the same time")
        yield


def _extend(shrunk: Shrunk, settings: LoaderConfig, progress: Progress, processes: int) -> Shrunk:
    """Append the missing images to the pixels that the table names, and save the table now and then, and at the end."""
    small, path, start, count = _Small(shrunk.files, settings), shrunk.folder / PIXELS, len(shrunk), len(shrunk.files)
    needed = _require_room(small, shrunk)
    workers = worker_count(settings.workers, processes) * processes
    batches = read_batches(small, _join, workers, batch_size=_BATCH, sampler=range(start, count))
    sizes, bad, saved = shrunk.sizes.tolist(), dict(shrunk.bad), time.monotonic()

    def save() -> Shrunk:
        with storing(path, needed):
            os.fsync(file)
        extended = Shrunk(shrunk.folder, shrunk.files, np.array(sizes, np.int32).reshape(-1, 2), bad)
        extended.save()
        return extended

    title = f"shrinking to {settings.cache} pixels, about {size(needed)}"
    with storing(path):
        file = path.open("ab")
        file.truncate(shrunk.total)
    with file, progress.chore(title, start, count) as advance:
        for pixels, shapes, reasons in batches:
            passing = next((reason for reason in reasons if reason is not None and not reason.lasting), None)
            if passing is not None:
                save()
                raise DataError(f"{passing}; that may pass, so nothing is noted and the next start goes on here; else remove it")
            with storing(path, needed):
                write_all(file.fileno(), pixels.numpy().data)
            bad |= {len(sizes) + number: str(reason) for number, reason in enumerate(reasons) if reason is not None}
            sizes += shapes
            advance(len(sizes))
            if time.monotonic() - saved >= _SAVE_EVERY:
                save()
                saved = time.monotonic()
        extended = save()
    if len(extended) < count or path.stat().st_size != extended.total:
        raise StorageError(f"{extended.folder}: is not what was written to it; remove it and check the disk")
    return extended


def _require_room(small: _Small, shrunk: Shrunk) -> int:
    """Estimate the bytes still to be written, by a sample; StorageError if there are fewer on the disk."""
    start, count = len(shrunk), len(shrunk.files)
    rows = spread(start, count, _SAMPLE)
    sampled = sum(image.size for image in map(small.__getitem__, rows) if isinstance(image, np.ndarray))
    needed = sampled * (count - start) // len(rows)
    with storing(shrunk.folder):
        leftover = shrunk.folder / PIXELS
        free = shutil.disk_usage(shrunk.folder).free + (leftover.stat().st_size - shrunk.total if leftover.exists() else 0)
    if needed > free:
        raise StorageError(
            f"{shrunk.folder}: the cache needs about {size(needed)}, {size(free)} are free; free some space, or lower loader.cache"
        )
    return needed
