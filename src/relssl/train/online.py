"""Measurements while training: figures of the features that need no labels, and kNN for sets with labels."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from relssl.data.images import Images, Pixels
from relssl.data.loader import lone_workers
from relssl.data.plain import PlainView, Reader
from relssl.engine import Engine
from relssl.evaluation.features import Features, LabelledFeatures, extract, unit
from relssl.evaluation.knn import knn_accuracy
from relssl.evaluation.pairs import LabelledPair, choose, labels_of
from relssl.method.base import unwrapped
from relssl.method.health import effective_rank
from relssl.settings.run import Config, derive
from relssl.train.checkpoint import State
from relssl.train.loggers import pictures
from relssl.train.memory import free_memory

_IMAGES, _NEAR = 512, 10  # images that the figures without labels are of, and nearest neighbours of each


class Online:
    """Measurements before the first step and while training: of up to 512 of the run's images, and kNN on a `pair`, whose labels reach
    nothing but this report."""

    def __init__(self, images: Images, config: Config, pair: LabelledPair | None = None) -> None:
        workers = lone_workers(config.loader.workers, config.engine.devices)
        self.reader = Reader(PlainView.of(config.views), workers, config.loader.max_pixels)
        self.images = choose(images, min(_IMAGES, len(images)), config.seed)
        self.config, self.pair = config, pair
        networks = len(derive(config).networks)
        # Images that pass through a network.
        self.passes = len(self.images) + (0 if pair is None else networks * (len(pair.bank) + len(pair.test)))

    def measure(self, state: State, engine: Engine) -> dict[str, float]:
        """Measure the present networks for a row.

        Returns:
            feature_rank: effective rank of the student's features, centred.
            neighbour_stability: mean share of an image's 10 nearest neighbours that are those of the last time, kept in the state.
            knn_top1, knn_teacher_top1: top-1 in percent at `log.knn`, where there are labels, and a teacher.
        """
        student, teacher = unwrapped(state.model.student).backbone, state.model.teacher
        take = partial(extract, reader=self.reader, engine=engine)
        features = take(student, self.images)
        vectors, places = features.vectors, torch.from_numpy(features.rows)
        rows, near = unit(vectors), min(_NEAR, len(vectors) - 1)
        nearest = places[(rows @ rows.T).fill_diagonal_(-torch.inf).topk(near).indices]
        figures = {"feature_rank": round(float(effective_rank(vectors - vectors.mean(dim=0))), 4)}
        # A line for each image, an empty one where it cannot be read; the others may have changed since.
        lines = dict(zip(places.tolist(), (" ".join(map(str, line)) for line in nearest.tolist()), strict=True))
        before = state.neighbours or []
        before = before if len(before) == len(self.images) else []
        pairs = [(lines[row].split(), {*line.split()}) for row, line in enumerate(before) if line and row in lines]
        if shared := [[each in then for each in now] for now, then in pairs]:
            figures["neighbour_stability"] = round(float(torch.tensor(shared).float().mean()), 4)
        state.neighbours = [lines.get(row, "") for row in range(len(self.images))]
        figures |= self._top1("knn_top1", partial(take, student), engine)
        return figures if teacher is None else figures | self._top1("knn_teacher_top1", partial(take, teacher.backbone), engine)

    def baselines(self, state: State, engine: Engine) -> dict[str, float]:
        """Measure the networks before they train; with labels a frozen teacher, and for sets in memory the pixels themselves,
        "knn_raw_pixels", too."""
        figures, pair = self.measure(state, engine), self.pair
        if state.model.given is not None:
            teacher: Any = state.model.given.backbone
            reader = replace(self.reader, view=teacher.transform)
            figures |= self._top1("knn_teacher_top1", partial(extract, teacher, reader=reader, engine=engine), engine)
        if pair is not None and all(isinstance(images.source, Pixels) for images in (pair.bank, pair.test)):
            figures |= self._top1(
                "knn_raw_pixels", lambda x: Features(x.source.tensor.flatten(1).float(), np.arange(len(x))), engine
            )
        return figures

    def projected(self, state: State, engine: Engine) -> dict[str, Any]:
        """Return features with their images, as TensorBoard's projector takes them."""
        features = extract(unwrapped(state.model.student).backbone, self.images, self.reader, engine)
        labels = None if self.images.labels is None else self.images.labels[features.rows].tolist()
        shown = [pictures(views) for _, views, _ in self.reader.batches(self.images)]
        return {"mat": features.vectors, "metadata": labels, "label_img": torch.cat(shown)}

    def _top1(self, name: str, take: Callable[[Any], Features], engine: Engine) -> dict[str, float]:
        """Return the figure of some features by its name, if there are labels."""
        if self.pair is None:
            return {}
        taken = ((take(images), labels_of(images)) for images in (self.pair.bank, self.pair.test))
        (bank, known), (queries, labels) = ((each.vectors, words[each.rows]) for each, words in taken)
        if engine.device.type == "cuda" and free_memory(engine.device) > 3 * bank.nbytes + 4 * queries.nbytes + (1 << 30):
            queries = queries.to(engine.device)
        both = LabelledFeatures(bank, known, queries, labels, self.pair.classes)
        return {name: round(knn_accuracy(both, *self.config.log.knn)["top1"], 4)}
