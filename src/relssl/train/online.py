"""kNN while training, for sets with labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from relssl.data.images import Images, Pixels
from relssl.data.loader import worker_count
from relssl.data.plain import PlainView, Reader
from relssl.engine import Engine
from relssl.evaluation.features import LabelledFeatures, extract
from relssl.evaluation.knn import knn_accuracy
from relssl.evaluation.pairs import LabelledPair
from relssl.method.base import Method, unwrapped
from relssl.settings.run import Config


class OnlineKnn:
    """Student and teacher on a labelled pair; these labels reach nothing but this report."""

    def __init__(self, pair: LabelledPair, config: Config) -> None:
        self.pair, self.knn = pair, config.log.knn
        workers = worker_count(config.loader.workers, config.engine.devices)
        self.reader = Reader(PlainView.of(config.views), workers, config.loader.max_pixels)

    def measure(self, model: Method, engine: Engine) -> dict[str, float]:
        """Measure top-1 in percent at `log.knn`: {"knn_top1": student, "knn_teacher_top1": teacher, if there is one}."""
        figures = {"knn_top1": self._top1(unwrapped(model.student).backbone, engine)}
        if model.teacher is not None:
            figures["knn_teacher_top1"] = self._top1(model.teacher.backbone, engine)
        return figures

    def baselines(self, model: Method, engine: Engine) -> dict[str, float]:
        """Measure the untrained networks, and for sets in memory the pixels themselves, "knn_raw_pixels"."""
        figures, sides = self.measure(model, engine), (self.pair.bank, self.pair.test)
        if all(isinstance(images.source, Pixels) for images in sides):
            figures["knn_raw_pixels"] = self._score(*map(_pixels, sides))
        return figures

    def _top1(self, backbone: nn.Module, engine: Engine) -> float:
        sides = []
        for images in (self.pair.bank, self.pair.test):
            features = extract(backbone, images, self.reader, engine)
            assert images.labels is not None
            sides.append((features.vectors, torch.from_numpy(images.labels[features.rows])))
        return self._score(*sides)

    def _score(self, bank: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
        return round(knn_accuracy(LabelledFeatures(*bank, *test, classes=self.pair.classes), *self.knn)["top1"], 4)


def _pixels(images: Images) -> tuple[Tensor, Tensor]:
    assert isinstance(images.source, Pixels) and images.labels is not None
    return images.source.tensor.flatten(1).float(), torch.from_numpy(images.labels)
