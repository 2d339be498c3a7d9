"""The tiled loss and its kernel against the plain loss and a float64 oracle."""

from __future__ import annotations

import os
import subprocess
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
from relssl.method.ressl import OBJECTIVES
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


def test_every_form_is_one_of_the_settings() -> None:
    from relssl.settings.reading import leaves
    from relssl.settings.run import Config

    choices = leaves(Config)["method.loss_form"][1].metadata["choices"]
    assert set(OBJECTIVES) == set(choices) - {"auto"}


INTERPRETED = """
import torch
import torch.nn.functional as F
from relssl.method.tiled import tiled_objective

torch.manual_seed(0)
unit = lambda *shape: F.normalize(torch.randn(*shape), dim=-1)
for views, batch, size, mix, teacher in ((1, 5, 100, 0.0, 0.04), (3, 7, 4097, 0.0, 0.01), (2, 4, 257, 0.4, 0.04), (2, 3, 64, 1.0, 0.04)):
    queries, keys, memory = unit(views, batch, 24), unit(batch, 24), unit(size, 24)
    made = []
    for fused in (False, True):
        leaf = queries.clone().requires_grad_()
        loss = tiled_objective(
            leaf, keys, memory, student_temperature=0.1, teacher_temperature=teacher, warmup_mix=mix, rows=2, fused=fused
        )
        loss.backward()
        made.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(made[1][0], made[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made[1][1], made[0][1], rtol=1e-4, atol=1e-6)
print("equal")
"""


def test_the_kernel_equals_the_tiles_in_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_kernel_compiles_for_gpus_that_are_not_here(architecture: int) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from relssl.method import fused

    types = {"student": "*fp32", "target": "*fp32", "cross": "*fp32", "rows": "i32", "size": "i32", "BLOCK": "constexpr"}
    source = triton.compiler.ASTSource(fn=fused._relate, signature=types, constexprs={"BLOCK": 4096})
    try:
        made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 8})
    except RuntimeError as error:  # only this build's own compiler may be missing, not the kernel refused
        if "ptxas" in str(error):
            pytest.skip("this Triton has no ptxas")
        raise
    assert len(made.asm["cubin"]) > 0
