"""Views of a whole batch at once, on its device, each sample with its own parameters.

Every operation equals torchvision's functional one on float tensors with the same parameters; the blur equals the paper's
Gaussian. Parameters live on the host: which samples an operation touches is decided there, and nothing waits for the device.
All in fp32, also under autocast; only TF32, where the caller has switched it on, reaches the matrix products of crop and blur
(a quarter of an 8-bit level).

RandAugment's operations are FixMatch's (Sohn et al. 2020, table 12) with the magnitudes of its usual PyTorch code, which the strong
views of ReSSL's official code follow: level v of 10, brightness, color, contrast and sharpness by 0.9 v / 10 + 0.05; posterize to
4 + int(4 v / 10) bits; solarize from 256 - int(256 v / 10); rotate by 3 v degrees; shear by 0.3 v / 10; translate by
int(0.3 v / 10 * side); the last three either way. The cutout that FixMatch adds at the end is not part of the pool. These are 8-bit
operations, with nearest neighbours and truncation, so their tensors hold whole numbers 0..255 and follow Pillow to the level.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from relssl.data.draws import CONTRAST, HUE, POOL, SATURATION, Bools, Draws, Floats, Ints
from relssl.engine import send
from relssl.settings.run import LUMA, ViewConfig


@torch.no_grad()
def apply(images: Tensor, view: ViewConfig, draws: Draws) -> Tensor:
    """Apply `draws`, a row an image, to images [B,C,H,W], uint8 or float in 0..1, in the order of ViewConfig's fields.

    They were drawn for `view`, whose size is S, and images of this size. What `left_out` names is left out. Returns fp32 [B,C,S,S] in
    0..1 on the images' device, in memory of its own.
    """
    with torch.autocast(images.device.type, enabled=False):
        x = _crop(images, view, draws)
        if view.affine:
            x = _affine(x, draws)
        x = on(x, draws.jitter, lambda part, rows: _jitter(part, view, draws.take(rows)))
        if x.shape[1] == 3:
            x = on(x, draws.grey, lambda part, rows: luma(part).expand_as(part))
        x = on(x, draws.sigma > 0, lambda part, rows: _blur(part, draws.sigma[rows], math.ceil(4 * view.blur_sigma[1])))
        x = on(x, draws.solarize, lambda part, rows: torch.where(part < 0.5, part, 1 - part))
        return on(x, draws.ops_applied.sum(axis=1) > 0, lambda part, rows: _randaugment(part, draws.take(rows)))


def left_out(views: Sequence[ViewConfig], channels: int) -> list[str]:
    """Return the operations of views that have no meaning for images of so many channels, and are not made."""
    colour = {
        "grey": lambda view: view.grey,
        "saturation": lambda view: view.jitter and view.saturation,
        "hue": lambda view: view.jitter and view.hue,
        "RandAugment's color": lambda view: view.randaugment,
    }
    return [name for name, share in colour.items() if channels != 3 and any(map(share, views))]


def normalise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise each channel of [B,C,S,S], float in 0..1 or uint8: fp32 (x - mean) / std, in 0..1; those of one turn colours grey."""
    if len(mean) == 1 and x.shape[1] == 3:
        x = luma(x / 255 if x.dtype == torch.uint8 else x)
    scale = 255.0 if x.dtype == torch.uint8 else 1.0
    weight, bias = (column(values, x)[..., 0] for values in (1 / (scale * np.asarray(std)), -np.asarray(mean) / np.asarray(std)))
    return torch.addcmul(bias, x.float(), weight)


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


def _crop(images: Tensor, view: ViewConfig, draws: Draws) -> Tensor:
    """Crop, resize and flip [B,C,H,W] -> [B,C,S,S]: torchvision's resized_crop (bilinear, antialiased) as two matrices."""
    (height, width), size = images.shape[-2:], view.size
    white = 255.0 if images.dtype == torch.uint8 else 1.0
    flip = draws.flip & (view.affine == 0)  # which costs nothing inside a resampling, and the affine's is the last
    if view.scale is None and (height, width) == (size, size):
        # Always a copy: what follows works in place.
        return on(images / white, flip, lambda part, rows: part.flip(-1))
    x = images.float()
    top, left, rows, columns = (column(each, x)[..., 0] for each in draws.crop.T)
    centres = torch.arange(size, device=x.device)[:, None] + 0.5
    mirrored = torch.where(column(flip, x)[..., 0] > 0, size - centres, centres)
    down = _resize_weights(top, rows, height, centres)
    across = _resize_weights(left, columns, width, mirrored).div_(white)
    return _filter(x, down, across)


def _resize_weights(start: Tensor, length: Tensor, source: int, centres: Tensor) -> Tensor:
    """Return the weights [B,S,source] of an antialiased bilinear resize of source[start : start + length], each [B,1,1], to S pixels.

    `centres`, [B,S,1] or [S,1], are those of the target pixels. Pillow's and ATen's definition: a triangle as wide as a target pixel
    (at least a source pixel), cut at the crop's edges and normalised again.
    """
    scale = length / centres.shape[-2]
    offset = torch.arange(source, device=start.device) - start
    weights = (1 - (offset + 0.5 - centres * scale).abs_().div_(scale.clamp(min=1.0))).clamp_(min=0)
    weights *= (offset >= 0) & (offset < length)
    return weights.div_(weights.sum(-1, keepdim=True))


