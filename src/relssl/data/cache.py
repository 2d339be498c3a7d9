"""A cache of shrunk images: each decoded once, in worker processes, made no larger than a run needs, and kept as raw pixels.

Pixels are appended to one file, and a table names those that are safe on the disk. So a build that was killed goes on where the
table ends, and a cache is complete when its table names every image.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler

from relssl.data.decode import BadImage, Opened
from relssl.data.folder import cache_root, shown
from relssl.data.images import Images, Source
from relssl.data.loader import lone_workers, read_batches
from relssl.data.subsets import identity, spread
from relssl.errors import DataError, StorageError
from relssl.files import locked, read_arrays, replacing, size, storing, sweep, write_all
from relssl.settings.run import LoaderConfig

PIXELS, TABLE = "pixels", "table.npz"
_BATCH = 8  # images a worker sends at once: a few MB, for shared memory is small in containers
_SAVE_EVERY = 30.0  # seconds between tables: what a kill costs
_SAMPLE = 64  # images by which the size of a cache is estimated


class Shrunk:
    """The first n images of a set of files, or all, shrunk; a source of `Images`, of which `take` returns files.

    The pixels are mapped into memory when the first image is read: all processes of a machine share what of it lies in the
    system's page cache, and a copy sent to another process maps the file anew. `sizes`, int32 [n,2], are height and width of each
    image, 0 if it cannot be read; `bad` is {position: reason} of those; `total` counts the bytes of all pixels.
    """

    def __init__(self, folder: Path, files: Source, sizes: np.ndarray, bad: dict[int, str]) -> None:
        self.folder, self.files, self.sizes, self.bad = folder, files, sizes, bad
        self.take, self.fingerprint, self.name, self.beginning = files.take, files.fingerprint, files.name, files.beginning
        self._ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(3 * sizes.astype(np.int64).prod(1))])
        self.total = int(self._ends[-1])
        self._pixels: np.ndarray | None = None

    @staticmethod
    def load(folder: Path, files: Source) -> Shrunk:
        """Return what the table of a folder names: no image if there is no table, it is damaged, or pixels are missing."""
        with suppress(OSError, ValueError, KeyError):
            if (table := read_arrays(folder / TABLE)) is not None:
                bad = dict(zip(table["rows"].tolist(), table["reasons"].tolist(), strict=True))
                if (folder / PIXELS).stat().st_size >= (shrunk := Shrunk(folder, files, table["sizes"], bad)).total:
                    return shrunk
        return Shrunk(folder, files, np.zeros((0, 2), np.int32), {})

    def save(self) -> None:
        """Write the table, whose pixels must be safe on the disk; StorageError if it cannot be, and an older one is kept then."""
        with replacing(self.folder / TABLE) as file:
            np.savez(file, sizes=self.sizes, rows=np.array([*self.bad], int), reasons=np.array([*self.bad.values()], str))

    def __len__(self) -> int:
        return len(self.sizes)

    def open(self, row: int, max_pixels: int) -> AbstractContextManager[Opened]:
        """Open one image; BadImage with the reason for which its file could not be read."""
        if row in self.bad:
            raise BadImage(self.bad[row])
        if self._pixels is None:
            self._pixels = np.memmap(self.folder / PIXELS, np.uint8, "r", shape=(self.total,))
        start, end = self._ends[row : row + 2]
        return nullcontext(Opened.of(Image.fromarray(self._pixels[start:end].reshape(*self.sizes[row], 3))))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pixels": None}


class Progress(Protocol):
    """Where a long piece of work is reported, such as `relssl.train.console.Display`."""

    def say(self, line: str) -> None: ...

    def chore(self, title: str, start: int, total: int) -> AbstractContextManager[Callable[[int], None]]: ...


def shrunken(images: Images, settings: LoaderConfig, progress: Progress, processes: int = 1) -> Shrunk:
    """Return the images with shorter sides of at most `loader.cache` pixels, from an earlier run's cache or made now.

    Processes that want the same at once agree: one makes it, the others wait. The workers of all training `processes` of this
    machine help.

    Raises:
        StorageError: if the disk has no room, or cannot be written.
        DataError: if a worker process dies, or a file cannot be read for a reason that may pass; the next call goes on there.
    """
    folder, files = place(images, settings), images.source
    shrunk, where = Shrunk.load(folder, files), shown(str(folder))
    if len(shrunk) < len(files):
        try:
            with locked(folder / ".lock", lambda: progress.say(f"cache: waiting for the process that makes {where}")) as alone:
                if not alone:
                    progress.say(f"cache: {where} cannot be locked; let no other run make it at the same time")
                shrunk = Shrunk.load(folder, files)  # another process may have made it meanwhile
                if len(shrunk) < len(files):
                    shrunk = _extend(shrunk, settings, progress, lone_workers(settings.workers, processes))
        except StorageError as error:
            raise StorageError(f"{error}, or set loader.cache_folder to another place") from error
    about = f"{len(files)} images in {size(shrunk.total)}, {where}"
    progress.say(f"cache: {about}; shorter sides are {settings.cache} pixels at most")
    return shrunk


def place(images: Images, settings: LoaderConfig) -> Path:
    """Return the folder of a cache: another one for other images, another side or what else decides about the pixels."""
    key = f"shrunk 1 {identity(images)} {settings.cache} {settings.max_pixels} {settings.reduced_decode}"
    root = Path(settings.cache_folder).expanduser() if settings.cache_folder else cache_root() / "shrunk"
    return root / f"shrunk-{settings.cache}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def _extend(shrunk: Shrunk, settings: LoaderConfig, progress: Progress, workers: int) -> Shrunk:
    """Append the missing images to the pixels that the table names, and save the table now and then, and however it ends."""
    folder, files, start, path = shrunk.folder, shrunk.files, len(shrunk), shrunk.folder / PIXELS
    sizes, bad, saved, shrink = shrunk.sizes.tolist(), dict(shrunk.bad), time.monotonic(), partial(_shrink, files, settings)
    sample = spread(start, len(files), _SAMPLE)
    needed = shrink(sample)[0].nbytes * (len(files) - start) // len(sample)
    batches = read_batches(shrink, BatchSampler(range(start, len(files)), _BATCH, drop_last=False), workers)
    sweep(folder)
    # Workers hold the lock too until they end, so they are not left to the garbage collector.
    with closing(batches), storing(path, needed), path.open("ab") as file:
        file.truncate(shrunk.total)
        if needed > (free := shutil.disk_usage(folder).free):
            needs = f"the cache needs about {size(needed)}, {size(free)} are free"
            raise StorageError(f"{folder}: {needs}; free some space, or lower loader.cache")

        def save() -> Shrunk:
            os.fsync(file)
            table = Shrunk(folder, files, np.array(sizes, np.int32).reshape(-1, 2), bad)
            table.save()
            return table

        with progress.chore(f"shrinking to {settings.cache} pixels, about {size(needed)}", start, len(files)) as advance:
            try:
                for pixels, shapes, reasons in batches:
                    write_all(file.fileno(), pixels.numpy().data)
                    bad |= reasons
                    sizes += shapes
                    if time.monotonic() - saved >= _SAVE_EVERY:
                        save()
                        saved = time.monotonic()
                    advance(len(sizes))
            finally:
                shrunk = save()
    return shrunk


def _shrink(files: Source, settings: LoaderConfig, rows: list[int]) -> tuple[Tensor, list[tuple[int, ...]], dict[int, str]]:
    """Scale images to shorter sides of `loader.cache` pixels at most.

    Returns:
        All pixels, uint8 in one row; the height and width of each image, 0 if it cannot be read; and the reasons, by position.

    Raises:
        DataError: if one cannot be read for a reason that may pass.
    """
    images, reasons, side = list[np.ndarray](), dict[int, str](), settings.cache or 0
    for row in rows:
        try:
            with files.open(row, settings.max_pixels) as opened:
                # The filter still gets twice the side, as in Pillow's own thumbnails.
                reductions = opened.reductions if settings.reduced_decode else ()
                image = opened.rgb(max((each for each in reductions if min(opened.size) >= 2 * side * each), default=1))
            if (shorter := min(image.size)) > side:
                image = image.resize([round(length * side / shorter) for length in image.size], Image.Resampling.LANCZOS)
            images.append(np.asarray(image))
        except BadImage as fault:
            if not fault.lasting:
                then = "that may pass, and the next start goes on here; if it does not, remove the file"
                raise DataError(f"{shown(files.name(row))}: {fault}; {then}") from fault
            images.append(np.empty((0, 0, 3), np.uint8))
            reasons[row] = str(fault)
    return torch.from_numpy(np.concatenate([*map(np.ravel, images)])), [image.shape[:2] for image in images], reasons
