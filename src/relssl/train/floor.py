"""What a step needs and what the hardware can do: the time that no implementation gets below."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from relssl.config import Config
from relssl.engine import Engine
from relssl.method import create_encoder

# Images [N, C, H, W] of 3x3 convolutions C -> C: the widths and sizes of residual networks.
_CONVOLUTIONS = {
    "cpu": ((32, 64, 32, 32), (32, 128, 28, 28), (32, 256, 14, 14)),
    "cuda": ((256, 64, 56, 56), (256, 128, 28, 28), (256, 256, 14, 14), (256, 512, 14, 14)),
}
# Side of the square matrices that are multiplied.
_MATRIX = {"cpu": 2048, "cuda": 8192}


def step_flops(config: Config) -> dict[str, int]:
    """Floating-point operations of one optimizer step per image, two for a multiply-add.

    Counted on the run's own networks in convolutions, matrix products and attention; all that is done entry by entry is left
    out. InfoNCE adds nothing, as its similarities are those of the relation.

    Returns:
        {"teacher": forward, "student": forward, "backward": of the student, "memory": similarities and their gradient}.

    Raises:
        ConfigError: if the network cannot be built, or images of the views' sizes do not pass through it.
    """
    with torch.random.fork_rng(devices=[]):  # networks are drawn, and others go on drawing afterwards
        student = create_encoder(config)
        teacher = student.teacher()
        # Two images, as batch norm has to have a spread to normalise by.
        weak = torch.randn(2, 3, config.views.weak.size, config.views.weak.size)
        strong = [torch.randn(2, 3, view.size, view.size) for view in config.strong_views]
        made: list[torch.Tensor] = []
        with torch.no_grad():
            teacher_flops = count_flops(lambda: teacher([weak]))
        student_flops = count_flops(lambda: made.append(student(strong)))
        backward_flops = count_flops(lambda: made[0].sum().backward())  # type: ignore[no-untyped-call]
    products = 1 + 2 * len(strong)  # the keys, the queries and the queries' gradient, by the memory
    memory = products * 2 * config.method.memory_size * config.encoder.dim
    return {"teacher": teacher_flops // 2, "student": student_flops // 2, "backward": backward_flops // 2, "memory": memory}


def count_flops(work: Callable[[], object]) -> int:
    """Floating-point operations of what `work` does, two for a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def attainable(engine: Engine, precision: str | None = None, seconds: float = 1.0) -> float:
    """Floating-point operations a second that this rank's device reaches at its best, measured.

    The best of several 3x3 convolutions, channels last, and of a large matrix product, in the run's own settings of the
    libraries. A network's step cannot be faster than its operations at this rate.

    Args:
        precision: fp32 or bf16; default: the engine's.
        seconds: for all of them together, after a warm-up.
    """
    dtype = torch.bfloat16 if (precision or engine.precision) == "bf16" else torch.float32
    kind = "cuda" if engine.device.type == "cuda" else "cpu"
    candidates = [_convolution(shape, dtype, engine) for shape in _CONVOLUTIONS[kind]]
    candidates.append(_product(_MATRIX[kind], dtype, engine))
    with torch.no_grad():
        return max(_rate(work, flops, engine, seconds / len(candidates)) for work, flops in candidates)


def _convolution(shape: tuple[int, int, int, int], dtype: torch.dtype, engine: Engine) -> tuple[Callable[[], object], int]:
    """A convolution to do, and its operations."""
    batch, channels, height, width = shape
    images: torch.Tensor = engine.place(torch.randn(shape)).to(dtype)
    weight: torch.Tensor = engine.place(nn.Conv2d(channels, channels, 3, bias=False)).weight.detach().to(dtype)
    return lambda: F.conv2d(images, weight, padding=1), 2 * 9 * batch * channels**2 * height * width


def _product(side: int, dtype: torch.dtype, engine: Engine) -> tuple[Callable[[], object], int]:
    """A product of square matrices to do, and its operations."""
    left, right = (torch.randn(side, side).to(engine.device, dtype) for _ in range(2))
    return lambda: left @ right, 2 * side**3


def _rate(work: Callable[[], object], flops: int, engine: Engine, seconds: float) -> float:
    """The best rate among rounds of a few calls each; a machine that others use is at its best now and then."""
    once = _seconds(work, 1, engine)  # builds the kernels; too slow to count
    once = min(once, _seconds(work, 1, engine))
    calls = max(1, int(seconds / 10 / max(once, 1e-6)))
    best, end = once, time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, _seconds(work, calls, engine) / calls)
    return flops / best


def _seconds(work: Callable[[], object], calls: int, engine: Engine) -> float:
    engine.synchronise()
    begun = time.perf_counter()
    for _ in range(calls):
        work()
    engine.synchronise()
    return time.perf_counter() - begun
