"""Evaluations beside scikit-learn: the same results, and what they take in time and memory; and a detector's training.

    python benchmarks/evaluate.py [--only knn,probe,detection] [--run RUN] [--bank BANK.npz --test TEST.npz] [--out FILE]

`knn`: 10,000 queries in a bank of 50,000, both of 512 dimensions, beside brute force. `probe`: logistic regression on features that
`relssl embed` wrote (random ones if none are given), at one penalty and with the penalty chosen. `detection`: mean average precision
on drawn shapes at several points of a training, from the run's backbone or a resnet18 of random weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
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
from contenders import Contender, Record, Work, compare, measure_parts, show, spread, times
from relssl.data.boxes import load
from relssl.data.plain import PlainView, Reader
from relssl.engine import Engine, available_cores
from relssl.evaluation.detection import create_detector, curve, length, measure, train
from relssl.evaluation.features import LabelledFeatures
from relssl.evaluation.knn import neighbours, votes
from relssl.evaluation.metrics import Bootstrap
from relssl.evaluation.probe import hold_out, probe
from relssl.evaluation.result import Task
from relssl.method.backbones import create_backbone
from relssl.settings.evaluation import DetectionConfig, ProbeConfig
from relssl.train.run_folder import environment
from relssl.weights.spec import BackboneSpec

CLASSES = 10
K, TEMPERATURE = 20, 0.07
SIDE = 96  # of the drawn shapes' images
VIEW = PlainView(SIDE, 1.0, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Categories, numbered with gaps and out of order, as COCO's are; their corners, and the angle of the first.
CATEGORIES = {7: "square", 3: "disc", 12: "triangle"}
_OUTLINES = {7: (4, np.pi / 4), 3: (24, 0.0), 12: (3, -np.pi / 2)}
Points = tuple[Tensor, Tensor, Tensor, Tensor]  # bank [N,F], labels [N], test [M,F], truth [M]


def blobs(bank: int, test: int, dims: int) -> Points:
    """Draw overlapping classes around random centres."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (bank + test,), generator=generator)
    labels[:CLASSES] = torch.arange(CLASSES)
    centres = torch.randn(CLASSES, dims, generator=generator)
    points = centres[labels] * (2.5 / dims**0.5) + torch.randn(bank + test, dims, generator=generator)
    return points[:bank], labels[:bank], points[bank:], labels[bank:]


def stored(bank: Path, test: Path) -> Points:
    """Read features and labels that `relssl embed` wrote; images without a label are left out."""
    files = [np.load(path, allow_pickle=False) for path in (bank, test)]
    (features, labels), (tested, truth) = (
        [torch.from_numpy(file[key][file["labels"] >= 0]) for key in ("features", "labels")] for file in files
    )
    return features, labels, tested, truth


def knn_here(points: Points) -> npt.NDArray[Any]:
    """Label the test points by our vote."""
    similarity, index = neighbours(points[0], points[2], K)
    return votes(similarity, points[1][index], TEMPERATURE, CLASSES).argmax(dim=1).numpy()


def knn_brute(points: Points) -> npt.NDArray[Any]:
    """Label the test points by scikit-learn's form of the same vote."""
    bank, labels, test, _ = (each.numpy() for each in points)
    model = KNeighborsClassifier(
        K, algorithm="brute", metric="cosine", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE)
    )
    guess: npt.NDArray[Any] = model.fit(bank, labels).predict(test)
    return guess


def probe_here(points: Points, strength: float | None) -> Record:
    """Fit and test our probe, scaling included; at a strength, or at one chosen on held-out images."""
    settings = ProbeConfig() if strength is None else ProbeConfig(strengths=(strength,))
    classes = int(max(points[1].max(), points[3].max())) + 1
    (finding,) = probe(LabelledFeatures(*points, classes=classes), settings, Bootstrap(100))
    return {"top1": finding.figures["top1"], "strength": finding.details["strength"]}


