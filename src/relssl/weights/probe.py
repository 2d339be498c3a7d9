"""Do weights come from training? The field's worst silent failure is a fresh network evaluated as a pretrained one."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from relssl.config import Config
from relssl.data import digits
from relssl.data.batch import standardise
from relssl.data.plain import plain_batch

ROWS = (0, 360, 720, 1080)  # drawings of different digits
DEVIATIONS = 5.0  # a sample's spread lies this many standard errors from its expected value once in millions


def untrained(backbone: nn.Module, fresh: nn.Module) -> str | None:
    """Why a backbone looks like a fresh one, or None.

    Args:
        backbone, fresh: the same network, `fresh` newly initialised.

    It does if all weights that start out constant (norms' weights, biases) still have that value, or all running
    statistics of batch norms have, or every larger tensor is spread as in a fresh network, within the sampling error.
    """
    pairs = [
        (name, value, fresh.state_dict()[name]) for name, value in backbone.state_dict().items() if value.is_floating_point()
    ]
    for what, statistics in (("batch-norm statistics", True), ("norms and biases", False)):
        chosen = [(value, old) for name, value, old in pairs if old.ndim == 1 and ("running_" in name) == statistics]
        start = [(value, old) for value, old in chosen if bool((old == old[0]).all())]
        if start and all(_unmoved(value, old) for value, old in start):
            return f"its {what} all have the values they start with"
    large = [(value, old) for _, value, old in pairs if old.ndim > 1 and old.numel() >= 4096]
    if large and all(_alike(value, old) for value, old in large):
        return f"its {len(large)} large weights are all spread as in a fresh network"
    return None


def _unmoved(value: Tensor, fresh: Tensor) -> bool:
    # Some start the last norm of a branch at 0, others at 1.
    return torch.equal(value, fresh) or any(torch.equal(value, torch.full_like(value, start)) for start in (0.0, 1.0))


def _alike(value: Tensor, fresh: Tensor) -> bool:
    expected = fresh.std()
    error = expected / (2 * value.numel()) ** 0.5
    # The fresh sample has an error of its own.
    return bool((value.std() - expected).abs() <= DEVIATIONS * 2**0.5 * error) and bool(
        (value.mean() - fresh.mean()).abs() <= DEVIATIONS * 2 * error
    )


@functools.lru_cache
def _images() -> Tensor:
    return torch.from_numpy(digits.load("test")[0][list(ROWS)])


@torch.no_grad()
def dead(backbone: nn.Module, config: Config) -> str | None:
    """What is wrong with the features of a few images (the embedded digits), or None: not finite, or the same for all."""
    features = backbone.eval()(standardise(plain_batch(_images(), config.views), config)).float()
    if not bool(features.isfinite().all()):
        return "its features are not finite"
    if bool(features.std(0).max() <= 1e-6 * features.abs().max()):
        return "its features are the same for all images"
    return None
