"""Batches of views on the device: of images in memory, or of files that worker processes read."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision.transforms.functional import pil_to_tensor

from relssl.data import batched
from relssl.data.decode import BadImage, Decoded, Opened
from relssl.data.draws import Ints, Slot, draw, draw_crops, uniforms
from relssl.data.folder import shown
from relssl.data.images import Images, Pixels
from relssl.engine import available_cores, send
from relssl.errors import ConfigError, DataError
from relssl.settings.run import LoaderConfig, ViewConfig

Fault = tuple[str, str]  # file, reason
Statistics = tuple[Sequence[float], Sequence[float]]  # means and deviations of the channels that the networks see, in 0..1


@dataclass
class Batch:
    """One part of a step on this rank.

    Attributes:
        ids: [B] int64, the samples' positions in the data set.
        weak: [B,C,H,W] the teacher's view, normalised, on the device.
        strong: the student's views, each [B,C,h,w].
        bad: (file, reason) of images that could not be read and were replaced.
    """

    ids: Tensor
    weak: Tensor
    strong: list[Tensor]
    bad: list[Fault] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """Which samples each step, part and rank sees.

    A step's batch is cut into parts, each part into the ranks' shares, so that parts and ranks joined in order give back
    the batch: one process, many and accumulation fill the memory alike. Images beyond the last full batch sit out an
    epoch.
    """

    count: int
    batch_size: int
    parts: int = 1
    rank: int = 0
    world: int = 1
    seed: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in the data."""
        return self.count // self.batch_size

    @property
    def share(self) -> int:
        """Images of one part on one rank."""
        return self.batch_size // (self.parts * self.world)

    def order(self, epoch: int) -> Ints:
        """Return the epoch's permutation of the samples, [count] int64."""
        keys = uniforms(self.seed, epoch, np.arange(self.count), Slot.ORDER, 1)[:, 0]
        return np.argsort(keys, kind="stable")

    def shuffle(self, step: int, part: int) -> Ints:
        """Return the order in which a part of a step's batch goes through a teacher that sees it shuffled, [world * share]
        int64: the same on all ranks, and for one rank that of many."""
        rows = self.batch_size // self.parts
        keys = uniforms(self.seed, step, part * rows + np.arange(rows), Slot.SHUFFLE, 1)[:, 0]
        return np.argsort(keys, kind="stable")

    def steps(self, start: int, stop: int) -> Iterator[tuple[int, list[Ints]]]:
        """Yield (epoch, this rank's sample positions for each part) of the steps from `start` to `stop`."""
        order, current = np.empty(0, np.int64), -1
        for step in range(start, stop):
            epoch, within = divmod(step, self.steps_per_epoch)
            if epoch != current:
                order, current = self.order(epoch), epoch
            batch = order[within * self.batch_size : (within + 1) * self.batch_size]
            yield epoch, list(batch.reshape(self.parts, self.world, self.share)[:, self.rank])


def create_loader(
    images: Images,
    views: Sequence[ViewConfig],
    plan: Plan,
    device: torch.device,
    statistics: Statistics,
    settings: LoaderConfig,
    processes: int = 1,
) -> Resident | FromFiles:
    """Create the loader that `loader.path` asks for.

    Args:
        images: what to read.
        views: what to make of each image, the first as `Batch.weak`, the others as `Batch.strong`.
        plan: which samples each step sees, and the seed of their views.
        device: where batches are wanted.
        statistics: what to normalise by.
        settings: how to load.
        processes: training processes that share this machine's cores.

    Raises:
        DataError: if there are fewer images than one batch.
        ConfigError: if files are to be resident, or images in memory to be cached.
    """
    if plan.steps_per_epoch == 0:
        raise DataError(
            f"{images.name}: {plan.count} usable images, batch is {plan.batch_size}; "
            f"lower batch_size to {max(2, plan.count)} or less, or add images"
        )
    if settings.path == "resident" and not images.in_memory:
        raise ConfigError("loader.path: resident is for data sets held in memory; use files for folders and lists")
    if settings.cache is not None and images.in_memory:
        raise ConfigError(f"loader.cache: is for folders and lists of files, {images.name} is held in memory; use null")
    if settings.path == "resident" or (settings.path == "auto" and images.in_memory):
        return Resident(images, views, plan, device, statistics, settings.views_ahead)
    workers = worker_count(settings.workers, processes)
    return FromFiles(images, views, plan, device, statistics, settings, workers)