def probe_sklearn(points: Points, strength: float | None) -> Record:
    """Fit and test scikit-learn's logistic regression, at the same penalties and on the same held-out images."""
    scaler, settings, labels = StandardScaler(), ProbeConfig(), points[1].numpy()
    bank, test, truth = scaler.fit_transform(points[0].numpy()), scaler.transform(points[2].numpy()), points[3].numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of iterations, and of names that change between versions
        if strength is not None:
            model = LogisticRegression(C=1 / (strength * len(labels)), max_iter=settings.iterations).fit(bank, labels)
            return {"top1": 100 * float(model.score(test, truth)), "strength": strength}
        out = hold_out(points[1], int(labels.max()) + 1, settings.held_out, 0)[0].numpy()
        costs = [1 / (each * int((~out).sum())) for each in settings.strengths]
        split = [((~out).nonzero()[0], out.nonzero()[0])]
        model = LogisticRegressionCV(Cs=costs, cv=split, max_iter=settings.iterations, scoring="accuracy").fit(bank, labels)
        chosen = settings.strengths[int(np.argmin(np.abs(np.array(costs) - float(np.ravel(model.C_)[0]))))]
        return {"top1": 100 * float(model.score(test, truth)), "strength": chosen}


def labelling(task: str, name: str, source: tuple[Any, ...], threads: int, strength: float | None = None) -> Work:
    """Return a fit, if any, and the labelling of all test points as work: of random points of such sizes, or of two files."""
    torch.set_num_threads(threads)
    threadpool_limits(threads)
    points, facts = (blobs if isinstance(source[0], int) else stored)(*source), dict[str, Any]()

    def run(count: int) -> None:
        for _ in range(count):
            if task == "knn":
                guess = (knn_here if name == "relssl" else knn_brute)(points)
                facts["top1"] = 100 * float((guess == points[3].numpy()).mean())
            else:
                facts.update((probe_here if name == "relssl" else probe_sklearn)(points, strength))

    return Work(run, len(points[2]), facts)


def measure_labelling(args: argparse.Namespace, task: str) -> Record:
    """Compare kNN with scikit-learn's brute force, or the probe with its logistic regression."""
    source: tuple[Any, ...] = (500, 100, 16) if args.tiny else (50_000, 10_000, 512)
    if task == "probe" and args.bank is not None:
        source = (args.bank, args.test)
    results: Record = {"source": [str(each) for each in source]}
    penalties: Record = {f"k {K}": None} if task == "knn" else {"one penalty, 0.001": 1e-3, "the penalty chosen": None}
    for title, strength in penalties.items():
        shared = {"task": task, "source": source, "threads": args.threads, "strength": strength}
        both = [Contender(name, labelling, {"name": name} | shared) for name in ("relssl", "scikit-learn")]
        results[title] = records = compare(both, args.rounds, 1)
        rows: list[list[object]] = []
        for name, record in records.items():
            if "failed" in record:
                rows.append([name, record["failed"], "-", "-", "-", "-"])
                continue
            (before, most), facts, faster = record["memory_mib"], record["facts"], spread(times(records, name, "scikit-learn"))
            rows.append(
                [name, spread(record["seconds_per_unit"]), faster, most - before, facts["top1"], facts.get("strength", "-")]
            )
        show(f"{task}, {title}", ["", "seconds", "times as fast", "MiB on top", "top-1", "penalty"], rows)
    return results


class Shape(NamedTuple):
    """One object: its category, its outline [corners, 2] in whole pixels, and its edges left, top, right, bottom."""

    category: int
    corners: npt.NDArray[np.float64]
    edges: tuple[int, int, int, int]


def draw(generator: np.random.Generator, side: int) -> tuple[Image.Image, list[Shape]]:
    """Draw an image of noise and, on it, one to four squares, discs and triangles that do not touch.

    Colours and sizes are drawn alike for all classes, so that a class shows in its shape alone.
    """
    image = Image.fromarray(generator.integers(60, 196, (side, side, 3), dtype=np.uint8))
    canvas, shapes, count = ImageDraw.Draw(image), list[Shape](), int(generator.integers(1, 5))
    for _ in range(50):
        category = int(generator.choice(list(CATEGORIES)))
        (corners, first), radius = _OUTLINES[category], generator.uniform(0.1, 0.22) * side
        angle = first + np.linspace(0, 2 * np.pi, corners, endpoint=False)
        centre = generator.uniform(radius + 1, side - radius - 1, 2)
        outline = np.round(centre + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1))
        left, top, right, bottom = (int(edge) for edge in (*outline.min(axis=0), *outline.max(axis=0)))
        apart = all(left > r or l > right or top > b or t > bottom for l, t, r, b in (shape.edges for shape in shapes))  # noqa: E741
        if len(shapes) < count and apart:
            colour = generator.choice([0, 255], 3) if generator.random() < 0.5 else generator.integers(0, 256, 3)
            canvas.polygon([(float(x), float(y)) for x, y in outline], fill=tuple(int(c) for c in colour))
            shapes.append(Shape(category, outline, (left, top, right, bottom)))
    return image, shapes


