"""Evaluations beside scikit-learn: the same results, and what they take in time and memory; and a detector's training.

    python benchmarks/evaluate.py [--only knn,probe,detection] [--run RUN] [--out FILE]

`knn`: 10,000 queries in a bank of 50,000, both of 512 dimensions, beside brute force. `probe`: logistic regression on the same
features, at one penalty and with the penalty chosen. `detection`: mean average precision
on drawn shapes after one step, a quarter of a training and all of it, from the run's backbone or a resnet18 of random weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor

import relssl
from contenders import Measures, Record, Work, measure, measure_parts, options, show
from relssl.data.plain import PlainView, Reader
from relssl.engine import Engine
from relssl.evaluation.detection import detection
from relssl.evaluation.features import LabelledFeatures
from relssl.evaluation.knn import neighbours, votes
from relssl.evaluation.metrics import Bootstrap
from relssl.evaluation.probe import hold_out, probe
from relssl.evaluation.result import Task
from relssl.method.backbones import create_backbone
from relssl.settings.evaluation import DetectionConfig, ProbeConfig
from relssl.weights.spec import BackboneSpec

K, TEMPERATURE = 20, 0.07
SIDE = 96  # of the drawn shapes' images
VIEW = PlainView(SIDE, 1.0, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Categories, numbered with gaps and out of order, as COCO's are; their corners, and the angle of the first.
CATEGORIES = {7: "square", 3: "disc", 12: "triangle"}
_OUTLINES = {7: (4, np.pi / 4), 3: (24, 0.0), 12: (3, -np.pi / 2)}
Points = tuple[Tensor, Tensor, Tensor, Tensor]  # bank [N,F], labels [N], test [M,F], truth [M]


def blobs(bank: int, test: int, dims: int, classes: int = 10) -> Points:
    """Draw overlapping classes around random centres."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (bank + test,), generator=generator)
    labels[:classes] = torch.arange(classes)
    centres = torch.randn(classes, dims, generator=generator)
    points = centres[labels] * (2.5 / dims**0.5) + torch.randn(bank + test, dims, generator=generator)
    return points[:bank], labels[:bank], points[bank:], labels[bank:]


def knn_here(points: Points, strength: None = None) -> float:
    """Classify by our vote."""
    similarity, index = neighbours(points[0], points[2], K)
    scores = votes(similarity, points[1][index], TEMPERATURE, int(points[1].max()) + 1)
    return 100 * float((scores.argmax(dim=1) == points[3]).float().mean())


def knn_sklearn(points: Points, strength: None = None) -> float:
    """Classify by scikit-learn's form of the same vote."""
    bank, labels, test, truth = (each.numpy() for each in points)
    model = KNeighborsClassifier(K, algorithm="brute", metric="cosine", weights=lambda far: np.exp((1 - far) / TEMPERATURE))
    return 100 * float(model.fit(bank, labels).score(test, truth))


def probe_here(points: Points, strength: float | None) -> float:
    """Fit and test our probe, scaling included; at a strength, or at one chosen on held-out images."""
    settings = ProbeConfig() if strength is None else ProbeConfig(strengths=(strength,))
    classes = int(max(points[1].max(), points[3].max())) + 1
    (finding,) = probe(LabelledFeatures(*points, classes=classes), settings, Bootstrap(100))
    return finding.figures["top1"]


def probe_sklearn(points: Points, strength: float | None) -> float:
    """Fit and test scikit-learn's logistic regression, at the same penalties and on the same held-out images."""
    scaler, settings, labels = StandardScaler(), ProbeConfig(), points[1].numpy()
    bank, test, truth = scaler.fit_transform(points[0].numpy()), scaler.transform(points[2].numpy()), points[3].numpy()
    model = LogisticRegression(C=1 / ((strength or 1) * len(labels)), max_iter=settings.iterations)
    if strength is None:
        out = hold_out(points[1], int(labels.max()) + 1, settings.held_out, 0)[0].numpy()
        costs, split = [1 / (each * int((~out).sum())) for each in settings.strengths], [((~out).nonzero()[0], out.nonzero()[0])]
        model = LogisticRegressionCV(Cs=costs, cv=split, max_iter=settings.iterations, scoring="accuracy")
    with warnings.catch_warnings(action="ignore"):  # of iterations, and of names that change between versions
        return 100 * float(model.fit(bank, labels).score(test, truth))


TASKS: dict[str, dict[str, Callable[..., float]]] = {
    "knn": {"relssl": knn_here, "scikit-learn": knn_sklearn},
    "probe": {"relssl": probe_here, "scikit-learn": probe_sklearn},
}
# The penalties that each is measured at; None: chosen among several.
WAYS: dict[str, dict[str, float | None]] = {
    "knn": {f"k {K}": None},
    "probe": {"one penalty, 0.001": 1e-3, "the penalty chosen": None},
}


def labelling(task: str, name: str, sizes: tuple[int, int, int], threads: int, strength: float | None = None) -> Work:
    """Return a fit, if any, and the labelling of all test points as work, of random points."""
    torch.set_num_threads(threads)
    threadpool_limits(threads)
    points, facts = blobs(*sizes), dict[str, Any]()

    def run(count: int) -> None:
        for _ in range(count):
            facts["top1"] = round(TASKS[task][name](points, strength), 2)

    return Work(run, len(points[2]), facts)


