"""Evaluations on features beside scikit-learn: the same results, and what they take in time and memory.

    python benchmarks/evaluate.py [--only knn,probe] [--bank BANK.npz --test TEST.npz] [--rounds 3] [--threads N] [--out FILE]

`knn`: equal to brute force on 2,000 random points; then 10,000 queries in a bank of 50,000, both of 512 dimensions.
`probe`: logistic regression on features that `relssl embed` wrote (random ones if none are given), at one penalty and with the
penalty chosen among all. Contenders take turns, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor

from bench import any_failed
from relssl.engine import available_cores
from relssl.evaluation.knn import knn_classify
from relssl.evaluation.metrics import Bootstrap
from relssl.evaluation.probe import hold_out, probe
from relssl.settings.evaluation import ProbeConfig
from relssl.train.run_folder import environment
from rounds import Contender, Work, compare, show, spread, times

PARTS = ("knn", "probe")
CLASSES = 10
AGREEMENT = ((1, 0.1), (20, 0.07), (200, 0.1))  # k, temperature
K, TEMPERATURE = 20, 0.07


@dataclass(frozen=True)
class Points:
    """Labelled features to learn from and to be asked: [N,F] and [M,F] fp32, [N] and [M] int64."""

    bank: Tensor
    labels: Tensor
    test: Tensor
    truth: Tensor

    @property
    def classes(self) -> int:
        return int(max(self.labels.max(), self.truth.max())) + 1


def blobs(bank: int, test: int, dims: int) -> Points:
    """Overlapping classes around random centres."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (bank + test,), generator=generator)
    labels[:CLASSES] = torch.arange(CLASSES)
    centres = torch.randn(CLASSES, dims, generator=generator)
    points = centres[labels] * (2.5 / dims**0.5) + torch.randn(bank + test, dims, generator=generator)
    return Points(points[:bank], labels[:bank], points[bank:], labels[bank:])


def stored(bank: Path, test: Path) -> Points:
    """Features and labels that `relssl embed` wrote."""
    arrays = []
    for path in (bank, test):
        with np.load(path, allow_pickle=False) as file:
            labels = file["labels"]
            arrays += [torch.from_numpy(file["features"][labels >= 0]), torch.from_numpy(labels[labels >= 0])]
    return Points(*arrays)


