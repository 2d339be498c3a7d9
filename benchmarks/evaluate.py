"""Evaluations and exports beside other programs: the same results, and what they take in time and memory.

    python benchmarks/evaluate.py [--only knn,probe,exports,detection] [--run RUN] [--bank BANK.npz --test TEST.npz] [--out FILE]

`knn`: equal to scikit-learn's brute force on 2,000 random points; then 10,000 queries in a bank of 50,000, both of 512 dimensions.
`probe`: logistic regression beside scikit-learn's, on features that `relssl embed` wrote (random ones if none are given), at one
penalty and with the penalty chosen. `exports`: every format of a run's backbone, read back by other programs in a process that never
imports relssl. `detection`: mean average precision on drawn shapes (`shapes.py`) at several points of a training, from the run's
backbone or a resnet18 of random weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor

import relssl
import shapes
from relssl.data.boxes import load
from relssl.data.plain import PlainView
from relssl.engine import Engine, available_cores
from relssl.errors import ConfigError
from relssl.evaluation.detection import create_detector, curve, length, measure, train
from relssl.evaluation.features import LabelledFeatures
from relssl.evaluation.knn import neighbours, votes
from relssl.evaluation.metrics import Bootstrap
from relssl.evaluation.probe import hold_out, probe
from relssl.method.backbones import create_backbone
from relssl.settings.evaluation import DetectionConfig, ProbeConfig
from relssl.train.run_folder import environment
from relssl.weights.formats import FORMATS
from relssl.weights.spec import BackboneSpec
from turns import Contender, Record, Work, any_failed, compare, show, spread, times

CLASSES = 10
K, TEMPERATURE = 20, 0.07
SIDE = 96  # of the drawn shapes' images
Points = tuple[Tensor, Tensor, Tensor, Tensor]  # bank [N,F], labels [N], test [M,F], truth [M]

_READER = """
import sys, numpy, torch
images = torch.from_numpy(numpy.load({images!r}))
{lines}
with torch.no_grad():
    images = images.numpy() if {arrays} else images
    {use}
assert "relssl" not in sys.modules
numpy.save({features!r}, numpy.asarray(features))
"""


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
    bank_part, test_part = (
        [torch.from_numpy(file[key][file["labels"] >= 0]) for key in ("features", "labels")] for file in files
    )
    return bank_part[0], bank_part[1], test_part[0], test_part[1]


def brute(k: int, temperature: float) -> KNeighborsClassifier:
    """Return scikit-learn's form of the same vote."""

    def weights(distance: Any) -> Any:
        return np.exp((1 - distance) / temperature)

    return KNeighborsClassifier(k, algorithm="brute", metric="cosine", weights=weights)


def shares(points: Points, k: int, temperature: float) -> np.ndarray[Any, Any]:
    """Return the share of the vote that each class gets, [M,C]."""
    similarity, index = neighbours(points[0], points[2], k)
    return votes(similarity, points[1][index], temperature, CLASSES).numpy()


def agreement(points: Points) -> list[dict[str, float]]:
    """Compute the share of queries that both label alike, brute force in fp64, and the largest difference of a class's vote."""
    bank, labels, test, _ = points
    rows = []
    for k, temperature in ((1, 0.1), (20, 0.07), (200, 0.1)):
        ours = shares(points, k, temperature)
        theirs = brute(k, temperature).fit(bank.double(), labels).predict_proba(test.double())
        alike = float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean())
        rows.append({"k": k, "temperature": temperature, "alike": alike, "difference": float(np.abs(ours - theirs).max())})
    return rows


def knn_work(name: str, sizes: tuple[int, int, int], threads: int) -> Work:
    """Return the labelling of all queries as work."""
    torch.set_num_threads(threads)
    threadpool_limits(threads)
    points, facts = blobs(*sizes), dict[str, Any]()
    bank, labels, test, truth = points

    def run(count: int) -> None:
        for _ in range(count):
            if name == "relssl":
                guess = shares(points, K, TEMPERATURE).argmax(axis=1)
            else:
                guess = brute(K, TEMPERATURE).fit(bank.numpy(), labels.numpy()).predict(test.numpy())
            facts["top1"] = 100 * float((guess == truth.numpy()).mean())

    return Work(run, sizes[1], facts)


