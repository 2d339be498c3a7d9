"""The benchmark of evaluations: that it would see a difference, and that both sides do the same work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import evaluate
from evaluate import agreement, blobs, knn_work, probe_work, stored


def _written(folder: Path) -> tuple[Path, Path]:
    points = blobs(300, 100, 8)
    for name, features, labels in (("bank", points.bank, points.labels), ("test", points.test, points.truth)):
        np.savez(folder / f"{name}.npz", features=features, labels=labels)
    return folder / "bank.npz", folder / "test.npz"


def test_agreement_is_complete_and_a_fault_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    points, right = blobs(300, 60, 8), evaluate.knn_classify
    assert [(each["alike"], each["difference"] < 1e-5) for each in agreement(points)] == [(1.0, True)] * 3

    def wrong(*features: Any, k: int, **more: Any) -> Any:
        return right(*features, k=k + 1, **more)

    monkeypatch.setattr(evaluate, "knn_classify", wrong)
    assert max(each["difference"] for each in agreement(points)) > 1e-3


def test_both_sides_of_knn_label_alike() -> None:
    mine, theirs = (knn_work(name, (400, 200, 16), 1) for name in ("relssl", "scikit-learn"))
    mine.run(1)
    theirs.run(1)
    assert dict(mine.facts) == dict(theirs.facts) and 30 < mine.facts["top1"] < 100


@pytest.mark.parametrize("strength", [1e-2, None])
def test_both_sides_of_the_probe_label_alike(tmp_path: Path, strength: float | None) -> None:
    works = [probe_work(name, *_written(tmp_path), strength, 1) for name in ("relssl", "scikit-learn")]
    for work in works:
        work.run(1)
    mine, theirs = (work.facts for work in works)
    assert abs(mine["top1"] - theirs["top1"]) <= (0 if strength else 3)
    assert 30 < mine["top1"] < 100 and 1e-6 <= theirs["strength"] <= 1


def test_features_are_those_that_embed_wrote_without_the_unlabelled(tmp_path: Path) -> None:
    bank, test = _written(tmp_path)
    with np.load(bank) as file:
        features, labels = file["features"], file["labels"]
    labels[::2] = -1
    np.savez(bank, features=features, labels=labels)
    points = stored(bank, test)
    np.testing.assert_array_equal(points.bank, features[1::2])
    assert len(points.labels) == 150 and points.classes == 10


def test_the_command_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "found.json"
    monkeypatch.setattr("sys.argv", ["evaluate.py", *f"--only knn --tiny --rounds 1 --threads 1 --out {out}".split()])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    found = json.loads(out.read_text())
    assert ended.value.code == 0
    assert found["knn"]["records"].keys() == {"relssl", "scikit-learn"}
    assert all(record["seconds_per_unit"] for record in found["knn"]["records"].values())
