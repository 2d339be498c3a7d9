"""Images as files: decoded and viewed in loader workers, in any number of which a view is the same."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from relssl.config import Config
from relssl.data import single
from relssl.data.batch import Batch, standardise
from relssl.data.decode import BadImage, decode
from relssl.data.draws import draw
from relssl.data.paths import shown
from relssl.data.plan import Plan
from relssl.data.sources import Images
from relssl.errors import DataError

_TRIES = 100


class Unreadable(DataError):
    """So many unreadable images in a row that a batch cannot be filled."""

    def __init__(self, faults: list[tuple[str, str]]) -> None:
        super().__init__(
            f"{len(faults)} images cannot be read, the last is {shown(faults[-1][0])} ({faults[-1][1]}); see bad_samples.jsonl"
        )
        self.faults = faults


class FromFiles:
    """Images decoded once each and viewed in loader workers; uint8 travels to the device and is normalised there."""

    def __init__(self, images: Images, config: Config, plan: Plan, device: torch.device) -> None:
        self.images, self.config, self.plan, self.device = images, config, plan, device

    def stream(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """The parts of each step; one set of workers serves the whole run."""
        workers = loader_workers(self.config)
        loader = DataLoader(
            Views(self.images, self.config),
            batch_sampler=_Requests(self.plan, start, stop),
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=reset_signals,
            prefetch_factor=self.config.loader.prefetch if workers else None,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else it would draw from the global one, and a resumed run once more
        )
        parts: list[Batch] = []
        for ids, views, bad in _watch(loader):
            if not views:
                raise Unreadable(bad)
            moved = [standardise(view.to(self.device, non_blocking=True), self.config) for view in views]
            parts.append(Batch(ids.to(self.device), moved[0], moved[1:], bad))
            if len(parts) == self.plan.parts:
                yield parts
                parts = []


def loader_workers(config: Config) -> int:
    """Loader processes of the files path."""
    return max(1, torch.get_num_threads() - 1) if config.loader.workers is None else config.loader.workers


def reset_signals(worker: int) -> None:
    """Workers end when their loader says so: Ctrl-C is for the main process, which finishes its step and saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _watch(loader: DataLoader[Any]) -> Iterator[Any]:
    """Batches of the loader; a worker that died becomes one line."""
    try:
        yield from loader
    except (RuntimeError, ConnectionError) as error:
        died = any(sign in str(error) for sign in ("exited unexpectedly", "killed by signal", "bus error", "Bus error"))
        if not died and not isinstance(error, ConnectionError):
            raise
        raise DataError(
            f"a loader process died ({str(error).splitlines()[0]}); try loader.workers 0 or more shared memory"
        ) from error


class _Requests(Sampler[list[tuple[int, int]]]):
    def __init__(self, plan: Plan, start: int, stop: int) -> None:
        self.plan, self.start, self.stop = plan, start, stop

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch, parts in self.plan.steps(self.start, self.stop):
            for rows in parts:
                yield [(epoch, int(row)) for row in rows]

    def __len__(self) -> int:
        return (self.stop - self.start) * self.plan.parts


class Views(Dataset[Any]):
    """One sample's views as uint8; stateless, so any worker gives the same for (epoch, row)."""

    def __init__(self, images: Images, config: Config) -> None:
        self.images, self.config = images, config
        self.views = [config.views.weak, *config.strong_views]

    def __getitem__(self, request: tuple[int, int]) -> tuple[int, list[Tensor], list[tuple[str, str]]]:
        epoch, row = request
        image, row, bad = self._read(row)
        made: list[Tensor] = []
        if image is None:
            return row, made, bad
        for slot, view in enumerate(self.views):
            draws = draw(view, self.config.seed, epoch, np.array([row]), slot, (image.height, image.width))
            made.append(single.apply(image, view, draws, 0))
        return row, made, bad

    def _read(self, row: int) -> tuple[Image.Image | None, int, list[tuple[str, str]]]:
        """The image at `row`, or the next one that can be read: a rule that no worker or rank count changes. None if there is
        none among many."""
        bad: list[tuple[str, str]] = []
        for offset in range(min(_TRIES, len(self.images))):
            position = (row + offset) % len(self.images)
            try:
                return read_image(self.images, position, self.config.loader.max_pixels), position, bad
            except BadImage as fault:
                bad.append((str(self.images.files and self.images.files[position]), str(fault)))
        return None, row, bad


def read_image(images: Images, position: int, max_pixels: int) -> Image.Image:
    """The RGB image at a position; BadImage if its file cannot be read."""
    if images.files is not None:
        return decode(images.files[position], max_pixels)
    assert images.pixels is not None
    return Image.fromarray(images.pixels[position].permute(1, 2, 0).cpu().numpy())


def _collate(
    samples: Sequence[tuple[int, list[Tensor], list[tuple[str, str]]]],
) -> tuple[Tensor, list[Tensor], list[tuple[str, str]]]:
    ids = torch.tensor([row for row, _, _ in samples])
    faults = [fault for _, _, bad in samples for fault in bad]
    if not all(made for _, made, _ in samples):
        return ids, [], faults
    return ids, [torch.stack(view) for view in zip(*(made for _, made, _ in samples), strict=True)], faults
