"""What a step needs and what the hardware can do: the time that no implementation gets below."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from relssl.config import Config
from relssl.engine import Engine
from relssl.method import create_student
from relssl.method.catalogue import count_flops
from relssl.methods import METHODS

# Images [N, C, H, W] of 3x3 convolutions C -> C: the widths and sizes of residual networks.
_CONVOLUTIONS = {
    "cpu": ((32, 64, 32, 32), (32, 128, 28, 28), (32, 256, 14, 14)),
    "cuda": ((256, 64, 56, 56), (256, 128, 28, 28), (256, 256, 14, 14), (256, 512, 14, 14)),
}
# Side of the square matrices that are multiplied.
_MATRIX = {"cpu": 2048, "cuda": 8192}


def step_flops(config: Config, classes: int = 1) -> dict[str, int]:
    """Floating-point operations of one optimizer step per image, two for a multiply-add.

    Counted on the run's own networks in convolutions, matrix products and attention; all that is done entry by entry is left
    out. ReSSL's InfoNCE adds nothing, as its similarities are those of the relation.

    Args:
        classes: of the labels, for supervised learning; where they are not known, 1 leaves out next to nothing.

    Returns:
        {"teacher": forward, 0 without one; "student": forward, "backward": of the student, "memory": similarities and their
        gradient, to the memory or within the batch; 0 without either}.

    Raises:
        ConfigError: if the network cannot be built, or images of the views' sizes do not pass through it.
    """
    # Split norms need whole batches, and cost nothing that is counted.
    config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, batch_norm_splits=1))
    with torch.random.fork_rng(devices=[]):  # networks are drawn, and others go on drawing afterwards
        student = create_student(config, classes)
        # Two images, as batch norm has to have a spread to normalise by.
        weak, *strong = (torch.randn(2, config.views.channels, view.size, view.size) for view in config.all_views)
        both = [weak, *strong]
        seen = both if config.two_way or not strong else strong
        taught = both if config.two_way else [weak]
        made: list[torch.Tensor] = []
        teacher_flops = 0
        if "teacher" in config.networks:
            teacher = student.teacher()
            with torch.no_grad():
                teacher_flops = count_flops(lambda: teacher(taught))
        student_flops = count_flops(lambda: made.append(student(seen)))
        backward_flops = count_flops(lambda: made[0].sum().backward())  # type: ignore[no-untyped-call]
    memory = _products(config, len(seen), len(taught)) * 2 * config.encoder.dim
    return {"teacher": teacher_flops // 2, "student": student_flops // 2, "backward": backward_flops // 2, "memory": memory}


def _products(config: Config, queries: int, keys: int) -> int:
    """Inner products of embeddings that an image takes part in: similarities and their gradient."""
    traits = METHODS[config.method.name]
    if traits.whole_batch:
        return 2 * queries * 2 * config.batch_size  # each query and its gradient, with two views of each image
    # The queries and their gradient by the memory, and the keys where the teacher's relation is wanted.
    return (2 * queries + keys * traits.sharpened) * config.method.memory_size * traits.memory


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