def _affine(x: Tensor, draws: Draws) -> Tensor:
    """Rotate, zoom and shift about the centre, black outside, then flip; [B,C,S,S]. As torchvision.transforms.functional.affine.

    The matrix maps a target pixel to its source: the flip first undone, then the shift, then rotation and zoom.
    """
    angle = np.deg2rad(draws.angle)
    cos, sin = np.cos(angle) / draws.zoom, np.sin(angle) / draws.zoom
    shift_x, shift_y = draws.shift.T * 2.0 / x.shape[-1]  # affine_grid's unit is half a side
    mirror = np.where(draws.flip, -1.0, 1.0)
    across = (cos * mirror, sin, -cos * shift_x - sin * shift_y)
    down = (-sin * mirror, cos, sin * shift_x - cos * shift_y)
    theta = column(np.stack([*across, *down], axis=1), x).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def luma(x: Tensor) -> Tensor:
    """Return the ITU-R 601 luma [B,1,S,S], with torchvision's rounded weights; of other than 3 channels their mean."""
    if x.shape[1] != 3:
        return x.mean(dim=1, keepdim=True)
    red, green, blue = LUMA
    return (red * x[:, :1]).add_(x[:, 1:2], alpha=green).add_(x[:, 2:], alpha=blue)


def _jitter(x: Tensor, view: ViewConfig, draws: Draws) -> Tensor:
    """Jitter colours, each sample in its own order: four rounds, in each of which every sample has its own operation."""
    colour = x.shape[1] == 3
    strengths = np.array([view.brightness, view.contrast, view.saturation * colour, view.hue * colour])
    for turn in draws.order.T:
        turn = np.where(strengths[turn] > 0, turn, -1)
        if (blended := (turn >= 0) & (turn != HUE)).any():
            x = _blend(x, turn, np.where(blended, draws.factors[np.arange(len(turn)), np.clip(turn, 0, 2)], 1.0))
        x = on(x, turn == HUE, lambda part, rows: _shift_hue(part, column(draws.hue[rows], part)))
    return x


def _blend(x: Tensor, turn: Ints, factor: Floats) -> Tensor:
    """Compute factor * x + (1 - factor) * base, clamped, in place; base: brightness 0, contrast the mean luma, saturation the luma."""
    grey = luma(x)
    mean = grey.mean(dim=(2, 3), keepdim=True)
    rest = 1.0 - factor
    towards_grey = column(np.where(turn == SATURATION, rest, 0.0), x)
    towards_mean = column(np.where(turn == CONTRAST, rest, 0.0), x)
    base = grey.mul_(towards_grey).add_(mean.mul_(towards_mean))
    return x.mul_(column(factor, x)).add_(base).clamp_(0.0, 1.0)


def _shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` [B,1,1,1] of the circle, in HSV as torchvision's adjust_hue; x [B,3,S,S] in 0..1.

    Back from hue in sixths h, value v and chroma c: channel = v - c * clamp(min(k, 4 - k), 0, 1), k = (n + h) mod 6, n = 5, 3, 1.
    """
    red, green, blue = x[:, :1], x[:, 1:2], x[:, 2:]
    value = x.amax(dim=1, keepdim=True)
    chroma = value - x.amin(dim=1, keepdim=True)
    divisor = torch.where(chroma == 0, 1.0, chroma)
    sixths = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2.0 + (blue - red) / divisor, 4.0 + (red - green) / divisor),
    )
    sixths += 6.0 * shift
    k = (sixths + column([5.0, 3.0, 1.0], x)[..., 0]).remainder_(6.0)
    return value - chroma * torch.minimum(k, 4.0 - k).clamp_(0.0, 1.0)


def _blur(x: Tensor, sigma: Floats, radius: int) -> Tensor:
    """Blur by a Gaussian of each sample's own `sigma` [B], cut at `radius`, edges repeated as Pillow does; [B,C,S,S]."""
    size = x.shape[-1]
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-0.5 * (offsets / column(sigma, x).view(-1, 1)) ** 2)
    kernel /= kernel.sum(dim=1, keepdim=True)
    # reach[d, o, j] = 1 where offset d from pixel o lands on pixel j once it is clamped to the image.
    landed = (torch.arange(size, device=x.device) + offsets[:, None]).clamp_(0, size - 1)
    reach = (landed[:, :, None] == torch.arange(size, device=x.device)).float()
    weights = (kernel @ reach.view(len(offsets), -1)).view(-1, size, size)
    return _filter(x, weights, weights)


def _filter(x: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Apply weights [B,S,H] and [B,S,W] along the two sides; [B,C,H,W] -> [B,C,S,S]."""
    wide = torch.bmm(x.flatten(1, 2), across.transpose(1, 2))
    return torch.matmul(down[:, None], wide.view(*x.shape[:3], across.shape[1]))


def _randaugment(x: Tensor, draws: Draws) -> Tensor:
    """Apply each sample's drawn operations, in turn, to x in 0..1."""
    pixels = (x * 255).round_()
    for ops, applied, levels in zip(draws.ops.T, draws.ops_applied.T, draws.levels.T, strict=True):
        for number, name in enumerate(POOL):
            if name != "identity" and (name != "color" or x.shape[1] == 3):
                pixels = on(pixels, applied & (ops == number), partial(_operate, name, levels))
    return pixels.div_(255)


def _operate(name: str, levels: Ints, x: Tensor, rows: Ints) -> Tensor:
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


def _whole_luma(x: Tensor) -> Tensor:
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
    "color": _whole_luma,
    "contrast": lambda x: _whole_luma(x).mean(dim=(2, 3), keepdim=True).add_(0.5).floor_(),
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