def make_views(
    images: Sequence[Tensor], views: Sequence[ViewConfig], seed: int, epoch: int, rows: Ints, statistics: Statistics
) -> list[Tensor]:
    """Make the normalised views of a batch, all at once, on the images' device.

    Args:
        images: uint8 [B,3,H,W], what each view is made of.
        views: their settings.
        seed, epoch, rows: what views depend on; rows are the images' positions in the data set.
        statistics: what to normalise by.

    Returns:
        fp32 [B,C,S,S] for each view.
    """
    finished = []
    for slot, (pixels, view) in enumerate(zip(images, views, strict=True)):
        draws = draw(view, seed, epoch, rows, slot, (pixels.shape[-2], pixels.shape[-1]))
        finished.append(batched.normalise(batched.apply(pixels, view, draws), *statistics))
    return finished


# Bytes of one view of all the images of a stretch; a handful of such blocks lives at a time.
_VIEW_BYTES = 256 << 20


class Resident:
    """Images held as uint8 on the device, whose views are computed there in batches, without workers.

    A GPU computes the views of one step faster than the host can launch them, operation by operation; so those of several
    steps are made in one go.

    Args:
        images, views, plan, device, statistics: as for `create_loader`.
        ahead: steps whose views are made in one go; None: up to 8 on GPUs, else 1.
    """

    def __init__(
        self,
        images: Images,
        views: Sequence[ViewConfig],
        plan: Plan,
        device: torch.device,
        statistics: Statistics,
        ahead: int | None = None,
    ) -> None:
        assert isinstance(images.source, Pixels)
        self.plan, self.device, self.views, self.statistics = plan, device, list(views), statistics
        self.pixels = images.source.tensor.to(device)
        step_bytes = plan.share * plan.parts * 3 * 4 * max(view.size for view in views) ** 2
        fitting = max(1, min(8, _VIEW_BYTES // step_bytes)) if device.type == "cuda" else 1
        self.ahead = ahead or fitting

    def stream(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """Yield the parts of each step from `start` to `stop`."""
        # Stretches begin and end at the same steps wherever the stream does, and none spans two epochs.
        step = start - start % self.plan.steps_per_epoch % self.ahead
        source = self.plan.steps(step, stop + self.ahead)
        while step < stop:
            count = self.stretch(step)
            for offset, parts in enumerate(self._stretch(list(islice(source, count)))):
                if start <= step + offset < stop:
                    yield parts
            step += count

    def stretch(self, step: int) -> int:
        """Return how many steps' views are made in one go with those of this step."""
        epoch = self.plan.steps_per_epoch
        within = step % epoch
        return min(self.ahead, epoch - (within - within % self.ahead))

    def _stretch(self, steps: list[tuple[int, list[Ints]]]) -> Iterator[list[Batch]]:
        """Yield the parts of some steps of one epoch."""
        rows = np.concatenate([part for _, parts in steps for part in parts])
        ids = send(torch.from_numpy(rows), self.device)
        pixels = [self.pixels[ids]] * len(self.views)
        views = make_views(pixels, self.views, self.plan.seed, steps[0][0], rows, self.statistics)
        share, parts = self.plan.share, self.plan.parts
        for first in range(0, len(steps) * parts, parts):
            cuts = [slice(part * share, (part + 1) * share) for part in range(first, first + parts)]
            yield [Batch(ids[cut], views[0][cut], [view[cut] for view in views[1:]]) for cut in cuts]


class Unreadable(DataError):
    """So many unreadable images in a row that a batch cannot be filled."""

    def __init__(self, faults: list[Fault]) -> None:
        last = f"the last is {shown(faults[-1][0])} ({faults[-1][1]})"
        super().__init__(f"{len(faults)} images in a row cannot be read, {last}; replace them, or take them out of the data set")
        self.faults = faults


class FromFiles:
    """Images decoded and cropped by worker processes; what else makes a view happens on the device, in batches.

    Args:
        images, views, plan, device, statistics, settings: as for `create_loader`.
        workers: loader processes; 0: this one.
    """

    def __init__(
        self,
        images: Images,
        views: Sequence[ViewConfig],
        plan: Plan,
        device: torch.device,
        statistics: Statistics,
        settings: LoaderConfig,
        workers: int,
    ) -> None:
        self.plan, self.device, self.statistics, self.workers = plan, device, statistics, workers
        self.samples = Crops(images, views, plan.seed, settings.max_pixels, settings.reduced_decode)
        # Of the parameters of a view, its crop alone depends on the image's size, so all others can be drawn without it.
        self.rest = [dataclasses.replace(view, scale=None) for view in views]

    def stream(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """Yield the parts of each step from `start` to `stop`."""
        steps, pin = self.plan.steps(start, stop), self.device.type == "cuda"
        requests = ([(epoch, int(row)) for row in rows] for epoch, parts in steps for rows in parts)
        parts: list[Batch] = []
        for sample in read_batches(self.samples, collate, self.workers, batch_sampler=requests, pin_memory=pin):
            parts.append(self.batch(sample))
            if len(parts) == self.plan.parts:
                yield parts
                parts = []

    def batch(self, sample: Sample) -> Batch:
        """Finish, on the device, the views of samples that are joined; Unreadable if there are none."""
        if not sample.crops:
            raise Unreadable(sample.bad)
        assert isinstance(sample.row, Tensor)
        crops = [send(pixels, self.device) for pixels in sample.crops]
        views = make_views(crops, self.rest, self.plan.seed, sample.epoch, sample.row.numpy(), self.statistics)
        return Batch(send(sample.row, self.device), views[0], views[1:], sample.bad)


class Sample(NamedTuple):
    """What is read of one image; of several, stacked, once collated.

    Attributes:
        epoch: the epoch that the crops are of.
        row: position of the image in the data set; [B] int64 once collated.
        crops: for each view, uint8 [3,S,S], or [B,3,S,S]; none if no image can be read.
        bad: files that could not be read on the way.
    """

    epoch: int
    row: int | Tensor
    crops: list[Tensor]
    bad: list[Fault]


# Images after one that cannot be read which are tried in its place.
_TRIES = 100

Request = tuple[int, int]  # epoch, position in the data set


class Crops(Dataset[Sample]):
    """The crop of each view of an image, scaled to the view's size; any worker gives the same for (epoch, row).

    An image that cannot be read is replaced by the next one that can, a rule that no number of workers or ranks changes.
    """

    def __init__(self, images: Images, views: Sequence[ViewConfig], seed: int, max_pixels: int, reduce: bool) -> None:
        self.images, self.views, self.seed, self.max_pixels, self.reduce = images, list(views), seed, max_pixels, reduce

    def __getitem__(self, request: Request) -> Sample:
        epoch, row = request
        bad: list[Fault] = []
        for offset in range(min(_TRIES, len(self.images))):
            position = (row + offset) % len(self.images)
            try:
                with self.images.source.open(position, self.max_pixels) as opened:
                    return Sample(epoch, position, self._crops(opened, epoch, position), bad)
            except BadImage as fault:
                bad.append((self.images.source.name(position), str(fault)))
        return Sample(epoch, row, [], bad)

    def _crops(self, opened: Opened | Decoded, epoch: int, row: int) -> list[Tensor]:
        """Decode an image once for all views, as small as the largest reduction at which no crop has fewer pixels than its view."""
        ids = np.array([row])
        boxes = [draw_crops(view, self.seed, epoch, ids, slot, opened.size)[0] for slot, view in enumerate(self.views)]
        spare = min(box[2:].min() / view.size for box, view in zip(boxes, self.views, strict=True)) if self.reduce else 1
        reduction = max((each for each in opened.reductions if each <= spare), default=1)
        image = opened.rgb(reduction)
        if reduction > 1:  # boxes then have parts of pixels at their edges, which only Pillow takes
            return [crop_reduced(image, box / reduction, view.size) for box, view in zip(boxes, self.views, strict=True)]
        pixels = pil_to_tensor(image)
        return [crop(pixels, box, view.size) for box, view in zip(boxes, self.views, strict=True)]


def crop(pixels: Tensor, box: Ints, size: int) -> Tensor:
    """Return a box (top, left, height, width) of an image uint8 [3,H,W], scaled to uint8 [3,size,size]."""
    top, left, height, width = box.tolist()
    part = pixels[None, :, top : top + height, left : left + width]
    return interpolate(part, (size, size), mode="bilinear", antialias=True)[0]


def crop_reduced(image: Image.Image, box: np.ndarray, size: int) -> Tensor:
    """Return a box (top, left, height, width), in pixels and parts of them, scaled to uint8 [3,size,size]."""
    (top, left), (bottom, right) = box[:2].tolist(), (box[:2] + box[2:]).tolist()
    x, y = math.floor(left), math.floor(top)
    # Cut out first, as torchvision does: a resize alone would look past the box.
    part = image.crop((x, y, math.ceil(right), math.ceil(bottom)))
    inside = (left - x, top - y, right - x, bottom - y)
    pixels: Tensor = pil_to_tensor(part.resize((size, size), Image.Resampling.BILINEAR, inside))
    return pixels


def collate(samples: Sequence[Sample]) -> Sample:
    """Join samples of one epoch; without crops if one of them has none."""
    rows, bad = torch.tensor([sample.row for sample in samples]), [fault for sample in samples for fault in sample.bad]
    whole = all(sample.crops for sample in samples)
    crops = [torch.stack(crops) for crops in zip(*(sample.crops for sample in samples), strict=True)] if whole else []
    return Sample(samples[0].epoch, rows, crops, bad)


# What errors say when a worker is gone, and when /dev/shm or memory is full.
_DIED = ("exited unexpectedly", "killed by signal", "bus error")
_FULL = ("unable to", "no space left", "cannot allocate", "can't allocate")


def worker_count(workers: int | None, processes: int = 1) -> int:
    """Return the loader processes to start: `workers`, else the cores of one of so many training processes, less one."""
    return max(1, available_cores() // processes - 1) if workers is None else workers


def read_batches(dataset: Dataset[Any], join: Callable[[list[Any]], Any], workers: int, **batching: Any) -> Iterator[Any]:
    """Yield batches that worker processes read and join.

    Args:
        dataset: what is read, item by item.
        join: makes one batch of a list of items.
        workers: loader processes; 0: this one.
        batching: further arguments of torch's DataLoader.

    Raises:
        DataError: if a worker dies, or has no shared or other memory left.
    """
    loader = DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=partial(_hand_over, join),
        worker_init_fn=_reset_signals,
        generator=torch.Generator(),  # else it would draw from the global one, and a resumed run once more
        **batching,
    )
    batches: Any = iter(loader)
    try:
        yield from batches
    except (RuntimeError, ConnectionError, OSError) as error:
        _dismiss(batches)
        reason = (str(error).strip() or type(error).__name__).splitlines()
        if workers and any(sign in str(error).lower() for sign in _FULL):
            raise DataError(
                f"a loader process has no memory left ({reason[-1]}); try loader.workers 0, or fewer, or more shared memory"
            ) from error
        if not isinstance(error, ConnectionError) and not any(sign in str(error).lower() for sign in _DIED):
            raise
        raise DataError(f"a loader process died ({reason[0]}); try loader.workers 0 or more shared memory") from error


def _reset_signals(worker: int) -> None:
    """Let workers end when their loader says so: Ctrl-C is for the main process, which finishes its step and saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _hand_over(join: Callable[[Any], Any], items: Any) -> Any:
    """Join items, their tensors already in shared memory if this is a worker.

    Else the queue's own thread would move them, and where it fails it drops the batch: the main process would wait for ever.
    """
    joined = join(items)
    if get_worker_info() is not None:
        _share(joined)
    return joined


def _share(joined: Any) -> None:
    if isinstance(joined, Tensor):
        joined.share_memory_()  # type: ignore[no-untyped-call]
    elif isinstance(joined, (list, tuple, dict)):
        for part in joined.values() if isinstance(joined, dict) else joined:
            _share(part)


def _dismiss(batches: Any) -> None:
    """End the workers that are left. Until they are forgotten, torch raises the death of one anew, in whatever the main thread is
    doing, whenever another child ends."""
    end, child = getattr(batches, "_shutdown_workers", None), getattr(signal, "SIGCHLD", None)
    if end is None or child is None or threading.current_thread() is not threading.main_thread():
        return
    before = signal.signal(child, signal.SIG_DFL)
    try:
        end()
    finally:
        signal.signal(child, before)
