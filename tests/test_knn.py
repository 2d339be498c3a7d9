"""kNN against scikit-learn's brute force, and what must never change a result."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from relssl.errors import ConfigError
from relssl.evaluation.features import LabelledFeatures
from relssl.evaluation.knn import knn, knn_accuracy, neighbours, votes
from relssl.evaluation.metrics import Bootstrap
from relssl.settings.evaluation import KnnConfig


def points(n: int, m: int, d: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=g)
    labels = torch.randint(classes, (n + m,), generator=g)
    labels[:classes] = torch.arange(classes)[: n + m]  # every class is in the bank
    features = centres[labels] + 1.5 * torch.randn(n + m, d, generator=g)
    return features[:n], labels[:n], features[n:], labels[n:]


def classify(
    bank: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, *, k: int, temperature: float, classes: int, **cells: int
) -> torch.Tensor:
    similarity, index = neighbours(bank, queries, k, **cells)
    return votes(similarity, labels[index], temperature, classes)


def oracle(bank: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, k: int, temperature: float) -> np.ndarray[Any, Any]:
    def weights(distance: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.exp((1 - distance) / temperature)

    model = KNeighborsClassifier(k, algorithm="brute", metric="cosine", weights=weights)
    return np.asarray(model.fit(bank.double().numpy(), labels.numpy()).predict_proba(queries.double().numpy()))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_shape_equals_scikit_learn_however_many_at_a_time(data: st.DataObject) -> None:
    classes = data.draw(st.integers(2, 6))
    n, m, d = data.draw(st.integers(classes, 60)), data.draw(st.integers(1, 20)), data.draw(st.integers(3, 40))
    k, temperature = data.draw(st.integers(1, n)), data.draw(st.sampled_from([0.05, 0.1, 1.0]))
    bank, labels, queries, _ = points(n, m, d, classes, data.draw(st.integers(0, 10**6)))
    scores = classify(bank, labels, queries, k=k, temperature=temperature, classes=classes, cells=data.draw(st.integers(1, 900)))
    np.testing.assert_allclose(scores, oracle(bank, labels, queries, k, temperature), atol=1e-4)


def plain(bank: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, k: int, classes: int) -> torch.Tensor:
    """Vote at temperature 1 after a stable sort of all similarities: equal ones stay in the order of the bank."""
    sides = (torch.nn.functional.normalize(x.double()) for x in (queries, bank))
    similarity, order = (next(sides) @ next(sides).T).float().sort(dim=1, descending=True, stable=True)
    votes = torch.zeros(len(queries), classes, dtype=torch.float64)
    votes.scatter_add_(1, labels[order[:, :k]], similarity[:, :k].double().exp())
    return votes / votes.sum(1, keepdim=True)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 400))
def test_exact_ties_go_to_the_lower_index_however_many_at_a_time(seed: int, k: int, cells: int) -> None:
    g = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (49, 4), generator=g).float() * 2 - 1  # norm 2 and products in steps of 1/4: no rounding anywhere
    labels = torch.randint(0, 3, (40,), generator=g)
    bank, queries = signs[:40], signs[40:]
    scores = classify(bank, labels, queries, k=k, temperature=1.0, classes=3, cells=cells)
    torch.testing.assert_close(scores, plain(bank, labels, queries, k, 3), atol=1e-6, rtol=0)


def test_a_k_beyond_the_bank_is_lowered_with_a_note() -> None:
    sides = LabelledFeatures(*points(50, 20, 4, 3), classes=3)
    assert knn_accuracy(sides, 200, 0.1) == knn_accuracy(sides, 50, 0.1)
    findings = knn(sides, KnnConfig((20, 200, 50), (0.1,)), Bootstrap(100))
    assert [finding.setting["k"] for finding in findings] == [20, 50]  # equal ones once
    assert findings[0].figures["top5"] == 100  # of three classes
    assert "lowered from 200 to 50" in knn(sides, KnnConfig((200,), (0.1,)), Bootstrap(100))[0].notes[0]
    several = LabelledFeatures(sides.bank, torch.zeros(50, 3, dtype=torch.int8), sides.test, sides.test_labels, 3)
    with pytest.raises(ConfigError, match="protocol"):
        knn(several, KnnConfig(), Bootstrap(100))


@pytest.mark.parametrize("scale", [1e-35, 1e37])
def test_the_length_of_a_feature_does_not_matter(scale: float) -> None:
    bank, labels, queries, _ = points(200, 30, 8, 4)
    want = classify(bank, labels, queries, k=9, temperature=0.1, classes=4)
    for scaled in (bank * scale, bank.double() * scale * 1e-100):
        scores = classify(scaled, labels, queries, k=9, temperature=0.1, classes=4)
        torch.testing.assert_close(scores, want, atol=1e-4, rtol=0)
    bank[7] = 0
    for temperature in (1e-6, 1e6):  # extreme ones stay finite
        scores = classify(bank, labels, queries, k=50, temperature=temperature, classes=4)
        torch.testing.assert_close(scores.sum(1), torch.ones(30).double())


def test_precision_settings_outside_do_not_reach_in() -> None:
    bank, labels, queries, _ = points(200, 30, 64, 4)
    want = classify(bank, labels, queries, k=9, temperature=0.1, classes=4)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = classify(bank, labels, queries.requires_grad_(), k=9, temperature=0.1, classes=4)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(scores, want)
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # torch's newer switch, beside which the older one cannot be read
    try:
        assert torch.equal(classify(bank, labels, queries, k=9, temperature=0.1, classes=4), want)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"


@pytest.mark.parametrize(("side", "value"), [(0, float("nan")), (2, float("inf"))])
def test_what_makes_no_sense_is_refused(side: int, value: float) -> None:
    sides = list(points(20, 5, 8, 4)[:3])
    for k in (0, 21):
        with pytest.raises(ValueError, match=r"1\.\.20"):
            classify(*sides, k=k, temperature=0.1, classes=4)
    sides[side][4, 2] = value
    with pytest.raises(ValueError, match="NaN or Inf"):
        classify(*sides, k=3, temperature=0.1, classes=4, cells=3)
