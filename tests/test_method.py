"""The pieces of the method: memory, relations, schedules, encoder, health."""

import sys
from collections import deque

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from relssl.method import Encoder, Memory, ReSSL, create_backbone, health, info_nce, relation, relational_loss, schedules
from relssl.method.health import effective_rank


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


@given(size=st.integers(1, 40), batches=st.lists(st.integers(1, 90), min_size=1, max_size=8))
@settings(max_examples=500, deadline=None)
def test_memory_is_a_ring_of_the_newest(size: int, batches: list[int]) -> None:
    memory = Memory(size, 2)
    before, newest, count = memory.keys.clone(), deque[int](maxlen=size), 0
    for n in batches:
        ids = torch.arange(count, count + n)
        memory.push(torch.stack([ids.float(), -ids.float()], dim=1), ids)
        newest.extend(ids.tolist())
        count += n
    written = memory.ids >= 0
    assert sorted(memory.ids[written].tolist()) == list(newest)
    assert torch.equal(memory.keys[written][:, 0].long(), memory.ids[written])
    assert torch.equal(memory.keys[~written], before[~written])
    assert int(memory.pointer) == count % size
    if count >= size:  # the next key goes over the oldest
        assert int(memory.ids[memory.pointer]) == newest[0]


def test_memory_starts_as_random_directions_and_refuses_other_shapes() -> None:
    memory = Memory(2000, 64)
    torch.testing.assert_close(memory.keys.norm(dim=1), torch.ones(2000))
    assert memory.keys.mean(dim=0).abs().max() < 0.02
    with pytest.raises(ValueError, match="needs keys"):
        memory.push(unit(4, 32), torch.arange(4))
    with pytest.raises(ValueError, match="needs keys"):
        memory.push(unit(4, 64), torch.arange(3))


def test_no_sample_meets_itself() -> None:
    """The loss sees the memory without this step's keys, so a key that equals its query cannot be found in it."""
    encoder = Encoder(torch.nn.Flatten(), 12, projector_hidden=8, dim=4)
    model = ReSSL(encoder, memory_size=16, dim=4)
    before = model.memory.keys.clone()
    model.step(torch.rand(4, 3, 2, 2), [torch.rand(4, 3, 2, 2)], student_temperature=0.1, teacher_temperature=0.04)
    assert torch.equal(model.memory.keys, before)


def test_relation_is_a_sharpened_distribution() -> None:
    z, memory = unit(8, 16), unit(50, 16)
    sharp, soft = relation(z, memory, 0.04), relation(z, memory, 0.1)
    torch.testing.assert_close(sharp.sum(dim=1), torch.ones(8))
    torch.testing.assert_close(soft, torch.softmax(z @ memory.T / 0.1, dim=1))
    assert (torch.special.entr(sharp).sum(1) < torch.special.entr(soft).sum(1)).all()
    nearest = F.one_hot((z @ memory.T).argmax(1), 50).float()
    torch.testing.assert_close(relation(z, memory, 1e-4), nearest)


def test_relational_loss_is_kl_plus_entropy_and_lowest_at_the_target() -> None:
    keys, memory, queries = unit(8, 16), unit(50, 16), unit(1, 8, 16)
    loss = relational_loss(queries, keys, memory, student_temperature=0.1, teacher_temperature=0.04)
    target, mine = relation(keys, memory, 0.04), relation(queries[0], memory, 0.1)
    kl = F.kl_div(mine.log(), target, reduction="batchmean")
    torch.testing.assert_close(loss, kl + torch.special.entr(target).sum(1).mean())
    equal = relational_loss(keys[None], keys, memory, student_temperature=0.04, teacher_temperature=0.04)
    assert equal < loss


def test_info_nce_equals_cross_entropy_over_positive_and_memory() -> None:
    keys, memory, queries = unit(8, 16), unit(50, 16), unit(2, 8, 16)
    scores = torch.cat([(queries * keys).sum(-1, keepdim=True), queries @ memory.T], dim=-1) / 0.2
    expected = F.cross_entropy(scores.view(16, 51), torch.zeros(16, dtype=torch.long))
    torch.testing.assert_close(info_nce(queries, keys, memory, temperature=0.2), expected)


def test_gradient_flows_through_the_queries_alone() -> None:
    keys, memory, queries = (t.requires_grad_() for t in (unit(8, 16), unit(50, 16), unit(1, 8, 16)))
    (
        relational_loss(queries, keys, memory, student_temperature=0.1, teacher_temperature=0.04)
        + info_nce(queries, keys, memory, temperature=0.1)
    ).backward()
    assert queries.grad is not None and keys.grad is None and memory.grad is None


def test_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [schedules.learning_rate(s, peak=0.06, warmup_steps=10, total_steps=110) for s in range(111)]
    assert rates[0] == 0 and rates[5] == pytest.approx(0.03) and rates[10] == pytest.approx(0.06)
    assert rates[60] == pytest.approx(0.03) and rates[110] == pytest.approx(0, abs=1e-12)
    reference = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.06)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=100)
    for rate in rates[10:]:
        assert rate == pytest.approx(reference.param_groups[0]["lr"], abs=1e-12)
        reference.step()
        cosine.step()


@given(step=st.integers(0, 300), length=st.floats(1, 200), shape=st.sampled_from(["hard", "linear", "cosine", "none"]))
def test_warmup_mix_falls_from_one_to_zero(step: int, length: float, shape: str) -> None:
    mix = schedules.warmup_mix(step, shape=shape, length=length)
    assert 0 <= mix <= 1
    assert mix >= schedules.warmup_mix(step + 1, shape=shape, length=length)
    if shape == "none" or step >= length:
        assert mix == 0
    elif step == 0:
        assert mix == 1


