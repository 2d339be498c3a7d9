"""Two evaluations compare only if they were made alike, naming the field that differs; transfer as one finding; their table."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relssl.cli import main
from relssl.errors import ConfigError, DataError
from relssl.evaluation.evaluate import transfer_table
from relssl.evaluation.result import Finding, compare
from relssl.report.tables import show_evaluation

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
def test_what_differs_is_named_and_can_be_allowed(
    field: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_a_field_that_differs_everywhere_is_told_once(tmp_path: Path) -> None:
    other = CARD | {"precision": "bf16"}
    sides = [[record(answers(0.5, 0), card, network) for network in ("student", "teacher")] for card in (CARD, other)]
    a, b = write(tmp_path / "a.json", *sides[0]), write(tmp_path / "b.json", *sides[1])
    with pytest.raises(ConfigError) as refused:
        compare(a, b)
    (row,) = compare(a, write(tmp_path / "c.json", record(answers(0.6, 1)[:-1])))
    assert row["interval"] is None  # an image was left out there
    assert [fault.count("precision differs") for fault in refused.value.faults] == [1, 0]


@pytest.mark.parametrize("damage", [{"figures": {"top1": None}}, {"correct": "AAAA"}, {"correct": "?"}, {"card": {"images": 3}}])
def test_damaged_results_are_refused(damage: dict[str, Any], tmp_path: Path) -> None:
    good = write(tmp_path / "good.json", record(answers(0.5, 0)))
    bad = write(tmp_path / "bad.json", record(answers(0.5, 0)) | damage)
    with pytest.raises(DataError, match=r"bad\.json: is not a result of"):
        compare(good, bad)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"results": [{"protocol": "knn"}]}', '{"results": 3}'])
def test_what_is_no_result_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=r"a\.json: is not a result of"):
        compare(tmp_path / "a.json", tmp_path / "a.json")
    with pytest.raises(DataError, match=r"no\.json: .*No such file"):
        compare(tmp_path / "no.json", tmp_path / "a.json")


def finding(main: str = "top1", notes: tuple[str, ...] = (), **figures: float) -> Finding:
    return Finding({}, main, figures, {name: (value - 1, value + 2) for name, value in figures.items()}, notes)


def result(protocol: str, network: str, one: Finding) -> dict[str, Any]:
    return json.loads(json.dumps({"protocol": protocol, "network": network, **one.plain()}))


def test_each_set_counts_by_its_figure() -> None:
    joined = transfer_table(
        {
            "cifar10": finding(top1=90.0, mean_per_class=10.0),
            "flowers102": finding(top1=10.0, mean_per_class=80.0),
            "voc07": finding("map", map=61.0),
            "./my photos": finding(top1=69.0, mean_per_class=10.0),
        }
    )
    assert joined.figures == {"cifar10": 90.0, "flowers102": 80.0, "voc07": 61.0, "./my photos": 69.0, "mean": 75.0}
    assert joined.intervals == {"cifar10": (89, 92), "flowers102": (79, 82), "voc07": (60, 63), "./my photos": (68, 71)}
    assert joined.details["rows"][1] == {
        "data": "flowers102",
        "metric": "mean_per_class",
        "value": 80.0,
        "interval": [79.0, 82.0],
    }
    assert (
        joined.main == "mean"
        and joined.setting == {"sets": ["cifar10", "flowers102", "voc07", "./my photos"]}
        and joined.notes == ()
    )
    assert json.loads(json.dumps(joined.plain()))["details"] == joined.details


def test_a_set_that_was_not_run_is_named_and_not_counted() -> None:
    outcomes = {
        "dtd": "dtd: not complete in /sets/dtd",
        "cifar10": finding(top1=50.0, notes=("a subset",)),
        "mean": finding(top1=70.0),
    }
    with pytest.raises(DataError, match="dtd was not run: no network; svhn was not run: broken"):
        transfer_table({"dtd": "no network", "svhn": "svhn: broken"})
    joined = transfer_table(outcomes)
    assert joined.figures == {"cifar10": 50.0, "mean": 60.0}
    assert joined.details["rows"][0] == {"data": "dtd", "not_run": "not complete in /sets/dtd"}
    assert joined.notes == (
        "the mean is over 2 of 3 data sets; do not compare it with one over others",
        "dtd was not run: not complete in /sets/dtd",
        "cifar10: a subset",
    )


def test_the_table_of_all_protocols(capsys: pytest.CaptureFixture[str]) -> None:
    low = "k was lowered to 100, the size of the bank"
    knn = Finding({"k": 200, "temperature": 0.07}, "top1", {"top1": 81.456, "top5": 99.0}, {"top1": (80.0, 83.25)}, (low,))
    plain = Finding({"strength": 1e-05}, "top1", {"top1": 70.0})
    transfer = transfer_table({"cifar10": finding(top1=90.0), "dtd": "no network", "oxford-pets": finding(mean_per_class=80.0)})
    rows = [("knn", "student", knn), ("knn", "teacher", knn), ("probe", "student", plain), ("transfer", "student", transfer)]
    show_evaluation({"source": "runs/[red]a", "data": "cifar10,dtd", "results": [result(*row) for row in rows]})
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "runs/[red]a on cifar10,dtd"
    assert "knn student k 200, temperature 0.07 top1 81.46 80.00 to 83.25 1" in lines
    assert "knn teacher k 200, temperature 0.07 top1 81.46 80.00 to 83.25 1" in lines
    assert "probe student strength 1e-05 top1 70.00" in lines
    table = [line.removeprefix("transfer student ") for line in lines if line.startswith("transfer")]
    assert table == [
        *("cifar10 top1 90.00 89.00 to 92.00", "dtd not run 2", "oxford-pets mean_per_class 80.00 79.00 to 82.00"),
        "all that ran mean 85.00 2 3",
    ]
    assert f"1 {low}" in lines and "2 dtd was not run: no network" in lines and out.count(low) == 1
