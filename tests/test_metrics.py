"""Figures against scikit-learn, and their intervals against a bootstrap that draws images one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, balanced_accuracy_score, top_k_accuracy_score

from relssl.errors import NumericError
from relssl.evaluation.features import require_varied
from relssl.evaluation.metrics import (
    Bootstrap,
    accuracies,
    accuracy_intervals,
    average_precision,
    map_samples,
    mean_interval,
    percentiles,
    ranks,
)


def _labelled(images: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    truth = torch.randint(classes, (images,), generator=g)
    truth[:classes] = torch.arange(classes)
    scores = torch.randn(images, classes, generator=g)
    scores[torch.arange(images), truth] += 1.0 + 0.2 * truth  # some classes are easier
    return scores, truth


@pytest.mark.parametrize("classes", [3, 8])
def test_accuracies_are_those_of_scikit_learn(classes: int) -> None:
    scores, truth = _labelled(200, classes)
    made = accuracies(ranks(scores, truth), truth, classes)
    best = range(classes)
    assert made["top1"] == pytest.approx(100 * top_k_accuracy_score(truth, scores, k=1, labels=best))
    top5 = 100 * top_k_accuracy_score(truth, scores, k=5, labels=best) if classes > 5 else 100
    assert made["top5"] == pytest.approx(top5)
    assert made["mean_per_class"] == pytest.approx(100 * balanced_accuracy_score(truth, scores.argmax(1)))


@given(st.data())
def test_a_rank_is_a_place_in_a_stable_sort(data: st.DataObject) -> None:
    images, classes = data.draw(st.integers(1, 8)), data.draw(st.integers(2, 6))
    row = st.lists(st.integers(-2, 2), min_size=classes, max_size=classes)  # few values: many ties
    scores = torch.tensor(data.draw(st.lists(row, min_size=images, max_size=images))).float()
    truth = torch.tensor(data.draw(st.lists(st.integers(0, classes - 1), min_size=images, max_size=images)))
    order = scores.sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(ranks(scores, truth), (order == truth[:, None]).int().argmax(dim=1))


@pytest.mark.parametrize("place", [(0, 0), (3, 1)])
def test_scores_that_are_nan_are_refused(place: tuple[int, int]) -> None:
    scores, truth = torch.zeros(5, 3), torch.tensor([0, 1, 2, 0, 1])
    scores[place] = torch.nan
    for measure in (lambda: ranks(scores, truth), lambda: average_precision(scores, torch.ones(5, 3, dtype=torch.int8))):
        with pytest.raises(NumericError, match="hold NaN"):
            measure()
    scores[place] = -torch.inf  # what has no image is never said
    assert len(ranks(scores, truth)) == 5


def test_intervals_of_accuracies_are_those_of_a_plain_bootstrap() -> None:
    classes, images, resamples = 8, 150, 20_000
    scores, truth = _labelled(images, classes, seed=3)
    rank = ranks(scores, truth)
    g = np.random.default_rng(7)
    samples: dict[str, list[float]] = {}
    for _ in range(4000):
        rows = torch.from_numpy(g.integers(0, images, images))
        for name, value in accuracies(rank[rows], truth[rows], classes).items():
            samples.setdefault(name, []).append(value)
    made = accuracy_intervals(rank, truth, classes, Bootstrap(resamples, seed=1))
    for name, values in samples.items():
        # A percentile of 4,000 resamples is off by about 2 % of the width; of both ends the widest of three is seen at 6 %.
        low, high = percentiles(np.array(values))
        np.testing.assert_allclose(made[name], (low, high), atol=0.08 * (high - low), err_msg=name)


def test_the_interval_of_a_mean_is_that_of_normal_theory_for_many_images() -> None:
    values = np.random.default_rng(0).exponential(size=2000)
    low, high = mean_interval(values, Bootstrap(4000, seed=2))
    error = values.std() / len(values) ** 0.5
    np.testing.assert_allclose((low, high), (values.mean() - 1.96 * error, values.mean() + 1.96 * error), atol=0.25 * error)


def test_intervals_depend_on_the_seed_alone() -> None:
    scores, truth = _labelled(60, 4)
    rank = ranks(scores, truth)
    first, again, other = (accuracy_intervals(rank, truth, 4, Bootstrap(500, seed)) for seed in (0, 0, 1))
    assert first == again != other


def _several(images: int, classes: int, seed: int, *, steps: int = 1000) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(-1, 2, (images, classes), generator=g).to(torch.int8)
    targets[0], targets[1] = 1, 0
    scores = (torch.randn(images, classes, generator=g) + targets) * steps
    return scores.round() / steps, targets


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(1, 5), st.integers(0, 10**6), st.sampled_from([1, 1000]))
def test_average_precision_is_that_of_scikit_learn(images: int, classes: int, seed: int, steps: int) -> None:
    scores, targets = _several(images, classes, seed, steps=steps)
    made = average_precision(scores, targets)
    for own in range(classes):
        told = targets[:, own] >= 0
        assert made[own] == pytest.approx(average_precision_score(targets[told, own], scores[told, own]))


def test_interpolated_precision_is_the_best_from_there_on() -> None:
    # By falling score: yes no no yes yes no. Precision at the three yes: 1, 2/4, 3/5; the second is raised to 3/5.
    scores = torch.tensor([[6.0], [5.0], [4.0], [3.0], [2.0], [1.0]])
    targets = torch.tensor([[1], [0], [0], [1], [1], [0]], dtype=torch.int8)
    assert average_precision(scores, targets)[0] == pytest.approx((1 + 2 / 4 + 3 / 5) / 3)
    assert average_precision(scores, targets, interpolated=True)[0] == pytest.approx((1 + 3 / 5 + 3 / 5) / 3)


def test_a_class_without_images_has_no_average_precision() -> None:
    targets = torch.tensor([[1, 0, -1], [0, 0, -1]], dtype=torch.int8)
    made = average_precision(torch.rand(2, 3), targets)
    assert np.isnan(made).tolist() == [False, True, True]


@pytest.mark.parametrize("interpolated", [False, True])
def test_resamples_of_map_are_those_of_copied_images(interpolated: bool) -> None:
    scores, targets = _several(40, 4, seed=5)
    targets[2:, 3] = 0  # a class with one image, which a resample may have none of
    bootstrap = Bootstrap(200, seed=3)
    made = map_samples(scores, targets, bootstrap, interpolated=interpolated)
    drawn = bootstrap.generator().multinomial(40, np.full(40, 1 / 40), size=200)
    for counts, value in zip(drawn, made, strict=True):
        rows = torch.from_numpy(np.repeat(np.arange(40), counts))
        assert value == pytest.approx(np.nanmean(average_precision(scores[rows], targets[rows], interpolated=interpolated)))
    assert (drawn[:, 0] == 0).any()


def test_resamples_are_the_same_however_many_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, targets = _several(30, 3, seed=1)
    want = map_samples(scores, targets, Bootstrap(50))
    monkeypatch.setattr("relssl.evaluation.metrics._CELLS", 70)
    np.testing.assert_array_equal(map_samples(scores, targets, Bootstrap(50)), want)


def test_features_that_vary_pass() -> None:
    require_varied(torch.tensor([[1.0, 5.0], [1.0, 5.001]]), "bank")
    require_varied(torch.tensor([[1.0, 2.0]]), "bank")  # one image cannot vary


@pytest.mark.parametrize("chunk", [3, 100])
def test_constant_features_are_refused(chunk: int) -> None:
    rounding = 1 + 1e-7 * torch.randn(20, 4)
    for features in (torch.zeros(20, 4), torch.full((20, 4), 3.7), 1e6 * rounding):
        with pytest.raises(NumericError, match="test features are constant over all 20 images"):
            require_varied(features, "test", chunk=chunk)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_are_refused_by_row(value: float) -> None:
    features = torch.randn(20, 4)
    features[13, 2] = features[17, 0] = value
    with pytest.raises(NumericError, match="bank features hold NaN or Inf, first in row 13"):
        require_varied(features, "bank", chunk=5)
