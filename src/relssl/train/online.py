"""Measurements while training: figures of the features that need no labels, and kNN for sets with labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from relssl.data.images import Images, Pixels
from relssl.data.loader import Loader, Plan, worker_count
from relssl.data.plain import PlainView, Reader
from relssl.engine import Engine
from relssl.evaluation.features import LabelledFeatures, evaluating, extract, unit
from relssl.evaluation.knn import knn_accuracy
from relssl.evaluation.pairs import LabelledPair, choose
from relssl.method.base import unwrapped
from relssl.method.health import effective_rank, lidar, spread
from relssl.settings.run import Config, derive
from relssl.train.loggers import pictures
from relssl.train.state import State

_IMAGES, _BATCH = 512, 128  # images that the figures without labels are of
_VIEWS, _NEAR = 4, 10  # strong views of each, and nearest neighbours


class Online:
    """What is measured before the first step and while training.

    Args:
        images: those of the run, of which up to 512 serve the figures without labels.
        pair: for kNN; its labels reach nothing but this report.
    """

    def __init__(self, images: Images, config: Config, pair: LabelledPair | None = None) -> None:
        workers = worker_count(config.loader.workers, config.engine.devices)
        self.reader = Reader(PlainView.of(config.views), workers, config.loader.max_pixels)
        self.images = choose(images, min(_IMAGES, len(images) - len(images) % _BATCH or len(images)), config.seed)
        self.config, self.pair = config, pair
        networks = 1 + derive(config).traits.teacher
        # Images that pass through a network.
        self.passes = (1 + _VIEWS) * len(self.images) + (0 if pair is None else networks * (len(pair.bank) + len(pair.test)))

    def measure(self, state: State, engine: Engine) -> dict[str, float]:
        """Measure the present networks for a row.

        Returns:
            feature_rank: effective rank of the student's features, centred.
            neighbour_stability: mean share of an image's 10 nearest neighbours that are those of the last time, kept in the state.
            lidar, feature_alignment, feature_uniformity: of 4 strong views of each image, the same ones each time.
            knn_top1, knn_teacher_top1: top-1 in percent at `log.knn`, where there are labels, and a teacher.
        """
        student = unwrapped(state.model.student).backbone
        vectors, views = extract(student, self.images, self.reader, engine).vectors, self._strong(student, engine)
        rows, near = unit(vectors), min(_NEAR, len(vectors) - 1)
        nearest = (rows @ rows.T).fill_diagonal_(-torch.inf).topk(near).indices
        figures = {"feature_rank": float(effective_rank(vectors - vectors.mean(dim=0))), "lidar": float(lidar(views))}
        sides = unit(views.flatten(end_dim=1)).view_as(views)
        figures["feature_alignment"] = float((sides - sides.roll(1, dims=1)).square().sum(dim=-1).mean())
        figures["feature_uniformity"] = float(spread(sides[:, 0])["uniformity"])
        if state.neighbours:
            before = torch.tensor([[int(each) for each in line.split()] for line in state.neighbours])
            shared = (nearest[:, :, None] == before[:, None]).any(dim=-1)
            figures["neighbour_stability"] = float(shared.float().mean())
        state.neighbours = [" ".join(map(str, line)) for line in nearest.tolist()]
        figures = {name: round(value, 4) for name, value in figures.items()}
        if self.pair is not None:
            figures["knn_top1"] = self._top1(self.pair, student, engine)
            if state.model.teacher is not None:
                figures["knn_teacher_top1"] = self._top1(self.pair, state.model.teacher.backbone, engine)
        return figures

    def baselines(self, state: State, engine: Engine) -> dict[str, float]:
        """Measure the networks before they train; with labels a frozen teacher, and for sets in memory the pixels themselves,
        "knn_raw_pixels", too."""
        figures = self.measure(state, engine)
        if self.pair is not None and state.model.given is not None:
            teacher: Any = state.model.given.backbone
            reader = replace(self.reader, view=teacher.transform)
            figures["knn_teacher_top1"] = self._top1(self.pair, teacher, engine, reader)
        if self.pair is not None and all(isinstance(images.source, Pixels) for images in (self.pair.bank, self.pair.test)):
            figures["knn_raw_pixels"] = self._score(self.pair, *map(_pixels, (self.pair.bank, self.pair.test)))
        return figures

    def projected(self, state: State, engine: Engine) -> dict[str, Any]:
        """Return features with their images, as TensorBoard's projector takes them."""
        features = extract(unwrapped(state.model.student).backbone, self.images, self.reader, engine)
        labels = None if self.images.labels is None else self.images.labels[features.rows].tolist()
        shown = [pictures(views) for _, views, _ in self.reader.batches(self.images)]
        return {"mat": features.vectors, "metadata": labels, "label_img": torch.cat(shown)}

    @torch.no_grad()
    def _strong(self, backbone: nn.Module, engine: Engine) -> Tensor:
        """The features of strong views, [N, 4, F]; an epoch of a loader gives one of each image."""
        config, count = self.config, len(self.images)
        plan, view = Plan(count, min(_BATCH, count), seed=config.seed), (derive(config).strong or derive(config).views)[0]
        loader = Loader(self.images, [view], plan, engine.device, config.views.statistics(), config.loader, config.engine.devices)
        features = []
        with evaluating(backbone):
            for (batch,) in loader.stream(0, _VIEWS * plan.steps_per_epoch):
                with engine.autocast():
                    features.append(backbone(engine.place(batch.weak)).float().cpu())
        order = torch.stack([torch.from_numpy(plan.order(epoch)).argsort() for epoch in range(_VIEWS)])
        views = torch.cat(features).view(_VIEWS, count, -1)
        return torch.stack([view[rows] for view, rows in zip(views, order, strict=True)], dim=1)

    def _top1(self, pair: LabelledPair, backbone: nn.Module, engine: Engine, reader: Reader | None = None) -> float:
        sides = []
        for images in (pair.bank, pair.test):
            features = extract(backbone, images, reader or self.reader, engine)
            assert images.labels is not None
            sides.append((features.vectors, torch.from_numpy(images.labels[features.rows])))
        return self._score(pair, *sides)

    def _score(self, pair: LabelledPair, bank: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
        return round(knn_accuracy(LabelledFeatures(*bank, *test, classes=pair.classes), *self.config.log.knn)["top1"], 4)


def _pixels(images: Images) -> tuple[Tensor, Tensor]:
    assert isinstance(images.source, Pixels) and images.labels is not None
    return images.source.tensor.flatten(1).float(), torch.from_numpy(images.labels)
