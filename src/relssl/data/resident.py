"""Images that fit in memory: held on the device, their views made there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from relssl.config import Config
from relssl.data import batched
from relssl.data.batch import Batch, standardise
from relssl.data.draws import draw
from relssl.data.plan import Plan
from relssl.data.sources import Images
from relssl.data.transfer import send
from relssl.views import ViewConfig

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
        assert images.pixels is not None
        self.plan, self.config, self.device = plan, config, device
        self.pixels = images.pixels.to(device)
        self.views = list(views or config.all_views)
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
            made.append(standardise(batched.apply(images, view, draws), self.config))
        return made
