"""Two evaluations compare only if they were made alike, naming the field that differs."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relssl.cli import main
from relssl.errors import ConfigError, DataError
from relssl.evaluation.result import Finding, compare

CARD: dict[str, Any] = {
    "layer": "backbone",
    "settings": {"k": 20, "temperature": 0.07},
    "view": {"size": 32, "mean": [0.5, 0.5, 0.5]},
    "precision": "fp32",
    "images": {"bank": {"images": 500, "hash": "aa"}, "test": {"images": 200, "hash": "bb"}},
    "weights": "1111",
    "source": {"kind": "run"},
    "backbone": {"name": "resnet18"},
}


def record(right: np.ndarray, card: dict[str, Any] = CARD, network: str = "student") -> dict[str, Any]:
    finding = Finding({"k": 20, "temperature": 0.07}, "top1", {"top1": 100 * float(right.mean())}, correct=right)
    return {"protocol": "knn", "network": network, "data": "digits", **finding.plain(), "card": card | {"network": network}}


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"source": "x", "data": "digits", "results": records}))
    return path


def answers(share: float, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).random(200) < share


def test_equal_cards_compare_whoever_is_measured(tmp_path: Path) -> None:
    first, second = answers(0.6, 0), answers(0.8, 1)
    a = write(tmp_path / "a.json", record(first))
    subject = {"weights": "2222", "source": {"kind": "timm"}, "backbone": {"name": "resnet50"}}
    b = write(tmp_path / "b.json", record(second, CARD | subject))
    (row,) = compare(a, b)
    assert row["difference"] == pytest.approx(100 * (second.mean() - first.mean())) and row["allowed"] == []
    # The interval against a plain bootstrap, image by image.
    generator = np.random.Generator(np.random.PCG64(5))
    change = 100 * (second.astype(float) - first)
    means = [change[generator.integers(0, 200, 200)].mean() for _ in range(4000)]
    assert row["interval"] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=1.0)


@pytest.mark.parametrize(
    ("field", "value"), [("precision", "bf16"), ("view.size", 64), ("images.test.hash", "cc"), ("settings.distance", "euclidean")]
)
def test_what_differs_is_named(field: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = copy.deepcopy(CARD)
    *path, leaf = field.split(".")
    place = card
    for name in path:
        place = place[name]
    place[leaf] = value
    a, b = write(tmp_path / "a.json", record(answers(0.5, 0))), write(tmp_path / "b.json", record(answers(0.5, 1), card))
    with pytest.raises(ConfigError, match=rf"knn student k=20 temperature=0.07: {field} differs"):
        compare(a, b)
    assert main(["compare", str(a), str(b)]) == 2
    assert field in capsys.readouterr().err
    for allowed in {field, field.split(".")[0]}:
        (row,) = compare(a, b, allow=[allowed])
        assert row["allowed"] == [field]
    with pytest.raises(ConfigError):
        compare(a, b, allow=[field[:-1]])


def test_networks_of_other_names_compare_only_when_named(tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", record(answers(0.5, 0)), record(answers(0.5, 2), network="teacher"))
    b = write(tmp_path / "b.json", record(answers(0.6, 1), network="backbone"))
    with pytest.raises(ConfigError, match=r"knn of teacher.*knn of backbone"):
        compare(a, b)
    (row,) = compare(a, b, network=("teacher", "backbone"))
    assert row["network"] == ["teacher", "backbone"] and row["allowed"] == ["network"]
    other = write(tmp_path / "c.json", record(answers(0.5, 0)) | {"main": "map", "figures": {"map": 50.0}})
    with pytest.raises(ConfigError, match="has no finding of the same"):
        compare(a, other)


GOOD = record(answers(0.5, 0))
DAMAGED = [{"figures": {"top1": None}}, {"correct": "AAAA"}, {"correct": "?"}, {"card": {"images": 3}}]


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[1]", '{"results": [{"protocol": "knn"}]}', *(json.dumps({"results": [GOOD | damage]}) for damage in DAMAGED)],
)
def test_what_is_no_result_is_refused(content: str, tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good.json", GOOD), tmp_path / "bad.json"
    bad.write_text(content)
    with pytest.raises(DataError, match=r"bad\.json: is not a result of"):
        compare(good, bad)
    with pytest.raises(DataError, match=r"no\.json: .*No such file"):
        compare(tmp_path / "no.json", good)