def _brute(k: int, temperature: float) -> KNeighborsClassifier:
    def weights(distance: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.asarray(np.exp((1 - distance) / temperature))

    return KNeighborsClassifier(k, algorithm="brute", metric="cosine", weights=weights)


def agreement(points: Points) -> list[dict[str, float]]:
    """Share of the queries that kNN here and brute force in fp64 label alike, and the largest difference of a class's vote."""
    found = []
    for k, temperature in AGREEMENT:
        mine = knn_classify(points.bank, points.labels, points.test, k=k, temperature=temperature, classes=CLASSES).numpy()
        theirs = _brute(k, temperature).fit(points.bank.double(), points.labels).predict_proba(points.test.double())
        alike = float((mine.argmax(axis=1) == theirs.argmax(axis=1)).mean())
        found.append({"k": k, "temperature": temperature, "alike": alike, "difference": float(np.abs(mine - theirs).max())})
    return found


def knn_work(name: str, sizes: tuple[int, int, int], threads: int) -> Work:
    """All queries labelled."""
    _limit(threads)
    points, facts = blobs(*sizes), dict[str, Any]()

    def run(count: int) -> None:
        for _ in range(count):
            if name == "relssl":
                some: dict[str, Any] = {"k": K, "temperature": TEMPERATURE, "classes": CLASSES}
                made = knn_classify(points.bank, points.labels, points.test, **some).argmax(dim=1).numpy()
            else:
                made = _brute(K, TEMPERATURE).fit(points.bank.numpy(), points.labels.numpy()).predict(points.test.numpy())
            facts["top1"] = 100 * float((made == points.truth.numpy()).mean())

    return Work(run, sizes[1], facts)


def probe_work(name: str, bank: Path, test: Path, strength: float | None, threads: int) -> Work:
    """Fitted and measured, scaling included; at a strength, or at one chosen on held-out images."""
    _limit(threads)
    points, facts = stored(bank, test), dict[str, Any]()
    fitted: dict[str, Callable[[Points, float | None], dict[str, Any]]] = {"relssl": _ours, "scikit-learn": _theirs}

    def run(count: int) -> None:
        for _ in range(count):
            facts.update(fitted[name](points, strength))

    return Work(run, len(points.bank), facts)


def _ours(points: Points, strength: float | None) -> dict[str, Any]:
    settings = ProbeConfig() if strength is None else ProbeConfig(strengths=(strength,))
    given: dict[str, Any] = {"classes": points.classes, "settings": settings, "bootstrap": Bootstrap(100), "seed": 0}
    (found,) = probe(points.bank, points.labels, points.test, points.truth, **given)
    return {"top1": found.figures["top1"], "strength": found.details["strength"]}


def _theirs(points: Points, strength: float | None) -> dict[str, Any]:
    scaler, settings, labels = StandardScaler(), ProbeConfig(), points.labels.numpy()
    bank, test, count = scaler.fit_transform(points.bank.numpy()), scaler.transform(points.test.numpy()), len(labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of iterations, and of names that change between versions
        if strength is not None:
            model = LogisticRegression(C=1 / (strength * count), max_iter=settings.iterations).fit(bank, labels)
            return {"top1": 100 * float(model.score(test, points.truth.numpy())), "strength": strength}
        held = hold_out(points.labels, points.classes, settings.held_out, 0)[0].numpy()
        split = [((~held).nonzero()[0], held.nonzero()[0])]
        costs = [1 / (each * int((~held).sum())) for each in settings.strengths]
        model = LogisticRegressionCV(Cs=costs, cv=split, max_iter=settings.iterations, scoring="accuracy").fit(bank, labels)
        chosen = settings.strengths[int(np.argmin(np.abs(np.array(costs) - float(np.ravel(model.C_)[0]))))]
        return {"top1": 100 * float(model.score(test, points.truth.numpy())), "strength": chosen}


def _limit(threads: int) -> None:
    torch.set_num_threads(threads)
    threadpool_limits(threads)


def measure_knn(args: argparse.Namespace) -> dict[str, Any]:
    """Compare, print and return the records."""
    alike = agreement(blobs(*((300, 50, 8) if args.tiny else (2000, 500, 64))))
    rows: list[list[object]] = [
        [each["k"], each["temperature"], f"{100 * each['alike']:.2f}", f"{each['difference']:.1e}"] for each in alike
    ]
    show("kNN and scikit-learn's brute force", ["k", "temperature", "labelled alike, %", "largest difference of a vote"], rows)
    sizes = (500, 100, 16) if args.tiny else (50_000, 10_000, 512)
    shared = {"sizes": sizes, "threads": args.threads}
    records = compare([Contender(n, knn_work, {"name": n} | shared) for n in ("relssl", "scikit-learn")], args.rounds, 1)
    _table(f"kNN, k {K}: {sizes[1]} queries in {sizes[0]} of {sizes[2]} dimensions", records)
    return {"agreement": alike, "sizes": sizes, "records": records}


def measure_probe(args: argparse.Namespace) -> dict[str, Any]:
    """Compare, print and return the records."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [args.bank, args.test]
        if args.bank is None:
            paths = [Path(folder, "bank.npz"), Path(folder, "test.npz")]
            points = blobs(*((300, 100, 16) if args.tiny else (50_000, 10_000, 512)))
            np.savez(paths[0], features=points.bank, labels=points.labels)
            np.savez(paths[1], features=points.test, labels=points.truth)
        found: dict[str, Any] = {"features": "random" if args.bank is None else [str(path) for path in paths]}
        for title, strength in (("at one penalty, 0.001", 1e-3), ("the penalty chosen", None)):
            shared = {"bank": paths[0], "test": paths[1], "strength": strength, "threads": args.threads}
            both = [Contender(name, probe_work, {"name": name} | shared) for name in ("relssl", "scikit-learn")]
            records = compare(both, args.rounds, 1)
            _table(f"Logistic regression, {title}", records)
            found[title] = records
            if not any_failed(records):
                ours, theirs = (record["facts"]["top1"] for record in records.values())
                found[title]["difference"] = {"top1": ours - theirs}
    return found


def _table(title: str, records: dict[str, Any]) -> None:
    rows: list[list[object]] = []
    for name, record in records.items():
        if "failed" in record:
            rows.append([name, record["failed"], "-", "-", "-", "-"])
            continue
        before, most = record["memory_mib"]
        faster = spread(times(records, name, "scikit-learn"))
        facts = record["facts"]
        rows.append(
            [name, spread(record["seconds_per_unit"]), faster, most - before, f"{facts['top1']:.2f}", facts.get("strength", "-")]
        )
    show(title, ["", "seconds", "times as fast", "MiB on top", "top-1", "penalty"], rows)


def main() -> None:
    """Measure the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas (default: both)")
    parser.add_argument("--bank", type=Path, help=".npz that the probe learns from, by relssl embed --split bank")
    parser.add_argument("--test", type=Path, help=".npz that it is measured on")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (default: 3)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="threads of each (default: the cores)")
    parser.add_argument("--tiny", action="store_true", help="try the code in seconds; the figures mean nothing")
    parser.add_argument("--out", type=Path, default=Path("results/evaluate.json"))
    args = parser.parse_args()
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only: knows no {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    if (args.bank is None) != (args.test is None):
        parser.error("--bank and --test: give both, or neither")
    measures = {"knn": measure_knn, "probe": measure_probe}
    found: dict[str, Any] = {"machine": environment(), "rounds": args.rounds, "threads": args.threads}
    for part in parts:
        found[part] = measures[part](args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {args.out}")
    sys.exit(int(any_failed(found)))


if __name__ == "__main__":
    main()
