"""Images as files: decoded and viewed in loader workers, in any number of which a view is the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from relssl.config import Config
from relssl.data import batched
from relssl.data.batch import Batch, standardise
from relssl.data.draws import draw
from relssl.data.jpegs import Bytes, Decoder, Files, collate_files
from relssl.data.paths import shown
from relssl.data.plan import Plan
from relssl.data.samples import Fault, Request, Sample, Views, collate
from relssl.data.sources import Images
from relssl.data.transfer import send, synchronise
from relssl.data.tuning import Choice, Tuning
from relssl.data.workers import WorkerError, cores, hand_over, reset_signals, watch
from relssl.errors import DataError
from relssl.views import ViewConfig


class Unreadable(DataError):
    """So many unreadable images in a row that a batch cannot be filled."""

    def __init__(self, faults: list[Fault]) -> None:
        last = f"the last is {shown(faults[-1][0])} ({faults[-1][1]})"
        super().__init__(f"{len(faults)} images in a row cannot be read, {last}; replace them, or take them out of the data set")
        self.faults = faults


class FromFiles:
    """Images decoded once each and viewed in loader workers; uint8 travels to the device and is normalised there.

    With `loader.decoder` torchvision the files themselves travel, and are decoded there too.

    Args:
        views: as for `create_loader`.

    Attributes:
        photometric_here: whether colours, blur and RandAugment are left to the device; workers then crop, move and flip alone.
        choice: how many workers serve the run, with what was measured to find that; None until it is known, which with
            `loader.workers` or `loader.prefetch` null is some tens of steps after the start of a long run.
        notice: one line that the user should be told once; None until there is one.
    """

    def __init__(
        self, images: Images, config: Config, plan: Plan, device: torch.device, views: Sequence[ViewConfig] | None = None
    ) -> None:
        self.images, self.config, self.plan, self.device = images, config, plan, device
        self.views = list(views or config.all_views)
        self.choice: Choice | None = None
        self.decoder = Decoder(images, config, device, self.views) if config.loader.decoder == "torchvision" else None
        wanted = config.loader.photometric
        by_itself = device.type == "cuda" or self.decoder is not None
        self.collate: Callable[[Any], Any] = collate if self.decoder is None else collate_files
        self.photometric_here = wanted == "device" or (wanted == "auto" and by_itself)

    @property
    def notice(self) -> str | None:
        return self.decoder.notice if self.decoder is not None else None

    def stream(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """The parts of each step; the first steps of a long run also tell which workers serve it best, see `choice`."""
        tuning = Tuning(self.config.loader, cores(self.config), self.plan.parts, stop - start)
        for trial in tuning.trials():
            steps = self._steps(start, start + trial.steps, trial.workers, trial.prefetch)
            try:
                for step in trial.timed(steps, self._clock):
                    yield step
                    start += 1
            except WorkerError:
                if not tuning.may_fail(trial):
                    raise  # else the next trial goes on with the steps that are still to come
        self.choice = tuning.choice()
        yield from self._steps(start, stop, self.choice.workers, self.choice.prefetch)

    def _steps(self, start: int, stop: int, workers: int, prefetch: int) -> Iterator[list[Batch]]:
        """The parts of these steps, by one set of workers."""
        plainly = self.decoder is None
        loader = DataLoader(
            self.samples(),
            batch_sampler=_Requests(self.plan, start, stop),
            num_workers=workers,
            collate_fn=partial(hand_over, self.collate),
            worker_init_fn=reset_signals,
            prefetch_factor=prefetch if workers else None,
            pin_memory=plainly and self.device.type == "cuda",
            generator=torch.Generator(),  # else it would draw from the global one, and a resumed run once more
        )
        parts: list[Batch] = []
        for sample in watch(loader):
            parts.append(self.batch(sample))
            if len(parts) == self.plan.parts:
                yield parts
                parts = []

    def _clock(self) -> float:
        """Seconds, once the device has caught up: a few looks a trial, none after."""
        synchronise(self.device)
        return time.perf_counter()

    def samples(self) -> Views:
        """What a worker makes, sample by sample."""
        if self.decoder is not None:
            return Bytes(self.images, self.config, self.views)
        return Views(self.images, self.config, photometric=not self.photometric_here, views=self.views)

    def batch(self, sample: Sample | Files) -> Batch:
        """What is left to do on the device for samples that workers have made and joined."""
        if isinstance(sample, Files):
            assert self.decoder is not None
            sample = self.decoder.views(sample)
        if not sample.views:
            raise Unreadable(sample.bad)
        assert isinstance(sample.row, torch.Tensor)
        moved = [send(view, self.device) for view in sample.views]
        if self.photometric_here:
            moved = self._photometric(moved, sample.epoch, sample.row.numpy())
        moved = [standardise(view, self.config) for view in moved]
        return Batch(send(sample.row, self.device), moved[0], moved[1:], sample.bad)

    def _photometric(self, views: list[torch.Tensor], epoch: int, rows: np.ndarray) -> list[torch.Tensor]:
        """The rest of each view, drawn again: of the parameters the crop alone depends on the size of the image."""
        made = []
        for slot, (view, pixels) in enumerate(zip(self.views, views, strict=True)):
            draws = draw(view, self.config.seed, epoch, rows, slot, (view.size, view.size))
            made.append(batched.photometric(pixels, view, draws))
        return made


class _Requests(Sampler[list[Request]]):
    def __init__(self, plan: Plan, start: int, stop: int) -> None:
        self.plan, self.start, self.stop = plan, start, stop

    def __iter__(self) -> Iterator[list[Request]]:
        for epoch, parts in self.plan.steps(self.start, self.stop):
            for rows in parts:
                yield [(epoch, int(row)) for row in rows]

    def __len__(self) -> int:
        return (self.stop - self.start) * self.plan.parts