def probe_work(name: str, bank: Path, test: Path, strength: float | None, threads: int) -> Work:
    """Return fit and measurement as work, scaling included; at a strength, or at one chosen on held-out images."""
    torch.set_num_threads(threads)
    threadpool_limits(threads)
    points, facts = stored(bank, test), dict[str, Any]()

    def run(count: int) -> None:
        for _ in range(count):
            facts.update((_ours if name == "relssl" else _theirs)(points, strength))

    return Work(run, len(points[0]), facts)


def _ours(points: Points, strength: float | None) -> dict[str, Any]:
    settings = ProbeConfig() if strength is None else ProbeConfig(strengths=(strength,))
    classes = int(max(points[1].max(), points[3].max())) + 1
    (finding,) = probe(LabelledFeatures(*points, classes=classes), settings, Bootstrap(100), seed=0)
    return {"top1": finding.figures["top1"], "strength": finding.details["strength"]}


def _theirs(points: Points, strength: float | None) -> dict[str, Any]:
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


def measure_knn(args: argparse.Namespace) -> Record:
    """Compare kNN with scikit-learn's brute force."""
    alike = agreement(blobs(*((300, 50, 8) if args.tiny else (2000, 500, 64))))
    show("kNN and scikit-learn's brute force", list(alike[0]), [list(row.values()) for row in alike])
    sizes = (500, 100, 16) if args.tiny else (50_000, 10_000, 512)
    shared = {"sizes": sizes, "threads": args.threads}
    records = compare([Contender(n, knn_work, {"name": n} | shared) for n in ("relssl", "scikit-learn")], args.rounds, 1)
    _table(f"kNN, k {K}: {sizes[1]} queries in {sizes[0]} of {sizes[2]} dimensions", records)
    return {"agreement": alike, "sizes": sizes, "records": records}


