"""Making `Shrunk`: every image of a set decoded once, in worker processes, and made no larger than a run needs it.

The pixels are appended to one file; the table names those that are safe on the disk. So a build that was killed goes on
where the table ends, and is complete when it names every image.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
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

from relssl.data.decode import BadImage, Opened
from relssl.data.folder import cache_root, shown
from relssl.data.images import Files, Images
from relssl.data.loader import read_batches, worker_count
from relssl.data.shrunk import LAYOUT, PIXELS, Shrunk
from relssl.data.subsets import identity, spread
from relssl.errors import DataError, StorageError
from relssl.files import size, storing, sweep, write_all
from relssl.settings.run import Config, LoaderConfig

# Images a worker sends at once: a few MB, for shared memory is small in containers.
_BATCH = 8
# Seconds between tables: what a kill costs.
_SAVE_EVERY = 30.0
# Images by which the size of a cache is estimated.
_SAMPLE = 64

Outcome = np.ndarray | BadImage  # pixels uint8 [H, W, 3], or why there are none


class Teller(Protocol):
    """Who tells the user how it goes."""

    def say(self, line: str) -> None:
        """One line."""

    def chore(self, what: str, done: int, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Around a long work: what is called inside with how many are done now."""


def shrunken(images: Images, config: Config, teller: Teller) -> Shrunk:
    """The images with shorter sides of at most `loader.cache` pixels, found where an earlier run left them, else made.

    Processes that want the same at once agree: one makes it, the others wait.

    Raises:
        StorageError: if the disk has no room, or cannot be written.
        DataError: if a worker process dies, or a file cannot be read for a reason that may pass; the next call goes on there.
    """
    assert isinstance(images.source, Files) and config.loader.cache is not None
    folder, files = place(images, config), images.source
    found = Shrunk.load(folder, files)
    if len(found) < len(images):
        with _placed(), _locked(folder, teller):
            found = Shrunk.load(folder, files)  # another process may have made it meanwhile
            if len(found) < len(images):
                sweep(folder)
                found = _make(config, found, teller)
    teller.say(
        f"cache: {len(images)} images in {size(found.total)}, {shown(str(folder))}; shorter sides are "
        f"{config.loader.cache} pixels at most"
    )
    return found


def place(images: Images, config: Config) -> Path:
    """The folder of a cache; another one for other images, another side or what else decides about the pixels."""
    loader = config.loader
    key = f"{LAYOUT} {identity(images)} {loader.cache} {loader.max_pixels} {loader.reduced_decode}"
    return root(config) / f"shrunk-{loader.cache}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def root(config: Config) -> Path:
    """The folder that caches lie in."""
    chosen = config.loader.cache_folder
    return Path(chosen).expanduser() if chosen else cache_root() / "shrunk"


