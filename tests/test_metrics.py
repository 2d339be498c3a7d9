"""Figures against scikit-learn, and their intervals against a bootstrap that draws images one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, balanced_accuracy_score, top_k_accuracy_score

from relssl.errors import NumericError
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


def labelled(images: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    truth = torch.randint(classes, (images,), generator=g)
    truth[:classes] = torch.arange(classes)
    scores = torch.randn(images, classes, generator=g)
    scores[torch.arange(images), truth] += 1.0 + 0.2 * truth  # some classes are easier
    return scores, truth


@pytest.mark.parametrize("classes", [3, 8])
def test_accuracies_are_those_of_scikit_learn(classes: int) -> None:
    scores, truth = labelled(200, classes)
    figures = accuracies(ranks(scores, truth), truth, classes)
    assert figures["top1"] == pytest.approx(100 * top_k_accuracy_score(truth, scores, k=1, labels=range(classes)))
    top5 = 100 * top_k_accuracy_score(truth, scores, k=5, labels=range(classes)) if classes > 5 else 100
    assert figures["top5"] == pytest.approx(top5)
    assert figures["mean_per_class"] == pytest.approx(100 * balanced_accuracy_score(truth, scores.argmax(1)))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 8), st.integers(2, 6), st.integers(0, 10**6))
def test_a_rank_is_a_place_in_a_stable_sort(images: int, classes: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(-2, 3, (images, classes), generator=g).float()  # few values: many ties
    truth = torch.randint(classes, (images,), generator=g)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(ranks(scores, truth), (order == truth[:, None]).int().argmax(dim=1))


def test_scores_that_are_nan_are_refused() -> None:
    scores, truth = torch.zeros(5, 3), torch.tensor([0, 1, 2, 0, 1])
    scores[3, 1] = torch.nan
    with pytest.raises(NumericError):
        ranks(scores, truth)
    with pytest.raises(NumericError):
        average_precision(scores, torch.ones(5, 3, dtype=torch.int8))
    scores[3, 1] = -torch.inf  # a class without images is never predicted
    assert len(ranks(scores, truth)) == 5


def test_intervals_of_accuracies_are_those_of_a_plain_bootstrap() -> None:
    classes, images = 8, 150
    scores, truth = labelled(images, classes, seed=3)
    rank = ranks(scores, truth)
    g = np.random.default_rng(7)
    samples: dict[str, list[float]] = {}
    for _ in range(2000):
        rows = torch.from_numpy(g.integers(0, images, images))
        for name, value in accuracies(rank[rows], truth[rows], classes).items():
            samples.setdefault(name, []).append(value)
    intervals = accuracy_intervals(rank, truth, classes, Bootstrap(20_000, seed=1))
    for name, values in samples.items():
        low, high = percentiles(np.array(values))
        np.testing.assert_allclose(intervals[name], (low, high), atol=0.1 * (high - low), err_msg=name)
    few = Bootstrap(200)
    assert accuracy_intervals(rank, truth, classes, few) == accuracy_intervals(rank, truth, classes, few)
    assert accuracy_intervals(rank, truth, classes, few) != accuracy_intervals(rank, truth, classes, Bootstrap(200, seed=1))


def test_the_interval_of_a_mean_is_that_of_normal_theory_for_many_images() -> None:
    values = np.random.default_rng(0).exponential(size=2000)
    low, high = mean_interval(values, Bootstrap(4000, seed=2))
    error = values.std() / len(values) ** 0.5
    np.testing.assert_allclose((low, high), (values.mean() - 1.96 * error, values.mean() + 1.96 * error), atol=0.25 * error)


def several(images: int, classes: int, seed: int, *, steps: int = 1000) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(-1, 2, (images, classes), generator=g).to(torch.int8)
    targets[0], targets[1] = 1, 0
    return ((torch.randn(images, classes, generator=g) + targets) * steps).round() / steps, targets


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 40), st.integers(1, 5), st.integers(0, 10**6), st.sampled_from([1, 1000]))
def test_average_precision_is_that_of_scikit_learn(images: int, classes: int, seed: int, steps: int) -> None:
    scores, targets = several(images, classes, seed, steps=steps)
    each = average_precision(scores, targets)
    for own in range(classes):
        known = targets[:, own] >= 0
        assert each[own] == pytest.approx(average_precision_score(targets[known, own], scores[known, own]))


def test_interpolated_precision_is_the_best_from_there_on() -> None:
    # By falling score: yes no no yes yes no. Precision at the three yes: 1, 2/4, 3/5; the second is raised to 3/5.
    scores = torch.tensor([[6.0], [5.0], [4.0], [3.0], [2.0], [1.0]])
    targets = torch.tensor([[1], [0], [0], [1], [1], [0]], dtype=torch.int8)
    assert average_precision(scores, targets)[0] == pytest.approx((1 + 2 / 4 + 3 / 5) / 3)
    assert average_precision(scores, targets, interpolated=True)[0] == pytest.approx((1 + 3 / 5 + 3 / 5) / 3)
    unknown = torch.tensor([[1, 0, -1], [0, 0, -1]], dtype=torch.int8)
    assert np.isnan(average_precision(torch.rand(2, 3), unknown)).tolist() == [False, True, True]


@pytest.mark.parametrize("interpolated", [False, True])
def test_resamples_of_map_are_those_of_copied_images(interpolated: bool) -> None:
    scores, targets = several(40, 4, seed=5)
    targets[2:, 3] = 0  # a class with one image, which a resample may have none of
    bootstrap = Bootstrap(100, seed=3)
    samples = map_samples(scores, targets, bootstrap, interpolated=interpolated)
    drawn = bootstrap.generator().multinomial(40, np.full(40, 1 / 40), size=100)
    for counts, value in zip(drawn, samples, strict=True):
        rows = torch.from_numpy(np.repeat(np.arange(40), counts))
        assert value == pytest.approx(np.nanmean(average_precision(scores[rows], targets[rows], interpolated=interpolated)))
    assert (drawn[:, 0] == 0).any()
