"""Batches of views on the device: of images in memory, or of files that worker processes read."""

from __future__ import annotations

import atexit
import math
import pickle
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from multiprocessing import active_children, get_start_method
from multiprocessing.connection import Listener
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision.transforms.functional import pil_to_tensor

from relssl.data import batched
from relssl.data.decode import BadImage, Opened
from relssl.data.draws import Ints, Slot, draw, draw_crops, permuted, uniforms
from relssl.data.folder import shown
from relssl.data.images import Fault, Images, Pixels
from relssl.data.transforms import Transform
from relssl.engine import available_cores, cores_each, send
from relssl.errors import STOPPING, ConfigError, DataError, RelsslError
from relssl.settings.run import LoaderConfig, ViewConfig

_SORTED = 4_000_000  # samples whose order is made by sorting: a second and 300 MB for twice as many
VIEW_BYTES = 256 << 20  # of one view of all the images of a stretch; a handful of such blocks lives at a time
_TRIES = 100  # images in a row before giving up
# Signs in errors that a worker is gone, or that /dev/shm or memory is full.
_DIED = ("exited unexpectedly", "killed by signal", "bus error", "unable to", "no space left", "allocate")


@dataclass
class Batch:
    """One part of a step on this rank."""

    ids: Tensor  # [B] int64, the samples' positions in the data set
    weak: Tensor  # [B,C,H,W], the teacher's view, normalised, on the device
    strong: list[Tensor]  # the student's views, each [B,C,h,w]
    bad: list[Fault] = field(default_factory=list)  # images that could not be read and were replaced


