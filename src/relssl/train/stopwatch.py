"""How long a run waits for its data."""

from __future__ import annotations

import time
from collections.abc import Iterator

from relssl.data.batch import Batch


class Stopwatch:
    """Counts steps, and the seconds spent waiting for their data out of all."""

    def __init__(self) -> None:
        self.begun, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def timed(self, batches: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
        """The same batches, with the time to get each one counted."""
        while True:
            begun = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - begun
            if batch is None:
                return
            self.steps += 1
            yield batch

    def split(self, batch_size: int) -> tuple[float, float]:
        """(images per second, share of the time spent waiting) since the last split."""
        now = time.perf_counter()
        seconds = max(now - self.begun, 1e-9)
        speed, share = self.steps * batch_size / seconds, self.waited / seconds
        self.begun, self.waited, self.steps = now, 0.0, 0
        return speed, share
