"""Figures and retrieval against scikit-learn, intervals against a bootstrap that draws images one by one."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, balanced_accuracy_score, top_k_accuracy_score

from relssl.errors import DataError, NumericError
from relssl.evaluation.features import LabelledFeatures
from relssl.evaluation.knn import retrieval
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
from relssl.evaluation.result import Finding
from relssl.settings.evaluation import RetrievalConfig


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


def test_scores_that_are_nan_are_refused() -> None:
    scores = torch.full((1, 3), torch.nan)
    with pytest.raises(NumericError):
        ranks(scores, torch.tensor([0]))
    with pytest.raises(NumericError):
        average_precision(scores, torch.ones(1, 3, dtype=torch.int8))


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
    scores, targets = -torch.arange(6.0)[:, None], torch.tensor([1, 0, 0, 1, 1, 0], dtype=torch.int8)[:, None]
    assert average_precision(scores, targets)[0] == pytest.approx((1 + 2 / 4 + 3 / 5) / 3)
    assert average_precision(scores, targets, interpolated=True)[0] == pytest.approx((1 + 3 / 5 + 3 / 5) / 3)


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


Side = tuple[torch.Tensor, torch.Tensor]


def points(images: int, dims: int, classes: int, seed: int = 0) -> Side:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=g)
    return torch.randn(classes, dims, generator=g)[labels] + torch.randn(images, dims, generator=g), labels


def measure(bank: Side, test: Side, *, gallery: str = "bank", at: tuple[int, ...] = (1, 3, 10), **more: int) -> Finding:
    (finding,) = retrieval(LabelledFeatures(*bank, *test, classes=6), RetrievalConfig(at, gallery), Bootstrap(100), **more)
    return finding


def oracle(bank: Side, test: Side, gallery: str) -> dict[str, np.ndarray[Any, Any]]:
    """Rank for each query with anything to find, by one stable sort."""
    sides = (test, test) if gallery == "test" else (bank, test)
    unit, queries = (torch.nn.functional.normalize(side[0].double()).numpy() for side in sides)
    kinds, own = (side[1].numpy() if side[1].dim() == 2 else np.eye(6, dtype=int)[side[1].numpy()] for side in sides)
    values: dict[str, list[float]] = {"map": [], "recall_at_1": [], "recall_at_3": [], "recall_at_10": []}
    for row, query in enumerate(queries):
        similarity, same = (unit @ query).astype(np.float32), ((kinds > 0) & (own[row] > 0)).any(axis=1)
        if gallery == "test":
            similarity, same = np.delete(similarity, row), np.delete(same, row)
        ranked = same[np.argsort(-similarity, kind="stable")]
        if ranked.any():
            # Places as scores: ties are already broken by the sort.
            values["map"].append(average_precision_score(ranked, -np.arange(len(ranked))))
            for k in (1, 3, 10):
                values[f"recall_at_{k}"].append(float(ranked[:k].any()))
    return {name: np.array(each) for name, each in values.items()}


def check(finding: Finding, want: dict[str, np.ndarray[Any, Any]], rel: float = 1e-5) -> None:
    assert finding.main == "map" and finding.figures.keys() == want.keys()
    for name, values in want.items():
        assert finding.figures[name] == pytest.approx(100 * values.mean(), rel=rel), name
        assert finding.intervals[name] == pytest.approx(mean_interval(100 * values, Bootstrap(100)), rel=1e-4), name


@pytest.mark.parametrize("gallery", ["bank", "test"])
def test_figures_are_those_of_a_plain_ranking(gallery: str) -> None:
    bank, test = points(300, 8, 6), points(80, 8, 6, seed=1)
    finding = measure(bank, test, gallery=gallery)
    check(finding, oracle(bank, test, gallery))
    assert finding.setting == {"gallery": gallery} and finding.notes == ()
    beyond = measure(bank, test, gallery=gallery, at=(1, 500))
    assert beyond.figures["recall_at_500"] == 100 and beyond.notes[0].startswith("The gallery has")
    assert finding.details == {"queries": 80, "gallery": 79 if gallery == "test" else 300}


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from(["bank", "test"]), st.integers(1, 1000))
def test_ties_go_to_the_lower_place_however_many_are_ranked_at_a_time(seed: int, gallery: str, cells: int) -> None:
    g = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (50, 4), generator=g).float() * 2 - 1  # products in steps of 1/4: no rounding, many ties
    signs[0], signs[1], signs[40], signs[41] = 1, -1, 1, -1
    labels = torch.randint(0, 3, (50,), generator=g)
    labels[[0, 1, 40, 41]] = torch.tensor([0, 1, 0, 0])
    bank, test = (signs[:40], labels[:40]), (signs[40:], labels[40:])
    check(measure(bank, test, gallery=gallery, cells=cells), oracle(bank, test, gallery), rel=1e-9)


@pytest.mark.parametrize("gallery", ["bank", "test"])
def test_with_several_labels_one_shared_is_enough(gallery: str) -> None:
    labels, truth = ((torch.randint(-1, 40, (n, 6)).clamp(max=30) - 28).clamp(-1, 1).to(torch.int8) for n in (120, 40))
    bank, test = (points(120, 8, 6)[0], labels), (points(40, 8, 6, seed=1)[0], truth)
    want = oracle(bank, test, gallery)
    finding = measure(bank, test, gallery=gallery)
    check(finding, want)
    assert finding.details["queries"] == len(want["map"]) < 40


def test_queries_without_anything_to_find_are_left_out_and_counted() -> None:
    (bank, labels), (test, truth) = points(100, 8, 6), points(30, 8, 6, seed=1)
    rest, lost = (bank[labels != 2], labels[labels != 2]), int((truth == 2).sum())
    finding = measure(rest, (test, truth))
    assert finding.details["queries"] == 30 - lost
    assert finding.notes[0].startswith(f"{lost} of 30 test images")
    check(finding, oracle(rest, (test[truth != 2], truth[truth != 2]), "bank"))
    with pytest.raises(DataError, match="no test image has another"):
        measure((bank, labels), (test[:6], torch.arange(6)), gallery="test")  # each the only one of its class
