"""Low-shot classification: what is drawn, what is learnt, and how the draws are summed up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.preprocessing import normalize
from sklearn.svm import LinearSVC

from relssl.errors import ConfigError, DataError, NumericError
from relssl.evaluation import lowshot as module
from relssl.evaluation.findings import Finding
from relssl.evaluation.lowshot import lowshot
from relssl.evaluation.metrics import Bootstrap, Problem, average_precision, choose_cost, deal, train
from relssl.settings.evaluation import LowshotConfig

Sides = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _digits() -> Sides:
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels, labels = pixels.float()[order], labels[order]
    return pixels[:600], labels[:600], pixels[600:1000], labels[600:1000]


def _several() -> Sides:
    bank, labels, test, truth = _digits()
    told, asked = (torch.stack([own % 2, own < 3, own == 7], dim=1).to(torch.int8) for own in (labels, truth))
    told[::5, 0], asked[::3, 1] = -1, -1
    return bank, told, test, asked


def _lowshot(sides: Sides, shots: int, *, classes: int = 10, draws: int = 3, seed: int = 0, **settings: Any) -> Finding:
    config = LowshotConfig(shots=(shots,), draws=draws, **settings)
    (finding,) = lowshot(*sides, classes=classes, settings=config, bootstrap=Bootstrap(200), seed=seed)
    return finding


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """The problems trained on in the end, not those of cross-validation."""
    problems: list[Problem] = []

    def keep(problem: Problem, cost: float) -> Any:
        problems.append(problem)
        return train(problem, cost)

    monkeypatch.setattr(module, "train", keep)
    return problems


def _rows(problem: Problem, bank: torch.Tensor) -> list[int]:
    """Which bank images a problem has."""
    unit = normalize(bank.double().numpy())
    return [int(np.abs(unit - row).sum(axis=1).argmin()) for row in problem.features[problem.rows]]


def test_a_draw_has_as_many_images_of_each_class_and_those_of_fewer_shots(drawn: list[Problem]) -> None:
    sides = _digits()
    _lowshot(sides, 4, draws=2)
    _lowshot(sides, 2, draws=2)
    four, other, two, _ = (set(_rows(problem, sides[0])) for problem in drawn)
    assert [np.bincount(problem.truth).tolist() for problem in drawn] == [[4] * 10] * 2 + [[2] * 10] * 2
    assert [sides[1][row] for row in _rows(drawn[0], sides[0])] == drawn[0].truth.tolist()
    assert len(four) == 40 and two < four and four != other


def test_draws_depend_on_the_seed_alone() -> None:
    sides = _digits()
    first, again, other = (_lowshot(sides, 2, seed=seed).details["draws"] for seed in (0, 0, 1))
    assert first == again != other


def test_all_images_give_what_scikit_learn_gives() -> None:
    sides = bank, labels, test, truth = _digits()
    finding = _lowshot(sides, 0, cost=(0.5,))
    model = LinearSVC(C=0.5, dual="auto", max_iter=5000).fit(normalize(bank.double()), labels)
    assert finding.figures["top1"] == pytest.approx(100 * model.score(normalize(test.double()), truth), abs=0.26)  # one of 400
    assert "top1_deviation" not in finding.figures  # one draw
    assert finding.correct is not None and 100 * finding.correct.mean() == pytest.approx(finding.figures["top1"])


def test_draws_are_summed_up_by_mean_and_deviation() -> None:
    finding = _lowshot(_digits(), 2)
    each = [draw["top1"] for draw in finding.details["draws"]]
    assert len(each) == 3 and finding.setting == {"shots": 2} and finding.main == "top1"
    assert finding.figures["top1"] == pytest.approx(np.mean(each), abs=1e-3)
    assert finding.figures["top1_deviation"] == pytest.approx(np.std(each, ddof=1), abs=1e-3)
    low, high = finding.intervals["top1"]
    assert low < finding.figures["top1"] < high
    assert finding.correct is None


def test_the_cost_is_the_best_on_images_left_out() -> None:
    g = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], 12)
    features = normalize(np.eye(30)[truth] + 0.5 * g.normal(size=(36, 30)))
    problem, costs = Problem(features, np.arange(36), truth), (1e-4, 1e-2, 1.0, 100.0)
    want = []
    for cost in costs:
        right = []
        for out in range(3):
            left = np.arange(36) % 12 % 3 == out
            model = LinearSVC(C=cost, dual="auto", max_iter=2000, random_state=0).fit(features[~left], truth[~left])
            right.append(model.score(features[left], truth[left]))
        want.append(np.mean(right))
    assert len(set(want)) > 1
    assert choose_cost([problem], costs[::-1], module._right) == costs[int(np.argmax(want))]


def test_images_of_a_class_take_turns_in_the_parts() -> None:
    truth = np.array([5, 3, 5, 5, 3, 5, 9])
    assert deal(truth).tolist() == [0, 0, 1, 2, 1, 0, -1]


def test_one_shot_takes_the_plain_cost_and_says_so() -> None:
    finding = _lowshot(_digits(), 1)
    assert {draw["cost"] for draw in finding.details["draws"]} == {1.0}
    assert any("no cross-validation" in note for note in finding.notes)
    assert not any("no cross-validation" in note for note in _lowshot(_digits(), 2).notes)
    assert {draw["cost"] for draw in _lowshot(_digits(), 1, cost=(0.3,)).details["draws"]} == {0.3}


def test_too_many_shots_name_the_class() -> None:
    bank, labels, test, truth = _digits()
    kept = (labels != 4) | (labels == 4).cumsum(0).le(3)
    sides = bank[kept], labels[kept], test, truth
    assert _lowshot(sides, 8).notes == ("Fewer than 8 bank images of class 4: all of them were used.",)
    assert len(_lowshot(sides, 1000).details["draws"]) == 1  # every draw would be the same


def test_a_class_that_the_bank_lacks_is_named_and_never_said() -> None:
    bank, labels, test, truth = _digits()
    sides = bank[labels != 4], labels[labels != 4], test, truth
    finding = _lowshot(sides, 0)
    assert finding.notes == (f"The bank has no image of class 4, so {int((truth == 4).sum())} test labels cannot be found.",)
    assert finding.correct is not None and not finding.correct[(truth == 4).numpy()].any()


def test_two_classes() -> None:
    bank, labels, test, truth = _digits()
    some, own = labels < 2, truth < 2
    finding = _lowshot((bank[some], labels[some], test[own], truth[own]), 4, classes=2)
    assert finding.figures["top1"] > 97 and finding.figures["top5"] == 100


def test_several_labels_draw_positives_and_twice_as_many_others(drawn: list[Problem]) -> None:
    sides = _several()
    _lowshot(sides, 5, classes=3, draws=1)
    assert [np.bincount(problem.truth).tolist() for problem in drawn] == [[10, 5]] * 3  # (C - 1) n others
    for own, problem in enumerate(drawn):
        assert problem.weights == {0: 1.0, 1: 2.0}
        assert [int(sides[1][row, own]) for row in _rows(problem, sides[0])] == problem.truth.tolist()  # never -1


def test_map_of_all_images_is_that_of_scikit_learn() -> None:
    sides = bank, told, test, asked = _several()
    finding = _lowshot(sides, 0, classes=3, cost=(1.0,))
    columns = []
    for own in range(3):
        known = (told[:, own] >= 0).numpy()
        model = LinearSVC(C=1.0, dual="auto", class_weight={0: 1, 1: 2}, max_iter=5000)
        model.fit(normalize(bank.double())[known], told[known, own].numpy())
        columns.append(torch.from_numpy(model.decision_function(normalize(test.double()))))
    want = 100 * average_precision(torch.stack(columns, dim=1), asked, interpolated=True).mean()
    assert finding.main == "map" and finding.figures["map"] == pytest.approx(want, abs=0.1)
    low, high = finding.intervals["map"]
    assert low < want < high


def test_map_over_draws() -> None:
    finding = _lowshot(_several(), 4, classes=3)
    each = [draw["map"] for draw in finding.details["draws"]]
    assert finding.figures == pytest.approx({"map": np.mean(each), "map_deviation": np.std(each, ddof=1)}, abs=1e-3)


def test_a_class_told_only_one_way_is_named() -> None:
    bank, told, test, asked = _several()
    told[:, 2] = told[:, 2].clamp_min(1)
    assert any("both of class 2 and not" in note for note in _lowshot((bank, told, test, asked), 2, classes=3).notes)
    with pytest.raises(DataError, match="nothing can be learnt"):
        _lowshot((bank, torch.ones_like(told), test, asked), 2, classes=3)


def test_bad_input_is_refused_by_name() -> None:
    bank, labels, test, truth = _digits()
    with pytest.raises(DataError, match="single class 4"):
        _lowshot((bank, torch.full_like(labels, 4), test, truth), 2)
    with pytest.raises(ConfigError, match="shots and cost"):
        _lowshot((bank, labels, test, truth), 2, cost=())
    with pytest.raises(NumericError, match="bank features are constant"):
        _lowshot((torch.ones_like(bank), labels, test, truth), 2)
