"""One sample of a set of images, read from its file and viewed in a loader worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from relssl.config import Config
from relssl.data import single
from relssl.data.decode import REDUCTIONS, Opened
from relssl.data.draws import draw
from relssl.data.refusal import BadImage
from relssl.data.sources import Images
from relssl.views import ViewConfig

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
        self.views = list(views or config.all_views)

    def __getitem__(self, request: Request) -> Any:
        """The sample, or the next one that can be read."""
        epoch, row = request
        bad: list[Fault] = []
        for position in positions(self.images, row):
            try:
                with open_image(self.images, position, self.config.loader.max_pixels) as opened:
                    return self.sample(opened, epoch, position, bad)
            except BadImage as fault:
                bad.append(named(self.images, position, fault))
        return Sample(epoch, row, [], bad)

    def sample(self, opened: Opened | Held, epoch: int, row: int, bad: list[Fault]) -> Any:
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


def named(images: Images, position: int, fault: BadImage) -> Fault:
    """The file at a position and what is wrong with it."""
    return str(images.files and images.files[position]), str(fault)


class Held:
    """Pixels that are decoded already, in the place of an opened file."""

    turn, reductions = 1, REDUCTIONS[:1]

    def __init__(self, image: Image.Image) -> None:
        self.image, self.size = image, (image.height, image.width)

    def rgb(self, reduction: int = 1) -> Image.Image:
        """The image."""
        return self.image

    def jpeg(self) -> bytes | None:
        """None: it is no file."""
        return None


@contextmanager
def open_image(images: Images, position: int, max_pixels: int) -> Iterator[Opened | Held]:
    """The image at a position, its size known and its pixels still to be read; BadImage if its file cannot be."""
    if images.files is None:
        assert images.pixels is not None
        yield Held(Image.fromarray(images.pixels[position].permute(1, 2, 0).cpu().numpy()))
    elif images.shrunk is not None:
        yield Held(images.shrunk[position])
    else:
        with Opened(images.files[position], max_pixels) as opened:
            yield opened


def read_image(images: Images, position: int, max_pixels: int) -> Image.Image:
    """The RGB image at a position, whole; BadImage if its file cannot be read."""
    with open_image(images, position, max_pixels) as opened:
        return opened.rgb()


def collate(samples: Sequence[Sample]) -> Sample:
    """Samples of one epoch as one; without views if one of them has none."""
    rows, bad = torch.tensor([sample.row for sample in samples]), [fault for sample in samples for fault in sample.bad]
    whole = all(sample.views for sample in samples)
    views = [torch.stack(view) for view in zip(*(sample.views for sample in samples), strict=True)] if whole else []
    return Sample(samples[0].epoch, rows, views, bad)
