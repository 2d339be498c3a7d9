"""Shrunk images as far as an estimate needs them: to make all of them takes hours, and nothing of it may stay."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from relssl.data.shrinking import place, shrunken
from relssl.data.shrunk import Shrunk
from relssl.evaluation.pairs import choose
from relssl.train.journal import Display
from relssl.train.trainer import Trainer

# Images that stand for all of a set.
_SAMPLE = 256


class Repeated(Shrunk):
    """A few shrunk images over and over, in the place of `count`."""

    def __init__(self, few: Shrunk, count: int) -> None:
        super().__init__(few.folder, few.sizes, few.bad)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> Image.Image:
        return super().__getitem__(position % len(self.sizes))


@contextmanager
def stand_in(trainer: Trainer) -> Iterator[int]:
    """Within, the trainer reads shrunk images, if they are asked for: those of an earlier run, or a few that stand for all.

    Every rank has to call it.

    Yields:
        Bytes that a run would still write to have them all; 0 if it would write none.

    Raises:
        StorageError: if the few do not fit the system's temporary folder.
    """
    config, images = trainer.config, trainer.images
    if config.loader.cache is None:
        yield 0
        return
    there = Shrunk.open(place(images, config))
    if not trainer.engine.largest(int(len(there) < len(images))):
        trainer.read(dataclasses.replace(images, shrunk=there))
        yield 0
        return
    with tempfile.TemporaryDirectory(prefix="relssl-") as folder, Display(1, 0, show=False) as silent:
        # By this process alone, as its neighbours do the same at this time.
        loader = dataclasses.replace(config.loader, cache_folder=folder, workers=0)
        few = shrunken(choose(images, _SAMPLE, config.seed), dataclasses.replace(config, loader=loader), silent)
        trainer.read(dataclasses.replace(images, shrunk=Repeated(few, len(images))))
        yield few.total * (len(images) - len(there)) // len(few)
