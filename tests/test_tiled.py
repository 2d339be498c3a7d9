"""The tiled loss against the plain loss and a float64 oracle."""

from __future__ import annotations

import sys
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from relssl.method.health import health
from relssl.method.relation import objective
from relssl.method.tiled import tiled_objective
from test_step_oracle import oracle, relative


def unit(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def graded(form: Any, queries: torch.Tensor, *rest: torch.Tensor, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = queries.clone().requires_grad_()
    loss = form(leaf, *rest, **settings)
    (2 * loss).backward()
    return loss.detach(), leaf.grad / 2


@given(
    views=st.integers(1, 4),
    batch=st.integers(1, 20),
    size=st.integers(2, 70),
    dim=st.integers(2, 24),
    rows=st.none() | st.integers(1, 9),
    mix=st.sampled_from([0.0, 0.3, 1.0]),
    temperatures=st.sampled_from([(0.1, 0.04, 0.1), (0.2, 0.01, 0.07), (1.0, 0.5, 2.0)]),
)
@settings(max_examples=150, deadline=None)
def test_loss_and_gradient_equal_the_float64_oracle(
    views: int, batch: int, size: int, dim: int, rows: int | None, mix: float, temperatures: tuple[float, float, float]
) -> None:
    student, teacher, nce = temperatures
    queries, keys, memory = unit(views, batch, dim), unit(batch, dim), unit(size, dim)
    named = {"student_temperature": student, "teacher_temperature": teacher, "info_nce_temperature": nce, "warmup_mix": mix}
    loss, gradient = graded(tiled_objective, queries, keys, memory, rows=rows, **named)
    exact, slope = oracle(queries.double().numpy(), keys.double().numpy(), memory.double().numpy(), mix, student, teacher, nce)
    assert float(loss) == pytest.approx(exact, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(gradient.double(), torch.from_numpy(slope), rtol=1e-4, atol=2e-6 * max(1.0, 1 / student))


@pytest.mark.parametrize("views", [1, 5])
@pytest.mark.parametrize("mix", [0.0, 0.4])
def test_tiles_equal_the_plain_form_at_size(views: int, mix: float) -> None:
    inputs = unit(views, 64, 128), unit(64, 128), unit(16384, 128)
    named = {"student_temperature": 0.1, "teacher_temperature": 0.04, "warmup_mix": mix}
    plain, tiled = graded(objective, *inputs, **named), graded(tiled_objective, *inputs, rows=24, **named)
    assert relative(tiled[0], plain[0]) < 1e-5 and relative(tiled[1], plain[1]) < 1e-5
    exact = [value.double() for value in inputs]
    plain, tiled = graded(objective, *exact, **named), graded(tiled_objective, *exact, rows=24, **named)
    assert relative(tiled[0], plain[0]) < 1e-12 and relative(tiled[1], plain[1]) < 1e-12


def test_half_precision_embeddings_are_widened_under_autocast() -> None:
    inputs = unit(2, 16, 32), unit(16, 32), unit(256, 32)
    named = {"student_temperature": 0.1, "teacher_temperature": 0.04}
    reference = graded(objective, *inputs, **named)
    with torch.autocast("cpu", torch.bfloat16):
        made = graded(tiled_objective, *inputs, **named)
    assert relative(made[0], reference[0]) < 1e-6 and relative(made[1], reference[1]) < 1e-5
    half = graded(tiled_objective, inputs[0].bfloat16(), *inputs[1:], **named)
    assert half[1].dtype == torch.bfloat16 and relative(half[0], reference[0]) < 1e-2


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return made


def test_no_matrix_of_all_queries_and_the_memory_is_made() -> None:
    views, batch, size = 5, 64, 8192
    inputs = unit(views, batch, 32), unit(batch, 32), unit(size, 32)
    named = {"student_temperature": 0.1, "teacher_temperature": 0.04}
    sizes = {}
    for name, run in {
        "plain": lambda: graded(objective, *inputs, **named),
        "tiled": lambda: graded(tiled_objective, *inputs, rows=8, warmup_mix=0.3, **named),
    }.items():
        with Largest() as seen:
            run()
        sizes[name] = seen.numel
    assert sizes["plain"] == views * batch * size
    assert sizes["tiled"] == (views + 1) * 8 * size


def test_health_in_tiles_equals_health_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = unit(3, 20, 16), unit(20, 16), unit(300, 16)
    named = {"student_temperature": 0.1, "teacher_temperature": 0.04}
    whole = health(*inputs, **named)
    monkeypatch.setattr(sys.modules["relssl.method.health"], "_TILE_BYTES", 4 * 300 * 4 * 7)
    for name, value in health(*inputs, **named).items():
        torch.testing.assert_close(value, whole[name], msg=name)
