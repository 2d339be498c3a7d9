"""What all parts of a benchmark are told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """The extent of a measurement.

    Attributes:
        rounds: turns each contender is given.
        threads: processor threads of a training process.
        workers: loader processes of every contender that has a loader.
        memory: keys in the memory of the small setting; None for the recipe's.
        images: a folder of JPEGs for the files part; None to generate some.
        tiny: try the code with counts and networks so small that the figures mean nothing.
    """

    rounds: int
    threads: int
    workers: int
    memory: int | None
    images: Path | None
    tiny: bool

    def pick(self, full: int, tiny: int) -> int:
        """A count, for measuring or for a trial."""
        return tiny if self.tiny else full
