"""Retrieval against a plain ranking in float64 and scikit-learn's average precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from relssl.errors import ConfigError, DataError, NumericError
from relssl.evaluation import retrieval as module
from relssl.evaluation.findings import Finding
from relssl.evaluation.metrics import Bootstrap, mean_interval
from relssl.evaluation.retrieval import retrieval
from relssl.settings.evaluation import RetrievalConfig


def _random(images: int, dims: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=g)
    return torch.randn(classes, dims, generator=g)[labels] + torch.randn(images, dims, generator=g), labels


def _retrieve(
    bank: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, truth: torch.Tensor, *, gallery: str = "bank", **more: Any
) -> Finding:
    given = {"classes": 6, "settings": RetrievalConfig((1, 3, 10), gallery), "bootstrap": Bootstrap(100), "seed": 0} | more
    (finding,) = retrieval(bank, labels, test, truth, **given)
    return finding


def _oracle(
    bank: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, truth: torch.Tensor, *, itself: bool
) -> dict[str, np.ndarray[Any, Any]]:
    """Per query with anything to find, from one stable sort each."""
    unit, asked = (torch.nn.functional.normalize(x.double()).numpy() for x in (bank, test))
    kinds, own = (x.numpy() if x.dim() == 2 else np.eye(6, dtype=int)[x.numpy()] for x in (labels, truth))
    found: dict[str, list[float]] = {"map": [], "recall_at_1": [], "recall_at_3": [], "recall_at_10": []}
    for row, query in enumerate(asked):
        similarity, same = (unit @ query).astype(np.float32), ((kinds > 0) & (own[row] > 0)).any(axis=1)
        if itself:
            similarity, same = np.delete(similarity, row), np.delete(same, row)
        ranked = same[np.argsort(-similarity, kind="stable")]
        if not ranked.any():
            continue
        # Places as scores: ties are already broken by the sort.
        found["map"].append(average_precision_score(ranked, -np.arange(len(ranked))))
        for k in (1, 3, 10):
            found[f"recall_at_{k}"].append(float(ranked[:k].any()))
    return {name: np.array(values) for name, values in found.items()}


def _is(finding: Finding, want: dict[str, np.ndarray[Any, Any]], rel: float = 1e-5) -> None:
    assert finding.main == "map" and finding.figures.keys() == want.keys()
    for name, values in want.items():
        assert finding.figures[name] == pytest.approx(100 * values.mean(), rel=rel), name


@pytest.mark.parametrize("gallery", ["bank", "test"])
def test_figures_are_those_of_a_plain_ranking(gallery: str) -> None:
    bank, labels = _random(300, 8, 6)
    test, truth = _random(80, 8, 6, seed=1)
    finding = _retrieve(bank, labels, test, truth, gallery=gallery)
    want = (
        _oracle(test, truth, test, truth, itself=True) if gallery == "test" else _oracle(bank, labels, test, truth, itself=False)
    )
    _is(finding, want)
    assert finding.setting == {"gallery": gallery} and finding.notes == ()
    assert finding.details == {"queries": 80, "gallery": 79 if gallery == "test" else 300}
    for name, values in want.items():
        np.testing.assert_allclose(finding.intervals[name], mean_interval(100 * values, Bootstrap(100)), rtol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_ties_go_to_the_lower_place_whatever_the_chunks(data: st.DataObject) -> None:
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    signs = torch.randint(0, 2, (50, 4), generator=g).float() * 2 - 1  # products in steps of 1/4: no rounding, many ties
    signs[0], signs[1], signs[40], signs[41] = 1, -1, 1, -1
    labels = torch.randint(0, 3, (50,), generator=g)
    labels[[0, 1, 40]] = torch.tensor([0, 1, 0])
    gallery = data.draw(st.sampled_from(["bank", "test"]))
    labels[41] = 0
    chunks = {"chunk": data.draw(st.integers(1, 12)), "gallery_chunk": data.draw(st.integers(1, 50))}
    bank, test, kinds, truth = signs[:40], signs[40:], labels[:40], labels[40:]
    sides = (test, truth) if gallery == "test" else (bank, kinds)
    want = _oracle(*sides, test, truth, itself=gallery == "test")
    _is(_retrieve(bank, kinds, test, truth, gallery=gallery, **chunks), want, rel=1e-9)


def test_few_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, labels = _random(90, 8, 6)
    want = _retrieve(bank, labels, bank[:30], labels[:30])
    monkeypatch.setattr(module, "_HELD", 90 * 7)
    monkeypatch.setattr(module, "_SORTED", 90 * 2)
    got = _retrieve(bank, labels, bank[:30], labels[:30])
    assert got.figures == pytest.approx(want.figures) and got.details == want.details


@pytest.mark.parametrize("gallery", ["bank", "test"])
def test_with_several_labels_one_shared_is_enough(gallery: str) -> None:
    bank, _ = _random(120, 8, 6)
    test, _ = _random(40, 8, 6, seed=1)
    labels, truth = ((torch.randint(-1, 40, (n, 6)).clamp(max=30) - 28).clamp(-1, 1).to(torch.int8) for n in (120, 40))
    assert (truth < 1).all(dim=1).any()
    sides = (test, truth) if gallery == "test" else (bank, labels)
    want = _oracle(*sides, test, truth, itself=gallery == "test")
    finding = _retrieve(bank, labels, test, truth, gallery=gallery)
    _is(finding, want)
    assert finding.details["queries"] == len(want["map"]) < 40


def test_queries_without_anything_to_find_are_left_out_and_counted() -> None:
    bank, labels = _random(100, 8, 6)
    test, truth = _random(30, 8, 6, seed=1)
    kept = labels != 2
    lost = int((truth == 2).sum())
    finding = _retrieve(bank[kept], labels[kept], test, truth)
    assert finding.details["queries"] == 30 - lost
    assert finding.notes[0].startswith(f"{lost} of 30 test images")
    _is(finding, _oracle(bank[kept], labels[kept], test[truth != 2], truth[truth != 2], itself=False))
    alone = torch.arange(6)  # each the only one of its class
    with pytest.raises(DataError, match="no test image has another"):
        _retrieve(bank, labels, test[:6], alone, gallery="test")


def test_an_image_is_not_its_own_answer() -> None:
    test, _ = _random(4, 8, 2)
    several = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 1, -1]], dtype=torch.int8)
    finding = _retrieve(test, several, test, several, gallery="test", classes=3)
    assert finding.details["queries"] == 3  # the third has a class of its own
    assert 0 < finding.figures["map"] <= 100


def test_k_beyond_the_gallery_is_said() -> None:
    bank, labels = _random(20, 8, 2)
    finding = _retrieve(bank, labels, bank[:5], labels[:5], settings=RetrievalConfig((1, 50), "bank"))
    assert finding.figures["recall_at_50"] == 100
    assert finding.notes == ("The gallery has 20 images; recall beyond that many is recall at that many.",)


def test_bad_features_are_refused() -> None:
    bank, labels = _random(20, 8, 2)
    with pytest.raises(ConfigError, match=r"retrieval\.at"):
        _retrieve(bank, labels, bank, labels, settings=RetrievalConfig(()))
    with pytest.raises(NumericError, match="bank features are constant"):
        _retrieve(torch.ones(20, 8), labels, bank, labels)
    with pytest.raises(NumericError, match="test features hold NaN or Inf, first in row 0"):
        _retrieve(bank, labels, bank * torch.nan, labels, gallery="test")
