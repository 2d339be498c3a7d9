"""Every schedule as a pure function of the optimizer step, so that a resumed run needs nothing but its step."""

import math


def learning_rate(step: int, *, peak: float, warmup_steps: float, total_steps: int, start: float = 0.0) -> float:
    """Linear from `start` to `peak` over `warmup_steps`, then a half cosine to 0 at `total_steps` (official code).

    Args:
        step: 0 at the first step.
    """
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def warmup_mix(step: int, *, shape: str, length: float) -> float:
    """InfoNCE's part of the loss: 1 at step 0, 0 from step `length` on.

    `hard` switches at `length`, `linear` and `cosine` fall until there, `none` is 0 throughout. The extended paper
    names the warm-up and not its form: these are a reconstruction.
    """
    if shape == "none" or step >= length:
        return 0.0
    falls = {"hard": 1.0, "linear": 1 - step / length, "cosine": 0.5 * (1 + math.cos(math.pi * step / length))}
    return falls[shape]


def teacher_momentum(step: int, *, start: float, end: float | None, total_steps: int) -> float:
    """Constant at `start` (the papers), or a half cosine from `start` to `end` at `total_steps` (BYOL)."""
    if end is None:
        return start
    progress = min(step / max(total_steps, 1), 1.0)
    return end - (end - start) * 0.5 * (1 + math.cos(math.pi * progress))


def temperature(step: int, *, start: float | None, end: float, length: float) -> float:
    """The teacher's temperature: `end` throughout, or linear from `start` to `end` over `length` steps."""
    if start is None or step >= length:
        return end
    return start + (end - start) * step / length
