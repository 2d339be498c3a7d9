"""What a step is given: the views of one part of its batch, on the device."""

from __future__ import annotations

import dataclasses
import io
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision.io
import torchvision.transforms.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.functional import pil_to_tensor

from relssl.data import batched, single
from relssl.data.decode import BadImage, Decoded, Opened
from relssl.data.draws import Draws, Ints, draw, uniforms
from relssl.data.folder import shown
from relssl.data.images import Images, Pixels
from relssl.data.workers import Choice, Tuning, WorkerError, cores, hand_over, reset_signals, watch
from relssl.engine import send, synchronise
from relssl.errors import ConfigError, DataError
from relssl.settings.run import Config, ViewConfig, derive


@dataclass
class Batch:
    """One part of a step on this rank.

    Attributes:
        ids: [B] int64, the samples' positions in the data set.
        weak: [B, C, H, W] the teacher's view, normalised, on the device.
        strong: the student's views, each [B, C, h, w].
        bad: (file, reason) of images that could not be read and were replaced.
    """

    ids: Tensor
    weak: Tensor
    strong: list[Tensor]
    bad: list[tuple[str, str]] = field(default_factory=list)


# Draws of the order, and of the teacher's, use slots of their own, far from those of views.
_ORDER_SLOT = 1 << 20
_SHUFFLE_SLOT = _ORDER_SLOT + 1


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

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's permutation of the samples, [count] int64."""
        keys = uniforms(self.seed, epoch, np.arange(self.count), _ORDER_SLOT, 1)[:, 0]
        return np.argsort(keys, kind="stable")

    def shuffle(self, step: int, part: int) -> np.ndarray:
        """The order in which a part of a step's batch goes through a teacher that sees it shuffled, [world * share] int64: the
        same on all ranks, and for one rank that of many."""
        rows = self.batch_size // self.parts
        keys = uniforms(self.seed, step, part * rows + np.arange(rows), _SHUFFLE_SLOT, 1)[:, 0]
        return np.argsort(keys, kind="stable")

    def steps(self, start: int, stop: int) -> Iterator[tuple[int, list[np.ndarray]]]:
        """(epoch, this rank's sample positions for each part) of the steps from `start` to `stop`."""
        order, current = np.empty(0, np.int64), -1
        for step in range(start, stop):
            epoch, within = divmod(step, self.steps_per_epoch)
            if epoch != current:
                order, current = self.order(epoch), epoch
            batch = order[within * self.batch_size : (within + 1) * self.batch_size]
            yield epoch, list(batch.reshape(self.parts, self.world, self.share)[:, self.rank])


_TRIES = 100

Request = tuple[int, int]  # epoch, position in the data set
Fault = tuple[str, str]  # file, reason


class Sample(NamedTuple):
    """The views of one image; of several, stacked, once collated.

    Attributes:
        epoch: which epoch's views they are.
        row: position of the image in the data set; [B] int64 once collated.
        views: uint8 [3,S,S] each, or [B,3,S,S]; none if no image was found.
        bad: files that could not be read on the way.
    """

    epoch: int
    row: int | Tensor
    views: list[Tensor]
    bad: list[Fault]


class Views(Dataset[Any]):
    """One sample's views; stateless, so any worker gives the same for (epoch, row).

    Args:
        images: what to read.
        config: the settings.
        photometric: whether views are made to the end; else what `batched.photometric` does is left out.
        views: as for `create_loader`.
    """

    def __init__(self, images: Images, config: Config, *, photometric: bool, views: Sequence[ViewConfig] | None = None) -> None:
        self.images, self.config, self.apply = images, config, single.apply if photometric else single.geometric
        self.views = list(views or derive(config).views)

    def __getitem__(self, request: Request) -> Any:
        """The sample, or the next one that can be read."""
        epoch, row = request
        bad: list[Fault] = []
        for position in positions(self.images, row):
            try:
                with self.images.source.open(position, self.config.loader.max_pixels) as opened:
                    return self.sample(opened, epoch, position, bad)
            except BadImage as fault:
                bad.append((self.images.source.name(position), str(fault)))
        return Sample(epoch, row, [], bad)

    def sample(self, opened: Opened | Decoded, epoch: int, row: int, bad: list[Fault]) -> Any:
        """The sample of an opened image, which is decoded once for all views, as small as the largest of their crops allows."""
        draws = [draw(view, self.config.seed, epoch, np.array([row]), slot, opened.size) for slot, view in enumerate(self.views)]
        drawn = list(zip(self.views, draws, strict=True))
        reduction = single.largest_reduction(opened.reductions, drawn) if self.config.loader.reduced_decode else 1
        image: Image.Image | Tensor = opened.rgb(reduction)
        # Boxes of reduced images have parts of pixels at their edges, which only Pillow takes.
        if self.config.loader.resize == "torch" and reduction == 1:
            image = pil_to_tensor(image)
        return Sample(epoch, row, [self.apply(image, view, draws, 0, reduction) for view, draws in drawn], bad)


