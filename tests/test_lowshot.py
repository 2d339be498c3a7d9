"""Low-shot classification: what is drawn, what is learnt, and how the draws are summed up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.preprocessing import normalize
from sklearn.svm import LinearSVC

from relssl.errors import DataError
from relssl.evaluation.features import LabelledFeatures
from relssl.evaluation.lowshot import Problem, choose_cost, drawn_rows, lowshot
from relssl.evaluation.metrics import Bootstrap, average_precision
from relssl.evaluation.result import Finding
from relssl.settings.evaluation import LowshotConfig

Sides = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def digits() -> Sides:
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels, labels = pixels.float()[order], labels[order]
    return pixels[:600], labels[:600], pixels[600:1000], labels[600:1000]


@pytest.fixture
def several(digits: Sides) -> Sides:
    bank, labels, test, truth = digits
    known, wanted = (torch.stack([own % 2, own < 3, own == 7], dim=1).to(torch.int8) for own in (labels, truth))
    known[::5, 0], wanted[::3, 1] = -1, -1
    return bank, known, test, wanted


def measure(sides: Sides, shots: int, *, classes: int = 10, draws: int = 3, seed: int = 0, **settings: Any) -> Finding:
    config = LowshotConfig(shots=(shots,), draws=draws, **settings)
    (finding,) = lowshot(LabelledFeatures(*sides, classes=classes), config, Bootstrap(200), seed=seed)
    return finding


def test_a_draw_has_as_many_images_of_each_class_and_those_of_fewer_shots(several: Sides) -> None:
    labels = np.arange(60) % 3
    order = np.random.default_rng(0).permutation(60)
    four, two = (drawn_rows(labels, 3, order, shots)[None] for shots in (4, 2))
    assert np.bincount(labels[four]).tolist() == [4] * 3 and set(two) < set(four)
    # With several labels: 5 of the class, (C - 1) * 5 others, never one that is unknown.
    known = several[1].numpy()
    for own, rows in drawn_rows(known, 3, np.arange(600), 5).items():
        assert own is not None and np.bincount(known[rows, own]).tolist() == [10, 5]


def test_draws_depend_on_the_seed_alone(digits: Sides) -> None:
    first, again, other = (measure(digits, 2, seed=seed).details["draws"] for seed in (0, 0, 1))
    assert first == again != other and len({draw["top1"] for draw in first}) > 1


def test_all_images_give_what_scikit_learn_gives(digits: Sides) -> None:
    bank, labels, test, truth = digits
    finding = measure(digits, 0, cost=(0.5,))
    model = LinearSVC(C=0.5, dual="auto", max_iter=5000).fit(normalize(bank.double()), labels)
    assert finding.figures["top1"] == pytest.approx(100 * model.score(normalize(test.double()), truth), abs=0.26)  # one of 400
    assert "top1_deviation" not in finding.figures  # one draw
    assert finding.correct is not None and 100 * finding.correct.mean() == pytest.approx(finding.figures["top1"])


def test_map_of_all_images_is_that_of_scikit_learn(several: Sides) -> None:
    bank, known, test, wanted = several
    finding = measure(several, 0, classes=3, cost=(1.0,))
    columns = []
    for own in range(3):
        rows = (known[:, own] >= 0).numpy()
        model = LinearSVC(C=1.0, dual="auto", class_weight={0: 1, 1: 2}, max_iter=5000)
        model.fit(normalize(bank.double())[rows], known[rows, own].numpy())
        columns.append(torch.from_numpy(model.decision_function(normalize(test.double()))))
    want = 100 * average_precision(torch.stack(columns, dim=1), wanted, interpolated=True).mean()
    assert finding.main == "map" and finding.figures["map"] == pytest.approx(want, abs=0.1)
    low, high = finding.intervals["map"]
    assert low < want < high


def test_draws_are_summed_up_by_mean_and_deviation(digits: Sides, several: Sides) -> None:
    for sides, classes, main in ((digits, 10, "top1"), (several, 3, "map")):
        finding = measure(sides, 4, classes=classes)
        each = [draw[main] for draw in finding.details["draws"]]
        assert len(each) == 3 and finding.setting["shots"] == 4 and finding.main == main and finding.correct is None
        assert finding.figures[main] == pytest.approx(np.mean(each), abs=1e-3)
        assert finding.figures[f"{main}_deviation"] == pytest.approx(np.std(each, ddof=1), abs=1e-3)
        assert finding.intervals[main][0] < finding.figures[main] < finding.intervals[main][1]


def test_the_cost_is_the_best_on_images_left_out() -> None:
    truth = np.repeat([0, 1, 2], 12)
    features = normalize(np.eye(30)[truth] + 0.5 * np.random.default_rng(0).normal(size=(36, 30)))
    costs, want = (1e-4, 1e-2, 1.0, 100.0), []
    for cost in costs:
        right = []
        for part in range(3):  # images of a class take turns
            out = np.arange(36) % 12 % 3 == part
            model = LinearSVC(C=cost, dual="auto", max_iter=2000, random_state=0).fit(features[~out], truth[~out])
            right.append(model.score(features[out], truth[out]))
        want.append(np.mean(right))
    assert len(set(want)) > 1
    best = choose_cost([Problem(features, np.arange(36), truth)], costs[::-1], single=True)
    assert best == costs[int(np.argmax(want))]


def test_one_shot_takes_the_plain_cost_and_says_so(digits: Sides) -> None:
    finding = measure(digits, 1)
    assert {draw["cost"] for draw in finding.details["draws"]} == {1.0}
    assert any("no cross-validation" in note for note in finding.notes)
    assert measure(digits, 2).notes == ()
    assert {draw["cost"] for draw in measure(digits, 1, cost=(0.3,)).details["draws"]} == {0.3}


def test_classes_with_few_images_or_none_are_noted(digits: Sides) -> None:
    bank, labels, test, truth = digits
    rest = (labels != 4) | (labels == 4).cumsum(0).le(3)
    sides = bank[rest], labels[rest], test, truth
    assert any("Fewer than 8 bank images of class 4" in note for note in measure(sides, 8).notes)
    assert len(measure(sides, 1000).details["draws"]) == 1  # every draw would be the same
    finding = measure((bank[labels != 4], labels[labels != 4], test, truth), 0)
    assert finding.correct is not None and not finding.correct[(truth == 4).numpy()].any()


def test_two_classes(digits: Sides) -> None:
    bank, labels, test, truth = digits
    some, own = labels < 2, truth < 2
    finding = measure((bank[some], labels[some], test[own], truth[own]), 4, classes=2)
    assert finding.figures["top1"] > 97 and finding.figures["top5"] == 100


def test_a_class_known_only_one_way_is_named(digits: Sides, several: Sides) -> None:
    bank, _, test, _ = digits
    several[1][:, 2] = several[1][:, 2].clamp_min(1)
    assert any("both of class 2 and not" in note for note in measure(several, 2, classes=3).notes)
    with pytest.raises(DataError, match="nothing can be learnt"):
        measure((bank, torch.ones_like(several[1]), test, several[3]), 2, classes=3)
