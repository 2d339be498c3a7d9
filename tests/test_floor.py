"""Operations of a step against hand-counted ones, and the device's best rate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from relssl.engine import Engine
from relssl.settings.run import EngineConfig, resolve
from relssl.train import estimate
from small_runs import SMALL


def test_a_small_network_counts_as_by_hand(tiny_net: type[nn.Module]) -> None:
    network, images = tiny_net(), torch.randn(5, 3, 8, 8)
    conv = 2 * 27 * 16 * 5 * 4 * 4  # 3x3x3 multiply-adds for each of 16 x 4 x 4 outputs of 5 images
    assert estimate.count_flops(lambda: network(images)) == conv
    # Of an only layer the weight's gradient alone is taken, which costs what the forward pass does.
    assert estimate.count_flops(lambda: network(images).sum().backward()) == 2 * conv


def test_resnet18_of_the_papers_counts_as_by_hand() -> None:
    config = resolve({"recipe": "nips/cifar10", "encoder.dim": 256, "method.memory_size": 65536})
    stem, layer1 = 2 * 27 * 64 * 32**2, 4 * 2 * 9 * 64 * 64 * 32**2
    # Each later stage: one convolution that halves the size, its shortcut, and three that keep it.
    later = 3 * (2 * 9 * 64 * 128 * 16**2 + 2 * 64 * 128 * 16**2 + 3 * 2 * 9 * 128 * 128 * 16**2)
    forward = stem + layer1 + later + 2 * (512 * 2048 + 2048 * 256)
    found = estimate.step_flops(config)
    assert found["student"] == found["teacher"] == forward == 1_113_980_928
    assert found["backward"] == 2 * forward - stem  # images need no gradient
    assert found["memory"] == 3 * 2 * 65536 * 256  # keys, queries, and the queries' gradient
    assert sum(found.values()) == pytest.approx(4.57e9, rel=0.005)


def test_crops_of_several_sizes_and_random_state() -> None:
    over = SMALL | {"views.weak": {"size": 32}, "views.crops": [[32, 0.2, 1], [16, 0.1, 0.3]]}
    torch.manual_seed(7)
    found = estimate.step_flops(resolve(over))
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))
    one = estimate.step_flops(resolve(SMALL | {"views.weak": {"size": 32}}))
    assert found["teacher"] == one["teacher"] and found["memory"] == one["memory"] * 5 // 3
    # A quarter of the pixels costs a quarter, but for the projector.
    projector = 2 * (16 * 32 + 32 * 16)
    assert found["student"] - one["student"] == (one["student"] - projector) / 4 + projector


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_best_of_the_candidates_counts(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """With a clock by which the product is ten times as fast a convolution as any."""
    dtypes = set()

    def clock(work: Callable[[], torch.Tensor], calls: int, engine: Engine) -> float:
        made = work()
        dtypes.add(made.dtype)
        return calls * (0.002 if made.ndim == 2 else 0.5)

    monkeypatch.setattr(estimate, "_MATRIX", {"cpu": 64})
    monkeypatch.setattr(estimate, "_CONVOLUTIONS", {"cpu": ((1, 8, 4, 4), (2, 8, 4, 4))})
    monkeypatch.setattr(estimate, "_seconds", clock)
    engine = Engine(EngineConfig(device="cpu", threads=1, precision="fp32"))
    assert estimate.attainable(engine, precision, seconds=0.01) == pytest.approx(2 * 64**3 / 0.002)
    assert dtypes == {torch.float32 if precision == "fp32" else torch.bfloat16}
