"""The probe and low-shot classification against scikit-learn; what is drawn, and how draws are summed up."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler, normalize
from sklearn.svm import LinearSVC

from relssl.errors import DataError
from relssl.evaluation.features import LabelledFeatures
from relssl.evaluation.lowshot import choose_cost, drawn_rows, lowshot
from relssl.evaluation.metrics import Bootstrap, average_precision
from relssl.evaluation.probe import fit, hold_out, predict, probe, standardise
from relssl.evaluation.result import Finding
from relssl.settings.evaluation import LowshotConfig, ProbeConfig

Sides = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def blobs(images: int, dims: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping classes in dimensions of very different mean and deviation, standardised."""
    labels = torch.arange(images) % classes
    features = torch.randn(classes, dims)[labels] + 1.5 * torch.randn(images, dims)
    features = features * torch.logspace(-2, 2, dims) + torch.linspace(-20, 5, dims)
    deviation, mean = torch.std_mean(features, dim=0, correction=0)
    rows = standardise(features, mean, deviation)
    np.testing.assert_allclose(rows, StandardScaler().fit_transform(features.double()), atol=1e-3)
    return rows, labels


@pytest.mark.parametrize(("classes", "strength"), [(2, 1.0), (5, 1e-3)])
def test_weights_are_those_of_scikit_learn(classes: int, strength: float) -> None:
    rows, labels = blobs(600, 12, classes)
    fitted = fit(rows, labels, classes, strength, 2000)
    inverse = 1 / (strength * 600) * (2 if classes == 2 else 1)
    model = LogisticRegression(C=inverse, tol=1e-8, max_iter=10_000).fit(rows.double().numpy(), labels.numpy())
    theirs = model.coef_ if classes > 2 else np.concatenate([-model.coef_, model.coef_]) / 2
    assert fitted.gradient <= 1e-4
    np.testing.assert_allclose(fitted.weight[:, :-1], theirs, atol=1e-3)
    shares = predict(rows, fitted.weight).double().softmax(dim=1)
    np.testing.assert_allclose(shares, model.predict_proba(rows.double().numpy()), atol=1e-3)


def test_several_labels_are_binary_regressions_on_the_images_known() -> None:
    rows, labels = blobs(500, 8, 3)
    several = torch.nn.functional.one_hot(labels, 3).to(torch.int8)
    several[torch.rand(500, 3) < 0.2] = -1
    weight = fit(rows, several, 3, 1e-2, 2000).weight
    for own in range(3):
        known = (several[:, own] >= 0).numpy()
        model = LogisticRegression(C=1 / (1e-2 * known.sum()), tol=1e-8, max_iter=10_000)
        model.fit(rows.double().numpy()[known], several[known, own].numpy())
        np.testing.assert_allclose(weight[own, :-1], model.coef_[0], atol=1e-3)


@pytest.fixture(scope="module")
def digits() -> Sides:
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels, labels = pixels.float()[order], labels[order]
    return pixels[:1000], labels[:1000], pixels[1000:], labels[1000:]


def measure(sides: Sides, classes: int = 10, settings: ProbeConfig | None = None) -> Finding:
    (finding,) = probe(LabelledFeatures(*sides, classes=classes), settings or ProbeConfig(), Bootstrap(100))
    return finding


def test_accuracy_on_digits_is_that_of_scikit_learn(digits: Sides) -> None:
    bank, labels, test, truth = digits
    finding = measure(digits)
    scaler = StandardScaler().fit(bank)
    model = LogisticRegression(C=1 / (finding.details["strength"] * 1000), tol=1e-6, max_iter=5000)
    model.fit(scaler.transform(bank), labels)
    assert abs(finding.figures["top1"] - 100 * model.score(scaler.transform(test), truth)) < 0.2
    assert finding.correct is not None and 100 * finding.correct.mean() == pytest.approx(finding.figures["top1"])
    assert finding.intervals["top1"][0] < finding.figures["top1"] < finding.intervals["top1"][1]


