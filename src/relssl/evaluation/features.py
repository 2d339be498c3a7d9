"""Backbone features of whole data sets, by one fixed view an image: made once, kept, and taken from the disk the next time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from relssl.config import Config
from relssl.data.plain import batches
from relssl.data.sources import Images
from relssl.errors import DataError, NumericError


@dataclass
class Features:
    """Features [N, F] fp32 on the CPU, the rows of the data set they belong to, and what could not be read.

    `vectors` may be a memory map of a file that is read as it is needed.
    """

    vectors: Tensor
    rows: np.ndarray
    bad: list[tuple[str, str]] = field(default_factory=list)


@torch.no_grad()
def stream(
    backbone: nn.Module,
    images: Images,
    config: Config,
    device: torch.device,
    autocast: AbstractContextManager[object] | None = None,
) -> Iterator[tuple[np.ndarray, Tensor, list[tuple[str, str]]]]:
    """(rows, features [B, F] fp32 on the CPU, unreadable files) batch by batch.

    The backbone runs in eval mode and is put back as it was, so measuring never changes what is measured.
    """
    with evaluating(backbone):
        for rows, views, bad in batches(images, config):
            with autocast or nullcontext():
                made = backbone(views.to(device).contiguous(memory_format=torch.channels_last)) if len(rows) else views
            yield rows, made.float().cpu(), bad


@contextmanager
def evaluating(backbone: nn.Module) -> Iterator[None]:
    """The backbone in eval mode, each module put back into its own mode after."""
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def frozen(backbone: nn.Module) -> Iterator[str]:
    """`evaluating`, with the hash of all weights and batch-norm statistics before; they must be the same after.

    A frozen evaluation that lets batch norm count the images it sees measures another network with each batch, and nobody
    can tell from the figure.
    """
    before = state_hash(backbone)
    with evaluating(backbone):
        yield before
    if state_hash(backbone) != before:
        raise AssertionError("a frozen evaluation changed the backbone's weights or batch-norm statistics")


def state_hash(module: nn.Module) -> str:
    """16 hex digits of every parameter and buffer: names, types, shapes, values."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def extract(
    backbone: nn.Module,
    images: Images,
    config: Config,
    device: torch.device,
    autocast: AbstractContextManager[object] | None = None,
) -> Features:
    """All features of a data set, in memory."""
    vectors: list[Tensor] = []
    rows: list[np.ndarray] = []
    bad: list[tuple[str, str]] = []
    for some, made, faults in stream(backbone, images, config, device, autocast):
        bad += faults
        if len(some):
            rows.append(some)
            vectors.append(made)
    if not vectors:
        raise DataError(f"{images.name}: none of its {len(images)} images can be read")
    return Features(torch.cat(vectors), np.concatenate(rows), bad)


def require_varied(features: Tensor, name: str, *, chunk: int = 16384) -> None:
    """Refuse features [N,F] that no protocol can use, a chunk at a time.

    Features count as constant if no dimension's range exceeds a millionth of the largest magnitude: that is what rounding
    leaves of one vector.

    Args:
        name: whose features they are, for the message, such as "bank".

    Raises:
        NumericError: if they hold NaN or Inf, or are all the same.
    """
    low, high = features.new_full((features.shape[1],), torch.inf), features.new_full((features.shape[1],), -torch.inf)
    for start in range(0, len(features), chunk):
        rows = features[start : start + chunk]
        low, high = torch.minimum(low, rows.amin(dim=0)), torch.maximum(high, rows.amax(dim=0))
        if not bool((low.isfinite() & high.isfinite()).all()):  # NaN passes through both
            row = start + int((~rows.isfinite().all(dim=1)).nonzero()[0])
            raise NumericError(f"{name} features hold NaN or Inf, first in row {row}; check the weights and their precision")
    scale = torch.maximum(low.abs(), high.abs()).max()
    if len(features) > 1 and bool((high.double() - low.double()).max() <= 1e-6 * scale.double()):
        raise NumericError(
            f"{name} features are constant over all {len(features)} images: the network has collapsed or is broken"
        )