@dataclass(frozen=True)
class Plan:
    """The samples that each step, part and rank sees.

    A step's batch is cut into parts, each part into the ranks' shares, so that parts and ranks joined in order give back the
    batch: one process, many and accumulation fill the memory alike. Images beyond the last full batch sit out an epoch.
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
        """Return the epoch's permutation of the samples, [count] int64; for up to `_SORTED` samples."""
        return np.argsort(uniforms(self.seed, epoch, np.arange(self.count), Slot.ORDER, 1)[:, 0], kind="stable")

    def shuffle(self, step: int, part: int) -> Ints:
        """Return the order in which a part of a step's batch goes through a teacher that sees it shuffled, [world * share]
        int64: the same on all ranks, and for one rank that of many."""
        rows = self.batch_size // self.parts
        return np.argsort(uniforms(self.seed, step, part * rows + np.arange(rows), Slot.SHUFFLE, 1)[:, 0], kind="stable")

    def steps(self, start: int, stop: int) -> Iterator[tuple[int, list[Ints]]]:
        """Yield (epoch, this rank's sample positions for each part) of the steps from `start` to `stop`."""
        for epoch, steps in groupby(range(start, stop), lambda step: step // self.steps_per_epoch):
            order = self.order(epoch) if self.count <= _SORTED else None
            for step in steps:
                rows = step % self.steps_per_epoch * self.batch_size + np.arange(self.batch_size)
                batch = permuted(self.seed, epoch, rows, self.count) if order is None else order[rows]
                yield epoch, list(batch.reshape(self.parts, self.world, self.share)[:, self.rank])


@dataclass
class Loader:
    """Views of images, made on the device in batches: of images that lie there as uint8, or of what worker processes decode and crop.

    A GPU computes the views of one step of resident images faster than the host can launch them, operation by operation; so those of
    several steps, a stretch, are made in one go.

    Attributes:
        workers: loader processes, 0: this one; None for images that lie on the device.
        ahead: steps of a stretch; without `loader.views_ahead` up to 8 on GPUs, else 1.

    Raises:
        DataError: if there are fewer images than one batch.
        ConfigError: if files are to be resident, or images in memory to be cached.
    """

    images: Images
    views: Sequence[ViewConfig]  # of each image, the first as `Batch.weak`, the others as `Batch.strong`
    plan: Plan  # which samples each step sees, and the seed of their views
    device: torch.device
    statistics: tuple[Sequence[float], Sequence[float]]  # means and deviations, in 0..1, of the channels that the networks see
    settings: LoaderConfig
    processes: int = 1  # for training, which share this machine's cores

    def __post_init__(self) -> None:
        images, settings, plan = self.images, self.settings, self.plan
        if plan.steps_per_epoch == 0:
            advice = f"lower batch_size to {max(2, plan.count)} or less, or add images"
            raise DataError(f"{images.name}: {plan.count} usable images, batch is {plan.batch_size}; {advice}")
        fitting(len(self.statistics[0]), images)
        self._calls = [Transform.of(view, slot, self.statistics) for slot, view in enumerate(self.views)]
        self.workers: int | None = worker_count(settings.workers, self.processes)
        if in_device_memory(images, settings, not any(self._calls)):
            assert isinstance(images.source, Pixels)
            self.workers, self._pixels = None, images.source.tensor.to(self.device)
        elif settings.path == "resident":
            raise ConfigError("loader.path: resident is for data sets held in memory and views of ours; use files for others")
        if settings.cache is not None and (images.in_memory or images.channels != 3):
            use = f"for colour images that have to be decoded, not for those of {images.name}; use null"
            raise ConfigError(f"loader.cache: is {use}")
        step_bytes = plan.share * plan.parts * images.channels * 4 * max(view.size for view in self.views) ** 2
        usual = max(1, min(8, VIEW_BYTES // step_bytes)) if self.device.type == "cuda" else 1
        self.ahead = settings.views_ahead or usual

    def stream(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """Yield the parts of each step from `start` to `stop`; Unreadable if one has no image."""
        return self._from_memory(start, stop) if self.workers is None else self._from_files(start, stop, self.workers)

    def weak(self, rows: Ints) -> Tensor:
        """Return the first epoch's first views [B,C,S,S] of images that lie on the device."""
        return self._view(0, self.views[0], self._pixels[torch.from_numpy(rows).to(self.device)], 0, rows)

    def _from_memory(self, start: int, stop: int) -> Iterator[list[Batch]]:
        # Stretches begin and end at the same steps wherever the stream does, and none spans two epochs.
        length, parts = self.plan.steps_per_epoch, self.plan.parts
        step = start - start % length % self.ahead
        source = self.plan.steps(step, stop + self.ahead)
        while step < stop:
            steps = list(islice(source, min(self.ahead, length - step % length)))
            rows = np.concatenate([share for _, shares in steps for share in shares])
            ids = send(torch.from_numpy(rows), self.device)
            pixels, epoch = self._pixels[ids], steps[0][0]
            weak, *strong = (self._view(slot, view, pixels, epoch, rows) for slot, view in enumerate(self.views))
            cuts = [slice(first, first + self.plan.share) for first in range(0, len(rows), self.plan.share)]
            batches = [Batch(ids[cut], weak[cut], [view[cut] for view in strong]) for cut in cuts]
            for number in range(max(0, start - step), min(len(steps), stop - step)):
                yield batches[number * parts : (number + 1) * parts]
            step += len(steps)

    def _from_files(self, start: int, stop: int, workers: int) -> Iterator[list[Batch]]:
        requests = ((epoch, rows) for epoch, parts in self.plan.steps(start, stop) for rows in parts)
        batches = map(self._finish, read_batches(self.read, requests, workers, self.device.type == "cuda"))
        while parts := list(islice(batches, self.plan.parts)):
            yield parts

    def _finish(self, crops: Crops) -> Batch:
        # Of the parameters of a view, its crop alone depends on the image's size, so all others can be drawn without it.
        rest = [replace(view, scale=None) for view in self.views]
        weak, *strong = (
            self._view(slot, view, send(pixels, self.device), crops.epoch, crops.rows)
            for slot, (view, pixels) in enumerate(zip(rest, crops.pixels, strict=True))
        )
        return Batch(send(torch.from_numpy(crops.rows), self.device), weak, strong, crops.bad)

    def _view(self, slot: int, view: ViewConfig, pixels: Tensor, epoch: int, rows: Ints) -> Tensor:
        """Make a normalised view fp32 [B,C,S,S] of uint8 [B,C,H,W]; of a callable it is made already."""
        if self._calls[slot]:
            return pixels
        draws = draw(view, self.plan.seed, epoch, rows, slot, (pixels.shape[-2], pixels.shape[-1]))
        return batched.normalise(batched.apply(pixels, view, draws), *self.statistics)

    def read(self, request: tuple[int, Ints]) -> Crops:
        """Read and crop the images of an epoch at positions [B]; any process returns the same.

        An image that cannot be read is replaced by the next one that can, a rule that no number of workers or ranks changes.
        """
        epoch, bad = request[0], list[Fault]()
        rows, crops = zip(*(self._readable(epoch, row, bad) for row in request[1].tolist()), strict=True)
        return Crops(epoch, np.array(rows), [torch.stack(view) for view in zip(*crops, strict=True)], bad)

    def _readable(self, epoch: int, row: int, bad: list[Fault]) -> tuple[int, list[Tensor]]:
        """Return the position and the crops of an image, or of the next that can be read, and add the others to `bad`."""
        tries = min(_TRIES, len(self.images))
        for position in range(row, row + tries):
            position %= len(self.images)
            try:
                with self.images.source.open(position, self.settings.max_pixels) as opened:
                    return position, self._crops(opened, epoch, position)
            except BadImage as fault:
                bad.append((self.images.source.name(position), str(fault)))
        last = f"the last is {shown(bad[-1][0])} ({bad[-1][1]})"
        error = Unreadable(f"{tries} images in a row cannot be read, {last}; replace them, or take them out of the data set")
        error.faults = bad
        raise error

    def _crops(self, opened: Opened, epoch: int, row: int) -> list[Tensor]:
        """Decode an image once for all views, as small as the largest reduction at which no crop has fewer pixels than its view."""
        seed, ids, sizes = self.plan.seed, np.array([row]), [view.size for view in self.views]
        boxes = [draw_crops(view, seed, epoch, ids, slot, opened.size)[0] for slot, view in enumerate(self.views)]
        whole = any(self._calls) or not self.settings.reduced_decode
        spare = 1 if whole else min(box[2:].min() / size for box, size in zip(boxes, sizes, strict=True))
        reduction = max((each for each in opened.reductions if each <= spare), default=1)
        if reduction > 1:  # boxes then have parts of pixels at their edges, which only Pillow takes
            image = opened.rgb(reduction)
            return [crop_reduced(image, box / reduction, size) for box, size in zip(boxes, sizes, strict=True)]
        pixels = pil_to_tensor(opened.rgb(1)) if opened.bands is None else torch.from_numpy(opened.bands)
        name = self.images.source.name(row)
        return [
            crop(pixels, box, size) if call is None else call(pixels, name, seed, epoch, row, slot)
            for slot, (box, size, call) in enumerate(zip(boxes, sizes, self._calls, strict=True))
        ]


class Crops(NamedTuple):
    """The crops of a batch of images, scaled to the views' sizes."""

    epoch: int
    rows: Ints  # [B], positions in the data set
    pixels: list[Tensor]  # for each view, uint8 [B,C,S,S], or what a callable has made
    bad: list[Fault]  # unreadable files on the way


class Unreadable(DataError):
    """So many unreadable images in a row that a batch cannot be filled."""

    faults: list[Fault]  # these


def in_device_memory(images: Images, settings: LoaderConfig, ours: bool) -> bool:
    """Return whether images are to lie on the device as a whole; `ours` is true if no view is a callable."""
    return settings.path != "files" and isinstance(images.source, Pixels) and ours


def fitting(channels: int, images: Images) -> None:
    """Check that networks which see so many channels can see these images; ConfigError if not. Grey and colour stand in for each other."""
    if channels != images.channels and {channels, images.channels} != {1, 3}:
        raise ConfigError(f"views.channels: the network sees {channels}, the images of {images.name} have {images.channels}")


def crop(pixels: Tensor, box: Ints, size: int) -> Tensor:
    """Return a box (top, left, height, width) of an image uint8 [C,H,W], scaled to uint8 [C,size,size]."""
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


def worker_count(workers: int | None, processes: int = 1) -> int:
    """Return the loader processes to start: `workers`, else the cores of one of so many training processes, less one."""
    return max(1, cores_each(processes) - 1) if workers is None else workers


def lone_workers(workers: int | None, processes: int) -> int:
    """Return the loader processes to start for one of so many training processes while the others wait."""
    each = worker_count(workers, processes)
    return max(each, min(each * processes, available_cores() - 1))


def read_batches(
    read: Callable[[Any], Any], requests: Iterable[Any], workers: int, pin: bool = False
) -> Generator[Any, None, None]:
    """Yield what `read` makes of each request, in worker processes (0: in this one), its tensors page-locked if `pin`.

    Raises:
        RelsslError: that `read` raises; one from a worker has lost its traceback.
        ConfigError: if workers have to be sent `read`, as processes that are not forked do, and it cannot be pickled.
        DataError: if a worker dies, or has no shared or other memory left, or if there is no folder for temporary files.
    """
    if workers:
        _check_sockets()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create|Got pickle error")  # more workers than cores; said below
        loader = DataLoader(
            _Answers(read),
            batch_size=None,
            sampler=requests,
            num_workers=workers,
            collate_fn=_share_memory,
            pin_memory=pin,
            worker_init_fn=_set_signals,
            generator=torch.Generator(),  # else it would draw from the global one, and a resumed run once more
        )
        # Workers begin with these blocked, until they have said what to do with them.
        handler, before = signal.getsignal(signal.SIGCHLD), {*active_children()}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING if workers else ())
        try:
            batches: Any = iter(loader)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            if get_start_method() == "fork":
                raise
            advice = "define the data set, and views of your own, in a module, or set loader.workers 0"
            raise ConfigError(f"loader.workers: loader processes cannot be sent the images ({error}); {advice}") from error
        except OSError as error:
            for child in {*active_children()} - before:  # the first of them, of which torch does not know
                child.kill()
            raise DataError(f"{workers} loader processes cannot be started ({error.strerror}); lower loader.workers") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            # torch would raise a worker's death in whatever the main thread does; it notices in `next`, too.
            if workers and threading.current_thread() is threading.main_thread():
                torchs = getattr(handler, "__module__", "").startswith("torch.utils.data")  # of a loader of the user's
                signal.signal(signal.SIGCHLD, signal.SIG_DFL if torchs or handler is None else handler)
    if workers:  # at exit, before multiprocessing ends them: by one SIGTERM, which is not theirs, and it would wait for ever
        atexit.register(batches._shutdown_workers)
    try:
        for batch in batches:
            if isinstance(batch, RelsslError):
                raise batch
            yield batch
    except (RuntimeError, OSError, EOFError) as error:
        # A worker that dies while its tensors are fetched is the end of a connection.
        died = isinstance(error, (ConnectionError, EOFError)) or any(sign in str(error).lower() for sign in _DIED)
        if not workers or not died:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        script = "" if get_start_method() == "fork" else '; a script has to begin below `if __name__ == "__main__":`'
        raise DataError(
            f"a loader process died or has no memory left ({reason}); try loader.workers 0, or fewer, or more shared memory{script}"
        ) from error
    finally:
        if workers:
            atexit.unregister(batches._shutdown_workers)
            batches._shutdown_workers()
        del batches  # else an error's traceback would hold it


def _check_sockets() -> None:
    """Check that a socket can be bound among the temporary files: workers' tensors come by one, and would never arrive; DataError if not."""
    try:
        Listener(family="AF_UNIX").close()
    except OSError as error:
        needs = f"loader processes need a folder for temporary files ({error.strerror or error})"
        raise DataError(f"{needs}; set TMPDIR to a short path that can be written, or loader.workers to 0") from error


@dataclass
class _Answers(Dataset[Any]):
    """The answers of `read` to each request; an error of ours is returned, as torch would raise it anew with its traceback for a message."""

    read: Callable[[Any], Any]

    def __getitem__(self, request: Any) -> Any:
        try:
            return self.read(request)
        except RelsslError as error:
            return error


def _share_memory(batch: Any) -> Any:
    """Move the tensors of a batch to shared memory if this is a worker.

    Else the queue's own thread would, and where it fails it drops the batch: the main process would wait for ever.
    """
    for leaf in tree_leaves(batch) if get_worker_info() else ():
        if isinstance(leaf, Tensor):
            leaf.share_memory_()  # type: ignore[no-untyped-call]
    return batch


def _set_signals(worker: int) -> None:
    """Let workers end when their loader says so: signals to the whole group are for the main process, which saves and stops them.

    One SIGTERM is such a signal; the second is meant, as by a main process that waits for this worker in vain.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
