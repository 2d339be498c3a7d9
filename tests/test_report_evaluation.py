"""Transfer as one finding, and the table of a whole evaluation."""

from __future__ import annotations

import json
from typing import Any

import pytest

from relssl.data.named import SETS
from relssl.errors import DataError
from relssl.evaluation.evaluate import CUSTOMARY, transfer_table
from relssl.evaluation.result import Finding
from relssl.report.tables import show_evaluation


def finding(main: str = "top1", notes: tuple[str, ...] = (), **figures: float) -> Finding:
    return Finding({}, main, figures, {name: (value - 1, value + 2) for name, value in figures.items()}, notes)


def result(protocol: str, network: str, found: Finding) -> dict[str, Any]:
    return json.loads(json.dumps({"protocol": protocol, "network": network, **found.plain()}))


def test_customary_figures_are_those_of_kornblith() -> None:
    assert {"fgvc-aircraft", "oxford-pets", "flowers102"} == set(CUSTOMARY) < set(SETS)
    assert set(CUSTOMARY.values()) == {"mean_per_class"}  # of the other sets, the probe's main figure: top1, or map for voc07


def test_each_set_counts_by_its_figure() -> None:
    found = transfer_table(
        {
            "cifar10": finding(top1=90.0, mean_per_class=10.0),
            "flowers102": finding(top1=10.0, mean_per_class=80.0),
            "voc07": finding("map", map=61.0),
            "./my photos": finding(top1=69.0, mean_per_class=10.0),
        }
    )
    assert found.main == "mean" and found.figures["mean"] == pytest.approx((90 + 80 + 61 + 69) / 4)
    assert {name: found.figures[name] for name in ("cifar10", "flowers102", "voc07", "./my photos")} == {
        **{"cifar10": 90.0, "flowers102": 80.0, "voc07": 61.0, "./my photos": 69.0}
    }
    assert found.intervals == {"cifar10": (89, 92), "flowers102": (79, 82), "voc07": (60, 63), "./my photos": (68, 71)}
    assert found.details["rows"][1] == {"data": "flowers102", "metric": "mean_per_class", "value": 80.0, "interval": [79.0, 82.0]}
    assert found.setting == {"sets": ["cifar10", "flowers102", "voc07", "./my photos"]} and found.notes == ()
    assert json.loads(json.dumps(found.plain()))["details"] == found.details


def test_a_set_that_was_not_run_is_named_and_not_counted() -> None:
    outcomes = {
        "dtd": "dtd: not complete in /sets/dtd",
        "cifar10": finding(top1=50.0, notes=("a subset",)),
        "mean": finding(top1=70.0),
    }
    found = transfer_table(outcomes)
    assert found.figures == {"cifar10": 50.0, "mean": 60.0}
    assert found.details["rows"][0] == {"data": "dtd", "not_run": "not complete in /sets/dtd"}
    assert found.notes == (
        "the mean is over 2 of 3 data sets; do not compare it with one over others",
        "dtd was not run: not complete in /sets/dtd",
        "cifar10: a subset",
    )


@pytest.mark.parametrize(
    ("outcomes", "message"),
    [({}, "no data set was named"), ({"dtd": "no network", "svhn": "svhn: broken"}, "dtd: no network; svhn: broken")],
)
def test_transfer_that_ran_nowhere_is_an_error(outcomes: dict[str, Finding | str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        transfer_table(outcomes)


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


def test_a_table_without_notes_or_results_has_no_footnotes(capsys: pytest.CaptureFixture[str]) -> None:
    show_evaluation({"source": "a", "data": "digits", "results": [result("knn", "student", Finding({}, "top1", {"top1": 1.0}))]})
    assert capsys.readouterr().out.splitlines()[-1].split() == ["knn", "student", "top1", "1.00"]
