"""The probe against scikit-learn's logistic regression, and what must never change a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import check_grad
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from relssl.errors import ConfigError, DataError, NumericError
from relssl.evaluation.features import Rows
from relssl.evaluation.findings import Finding
from relssl.evaluation.metrics import Bootstrap, average_precision
from relssl.evaluation.probe import _Objective, fit, hold_out, measure, predict, probe, unpack
from relssl.settings.evaluation import ProbeConfig

CPU = torch.device("cpu")
MORE: dict[str, Any] = {"device": CPU, "iterations": 2000}


def _blobs(images: int, dims: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping classes in dimensions of very different mean and deviation."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=g)
    labels[: 2 * classes] = torch.arange(classes).repeat(2)
    points = torch.randn(classes, dims, generator=g)[labels] + 1.5 * torch.randn(images, dims, generator=g)
    return points * torch.logspace(-2, 2, dims) + torch.linspace(-20, 5, dims), labels


def _standard(features: torch.Tensor) -> np.ndarray[Any, Any]:
    return np.asarray(StandardScaler().fit_transform(features.double().numpy()))


def _probe(bank: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, truth: torch.Tensor, **more: Any) -> Finding:
    given = {"classes": 10, "settings": ProbeConfig(), "bootstrap": Bootstrap(100), "seed": 0} | more
    (finding,) = probe(bank, labels, test, truth, **given)
    return finding


@pytest.mark.parametrize("strength", [1.0, 1e-2, 1e-3])
@pytest.mark.parametrize("classes", [2, 5])
def test_weights_are_those_of_scikit_learn(classes: int, strength: float) -> None:
    features, labels = _blobs(600, 12, classes)
    rows = Rows("bank", features)
    scale = measure(rows, CPU, 100)
    found = fit(rows, labels, classes, strength, scale, chunk=250, **MORE)
    weight, _ = unpack(found.flat, classes, CPU)
    inverse = 1 / (strength * 600) * (2 if classes == 2 else 1)
    model = LogisticRegression(C=inverse, tol=1e-8, max_iter=10_000).fit(_standard(features), labels.numpy())
    theirs = model.coef_ if classes > 2 else np.concatenate([-model.coef_, model.coef_]) / 2
    assert found.converged
    np.testing.assert_allclose(weight, theirs, atol=1e-3)
    shares = predict(rows, found, classes, scale, CPU, 77).double().softmax(dim=1)
    np.testing.assert_allclose(shares, model.predict_proba(_standard(features)), atol=1e-3)


def test_several_labels_are_binary_regressions_on_the_images_told() -> None:
    features, labels = _blobs(500, 8, 3)
    several = torch.nn.functional.one_hot(labels, 3).to(torch.int8)
    several[torch.rand(500, 3) < 0.2] = -1
    scale = measure(Rows("bank", features), CPU, 100)
    weight, _ = unpack(fit(Rows("bank", features), several, 3, 1e-2, scale, chunk=170, **MORE).flat, 3, CPU)
    for own in range(3):
        told = (several[:, own] >= 0).numpy()
        model = LogisticRegression(C=1 / (1e-2 * told.sum()), tol=1e-8, max_iter=10_000)
        model.fit(_standard(features)[told], several[told, own].numpy())
        np.testing.assert_allclose(weight[own], model.coef_[0], atol=1e-3)


@pytest.mark.parametrize("several", [False, True])
def test_the_gradient_is_that_of_the_objective(several: bool) -> None:
    features, labels = _blobs(40, 5, 3)
    targets = torch.randint(-1, 2, (40, 3)).to(torch.int8) if several else labels
    scale = measure(Rows("bank", features), CPU, 40)
    objective = _Objective(Rows("bank", features), targets, 3, 0.1, scale, CPU, 16)
    point = np.random.default_rng(0).normal(size=18)
    assert check_grad(lambda x: objective(x)[0], lambda x: objective(x)[1], point, epsilon=1e-3) < 5e-3


def test_mean_and_deviation_survive_a_large_mean() -> None:
    features = torch.randn(1000, 3) * torch.tensor([1.0, 1e-3, 0.0]) + torch.tensor([0.0, 30.0, 30.0])
    scale = measure(Rows("bank", features), CPU, 99)
    exact = features.double()
    torch.testing.assert_close(scale.mean, exact.mean(dim=0).float(), rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(1 / scale.inverse[:2], exact.std(dim=0, correction=0)[:2], rtol=1e-6, atol=0)
    assert scale.inverse[2] == 0  # a dimension that tells nothing has no weight


def _digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels, labels = pixels.float()[order], labels[order]
    return pixels[:1000], labels[:1000], pixels[1000:], labels[1000:]


def test_accuracy_on_digits_is_that_of_scikit_learn() -> None:
    bank, labels, test, truth = _digits()
    finding = _probe(bank, labels, test, truth)
    scaler = StandardScaler().fit(bank)
    model = LogisticRegression(C=1 / (finding.details["strength"] * 1000), tol=1e-6, max_iter=5000)
    model.fit(scaler.transform(bank), labels)
    assert finding.main == "top1"
    assert abs(finding.figures["top1"] - 100 * model.score(scaler.transform(test), truth)) < 0.2
    assert finding.correct is not None and 100 * finding.correct.mean() == pytest.approx(finding.figures["top1"])
    assert finding.intervals["top1"][0] < finding.figures["top1"] < finding.intervals["top1"][1]


def test_map_of_several_labels_is_that_of_the_scores() -> None:
    bank, labels, test, truth = _digits()
    told, asked = (torch.stack([own % 2, own < 3, own * 0 + 1, own // 10], dim=1).to(torch.int8) for own in (labels, truth))
    told[::7, 0] = -1
    finding = _probe(bank, told, test, asked, classes=4)
    assert finding.main == "map" and list(finding.figures) == ["map"]
    each = finding.details["average_precision"]
    assert each[3] is None and each[2] == 100
    assert finding.figures["map"] == pytest.approx(np.mean(each[:3]), abs=1e-3)
    scaler = StandardScaler().fit(bank)
    model = LogisticRegression(C=1 / (finding.details["strength"] * 1000), max_iter=5000).fit(scaler.transform(bank), labels < 3)
    scores = torch.from_numpy(model.decision_function(scaler.transform(test)))[:, None]
    assert each[1] == pytest.approx(100 * average_precision(scores, asked[:, 1:2])[0], abs=0.2)
    assert any("class 3" in note for note in finding.notes)


def test_the_penalty_is_the_best_on_held_out_images() -> None:
    bank, labels, test, truth = _digits()
    noise = torch.randn(1000, 40, generator=torch.Generator().manual_seed(1))  # the weakest penalty must lose
    bank, test = torch.cat([bank[:, ::4], noise], dim=1)[:300], torch.cat([test[:, ::4], noise[: len(test)]], dim=1)
    finding = _probe(bank, labels[:300], test, truth)
    tried = finding.details["tried"]
    whole, best = sorted(ProbeConfig().strengths, reverse=True), max(each["top1"] for each in tried)
    assert [each["strength"] for each in tried] == whole[: len(tried)]
    behind = len(tried) - 1 - next(place for place, each in enumerate(tried) if each["top1"] == best)
    assert behind == 2 and len(tried) < len(whole)  # two in a row that are no better end the search
    assert finding.details["strength"] == max(tried, key=lambda each: each["top1"])["strength"]  # max takes the first
    held, _ = hold_out(labels[:300], 10, 0.2, 0)
    assert finding.details["held_out"] == int(held.sum())
    scaler = StandardScaler().fit(bank)
    model = LogisticRegression(C=1 / (tried[0]["strength"] * int((~held).sum())), tol=1e-6, max_iter=5000)
    model.fit(scaler.transform(bank[~held]), labels[:300][~held])
    rows = Rows("bank", bank, (~held).nonzero().flatten())
    cold = fit(rows, labels[:300][~held], 10, 1e-6, measure(Rows("bank", bank), CPU, 100), chunk=100, **MORE)
    assert tried[-1]["iterations"] < cold.iterations  # it began where the fit before had ended
    assert tried[0]["top1"] == pytest.approx(100 * model.score(scaler.transform(bank[held]), labels[:300][held]), abs=1e-3)


def test_of_equal_penalties_the_strongest_is_taken() -> None:
    labels = torch.arange(60) % 3
    features = 10 * torch.eye(3)[labels] + torch.randn(60, 3)  # so far apart that every penalty is right
    finding = _probe(features, labels, features, labels, classes=3)
    assert {each["top1"] for each in finding.details["tried"]} == {100.0}
    assert finding.details["strength"] == 1.0


def test_held_out_images_are_a_share_of_each_class() -> None:
    labels = torch.tensor([0] * 20 + [1] * 7 + [2] * 2 + [3])[torch.randperm(30)]
    held, notes = hold_out(labels, 5, 0.2, seed=0)
    assert torch.bincount(labels[held], minlength=5).tolist() == [4, 1, 1, 0, 0]
    assert len(notes) == 1 and "class 3" in notes[0]
    assert torch.equal(held, hold_out(labels, 5, 0.2, seed=0)[0])
    assert not torch.equal(held, hold_out(labels, 5, 0.2, seed=1)[0])


def test_chunks_and_files_change_nothing(tmp_path: Path) -> None:
    bank, labels, test, truth = _digits()
    want = _probe(bank, labels, test, truth)
    np.save(tmp_path / "bank.npy", bank.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "bank.npy", mmap_mode="c"))
    got = _probe(mapped, labels, test, truth, chunk=77)
    assert got.details["strength"] == want.details["strength"]
    assert abs(got.figures["top1"] - want.figures["top1"]) < 0.2
    assert torch.equal(mapped, bank)


def test_a_choice_at_the_edge_and_too_few_iterations_are_said() -> None:
    bank, labels, test, truth = _digits()
    (edge,) = _probe(bank, labels, test, truth, settings=ProbeConfig(strengths=(10.0, 100.0))).notes
    assert "10, is at the edge" in edge
    (short,) = _probe(bank, labels, test, truth, settings=ProbeConfig(strengths=(1e-4,), iterations=3)).notes
    assert "3 iterations" in short


def test_classes_of_one_image_leave_the_middle_penalty() -> None:
    bank, labels, test, truth = _digits()
    first = torch.tensor([int((labels == own).nonzero()[0]) for own in range(10)])
    finding = _probe(bank[first], labels[first], test, truth)
    assert finding.details["strength"] == 1e-3 and finding.details["tried"] == []
    assert any("middle penalty" in note for note in finding.notes)
    assert finding.figures["top1"] > 40


def test_a_test_class_that_the_bank_lacks_is_named() -> None:
    bank, labels, test, truth = _digits()
    known = labels < 3
    finding = _probe(bank[known], labels[known], test, truth)
    assert any("no image of classes 3, 4, 5, 6, 7 and 2 more" in note for note in finding.notes)
    assert finding.correct is not None and not finding.correct[(truth >= 3).numpy()].any()


def test_bad_input_is_refused_by_name() -> None:
    bank, labels, test, truth = _digits()
    with pytest.raises(DataError, match="all 1000 images of the bank are of the single class 4"):
        _probe(bank, torch.full_like(labels, 4), test, truth)
    with pytest.raises(ConfigError, match=r"probe\.strengths"):
        _probe(bank, labels, test, truth, settings=ProbeConfig(strengths=()))
    with pytest.raises(DataError, match="of no class"):
        _probe(bank, labels, test[:0], truth[:0])
    with pytest.raises(NumericError, match="test features are constant"):
        _probe(bank, labels, torch.ones_like(test), truth)
    with pytest.raises(NumericError, match="bank features hold NaN or Inf, first in row 0"):
        _probe(bank / 0, labels, test, truth)
