"""How long a run waits for its data."""

from __future__ import annotations

import time
from collections.abc import Iterator

from relssl.data.loaders import Batch


class Stopwatch:
    """Seconds spent waiting for data, out of all."""

    def __init__(self) -> None:
        self.begun, self.waited = time.perf_counter(), 0.0

    def timed(self, batches: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
        """The same batches, with the time to get each one counted."""
        while True:
            begun = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - begun
            if batch is None:
                return
            yield batch

    def split(self) -> tuple[float, float]:
        """(seconds, share of them spent waiting) since the last split."""
        now = time.perf_counter()
        seconds, waited = now - self.begun, self.waited
        self.begun, self.waited = now, 0.0
        return seconds, waited / max(seconds, 1e-9)