def shrink(image: Image.Image, side: int) -> Image.Image:
    """An image whose shorter side is `side` pixels, its shape kept; itself if it is no larger."""
    shorter = min(image.size)
    if shorter <= side:
        return image
    width, height = (round(length * side / shorter) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


class _Small(Dataset[Outcome]):
    """Each image shrunk, or why it cannot be read."""

    def __init__(self, files: Files, loader: LoaderConfig) -> None:
        assert loader.cache is not None
        self.files, self.loader, self.side = files, loader, loader.cache

    def __getitem__(self, row: int) -> Outcome:
        try:
            with Opened(self.files.name(row), self.loader.max_pixels) as opened:
                return np.asarray(shrink(opened.rgb(self._reduction(opened)), self.side))
        except BadImage as fault:
            return fault if fault.lasting else BadImage(f"{shown(self.files.name(row))}: {fault}", lasting=False)

    def _reduction(self, opened: Opened) -> int:
        """By how much to reduce while decoding: the filter still gets twice the side, as in Pillow's own thumbnails."""
        wanted = opened.reductions if self.loader.reduced_decode else ()
        return max((each for each in wanted if min(opened.size) >= 2 * self.side * each), default=1)


def _join(outcomes: list[Outcome]) -> tuple[torch.Tensor, list[tuple[int, int]], list[BadImage | None]]:
    """All pixels, uint8 in one row, the height and width of each image, and the reasons."""
    pixels = [outcome.reshape(-1) for outcome in outcomes if isinstance(outcome, np.ndarray)]
    sizes = [outcome.shape[:2] if isinstance(outcome, np.ndarray) else (0, 0) for outcome in outcomes]
    reasons = [outcome if isinstance(outcome, BadImage) else None for outcome in outcomes]
    return torch.from_numpy(np.concatenate([np.zeros(0, np.uint8), *pixels])), sizes, reasons


@contextlib.contextmanager
def _placed() -> Iterator[None]:
    """Add the setting that decides about the place to what a StorageError advises."""
    try:
        yield
    except StorageError as error:
        raise StorageError(f"{error}, or set loader.cache_folder to another place") from error


@contextlib.contextmanager
def _locked(folder: Path, teller: Teller) -> Iterator[None]:
    """Only one process writes; the lock goes with it, however it ends. Where the file system has no locks, users must see to it."""
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    with lock:
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                teller.say(f"cache: waiting for the process that makes {shown(str(folder))}")
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            teller.say(f"cache: {shown(str(folder))} cannot be locked; let no other run make it at the same time")
        yield


def _make(config: Config, found: Shrunk, teller: Teller) -> Shrunk:
    """Append what is missing."""
    loader, count = config.loader, len(found.files)
    small, start = _Small(found.files, loader), len(found)
    needed = _require_room(small, found, count)
    workers = worker_count(loader.workers, config.engine.devices) * config.engine.devices  # those of all ranks, which wait
    batches = read_batches(small, _join, workers, batch_size=_BATCH, sampler=range(start, count))
    what = f"shrinking to {loader.cache} pixels, about {size(needed)}"
    with teller.chore(what, start, count) as advance:
        made = _append(found, batches, needed, advance)
    if len(made) < count or (made.folder / PIXELS).stat().st_size != made.total:
        raise StorageError(f"{made.folder}: is not what was written to it; remove it and check the disk")
    return made


def _require_room(small: _Small, found: Shrunk, count: int) -> int:
    """The bytes still to be written, by a sample; StorageError if there are fewer on the disk."""
    rows = spread(len(found), count, _SAMPLE)
    sampled = sum(made.size for made in (small[row] for row in rows) if isinstance(made, np.ndarray))
    needed = sampled * (count - len(found)) // len(rows)
    with storing(found.folder):
        leftover = found.folder / PIXELS
        free = shutil.disk_usage(found.folder).free
        free += max(0, leftover.stat().st_size - found.total) if leftover.exists() else 0
    if needed > free:
        raise StorageError(
            f"{found.folder}: the cache needs about {size(needed)}, {size(free)} are free; free some space, or lower loader.cache"
        )
    return needed


def _append(found: Shrunk, batches: Iterator[Any], needed: int, advance: Callable[[int], None]) -> Shrunk:
    """Write pixels as they come, behind those that the table names; and the table now and then, and at the end."""
    path, sizes, bad = found.folder / PIXELS, found.sizes.tolist(), dict(found.bad)
    with storing(path):
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)

    def save() -> Shrunk:
        with storing(path, needed):
            os.fsync(file)
        made = Shrunk(found.folder, found.files, np.array(sizes, np.int32).reshape(-1, 2), bad)
        made.save()
        return made

    try:
        with storing(path):
            os.ftruncate(file, found.total)
            os.lseek(file, found.total, os.SEEK_SET)
        saved = time.monotonic()
        for pixels, shapes, reasons in batches:
            passing = next((reason for reason in reasons if reason is not None and not reason.lasting), None)
            if passing is not None:
                save()
                raise DataError(f"{passing}; that may pass, so nothing is noted and the next start goes on here; else remove it")
            with storing(path, needed):
                write_all(file, pixels.numpy().data)
            bad |= {len(sizes) + place: str(reason) for place, reason in enumerate(reasons) if reason is not None}
            sizes += shapes
            advance(len(sizes))
            if time.monotonic() - saved >= _SAVE_EVERY:
                save()
                saved = time.monotonic()
        return save()
    finally:
        os.close(file)
