"""The step against float64 oracles: losses and their gradients written out from the formulas, the paper's order replayed."""

import copy
import sys
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from relssl.method import Encoder, ReSSL
from relssl.method.base import World
from relssl.method.health import health
from relssl.method.relation import Target, balance, objective
from relssl.method.tiled import tiled_objective

TEMPERATURES = {"student_temperature": 0.1, "teacher_temperature": 0.04}


def softmax(s: np.ndarray) -> np.ndarray:
    e = np.exp(s - s.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def oracle(q: np.ndarray, k: np.ndarray, memory: np.ndarray, mix: float, t_s=0.1, t_t=0.04, t_n=0.1) -> tuple[float, np.ndarray]:
    """Loss and its gradient for queries [V,B,D], in float64: cross-entropy of relations and InfoNCE, mixed."""
    views, batch, _ = q.shape
    rows = views * batch
    target = softmax(k @ memory.T / t_t)
    relation = softmax(q @ memory.T / t_s)
    relational = -(target * np.log(relation)).sum() / rows
    d_relational = (relation - target) @ memory / (t_s * rows)
    positive = (q * k).sum(-1, keepdims=True)
    p = softmax(np.concatenate([positive, q @ memory.T], axis=-1) / t_n)
    nce = -np.log(p[..., 0]).sum() / rows
    d_nce = ((p[..., :1] - 1) * k + p[..., 1:] @ memory) / (t_n * rows)
    return mix * nce + (1 - mix) * relational, mix * d_nce + (1 - mix) * d_relational


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("views", [1, 5])
@pytest.mark.parametrize("predictor", ["none", "mlp", "residual"])
@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_loss_and_gradient_equal_the_float64_oracle(tiny_net, views: int, predictor: str, mix: float) -> None:
    student = Encoder(tiny_net(), 16, projector_hidden=32, dim=12, predictor=predictor, predictor_hidden=24)
    for parameter in student.parameters():  # a residual predictor's zero layer would hide its gradient's path
        torch.nn.init.normal_(parameter, std=0.3)
    model = ReSSL(student, memory_size=64, dim=12)
    exact = copy.deepcopy(model).double()
    weak, strong = torch.rand(8, 3, 8, 8), [torch.rand(8, 3, 8, 8) for _ in range(views)]

    made = model.step(weak, strong, **TEMPERATURES, warmup_mix=mix)
    made.loss.backward()

    keys = exact.teacher([weak.double()])[0].detach()
    queries = exact.student([view.double() for view in strong])
    loss, gradient = oracle(queries.detach().numpy(), keys.numpy(), exact.memory.keys.numpy(), mix)
    queries.backward(torch.from_numpy(gradient))

    assert abs(float(made.loss.detach()) - loss) / loss < 1e-5
    flat = [torch.cat([p.grad.flatten() for p in m.student.parameters()]) for m in (model, exact)]
    assert relative(*flat) < 1e-5


def test_training_equals_the_papers_order_replayed(tiny_net) -> None:
    """Teacher update at the head of each step, as the papers write it, against ours at its end: the same keys and losses."""
    student = Encoder(tiny_net(norm=False), 16, projector_hidden=32, dim=12).double()
    model = ReSSL(student, memory_size=20, dim=12).double()
    paper = copy.deepcopy(model)
    ours, theirs = (torch.optim.SGD(m.student.parameters(), lr=0.5, momentum=0.9) for m in (model, paper))
    memory, pointer = paper.memory.keys.clone(), 0
    for step in range(8):
        weak, strong = torch.rand(6, 3, 8, 8).double(), [torch.rand(6, 3, 8, 8).double()]
        made = model.step(weak, strong, **TEMPERATURES)
        ours.zero_grad()
        made.loss.backward()
        ours.step()
        model.push(made.keys, torch.arange(6) + 6 * step)
        model.follow(0.9)

        with torch.no_grad():
            for t, s in zip(paper.teacher.parameters(), paper.student.parameters(), strict=True):
                t.copy_(0.9 * t + 0.1 * s)
            keys = paper.teacher([weak])[0]
        queries = paper.student(strong)
        loss, gradient = oracle(queries.detach().numpy(), keys.numpy(), memory.numpy(), 0.0)
        theirs.zero_grad()
        queries.backward(torch.from_numpy(gradient))
        theirs.step()
        for key in keys:
            memory[pointer] = key
            pointer = (pointer + 1) % 20

        assert abs(float(made.loss.detach()) - loss) < 1e-10
        torch.testing.assert_close(made.keys, keys, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model.memory.keys, memory, rtol=1e-6, atol=1e-7)  # the memory itself is fp32
    assert int(model.memory.pointer) == pointer


def test_views_of_several_sizes_pass_and_keep_their_order(tiny_net) -> None:
    student = Encoder(tiny_net(norm=False), 16, projector_hidden=32, dim=12)
    views = [torch.rand(4, 3, size, size) for size in (16, 8, 16, 12)]
    together = student(views)
    assert together.shape == (4, 4, 12)
    for view, made in zip(views, together, strict=True):
        torch.testing.assert_close(student([view])[0], made)


def test_loss_under_bf16_autocast_stays_near_float64(tiny_net) -> None:
    """Similarities and softmax are fp32 under autocast: only the networks' own rounding is left, which is given to both."""
    student = Encoder(tiny_net(), 16, projector_hidden=32, dim=12)
    model = ReSSL(student, memory_size=64, dim=12)
    weak, strong = torch.rand(8, 3, 8, 8), [torch.rand(8, 3, 8, 8)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = model.step(weak, strong, **TEMPERATURES, warmup_mix=0.5)
    assert made.keys.dtype == made.queries.dtype == made.loss.dtype == torch.float32
    loss, _ = oracle(made.queries.double().numpy(), made.keys.double().numpy(), model.memory.keys.double().numpy(), 0.5)
    assert abs(float(made.loss.detach()) - loss) / loss < 1e-6


def test_teacher_follows_the_float64_recurrence_and_takes_no_gradient(tiny_net) -> None:
    student = Encoder(tiny_net(), 16, projector_hidden=32, dim=12, predictor="residual")
    model = ReSSL(student, memory_size=64, dim=12)
    start = {n: p.clone().double() for n, p in model.teacher.named_parameters()}
    for parameter in student.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    moved = dict(student.named_parameters())
    for _ in range(1000):
        model.follow(0.999)
    for name, parameter in model.teacher.named_parameters():
        assert not parameter.requires_grad
        assert parameter.data_ptr() != moved[name].data_ptr()
        expected = moved[name].double() + 0.999**1000 * (start[name] - moved[name].double())
        assert relative(parameter, expected) < 1e-4
    assert model.teacher.predictor is None
    model.follow(1.0)
    before = [p.clone() for p in model.teacher.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, model.teacher.parameters(), strict=True))
    model.follow(0.0)
    assert all(torch.equal(p, moved[n]) for n, p in model.teacher.named_parameters())


def test_residual_predictor_starts_as_the_identity(tiny_net) -> None:
    student = Encoder(tiny_net(), 16, projector_hidden=32, dim=12, predictor="residual")
    images = torch.rand(8, 3, 8, 8)
    torch.testing.assert_close(student([images]), student.teacher()([images]))


# Options of later methods


def sinkhorn(similar: np.ndarray, iterations: int) -> np.ndarray:
    """The matrix exp(similar) [B, K] with its columns and then its rows divided by their sums, so many times, in float64."""
    q = np.exp(similar - similar.max())
    for _ in range(iterations):
        q /= q.sum(axis=0, keepdims=True)
        q /= q.sum(axis=1, keepdims=True)
    return q


@pytest.mark.parametrize("form", ["plain", "tiled"])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("relation", ["embeddings", "features"])
@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_relations_of_features_and_balanced_targets_equal_the_float64_oracle(
    tiny_net, form: str, shuffle: bool, relation: str, iterations: int
) -> None:
    student = Encoder(
        tiny_net(norm=False), 16, projector_hidden=32, dim=12, predictor="mlp", predictor_hidden=24, predictor_norm="none"
    )
    width = 16 if relation == "features" else 0
    model = ReSSL(student, memory_size=40, dim=12, loss_form=form, features=width, sinkhorn_iterations=iterations)
    exact = copy.deepcopy(model.student).double(), copy.deepcopy(model.teacher).double()
    for start in range(0, 56, 8):  # the memory is full, and has wrapped around
        weak, strong = torch.rand(8, 3, 8, 8), [torch.rand(8, 3, 8, 8) for _ in range(2)]
        world = World(order=torch.randperm(8)) if shuffle else World()
        past = model.memory.keys.double().numpy(), (model.memory.features if width else model.memory.keys).double().numpy()
        step = model(weak, strong, world, **TEMPERATURES)
        model.student.zero_grad()
        step.loss.backward()
        model.push(step.keys, torch.arange(start, start + 8), None, step.features)

    features = exact[1].backbone(weak.double())
    keys = F.normalize(exact[1].projector(features), dim=1)
    rows = (F.normalize(features, dim=1) if width else keys).detach().numpy()
    target = sinkhorn(rows @ past[1].T / 0.04, iterations) if iterations else softmax(rows @ past[1].T / 0.04)
    queries = exact[0]([view.double() for view in strong])
    assert np.allclose(target.sum(axis=1), 1)
    loss = -(torch.from_numpy(target) * (queries @ torch.from_numpy(past[0]).T / 0.1).log_softmax(dim=-1)).sum(dim=-1).mean()
    loss.backward()

    torch.testing.assert_close(step.loss.double(), loss, rtol=1e-5, atol=0)
    flat = [torch.cat([p.grad.flatten() for p in network.parameters()]) for network in (model.student, exact[0])]
    assert relative(*flat) < 1e-4
    torch.testing.assert_close(model.memory.keys[16 - 8 : 16].double(), keys.detach(), rtol=1e-5, atol=1e-6)
    if width:
        torch.testing.assert_close(model.memory.features[16 - 8 : 16].double(), torch.from_numpy(rows), rtol=1e-5, atol=1e-6)
    # The figures are those of the relation that the loss has seen.
    model.memory.keys.copy_(torch.from_numpy(past[0]))
    seen = Target(torch.from_numpy(rows), torch.from_numpy(past[1]))
    seen = seen if not iterations else Target(seen.rows, seen.memory, balance(seen.logits(0.04), iterations))
    figures = health(queries.detach(), keys.detach(), torch.from_numpy(past[0]), **TEMPERATURES, target=seen)
    assert float(figures["teacher_entropy"]) == pytest.approx(-(target * np.log(target)).sum(axis=1).mean(), rel=1e-6)


def test_targets_are_balanced_over_the_samples_of_all_ranks() -> None:
    """Two ranks, of which each has half of the batch, have together the targets of the whole one, and many iterations even the memory out."""
    rows, past = unit(12, 8).double(), unit(20, 8).double()
    whole = sinkhorn((rows @ past.T / 0.04).numpy(), 200)
    np.testing.assert_allclose(whole.sum(axis=0), np.full(20, 12 / 20), rtol=1e-3)
    for rank in range(2):
        model = ReSSL(Encoder(torch.nn.Flatten(), 8, dim=8), memory_size=20, dim=8, sinkhorn_iterations=200)
        model.memory.keys = past
        part = rows[6 * rank : 6 * rank + 6]
        target = model.target(part, None, 0.04, World(rank, gather=lambda _: rows))
        np.testing.assert_allclose(target.logits(0.04).softmax(dim=-1).numpy(), whole[6 * rank : 6 * rank + 6], rtol=1e-8)


# The tiled loss


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
def test_tiles_equal_the_float64_oracle(
    views: int, batch: int, size: int, dim: int, rows: int | None, mix: float, temperatures: tuple[float, float, float]
) -> None:
    student, teacher, nce = temperatures
    queries, keys, memory = unit(views, batch, dim), unit(batch, dim), unit(size, dim)
    named = {"student_temperature": student, "teacher_temperature": teacher, "info_nce_temperature": nce, "warmup_mix": mix}
    loss, gradient = graded(tiled_objective, queries, keys, memory, rows=rows, **named)
    exact, slope = oracle(queries.double().numpy(), keys.double().numpy(), memory.double().numpy(), mix, student, teacher, nce)
    assert float(loss) == pytest.approx(exact, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(gradient.double(), torch.from_numpy(slope), rtol=1e-4, atol=2e-6 * max(1.0, 1 / student))


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