def test_map_of_several_labels_is_that_of_the_scores(digits: Sides) -> None:
    bank, labels, test, truth = digits
    known, several_truth = (
        torch.stack([own % 2, own < 3, own * 0 + 1, own // 10], dim=1).to(torch.int8) for own in (labels, truth)
    )
    known[::7, 0] = -1
    finding = measure((bank, known, test, several_truth), classes=4)
    each = finding.details["average_precision"]
    assert finding.main == "map" and list(finding.figures) == ["map"] and (each[2], each[3]) == (100, None)
    assert finding.figures["map"] == pytest.approx(np.mean(each[:3]), abs=1e-3)
    scaler = StandardScaler().fit(bank)
    model = LogisticRegression(C=1 / (finding.details["strength"] * 1000), max_iter=5000).fit(scaler.transform(bank), labels < 3)
    scores = torch.from_numpy(model.decision_function(scaler.transform(test)))[:, None]
    assert each[1] == pytest.approx(100 * average_precision(scores, several_truth[:, 1:2])[0], abs=0.2)


def test_the_penalty_is_the_best_on_held_out_images(digits: Sides) -> None:
    bank, labels, test, truth = digits
    noise = torch.randn(1000, 40, generator=torch.Generator().manual_seed(1))  # the weakest penalty must lose
    bank, test = torch.cat([bank[:, ::4], noise], dim=1)[:300], torch.cat([test[:, ::4], noise[: len(test)]], dim=1)
    finding = measure((bank, labels[:300], test, truth))
    tried = finding.details["tried"]
    whole, best = sorted(ProbeConfig().strengths, reverse=True), max(each["top1"] for each in tried)
    assert [each["strength"] for each in tried] == whole[: len(tried)]
    behind = len(tried) - 1 - next(place for place, each in enumerate(tried) if each["top1"] == best)
    assert behind == 2 and len(tried) < len(whole)  # two in a row that are no better end the search
    assert finding.details["strength"] == max(tried, key=lambda each: each["top1"])["strength"]  # max takes the first
    out, _ = hold_out(labels[:300], 10, 0.2, 0)
    assert finding.details["held_out"] == int(out.sum())
    scaler = StandardScaler().fit(bank)
    model = LogisticRegression(C=1 / (tried[0]["strength"] * int((~out).sum())), tol=1e-6, max_iter=5000)
    model.fit(scaler.transform(bank[~out]), labels[:300][~out])
    assert tried[0]["top1"] == pytest.approx(100 * model.score(scaler.transform(bank[out]), labels[:300][out]), abs=1e-3)


def test_held_out_images_are_a_share_of_each_class() -> None:
    labels = torch.tensor([0] * 20 + [1] * 7 + [2] * 2 + [3])[torch.randperm(30)]
    out, notes = hold_out(labels, 5, 0.2, seed=0)
    assert torch.bincount(labels[out], minlength=5).tolist() == [4, 1, 1, 0, 0]
    assert len(notes) == 1 and "class 3" in notes[0]
    assert torch.equal(out, hold_out(labels, 5, 0.2, seed=0)[0])
    assert not torch.equal(out, hold_out(labels, 5, 0.2, seed=1)[0])


def few(sides: Sides) -> Sides:
    bank, labels, test, truth = sides
    return bank[:600], labels[:600], test[:400], truth[:400]


@pytest.fixture
def several(digits: Sides) -> Sides:
    bank, labels, test, truth = few(digits)
    known, several_truth = (torch.stack([own % 2, own < 3, own == 7], dim=1).to(torch.int8) for own in (labels, truth))
    known[::5, 0], several_truth[::3, 1] = -1, -1
    return bank, known, test, several_truth


def shoot(sides: Sides, shots: int, *, classes: int = 10, draws: int = 3, seed: int = 0, **settings: Any) -> Finding:
    config = LowshotConfig(shots=(shots,), draws=draws, **settings)
    (finding,) = lowshot(LabelledFeatures(*few(sides), classes=classes), config, Bootstrap(200, seed))
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


def test_all_images_give_what_scikit_learn_gives(digits: Sides) -> None:
    bank, labels, test, truth = few(digits)
    finding = shoot(digits, 0, cost=(0.5,))
    model = LinearSVC(C=0.5, dual="auto", max_iter=5000).fit(normalize(bank.double()), labels)
    assert finding.figures["top1"] == pytest.approx(100 * model.score(normalize(test.double()), truth), abs=0.26)  # one of 400
    assert "top1_deviation" not in finding.figures  # one draw
    assert finding.correct is not None and 100 * finding.correct.mean() == pytest.approx(finding.figures["top1"])


def test_map_of_all_images_is_that_of_scikit_learn(several: Sides) -> None:
    bank, known, test, several_truth = several
    finding = shoot(several, 0, classes=3, cost=(1.0,))
    columns = []
    for own in range(3):
        rows = (known[:, own] >= 0).numpy()
        model = LinearSVC(C=1.0, dual="auto", class_weight={0: 1, 1: 2}, max_iter=5000)
        model.fit(normalize(bank.double())[rows], known[rows, own].numpy())
        columns.append(torch.from_numpy(model.decision_function(normalize(test.double()))))
    want = 100 * average_precision(torch.stack(columns, dim=1), several_truth, interpolated=True).mean()
    assert finding.main == "map" and finding.figures["map"] == pytest.approx(want, abs=0.1)
    low, high = finding.intervals["map"]
    assert low < want < high


def test_draws_are_summed_up_by_mean_and_deviation(digits: Sides, several: Sides) -> None:
    for sides, classes, main in ((digits, 10, "top1"), (several, 3, "map")):
        finding = shoot(sides, 4, classes=classes)
        each = [draw[main] for draw in finding.details["draws"]]
        assert len(set(each)) > 1 and shoot(sides, 4, classes=classes).details["draws"] == finding.details["draws"]
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
    best = choose_cost([(features, truth)], costs[::-1], single=True)
    assert best == costs[int(np.argmax(want))]


def test_a_class_known_only_one_way_is_named(digits: Sides, several: Sides) -> None:
    bank, _, test, _ = digits
    several[1][:, 2] = several[1][:, 2].clamp_min(1)
    assert any("both of class 2 and not" in note for note in shoot(several, 2, classes=3).notes)
    with pytest.raises(DataError, match="nothing can be learnt"):
        shoot((bank, torch.ones_like(several[1]), test, several[3]), 2, classes=3)