def measure_labelling(args: argparse.Namespace, task: str) -> Record:
    """Compare kNN with scikit-learn's brute force, or the probe with its logistic regression."""
    sizes = (500, 100, 16) if args.tiny else (50_000, 10_000, 512)
    results: Record = {"sizes": sizes}
    for title, strength in WAYS[task].items():
        rivals = {name: partial(labelling, task, name, sizes, args.threads, strength) for name in TASKS[task]}
        results[title] = measure(args, f"{task}, {title}", rivals, ["scikit-learn"])
    return results


class Shape(NamedTuple):
    """One object: its category, its outline [corners, 2] in whole pixels, and its edges left, top, right, bottom."""

    category: int
    corners: npt.NDArray[np.float64]
    edges: tuple[int, ...]


def draw(generator: np.random.Generator, side: int) -> tuple[Image.Image, list[Shape]]:
    """Draw an image of noise and, in one to four of its quarters, a square, disc or triangle each.

    Colours and sizes are drawn alike for all classes, so that a class shows in its shape alone.
    """
    image, shapes = Image.fromarray(generator.integers(60, 196, (side, side, 3), dtype=np.uint8)), list[Shape]()
    for quarter in generator.permutation(4)[: generator.integers(1, 5)]:
        category, radius = int(generator.choice(list(CATEGORIES))), generator.uniform(0.1, 0.22) * side
        corners, first = _OUTLINES[category]
        angle = first + np.linspace(0, 2 * np.pi, corners, endpoint=False)
        centre = side / 2 * np.array([quarter % 2, quarter // 2]) + generator.uniform(radius + 1, side / 2 - radius - 1, 2)
        outline = np.round(centre + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1))
        colour = generator.choice([0, 255], 3) if generator.random() < 0.5 else generator.integers(0, 256, 3)
        ImageDraw.Draw(image).polygon([(float(x), float(y)) for x, y in outline], fill=tuple(int(c) for c in colour))
        shapes.append(Shape(category, outline, tuple(int(edge) for edge in (*outline.min(axis=0), *outline.max(axis=0)))))
    return image, shapes


def write_coco(folder: Path, *, train: int, test: int, side: int, seed: int = 0) -> None:
    """Write `train` and `test` images of `side` pixels as train/ and val/, called 0000.png, 0001.png, ..., with annotations."""
    generator = np.random.Generator(np.random.PCG64(seed))
    (folder / "annotations").mkdir(parents=True)
    for part, count in (("train", train), ("val", test)):
        (folder / part).mkdir()
        images, annotations = [], list[Record]()
        for number in range(10, 10 + count):
            image, shapes = draw(generator, side)
            image.save(folder / part / f"{number - 10:04}.png")
            images.append({"id": number, "file_name": f"{number - 10:04}.png", "width": side, "height": side})
            for category, corners, (left, top, right, bottom) in shapes:
                about: Record = {"id": len(annotations) + 1, "image_id": number, "category_id": category, "iscrowd": 0}
                about |= {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}
                annotations.append(about | {"segmentation": [corners.ravel().tolist()]})
        categories = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))


def measure_detection(args: argparse.Namespace) -> Record:
    """Train detectors of several lengths on drawn shapes, each from the same start."""
    torch.manual_seed(0)
    backbone, spec = create_backbone("resnet18"), BackboneSpec("resnet18", {}, "standard", VIEW)
    if args.run is not None:
        loaded: Any = relssl.load_backbone(args.run)
        backbone, spec = loaded, loaded.spec
    small: Record = {"min_size": SIDE, "max_size": SIDE, "regions": 32, "frozen_stages": 0, "norm": "train"}
    small |= {"model": "faster-rcnn", "batch_size": 4, "lr": 0.01}
    counts, engine = {"train": 8, "test": 2} if args.tiny else {"train": 240, "test": 60}, Engine.local("auto", "fp32")
    points: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        write_coco(Path(folder, "shapes"), **counts, side=SIDE)
        for epochs in (0.01, 1.5, 6.0):
            settings = DetectionConfig(**small, epochs=epochs)
            task = Task(spec, Reader(VIEW, workers=0), engine, Bootstrap(), lambda line: None)
            (finding,) = detection(backbone, str(Path(folder, "shapes")), settings, task)
            points.append({"step": finding.details["steps"]} | {name: round(v, 2) for name, v in finding.figures.items()})
    show(f"Detection on shapes, {spec.name}", list(points[-1]), [list(point.values()) for point in points])
    weights = "random weights" if args.run is None else args.run.name
    return {"backbone": spec.name, "weights": weights, "settings": small, "images": counts, "points": points}


def main() -> None:
    """Measure the parts asked for."""
    parser = options(__doc__, ("knn", "probe"), "results/evaluate.json")
    parser.add_argument("--run", type=Path, help="run folder or exported file, for detection")
    parts: Measures = {task: partial(measure_labelling, task=task) for task in TASKS}
    measure_parts(parser.parse_args(), {**parts, "detection": measure_detection})


if __name__ == "__main__":
    main()
