"""RandAugment's operations as FixMatch defines them (Sohn et al. 2020, table 12), for a batch of tensors.

The magnitudes are those of FixMatch's usual PyTorch code, which the strong views of ReSSL's official code follow: level v of 10,
brightness, color, contrast and sharpness by 0.9 v / 10 + 0.05; posterize to 4 + int(4 v / 10) bits; solarize from
256 - int(256 v / 10); rotate by 3 v degrees; shear by 0.3 v / 10; translate by int(0.3 v / 10 * side); the last three either way.
The cutout that FixMatch adds at the end is not part of the pool. The operations are 8-bit ones, with nearest neighbours and
truncation, so the tensors hold whole numbers 0..255 and follow Pillow to the level.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from relssl.data.draws import POOL, Bools, Draws, Ints
from relssl.engine import send


def on(x: Tensor, where: Bools, operation: Callable[[Tensor, Ints], Tensor]) -> Tensor:
    """Replace in x, in place, the rows marked on the host by operation(those rows, their indices)."""
    rows = np.flatnonzero(where)
    if len(rows) == 0:
        return x
    index = send(torch.as_tensor(rows), x.device)
    return x.index_copy_(0, index, operation(x.index_select(0, index), rows))


def column(values: npt.ArrayLike, like: Tensor) -> Tensor:
    """Send numbers of the host, one a sample, to `like`'s device: fp32 [B,1,1,1]."""
    return send(torch.as_tensor(np.asarray(values, np.float32)), like.device).view(-1, 1, 1, 1)


def apply(x: Tensor, draws: Draws) -> Tensor:
    """Apply each sample's drawn operations, in turn, in place; x fp32 [B,C,S,S] in 0..1, on any device."""
    return on(x, draws.ops_applied.sum(axis=1) > 0, lambda part, rows: _apply_drawn(part, draws.take(rows)))


def _apply_drawn(x: Tensor, draws: Draws) -> Tensor:
    pixels = (x * 255).round_()
    for ops, applied, levels in zip(draws.ops.T, draws.ops_applied.T, draws.levels.T, strict=True):
        for number, name in enumerate(POOL):
            if name != "identity" and (name != "color" or x.shape[1] == 3):
                pixels = on(pixels, applied & (ops == number), partial(_apply, name, levels))
    return pixels.div_(255)


def _apply(name: str, levels: Ints, x: Tensor, rows: Ints) -> Tensor:
    """Apply one operation to whole numbers 0..255 [B,C,S,S], each sample at its own level, that of its row."""
    levels = levels[rows]
    strength = np.abs(levels)
    if name in _BASES:  # blended as by Pillow's Image.blend, which truncates
        base = _BASES[name](x)
        return (base + column(0.9 * strength / 10 + 0.05, x) * (x - base)).floor_()
    if name == "autocontrast":
        return _autocontrast(x)
    if name == "equalize":
        return _equalize(x)
    if name == "posterize":
        return x - x.remainder(column(2 ** (4 - 4 * strength // 10), x))
    if name == "solarize":
        return torch.where(x < column(256 - 256 * strength // 10, x), x, 255 - x)
    return _warp(x, name, levels)


def _luma(x: Tensor) -> Tensor:
    """Convert as Pillow does to L, [B,1,S,S]: 16-bit fixed point, whose whole numbers fp32 holds exactly; of other than 3 channels their mean."""
    if x.shape[1] != 3:
        return x.mean(dim=1, keepdim=True)
    luma = 19595 * x[:, :1] + 38470 * x[:, 1:2] + 7471 * x[:, 2:] + 32768
    return luma.div_(65536).floor_()


def _smooth(x: Tensor) -> Tensor:
    """Apply Pillow's SMOOTH filter, which leaves the outermost pixels as they are."""
    kernel = torch.ones(x.shape[1], 1, 3, 3, dtype=x.dtype, device=x.device)
    kernel[:, :, 1, 1] = 5
    smooth = x.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(x, kernel, groups=x.shape[1]).div_(13).add_(0.5).floor_()
    return smooth


_BASES: dict[str, Callable[[Tensor], Tensor]] = {
    "brightness": torch.zeros_like,
    "color": _luma,
    "contrast": lambda x: _luma(x).mean(dim=(2, 3), keepdim=True).add_(0.5).floor_(),
    "sharpness": _smooth,
}


def _autocontrast(x: Tensor) -> Tensor:
    """Stretch each channel to 0..255. Pillow's table, kept in floating point, may come out one level lower."""
    low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, ((x - low) * 255 / (high - low).clamp(min=1)).floor_(), x)


def _equalize(x: Tensor) -> Tensor:
    """Equalise as Pillow does: each channel through the running sum of its histogram, in whole numbers."""
    flat = x.long().flatten(2).flatten(0, 1)
    histogram = torch.zeros(len(flat), 256, dtype=torch.long, device=x.device).scatter_add_(1, flat, torch.ones_like(flat))
    last = histogram.gather(1, flat.amax(dim=1, keepdim=True))
    step = (flat.shape[1] - last) // 255
    before = histogram.cumsum(1) - histogram
    table = (before + step // 2) // step.clamp(min=1)
    return torch.where(step > 0, table.clamp_(max=255).gather(1, flat), flat).view(x.shape).to(x.dtype)


def _warp(x: Tensor, name: str, levels: Ints) -> Tensor:
    """Move pixels to their nearest neighbours, over black; in Pillow's 16-bit fixed point, so that ties fall the same way."""
    side, share, angle = x.shape[-1], 0.3 * levels / 10, np.deg2rad(3 * levels)
    shift, cos, sin = np.trunc(share * side), np.cos(angle), np.sin(angle)
    # Pillow's affine data: target (x, y) takes its pixel from (a x + b y + c, d x + e y + f).
    numbers: dict[str, tuple[Any, ...]] = {
        "shear_x": (1, share, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, share, 1, 0),
        "translate_x": (1, 0, shift, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, shift),
        "rotate": (cos, -sin, side / 2 - side / 2 * (cos - sin), sin, cos, side / 2 - side / 2 * (sin + cos)),
    }
    matrices = np.stack(np.broadcast_arrays(*numbers[name], share)[:6], axis=1)
    matrices[:, [2, 5]] += 0.5 * (matrices[:, [0, 3]] + matrices[:, [1, 4]])  # pixels are taken at their centres
    fixed = torch.as_tensor(np.floor(matrices * 65536 + 0.5).astype(np.int64))
    a, b, c, d, e, f = send(fixed, x.device).view(-1, 6, 1, 1).unbind(1)
    across = torch.arange(side, device=x.device)
    down = across[:, None]
    column, row = (c + a * across + b * down) >> 16, (f + d * across + e * down) >> 16
    inside = (column >= 0) & (column < side) & (row >= 0) & (row < side)
    source = (row.clamp(0, side - 1) * side + column.clamp(0, side - 1)).flatten(1)
    moved = x.flatten(2).gather(2, source[:, None].expand(-1, x.shape[1], -1)).view(x.shape)
    return moved * inside[:, None]
