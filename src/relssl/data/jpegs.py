"""JPEG files that workers only read: decoded, turned and cropped on the device, by nvJPEG where that is CUDA."""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torchvision.io
import torchvision.transforms.functional as F
from PIL import Image
from torch import Tensor

from relssl.config import Config
from relssl.data import batched
from relssl.data.decode import Opened
from relssl.data.draws import Draws, Ints, draw
from relssl.data.samples import Fault, Held, Sample, Views, collate
from relssl.data.sources import Images
from relssl.data.transfer import send
from relssl.errors import ConfigError
from relssl.views import ViewConfig

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

    def sample(self, opened: Opened | Held, epoch: int, row: int, bad: list[Fault]) -> Jpeg | Sample:
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