def measure_probe(args: argparse.Namespace) -> Record:
    """Compare the probe with scikit-learn's logistic regression."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [args.bank, args.test]
        if args.bank is None:
            points, paths = blobs(*((300, 100, 16) if args.tiny else (50_000, 10_000, 512))), []
            for features, labels in (points[:2], points[2:]):
                paths.append(Path(folder, f"{len(paths)}.npz"))
                np.savez(paths[-1], features=features, labels=labels)
        results: Record = {"features": "random" if args.bank is None else [str(path) for path in paths]}
        for title, strength in (("at one penalty, 0.001", 1e-3), ("the penalty chosen", None)):
            shared = {"bank": paths[0], "test": paths[1], "strength": strength, "threads": args.threads}
            both = [Contender(name, probe_work, {"name": name} | shared) for name in ("relssl", "scikit-learn")]
            results[title] = compare(both, args.rounds, 1)
            _table(f"Logistic regression, {title}", results[title])
    return results


def _table(title: str, records: Record) -> None:
    rows: list[list[object]] = []
    for name, record in records.items():
        if "failed" in record:
            rows.append([name, record["failed"], "-", "-", "-", "-"])
            continue
        (before, most), facts = record["memory_mib"], record["facts"]
        faster = spread(times(records, name, "scikit-learn"))
        rows.append([name, spread(record["seconds_per_unit"]), faster, most - before, facts["top1"], facts.get("strength", "-")])
    show(title, ["", "seconds", "times as fast", "MiB on top", "top-1", "penalty"], rows)


def measure_exports(args: argparse.Namespace) -> Record:
    """Compare the features of every export with the source's, over 16 images of noise; or say why a format cannot hold it."""
    backbone, rows = relssl.load_backbone(args.run, "student"), []
    spec: Any = backbone.spec
    images = torch.randn(16, spec.view.channels, spec.view.size, spec.view.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = backbone(images).numpy()
    for format, about in FORMATS.items():
        if format == "detectron2":  # whose names only detectron2 reads
            continue
        row = {"backbone": spec.name, "stem": spec.stem, "format": format}
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            try:
                exported = relssl.export(args.run, format=format, out=Path(folder, f"backbone-{format}{about.suffix}"))
            except ConfigError as error:
                rows.append(row | {"refused": str(error)})
                continue
            row |= {"seconds": round(time.perf_counter() - start, 1), "bytes": sum(f.stat().st_size for f in exported.files)}
            use = (
                'features = session.run(["features"], {"images": images})[0]'
                if format == "onnx"
                else "features = backbone(images)"
            )
            names = {"images": str(Path(folder, "images.npy")), "features": str(Path(folder, "features.npy"))}
            np.save(names["images"], images.numpy())
            code = _READER.format(lines="\n".join(exported.lines), use=use, arrays=format == "onnx", **names)
            subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
            difference = float(np.abs(wanted - np.load(names["features"])).max())
            rows.append(row | {"difference": difference, "relative": difference / float(np.abs(wanted).max())})
    show(f"Exports of {args.run}", ["format", "difference"], [[r["format"], r.get("difference", r.get("refused"))] for r in rows])
    return {"rows": rows}


def measure_detection(args: argparse.Namespace) -> Record:
    """Train a detector on drawn shapes once, and measure before, at each quarter and at the end."""
    torch.manual_seed(0)
    spec: Any = BackboneSpec(
        "resnet18", {}, "standard", PlainView(SIDE, 1.0, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    backbone = create_backbone("resnet18") if args.run is None else relssl.load_backbone(args.run)
    spec = spec if args.run is None else backbone.spec
    settings = DetectionConfig(
        epochs=6, batch_size=4, lr=0.01, min_size=SIDE, max_size=SIDE, regions=32, frozen_stages=0, norm="train"
    )
    engine, counts = Engine.local("auto", "fp32"), {"train": 8, "test": 2} if args.tiny else {"train": 240, "test": 60}
    points, losses = list[Record](), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        shapes.write_coco(Path(folder, "shapes"), **counts, side=SIDE)
        train_set, test_set = load(str(Path(folder, "shapes")), masks=False, max_pixels=1 << 20)
        steps, _ = length(len(train_set), settings)
        model = create_detector(backbone, spec, settings, len(train_set.classes), masks=False, autocast=engine.autocast)
        training = train(engine.place(model), train_set, 0, engine, settings=settings, seed=0)
        for stop in (round(steps * quarter / 4) for quarter in range(5)):
            while len(losses) < stop:
                losses.append(next(training))
            figures, _ = measure(model, test_set, 0, engine)["boxes"]
            points.append({"step": stop} | {f"boxes {name}": round(value, 2) for name, value in figures.items()})
    show(
        f"Detection on shapes, {spec.name}", list(points[-1]), [[point.get(name, "-") for name in points[-1]] for point in points]
    )
    weights = "random weights" if args.run is None else args.run.name
    about = {"backbone": spec.name, "weights": weights, "settings": vars(settings), "images": counts}
    return about | {"points": points, "loss": curve(losses)}


MEASURES = {"knn": measure_knn, "probe": measure_probe, "exports": measure_exports, "detection": measure_detection}


def main() -> None:
    """Measure the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="knn,probe", help="parts, separated by commas (default: knn,probe)")
    parser.add_argument("--run", type=Path, help="run folder or exported file, for exports and detection")
    parser.add_argument("--bank", type=Path, help=".npz that the probe learns from, by relssl embed --split bank")
    parser.add_argument("--test", type=Path, help=".npz that it is measured on")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (default: 3)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="threads of each (default: the cores)")
    parser.add_argument("--tiny", action="store_true", help="try the code in seconds; the figures mean nothing")
    parser.add_argument("--out", type=Path, default=Path("results/evaluate.json"))
    args = parser.parse_args()
    if (args.bank is None) != (args.test is None) or ("exports" in args.only and args.run is None):
        parser.error("--bank and --test: give both, or neither; exports need --run")
    results: Record = {"machine": environment(), "rounds": args.rounds, "threads": args.threads}
    for part in args.only.split(","):
        results[part] = MEASURES[part](args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {args.out}")
    sys.exit(int(any_failed(results)))


if __name__ == "__main__":
    main()
