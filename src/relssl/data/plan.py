"""Which samples each step sees, in an order that depends on the seed and the step alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from relssl.data.draws import uniforms

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
