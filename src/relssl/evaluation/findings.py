"""What a protocol found: figures with their intervals, ready for JSON."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Finding:
    """One outcome of a protocol.

    Attributes:
        setting: what tells it from the protocol's other outcomes, such as {"k": 20, "temperature": 0.07}.
        main: the figure to quote, a key of `figures`.
        figures: by name, such as top1, top5, mean_per_class, map, recall_at_1; percent unless its name says otherwise.
        intervals: 95 % intervals [low, high] of some of the figures, in their unit.
        notes: what a reader must know, such as a k that had to be lowered; a sentence each.
        details: how it came about, such as the penalty that was chosen or the figures of each draw; plain JSON.
        correct: bool [M], whether each test image was labelled right, for comparing two findings image by image.
    """

    setting: dict[str, Any]
    main: str
    figures: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    correct: npt.NDArray[np.bool_] | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON; `correct` packed, eight images a byte, as base64."""
        made: dict[str, Any] = {
            "setting": self.setting,
            "main": self.main,
            "figures": {name: round(value, 4) for name, value in self.figures.items()},
            "intervals": {name: [round(low, 4), round(high, 4)] for name, (low, high) in self.intervals.items()},
            "notes": list(self.notes),
            "details": self.details,
        }
        if self.correct is not None:
            made["tested"] = len(self.correct)
            made["correct"] = base64.b64encode(np.packbits(self.correct).tobytes()).decode()
        return made


def unpack(text: str, count: int) -> npt.NDArray[np.bool_]:
    """The `correct` [count] that `Finding.plain` packed; ValueError if it holds another number of images."""
    packed = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(packed) != -(-count // 8):
        raise ValueError(f"holds {len(packed)} bytes, {count} images need {-(-count // 8)}")
    return np.unpackbits(packed, count=count).astype(bool)
