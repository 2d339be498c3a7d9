"""Retrieval against a plain ranking in float64 and scikit-learn's average precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from relssl.errors import DataError
from relssl.evaluation.features import LabelledFeatures
from relssl.evaluation.metrics import Bootstrap, mean_interval
from relssl.evaluation.result import Finding
from relssl.evaluation.retrieval import retrieval
from relssl.settings.evaluation import RetrievalConfig

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


def test_k_beyond_the_gallery_is_said() -> None:
    bank, labels = points(20, 8, 2)
    finding = measure((bank, labels), (bank[:5], labels[:5]), at=(1, 50))
    assert finding.figures["recall_at_50"] == 100
    assert finding.notes[0].startswith("The gallery has 20 images")
