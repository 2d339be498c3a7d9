"""Images that fit in memory: held on the device, their views made there."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from relssl.config import Config
from relssl.data import batched
from relssl.data.batch import Batch, standardise
from relssl.data.draws import draw
from relssl.data.plan import Plan
from relssl.data.sources import Images


class Resident:
    """Images held as uint8 on the device, views made there in batches, without workers."""

    def __init__(self, images: Images, config: Config, plan: Plan, device: torch.device) -> None:
        assert images.pixels is not None
        self.plan, self.config, self.device = plan, config, device
        self.pixels = images.pixels.to(device)
        self.views = [config.views.weak, *config.strong_views]

    def stream(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """The parts of each step."""
        for epoch, parts in self.plan.steps(start, stop):
            yield [self._batch(epoch, rows) for rows in parts]

    def _batch(self, epoch: int, rows: np.ndarray) -> Batch:
        ids = torch.from_numpy(rows).to(self.device)
        images = self.pixels[ids]
        size, made = images.shape[-2:], []
        for slot, view in enumerate(self.views):
            draws = draw(view, self.plan.seed, epoch, rows, slot, (int(size[0]), int(size[1])))
            made.append(standardise(batched.apply(images, view, draws), self.config))
        return Batch(ids, made[0], made[1:])
