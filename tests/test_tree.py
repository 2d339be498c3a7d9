"""State dicts taken apart and put together again, to the bit and the type of every key."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from relssl.errors import CheckpointError
from relssl.weights import store

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5),
    st.sampled_from(["$tensor", "__metadata__"]), st.builds(lambda n: torch.arange(n), st.integers(0, 3)),
)  # fmt: skip
KEYS = st.one_of(
    st.text(max_size=3), st.integers(-3, 3), st.none(), st.sampled_from(["$tensor", "$dict", "a.b", "__metadata__", "0"])
)
TREES = st.recursive(
    LEAVES, lambda t: st.one_of(st.lists(t, max_size=3), st.dictionaries(KEYS, t, max_size=3), st.tuples(t, t)), max_leaves=12
)


def _equal(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=True)
        return len(a) == len(b) and all(_equal(ka, kb) and _equal(va, vb) for (ka, va), (kb, vb) in pairs)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b) and (not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b))


@settings(max_examples=300, deadline=None)
@given(TREES)
def test_flatten_round_trip_is_exact(state: Any) -> None:
    tensors, rest = store.flatten(state)
    rest = json.loads(json.dumps(rest, allow_nan=False))
    assert _equal(store.unflatten(tensors, rest), state)
    assert "__metadata__" not in tensors


def test_an_optimizer_survives_a_checkpoint(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    groups: list[dict[str, Any]] = [{"params": [model.weight], "lr": 0.1 + 0.2}, {"params": [model.bias]}]
    optimizer = torch.optim.Adam(groups, betas=(0.8, 0.9))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "model": dict(model.state_dict()), "best": -math.inf, "mean": math.nan}
    tensors, rest = store.flatten(state)
    store.save(tmp_path / "a", tensors, {"rest": rest})
    stored, meta = store.load(tmp_path / "a")
    assert {"optimizer.state.0.exp_avg", "model.weight"} <= stored.keys()
    back = store.unflatten(stored, meta["rest"])
    assert math.isnan(back.pop("mean"))
    assert math.isnan(state.pop("mean"))  # type: ignore[arg-type]
    assert _equal(back, state)


@pytest.mark.parametrize(
    "rest",
    [{"$tensor": "gone"}, {"$tensor": []}, {"$dict": 3}, {"$dict": [[[], 1]]}, {"$float": "x"}, {"$tuple": 1}, {"$x": 1}, {1: 2}],
)
def test_a_malformed_rest_is_refused(rest: Any) -> None:
    with pytest.raises(CheckpointError):
        store.unflatten({}, rest)


def test_what_cannot_be_flattened_is_named() -> None:
    with pytest.raises(TypeError, match=r"state\.3: a set"):
        store.flatten({"state": {3: {1}}})
