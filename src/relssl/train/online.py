"""Measurements while training: kNN, for sets with labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from relssl.data.images import Images, Pixels
from relssl.data.loader import worker_count
from relssl.data.plain import PlainView, Reader
from relssl.engine import Engine
from relssl.evaluation.features import LabelledFeatures, extract
from relssl.evaluation.knn import knn_accuracy
from relssl.evaluation.pairs import LabelledPair, choose
from relssl.method.base import Method, unwrapped
from relssl.method.health import effective_rank
from relssl.settings.run import Config


def _reader(config: Config) -> Reader:
    workers = worker_count(config.loader.workers, config.engine.devices)
    return Reader(PlainView.of(config.views), workers, config.loader.max_pixels)


class OnlineRank:
    """The rank of the features, for given weights without labels: how many directions the student's features use."""

    def __init__(self, images: Images, config: Config) -> None:
        self.images, self.reader = choose(images, 512, config.seed), _reader(config)
        self.count = len(self.images)

    def measure(self, model: Method, engine: Engine) -> dict[str, float]:
        """Measure {"feature_rank": effective rank of the student's features, centred}."""
        vectors = extract(unwrapped(model.student).backbone, self.images, self.reader, engine).vectors
        return {"feature_rank": round(float(effective_rank(vectors - vectors.mean(dim=0))), 2)}

    baselines = measure


class OnlineKnn:
    """Student and teacher on a labelled pair; these labels reach nothing but this report."""

    def __init__(self, pair: LabelledPair, config: Config) -> None:
        self.pair, self.knn, self.reader = pair, config.log.knn, _reader(config)
        self.count = len(pair.bank) + len(pair.test)

    def measure(self, model: Method, engine: Engine) -> dict[str, float]:
        """Measure top-1 in percent at `log.knn`: {"knn_top1": student, "knn_teacher_top1": teacher, if there is one}."""
        figures = {"knn_top1": self._top1(unwrapped(model.student).backbone, engine)}
        if model.teacher is not None:
            figures["knn_teacher_top1"] = self._top1(model.teacher.backbone, engine)
        return figures

    def baselines(self, model: Method, engine: Engine) -> dict[str, float]:
        """Measure the networks before they train, a frozen teacher, and for sets in memory the pixels themselves, "knn_raw_pixels"."""
        figures, sides = self.measure(model, engine), (self.pair.bank, self.pair.test)
        if model.given is not None:
            teacher: Any = model.given.backbone
            figures["knn_teacher_top1"] = self._top1(teacher, engine, replace(self.reader, view=teacher.transform))
        if all(isinstance(images.source, Pixels) for images in sides):
            figures["knn_raw_pixels"] = self._score(*map(_pixels, sides))
        return figures

    def _top1(self, backbone: nn.Module, engine: Engine, reader: Reader | None = None) -> float:
        sides = []
        for images in (self.pair.bank, self.pair.test):
            features = extract(backbone, images, reader or self.reader, engine)
            assert images.labels is not None
            sides.append((features.vectors, torch.from_numpy(images.labels[features.rows])))
        return self._score(*sides)

    def _score(self, bank: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
        return round(knn_accuracy(LabelledFeatures(*bank, *test, classes=self.pair.classes), *self.knn)["top1"], 4)


Online = OnlineKnn | OnlineRank  # each with `count`, the images that it looks at


def _pixels(images: Images) -> tuple[Tensor, Tensor]:
    assert isinstance(images.source, Pixels) and images.labels is not None
    return images.source.tensor.flatten(1).float(), torch.from_numpy(images.labels)