def test_momentum_and_temperature_schedules() -> None:
    assert schedules.teacher_momentum(7, start=0.99, end=None, total_steps=100) == 0.99
    assert schedules.teacher_momentum(0, start=0.99, end=1.0, total_steps=100) == pytest.approx(0.99)
    assert schedules.teacher_momentum(50, start=0.99, end=1.0, total_steps=100) == pytest.approx(0.995)
    assert schedules.teacher_momentum(100, start=0.99, end=1.0, total_steps=100) == 1.0
    assert schedules.temperature(5, start=None, end=0.04, length=10) == 0.04
    assert schedules.temperature(5, start=0.02, end=0.04, length=10) == pytest.approx(0.03)
    assert schedules.temperature(10, start=0.02, end=0.04, length=10) == 0.04


@pytest.mark.parametrize(("stem", "side"), [("small", 32), ("small-pool", 16), ("standard", 8)])
def test_small_stems_keep_the_resolution(stem: str, side: int) -> None:
    backbone = create_backbone("resnet18", stem)
    seen = {}
    backbone.layer1.register_forward_hook(lambda module, inputs, output: seen.update(side=output.shape[-1]))
    assert backbone.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 512)
    assert seen["side"] == side
    if stem != "standard":
        assert backbone.conv1.weight.shape == (64, 3, 3, 3)


def test_health_of_known_relations() -> None:
    torch.manual_seed(1)
    keys, memory = unit(64, 32), unit(512, 32)
    figures = health(keys[None], keys, memory, student_temperature=0.1, teacher_temperature=0.1)
    assert figures["kl"] == pytest.approx(0, abs=1e-5) and figures["agreement"] == 1
    assert figures["embedding_std"] == pytest.approx(1, abs=0.05)
    entropy = torch.distributions.Categorical(logits=keys @ memory.T / 0.1).entropy().mean()
    assert figures["teacher_entropy"] == pytest.approx(float(entropy), rel=1e-5)
    assert figures["teacher_neighbours"] == pytest.approx(float(entropy.exp()), rel=1e-5)
    one = keys[:1].expand(64, 32)
    collapsed = health(one[None], one, memory[:1].expand(512, 32), student_temperature=0.1, teacher_temperature=0.04)
    assert collapsed["teacher_neighbours"] == pytest.approx(512, rel=1e-4) and collapsed["embedding_std"] == pytest.approx(
        0, abs=1e-5
    )


def test_effective_rank_counts_directions() -> None:
    assert float(effective_rank(torch.eye(16))) == pytest.approx(16, rel=1e-4)
    assert float(effective_rank(torch.ones(16, 8))) == pytest.approx(1, rel=1e-3)


def test_figures_of_relations_equal_a_float64_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample by sample, written from the definitions; and the same in tiles."""
    generator = np.random.default_rng(3)
    count, size, near = 24, 300, 10

    def unit_rows(*shape: int) -> np.ndarray:
        rows = generator.normal(size=shape)
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    memory, keys = Memory(size, 16), unit_rows(count, 16)
    pushed = [unit_rows(50, 16) for _ in range(5)]
    for number, rows in enumerate(pushed):
        memory.push(torch.tensor(rows, dtype=torch.float32), torch.arange(50 * number, 50 * number + 50))
    past = memory.keys.double().numpy()
    ages = np.concatenate([np.repeat([5, 4, 3, 2, 1], 50), np.zeros(50)])
    assert np.array_equal(memory.ages(50), ages)
    queries = unit_rows(2, count, 16) + keys
    queries /= np.linalg.norm(queries, axis=-1, keepdims=True)
    teacher, student = keys @ past.T, queries @ past.T
    places = np.argsort(-teacher, axis=1)[:, :near]
    theirs = np.argsort(-student, axis=2)[..., :near]
    counts = np.bincount(places.flatten(), minlength=size)
    cosine = (queries * keys).sum(axis=-1)
    matched = ages[places[:, 0]]
    distances = ((keys[:, None] - keys[None]) ** 2).sum(axis=-1)[~np.eye(count, dtype=bool)]
    softmax = np.exp(teacher / 0.04) / np.exp(teacher / 0.04).sum(axis=1, keepdims=True)
    oracle = {
        "top_agreement": np.mean([[len({*a} & {*b}) / near for a, b in zip(places, view, strict=True)] for view in theirs]),
        "positive_margin": (
            cosine - np.sort(student, axis=-1)[..., (size - 1) // 2]
        ).mean(),  # the lower one of two in the middle
        "alignment": ((queries - keys) ** 2).sum(axis=-1).mean(),
        "memory_unused": (counts == 0).mean(),
        "hubness": np.sort(counts)[-3:].sum() / counts.sum(),
        "matched_age": matched[matched > 0].mean(),
        "uniformity": np.log(np.exp(-2 * distances).mean()),
        "top_probability": softmax.max(axis=1),
        "neighbours": np.exp(-(softmax * np.log(softmax)).sum(axis=1)),
    }
    for tile in (1 << 26, 1):
        monkeypatch.setattr(sys.modules["relssl.method.health"], "_TILE_BYTES", tile)
        tensors = [torch.tensor(rows, dtype=torch.float32) for rows in (queries, keys, past)]
        figures = health(*tensors, student_temperature=0.1, teacher_temperature=0.04, ages=memory.ages(50))
        for name, value in oracle.items():
            assert figures[name].numpy() == pytest.approx(value, rel=1e-4), name