def positions(images: Images, row: int) -> Iterator[int]:
    """Where to look for a sample: at `row`, then at the ones behind it, a rule that no worker or rank count changes."""
    return ((row + offset) % len(images) for offset in range(min(_TRIES, len(images))))


def collate(samples: Sequence[Sample]) -> Sample:
    """Samples of one epoch as one; without views if one of them has none."""
    rows, bad = torch.tensor([sample.row for sample in samples]), [fault for sample in samples for fault in sample.bad]
    whole = all(sample.views for sample in samples)
    views = [torch.stack(view) for view in zip(*(sample.views for sample in samples), strict=True)] if whole else []
    return Sample(samples[0].epoch, rows, views, bad)


# Pixels that are decoded at once: 200 MB of colours, however large the pictures of a batch are.
_AT_ONCE = 1 << 26

# What errors say that are no file's fault; torchvision hides even memory that has run out behind a plain RuntimeError.
_BROKEN = ("cuda error", "cuda stream", "out of memory", "can't allocate")

# Refusals, and their share of the files so far, above which the user is told.
_MANY, _SHARE = 16, 0.01

# What makes pixels [3,H,W] of an EXIF orientation upright.
_TURNS: dict[int, Callable[[Tensor], Tensor]] = {
    2: lambda x: x.flip(2),
    3: lambda x: x.flip(1, 2),
    4: lambda x: x.flip(1),
    5: lambda x: x.transpose(1, 2),
    6: lambda x: x.transpose(1, 2).flip(2),
    7: lambda x: x.transpose(1, 2).flip(1, 2),
    8: lambda x: x.transpose(1, 2).flip(1),
}


class Jpeg(NamedTuple):
    """The file of one sample, in the place of its views; its bytes are uint8 [n], its size (height, width) upright."""

    epoch: int
    row: int
    data: Tensor
    size: tuple[int, int]
    turn: int
    bad: list[Fault]


class Files(NamedTuple):
    """The samples of a batch, some as files and the others, which are for Pillow, as views.

    Attributes:
        epoch: which epoch's views they are.
        row: [B] int64 positions in the data set.
        places: [J] int64, which of the B are files.
        data: uint8, the files one behind another: many small tensors would each take a file handle on their way.
        lengths: of the J files, in bytes.
        sizes: [J,2] int64 heights and widths, upright.
        turns: EXIF orientations of the J files.
        views: uint8 [B - J,3,S,S] of each view, of the others in their order; none if J is B.
        bad: files that could not be read on the way.
    """

    epoch: int
    row: Tensor
    places: Ints
    data: Tensor
    lengths: list[int]
    sizes: Ints
    turns: list[int]
    views: list[Tensor]
    bad: list[Fault]


class Bytes(Views):
    """Samples as JPEG files where that is what they are, else as views without their photometric half."""

    def __init__(self, images: Images, config: Config, views: Sequence[ViewConfig] | None = None) -> None:
        super().__init__(images, config, photometric=False, views=views)

    def sample(self, opened: Opened | Decoded, epoch: int, row: int, bad: list[Fault]) -> Jpeg | Sample:
        """The file, checked up to its header, or the views of what is for Pillow."""
        found = opened.jpeg()
        if found is None:
            made: Sample = super().sample(opened, epoch, row, bad)
            return made
        return Jpeg(epoch, row, torch.frombuffer(bytearray(found), dtype=torch.uint8), opened.size, opened.turn, bad)


def collate_files(samples: Sequence[Jpeg | Sample]) -> Files | Sample:
    """Samples of one epoch as one; without files and views if one of them has neither."""
    rows, bad = torch.tensor([sample.row for sample in samples]), [fault for sample in samples for fault in sample.bad]
    files = [sample for sample in samples if isinstance(sample, Jpeg)]
    others = [sample for sample in samples if isinstance(sample, Sample)]
    if not files:
        return collate(others)
    if not all(sample.views for sample in others):
        return Sample(samples[0].epoch, rows, [], bad)
    return Files(
        samples[0].epoch,
        rows,
        np.array([place for place, sample in enumerate(samples) if isinstance(sample, Jpeg)], np.int64),
        torch.cat([file.data for file in files]),
        [len(file.data) for file in files],
        np.array([file.size for file in files], np.int64),
        [file.turn for file in files],
        collate(others).views if others else [],
        bad,
    )