def write_coco(folder: Path, *, train: int, test: int, side: int, seed: int = 0) -> None:
    """Write `train` and `test` images of `side` pixels as train/ and val/, called 0000.png, 0001.png, ..., with annotations."""
    generator = np.random.Generator(np.random.PCG64(seed))
    (folder / "annotations").mkdir(parents=True)
    for part, count in (("train", train), ("val", test)):
        (folder / part).mkdir()
        images, annotations = [], list[dict[str, Any]]()
        for number in range(10, 10 + count):
            image, shapes = draw(generator, side)
            image.save(folder / part / f"{number - 10:04}.png")
            images.append({"id": number, "file_name": f"{number - 10:04}.png", "width": side, "height": side})
            for category, corners, (left, top, right, bottom) in shapes:
                x, y = corners.T
                about: Record = {"id": len(annotations) + 1, "image_id": number, "category_id": category, "iscrowd": 0}
                about |= {"bbox": [left, top, right - left, bottom - top], "segmentation": [corners.ravel().tolist()]}
                annotations.append(about | {"area": abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2})
        categories = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))


def measure_detection(args: argparse.Namespace) -> Record:
    """Train a detector on drawn shapes once, and measure before, at each quarter and at the end."""
    torch.manual_seed(0)
    backbone, spec = create_backbone("resnet18"), BackboneSpec("resnet18", {}, "standard", VIEW)
    if args.run is not None:
        loaded: Any = relssl.load_backbone(args.run)
        backbone, spec = loaded, loaded.spec
    settings = DetectionConfig(
        epochs=6, batch_size=4, lr=0.01, min_size=SIDE, max_size=SIDE, regions=32, frozen_stages=0, norm="train"
    )
    task = Task(spec, Reader(VIEW), Engine.local("auto", "fp32"), Bootstrap(), print)
    counts = {"train": 8, "test": 2} if args.tiny else {"train": 240, "test": 60}
    points, losses = list[Record](), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        write_coco(Path(folder, "shapes"), **counts, side=SIDE)
        train_set, test_set = load(str(Path(folder, "shapes")), masks=False, max_pixels=1 << 20)
        steps, _ = length(len(train_set), settings)
        model = create_detector(backbone, spec, settings, len(train_set.classes), masks=False, autocast=task.engine.autocast)
        training = train(task.engine.place(model), train_set, settings, task)
        for stop in (round(steps * quarter / 4) for quarter in range(5)):
            while len(losses) < stop:
                losses.append(next(training))
            figures, _ = measure(model, test_set, task)["boxes"]
            points.append({"step": stop} | {f"boxes {name}": round(value, 2) for name, value in figures.items()})
    columns = list(points[-1])
    show(f"Detection on shapes, {spec.name}", columns, [[point.get(name, "-") for name in columns] for point in points])
    weights = "random weights" if args.run is None else args.run.name
    about = {"backbone": spec.name, "weights": weights, "settings": vars(settings), "images": counts}
    return about | {"points": points, "loss": curve(losses)}


def main() -> None:
    """Measure the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="knn,probe", help="parts, separated by commas (default: knn,probe)")
    parser.add_argument("--run", type=Path, help="run folder or exported file, for detection")
    parser.add_argument("--bank", type=Path, help=".npz that the probe learns from, by relssl embed --split bank")
    parser.add_argument("--test", type=Path, help=".npz that it is measured on")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (default: 3)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="threads of each (default: the cores)")
    parser.add_argument("--tiny", action="store_true", help="try the code in seconds; the figures mean nothing")
    parser.add_argument("--out", type=Path, default=Path("results/evaluate.json"))
    args = parser.parse_args()
    if (args.bank is None) != (args.test is None):
        parser.error("--bank and --test: give both, or neither")
    results: Record = {"machine": environment(), "rounds": args.rounds, "threads": args.threads}

    def part(name: str) -> Record:
        return measure_detection(args) if name == "detection" else measure_labelling(args, name)

    measure_parts(args.only.split(","), part, results, args.out)


if __name__ == "__main__":
    main()
