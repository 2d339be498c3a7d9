"""kNN against scikit-learn's brute force, and what must never change a result."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from relssl.evaluation import knn
from relssl.evaluation.knn import knn_accuracy, knn_classify

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _random(n: int, m: int, d: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=g)
    labels = torch.randint(classes, (n + m,), generator=g)
    labels[:classes] = torch.arange(classes)[: n + m]  # every class is in the bank
    points = centres[labels] + 1.5 * torch.randn(n + m, d, generator=g)
    return points[:n], labels[:n], points[n:], labels[n:]


def _oracle(bank: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, k: int, temperature: float) -> np.ndarray[Any, Any]:
    def weights(distance: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.exp((1 - distance) / temperature)

    model = KNeighborsClassifier(k, algorithm="brute", metric="cosine", weights=weights)
    return np.asarray(model.fit(bank.double().numpy(), labels.numpy()).predict_proba(queries.double().numpy()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (5, 0.07), (20, 0.07), (200, 0.1), (200, 0.02), (1500, 1.0)])
def test_equals_scikit_learn(device: str, k: int, temperature: float) -> None:
    bank, labels, queries, _ = _random(1500, 500, 32, 10)
    want = _oracle(bank, labels, queries, k, temperature)
    got = knn_classify(
        bank.to(device), labels.to(device), queries.to(device), k=k, temperature=temperature, classes=10, chunk=64, bank_chunk=333
    )
    assert got.device.type == device
    np.testing.assert_allclose(got.cpu().numpy(), want, atol=2e-5 / temperature * 0.1)
    assert (got.argmax(1).cpu().numpy() == want.argmax(1)).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_equals_scikit_learn_whatever_the_chunks(data: st.DataObject) -> None:
    classes = data.draw(st.integers(2, 6))
    n, m, d = data.draw(st.integers(classes, 60)), data.draw(st.integers(1, 20)), data.draw(st.integers(3, 40))
    k, temperature = data.draw(st.integers(1, n)), data.draw(st.sampled_from([0.05, 0.1, 1.0]))
    bank, labels, queries, _ = _random(n, m, d, classes, data.draw(st.integers(0, 10**6)))
    chunks = {"chunk": data.draw(st.integers(1, 30)), "bank_chunk": data.draw(st.integers(1, 80))}
    got = knn_classify(bank, labels, queries, k=k, temperature=temperature, classes=classes, **chunks)
    np.testing.assert_allclose(got, _oracle(bank, labels, queries, k, temperature), atol=1e-4)
    whole = knn_classify(bank, labels, queries, k=k, temperature=temperature, classes=classes)
    torch.testing.assert_close(got, whole, atol=1e-4, rtol=0)


def _plain(bank: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, k: int, classes: int) -> torch.Tensor:
    """Temperature 1, a stable sort of all similarities: equal ones stay in the order of the bank."""
    unit, asked = (torch.nn.functional.normalize(x.double()) for x in (bank, queries))
    similarity, order = (asked @ unit.T).float().sort(dim=1, descending=True, stable=True)
    votes = torch.zeros(len(queries), classes, dtype=torch.float64)
    votes.scatter_add_(1, labels[order[:, :k]], similarity[:, :k].double().exp())
    return (votes / votes.sum(1, keepdim=True)).float()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 50), st.integers(1, 9))
def test_exact_ties_go_to_the_lower_index_whatever_the_chunks(seed: int, k: int, bank_chunk: int, chunk: int) -> None:
    g = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (49, 4), generator=g).float() * 2 - 1  # norm 2 and products in steps of 1/4: no rounding anywhere
    labels = torch.randint(0, 3, (40,), generator=g)
    labels[:2] = torch.tensor([0, 1])
    bank, queries = signs[:40], signs[40:]
    got = knn_classify(bank, labels, queries, k=k, temperature=1.0, classes=3, chunk=chunk, bank_chunk=bank_chunk)
    torch.testing.assert_close(got, _plain(bank, labels, queries, k, 3), atol=1e-6, rtol=0)


def test_keys_order_by_similarity_then_by_lower_index() -> None:
    values = torch.tensor([[-1.0, -0.5, -1e-30, -0.0, 0.0, 1e-30, 0.5, 1.0]])
    keys = knn._keys(values, torch.arange(8))
    assert keys[0].argsort(descending=True).tolist() == [7, 6, 5, 3, 4, 2, 1, 0]
    assert torch.equal(knn._similarity(keys), values)


def test_identical_features_vote_alike() -> None:
    bank, labels = torch.ones(30, 8), torch.arange(30) % 3
    score = knn_classify(bank, labels, torch.ones(2, 8), k=30, temperature=0.07, classes=3)
    torch.testing.assert_close(score, torch.full((2, 3), 1 / 3))


def test_random_labels_give_chance() -> None:
    g = torch.Generator().manual_seed(1)
    bank, queries = torch.randn(2000, 16, generator=g), torch.randn(2000, 16, generator=g)
    labels, truth = torch.randint(10, (2000,), generator=g), torch.randint(10, (2000,), generator=g)
    (result, _) = knn_accuracy(bank, labels, queries, truth, classes=10)
    assert abs(result["top1"] - 10) < 3  # 4 standard deviations
    assert abs(result["top5"] - 50) < 5
    assert abs(result["mean_per_class"] - 10) < 3


def test_accuracy_is_that_of_the_scores() -> None:
    bank, labels, queries, truth = _random(900, 300, 8, 12, seed=3)
    truth[:30] = -1
    pairs = ((50, 0.1), (7, 0.07), (1, 0.5))
    report = knn_accuracy(bank, labels, queries, truth, classes=12, settings=pairs, chunk=70, bank_chunk=128)
    for (k, temperature), result in zip(pairs, report, strict=True):
        scores = torch.from_numpy(_oracle(bank, labels, queries, k, temperature))[30:]
        own, right = truth[30:], scores.argmax(1) == truth[30:]
        ranked = scores.sort(dim=1, descending=True, stable=True)
        among = ((ranked.indices[:, :5] == own[:, None]) & (ranked.values[:, :5] > 0)).any(1)
        assert (result["k"], result["k_asked"], result["temperature"]) == (k, k, temperature)
        assert result["top1"] == pytest.approx(100 * right.double().mean().item())
        assert result["top5"] == pytest.approx(100 * among.double().mean().item())
        assert result["mean_per_class"] == pytest.approx(
            100 * np.mean([right[own == c].double().mean() for c in range(12) if (own == c).any()])
        )


def test_few_classes_make_top5_certain() -> None:
    bank, labels, queries, truth = _random(60, 20, 4, 3)
    assert [r["top5"] for r in knn_accuracy(bank, labels, queries, truth, classes=3, settings=[(1, 0.1)])] == [100.0]


def test_k_is_capped_only_on_request_and_says_so() -> None:
    bank, labels, queries, truth = _random(50, 20, 4, 3)
    with pytest.raises(ValueError, match=r"1\.\.50.*200"):
        knn_accuracy(bank, labels, queries, truth, classes=3)
    results = knn_accuracy(bank, labels, queries, truth, classes=3, cap=True)
    assert [(r["k"], r["k_asked"]) for r in results] == [(50, 200), (20, 20)]


def test_unlabelled_bank_features_take_no_part() -> None:
    bank, labels, queries, _ = _random(300, 40, 8, 4)
    hidden = torch.arange(300) % 3 == 1
    hidden[:4] = False
    masked, poisoned = labels.masked_fill(hidden, -1), bank.masked_fill(hidden[:, None], float("nan"))
    got = knn_classify(poisoned, masked, queries, k=9, temperature=0.1, classes=4, bank_chunk=50)
    want = knn_classify(bank[~hidden], labels[~hidden], queries, k=9, temperature=0.1, classes=4)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=rf"1\.\.{int((~hidden).sum())}.*300"):
        knn_classify(bank, masked, queries, k=300, temperature=0.1, classes=4)


@pytest.mark.parametrize("scale", [1e-35, 1e-20, 1e20, 1e37])
def test_the_length_of_a_feature_does_not_matter(scale: float) -> None:
    bank, labels, queries, _ = _random(200, 30, 8, 4)
    want = knn_classify(bank, labels, queries, k=9, temperature=0.1, classes=4)
    got = knn_classify(bank * scale, labels, queries, k=9, temperature=0.1, classes=4)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    far = knn_classify(bank.double() * scale * 1e-100, labels, queries, k=9, temperature=0.1, classes=4)
    torch.testing.assert_close(far, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1e6])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    bank, labels, queries, _ = _random(200, 30, 8, 4)
    bank[7] = 0
    scores = knn_classify(bank, labels, queries, k=50, temperature=temperature, classes=4)
    torch.testing.assert_close(scores.sum(1), torch.ones(30))


def test_precision_settings_outside_do_not_reach_in() -> None:
    bank, labels, queries, _ = _random(200, 30, 64, 4)
    want = knn_classify(bank, labels, queries, k=9, temperature=0.1, classes=4)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = knn_classify(bank, labels, queries.requires_grad_(), k=9, temperature=0.1, classes=4)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(got, want)


def test_no_queries_give_no_scores() -> None:
    bank, labels, queries, _ = _random(20, 1, 8, 4)
    assert knn_classify(bank, labels, queries[:0], k=3, temperature=0.1, classes=4).shape == (0, 4)


def _set(**changes: Any) -> dict[str, Any]:
    bank, labels, queries, _ = _random(20, 5, 8, 4)
    return {"bank": bank, "bank_labels": labels, "queries": queries, "k": 3, "temperature": 0.1, "classes": 4, **changes}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"k": 21}, "20.*21"),
        ({"k": 0}, "got 0"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"classes": 1}, "2 classes"),
        ({"classes": 3}, r"-1\.\.2"),
        ({"bank_labels": torch.full((20,), 2)}, "single class 2"),
        ({"bank_labels": torch.full((20,), -1)}, r"no labelled"),
        ({"bank_labels": torch.full((20,), -2)}, "-2"),
        ({"bank_labels": torch.zeros(19, dtype=torch.long)}, "labels"),
        ({"bank_labels": torch.zeros(20)}, "integers"),
        ({"bank": torch.zeros(20)}, "dimensions"),
        ({"queries": torch.zeros(5, 9)}, "fit"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_refusals_name_the_fault(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        knn_classify(**_set(**changes))


@pytest.mark.parametrize("side", ["bank", "queries"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_features_are_refused_by_row(side: str, value: float) -> None:
    arguments = _set(chunk=2, bank_chunk=3)
    arguments[side] = arguments[side].clone()
    arguments[side][4, 2] = value
    with pytest.raises(ValueError, match=rf"{side.replace('queries', 'query')} features hold NaN or Inf.*row 4"):
        knn_classify(**arguments)