class Decoder:
    """Makes the views of `Files`, but for their photometric half, on the device.

    Args:
        images: what the files are of: one that is refused is read again by Pillow, or replaced as it says.
        config: the settings.
        device: where views are wanted.
        views: as for `create_loader`.

    Attributes:
        notice: one line, once so many files are refused that it costs time; None until then.

    Raises:
        ConfigError: if JPEGs cannot be decoded there.
    """

    def __init__(self, images: Images, config: Config, device: torch.device, views: Sequence[ViewConfig] | None = None) -> None:
        self.pillow = Views(images, config, photometric=False, views=views)
        self.device, self.seed = device, config.seed
        self.seen = self.refused = 0
        self.notice: str | None = None
        self.where = device if device.type == "cuda" else torch.device("cpu")
        probe = io.BytesIO()
        Image.new("RGB", (16, 16)).save(probe, "JPEG")
        try:
            self._call([torch.frombuffer(bytearray(probe.getvalue()), dtype=torch.uint8)])
        except (RuntimeError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"loader.decoder: torchvision cannot decode JPEG on {self.where} ({reason}); use pillow") from error

    def views(self, files: Files) -> Sample:
        """The sample with uint8 views [B,3,S,S] on the device; its rows are those of what was read in the end."""
        count, rows, bad = len(files.row), files.row.clone(), list(files.bad)
        views = [torch.empty(count, 3, v.size, v.size, dtype=torch.uint8, device=self.device) for v in self.pillow.views]
        others = np.setdiff1d(np.arange(count), files.places)
        for view, given in zip(views, files.views, strict=False):
            _put(view, others, given)
        refused = self._decoded(files, views)
        self._count(len(files.places), len(refused))
        for number in refused:
            place = files.places[number]
            sample: Sample = self.pillow[files.epoch, int(rows[place])]
            bad += sample.bad
            if not sample.views:
                return sample._replace(row=rows, bad=bad)
            rows[place] = sample.row
            for view, given in zip(views, sample.views, strict=True):
                _put(view, np.array([place]), given[None])
        return Sample(files.epoch, rows, views, bad)

    def _count(self, seen: int, refused: int) -> None:
        self.seen, self.refused = self.seen + seen, self.refused + refused
        if self.notice is None and self.refused >= _MANY and self.refused > _SHARE * self.seen:
            self.notice = (
                f"{self.refused} of the first {self.seen} JPEGs were refused by torchvision on {self.where} and decoded by Pillow "
                "in the main process, which is slow; try loader.decoder pillow"
            )

    def _decoded(self, files: Files, views: list[Tensor]) -> list[int]:
        """Put the views of all files where they belong; returns the numbers of those that were refused."""
        settings, refused = self.pillow.views, list[int]()
        rows, data = files.row.numpy()[files.places], torch.split(files.data, files.lengths)
        draws = [draw(v, self.seed, files.epoch, rows, slot, files.sizes) for slot, v in enumerate(settings)]
        for numbers in _chunks(files.sizes):
            images = dict[int, Tensor]()
            for number, found in zip(numbers, self._decode([data[number] for number in numbers]), strict=True):
                image = None if found is None else _upright(found, files.turns[number], files.sizes[number])
                if image is None:
                    refused.append(number)
                else:
                    images[number] = image
            good = list(images)
            for view, setting, drawn in zip(views, settings, draws, strict=True):
                if good:
                    crops = torch.stack([_crop(image, drawn.crop[number], setting.size) for number, image in images.items()])
                    _put(view, files.places[good], _moved(crops.to(self.device), setting, drawn.take(good)))
        return refused

    def _decode(self, files: list[Tensor]) -> list[Tensor | None]:
        """[3,H,W] uint8 of each file as it lies; None for one that is refused."""
        try:
            return list(self._call(files))
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or any(sign in str(error).lower() for sign in _BROKEN):
                raise
            half = len(files) // 2  # which one it was is not said
            return [*self._decode(files[:half]), *self._decode(files[half:])] if half else [None]

    def _call(self, files: list[Tensor]) -> list[Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer torchvisions announce a successor
            made: list[Tensor] = torchvision.io.decode_jpeg(files, torchvision.io.ImageReadMode.RGB, self.where)
        return made


def _chunks(sizes: Ints) -> Iterator[range]:
    """The numbers of consecutive images of `sizes` [J,2] that are decoded at once."""
    start, pixels = 0, 0
    for number, area in enumerate(sizes.prod(axis=1).tolist()):
        if pixels and pixels + area > _AT_ONCE:
            yield range(start, number)
            start, pixels = number, 0
        pixels += area
    yield range(start, len(sizes))


def _upright(image: Tensor, turn: int, size: Ints) -> Tensor | None:
    """The image [3,H,W] turned; None if it is not of the size that its header says."""
    turned = _TURNS[turn](image) if turn in _TURNS else image
    return turned if tuple(turned.shape) == (3, *size) else None


def _crop(image: Tensor, box: Ints, size: int) -> Tensor:
    """The box (top, left, height, width) of an image [3,H,W] as uint8 [3,size,size]."""
    cropped: Tensor = F.resized_crop(image, *box.tolist(), [size, size], antialias=True)
    return cropped


def _moved(crops: Tensor, view: ViewConfig, draws: Draws) -> Tensor:
    """Affine and flip of what is cropped already; uint8 [B,3,S,S] to the same."""
    whole = dataclasses.replace(view, scale=None)
    return batched.geometric(crops, whole, draws).mul_(255).round_().to(torch.uint8)


def _put(view: Tensor, places: Ints, given: Tensor) -> None:
    view.index_copy_(0, send(torch.as_tensor(places), view.device), send(given, view.device))


# Of one view of all the images of a stretch; a handful of such blocks lives at a time.
_VIEW_BYTES = 256 << 20


class Resident:
    """Images held as uint8 on the device, views made there in batches, without workers.

    A GPU computes the views of one step faster than the host can ask for them, operation by operation; so those of several
    steps are made in one go.

    Args:
        views: as for `create_loader`.
    """

    def __init__(
        self, images: Images, config: Config, plan: Plan, device: torch.device, views: Sequence[ViewConfig] | None = None
    ) -> None:
        assert isinstance(images.source, Pixels)
        self.plan, self.config, self.device = plan, config, device
        self.pixels = images.source.tensor.to(device)
        self.views = list(views or derive(config).views)
        self.ahead = config.loader.views_ahead or (self._fitting(8) if device.type == "cuda" else 1)

    def _fitting(self, most: int) -> int:
        """Steps, at most `most`, whose largest view takes no more than a part of a GPU's memory."""
        side = max(view.size for view in self.views)
        return max(1, min(most, _VIEW_BYTES // (self.plan.share * self.plan.parts * 3 * side * side * 4)))

    def stream(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """The parts of each step."""
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
        """How many steps' views are made in one go with those of this step."""
        epoch = self.plan.steps_per_epoch
        within = step % epoch
        return min(self.ahead, epoch - (within - within % self.ahead))

    def _stretch(self, steps: list[tuple[int, list[np.ndarray]]]) -> Iterator[list[Batch]]:
        """The parts of some steps of one epoch."""
        rows = np.concatenate([part for _, parts in steps for part in parts])
        ids = send(torch.from_numpy(rows), self.device)
        views = self._views(steps[0][0], rows, self.pixels[ids])
        share, parts = self.plan.share, self.plan.parts
        for first in range(0, len(steps) * parts, parts):
            cuts = [slice(part * share, (part + 1) * share) for part in range(first, first + parts)]
            yield [Batch(ids[cut], views[0][cut], [view[cut] for view in views[1:]]) for cut in cuts]

    def _views(self, epoch: int, rows: np.ndarray, images: Tensor) -> list[Tensor]:
        size = (int(images.shape[-2]), int(images.shape[-1]))
        made = []
        for slot, view in enumerate(self.views):
            draws = draw(view, self.plan.seed, epoch, rows, slot, size)
            made.append(batched.normalise(batched.apply(images, view, draws), *self.config.views.statistics()))
        return made


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
        self.views = list(views or derive(config).views)
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
        moved = [batched.normalise(view, *self.config.views.statistics()) for view in moved]
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


def create_loader(
    images: Images, config: Config, plan: Plan, device: torch.device, views: Sequence[ViewConfig] | None = None
) -> Resident | FromFiles:
    """The loader that `loader.path` asks for.

    Args:
        images: what to read.
        config: the settings.
        plan: which samples each step sees.
        device: where batches are wanted.
        views: what to make of each image, the first as `Batch.weak`, the others as `Batch.strong`; None: the views of `config`.

    Raises:
        DataError: if there are fewer images than one batch.
        ConfigError: if files are asked to be resident, or images in memory to be cached.
    """
    if plan.steps_per_epoch == 0:
        raise DataError(
            f"{images.name}: {plan.count} usable images, batch is {plan.batch_size}; "
            f"lower batch_size to {max(2, plan.count)} or less, or add images"
        )
    path = config.loader.path
    if path == "resident" and not images.in_memory:
        raise ConfigError("loader.path: resident is for data sets held in memory; use files for folders and lists")
    if config.loader.cache is not None and images.in_memory:
        raise ConfigError(f"loader.cache: is for folders and lists of files, {images.name} is held in memory; use null")
    if path == "resident" or (path == "auto" and images.in_memory):
        return Resident(images, config, plan, device, views)
    return FromFiles(images, config, plan, device, views)
