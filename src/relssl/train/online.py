"""kNN while training, for sets with labels."""

from __future__ import annotations

from typing import Any

from relssl.config import Config
from relssl.engine import Engine
from relssl.evaluation.protocol import LabelledPair, knn, raw_pixel_knn
from relssl.method.ressl import ReSSL, unwrapped


class OnlineKnn:
    """Student and teacher on a labelled pair; labels reach nothing but this report."""

    def __init__(self, pair: LabelledPair, config: Config) -> None:
        self.pair, self.config = pair, config

    def measure(self, model: ReSSL, engine: Engine) -> dict[str, float]:
        """Top-1 in percent at `log.knn`: {"knn_top1": student, "knn_teacher_top1": teacher}."""
        figures = {}
        for name, encoder in (("knn_top1", unwrapped(model.student)), ("knn_teacher_top1", model.teacher)):
            figures[name] = _main(
                knn(encoder.backbone, self.pair, self.config, engine.device, engine.autocast(), [self.config.log.knn])
            )
        return figures

    def baselines(self, model: ReSSL, engine: Engine) -> dict[str, float]:
        """The untrained networks, and for sets in memory the pixels themselves, "knn_raw_pixels"."""
        pixels = raw_pixel_knn(self.pair, [self.config.log.knn])
        return self.measure(model, engine) | ({} if pixels is None else {"knn_raw_pixels": _main(pixels)})


def _main(scores: dict[str, Any]) -> float:
    """The top-1 of the one setting asked for."""
    return float(next(iter(scores.values()))["top1"])
