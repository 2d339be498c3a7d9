"""The random parameters of views: a pure function of (seed, epoch, sample id, view slot); who computes a view never changes it.

The random numbers come from a counter, not from a generator with a state: number `column` of a sample is hash(seed, epoch, slot,
id, column). Each parameter owns its column, so switching one operation off leaves the draws of all others as they were. No torch
here.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from enum import IntEnum, unique
from typing import Any

import numpy as np
import numpy.typing as npt

from relssl.settings.run import ViewConfig

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# FixMatch's RandAugment pool (Sohn et al. 2020, table 12), in the order of its usual PyTorch code; Draws.ops indexes it.
POOL = (
    *("autocontrast", "brightness", "color", "contrast", "equalize", "identity", "posterize"),
    *("rotate", "sharpness", "shear_x", "shear_y", "solarize", "translate_x", "translate_y"),
)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

_ATTEMPTS = 10  # of a crop that fits, as torchvision's RandomResizedCrop
_ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.int64)

# Columns of the uniform numbers. To add a parameter, append a column after the last: never move one.
_CROP = 0  # area and ratio of each attempt, then top and left
_AFFINE = _CROP + 2 * _ATTEMPTS + 2  # applied, angle, shift x, shift y, zoom
_FLIP = _AFFINE + 5
_JITTER = _FLIP + 1  # applied, order, brightness, contrast, saturation, hue
_GREY = _JITTER + 6
_BLUR = _GREY + 1  # applied, sigma
_RANDAUGMENT = _BLUR + 2  # operation, applied, level, sign of each of n, which varies
_SOLARIZE = _RANDAUGMENT + 4 * 14  # behind the most operations that RandAugment may have


@unique
class Slot(IntEnum):
    """Who draws, where it is no view; view number n has slot n, the weak one 0."""

    ORDER = 1 << 20  # of the samples of an epoch
    SHUFFLE = ORDER + 1  # of the rows that go through a teacher
    SUBSET = ORDER + 2  # of the images of a class


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Draws:
    """The drawn parameters of B views of one ViewConfig, one row a sample. What is not applied holds its neutral value."""

    crop: Ints  # [B,4] top, left, height, width, in pixels of the source image
    angle: Floats  # [B] degrees clockwise, as torchvision.transforms.functional.affine counts them
    shift: Ints  # [B,2] x, y in whole pixels of the view
    zoom: Floats  # [B]
    flip: Bools  # [B]
    ops: Ints  # [B,n] RandAugment: index into POOL
    ops_applied: Bools  # [B,n]
    levels: Ints  # [B,n] RandAugment: magnitude 1..9 of 10, negative where the operation runs the other way
    jitter: Bools  # [B]
    order: Ints  # [B,4] permutation of BRIGHTNESS, CONTRAST, SATURATION, HUE
    factors: Floats  # [B,3] of brightness, contrast, saturation; 1 = unchanged
    hue: Floats  # [B] share of the circle; 0 = unchanged
    grey: Bools  # [B]
    sigma: Floats  # [B] of the blur, in pixels; 0 = not blurred
    solarize: Bools  # [B]

    def take(self, rows: Any) -> Draws:
        """Return the draws of `rows`: an index array, a boolean mask or a slice."""
        return Draws(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


def uniforms(seed: int, epoch: int, ids: Ints, slot: int, count: int) -> Floats:
    """Compute random numbers [B, count] float64 in [0, 1), of 53 bits; row i from nothing but (seed, epoch, slot, ids[i]).

    The words are absorbed one after another through splitmix64's finaliser (Steele, Lea and Flood 2014; constants: Stafford's
    variant 13); this key starts a splitmix64 sequence of which column c is element c, whatever the count. For given other words
    the key is a bijection of the id, so two samples never share one.
    """
    key = np.zeros(1, dtype=np.uint64)
    for word in (seed, epoch, slot):
        key = _mix(key + np.array([word & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64) + _GOLDEN)
    key = _mix(key + np.asarray(ids, dtype=np.int64).view(np.uint64) + _GOLDEN)
    bits = _mix(key[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permuted(seed: int, epoch: int, positions: Ints, count: int) -> Ints:
    """Return what stands at some positions of an epoch's order of 0..count-1, each computed by itself, so that nothing of size `count` is.

    A Feistel network of six rounds on the next even number of bits, applied until the result is below `count` (cycle walking: Black and
    Rogaway 2002, "Ciphers with Arbitrary Finite Domains"), which makes it a bijection.
    """
    half = np.uint64((max(count - 1, 1).bit_length() + 1) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = (uniforms(seed, epoch, np.arange(6), Slot.ORDER, 2)[:, 1] * 2.0**53).astype(np.uint64)
    values, outside = np.asarray(positions, np.int64).astype(np.uint64), np.ones(len(positions), np.bool_)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        values[outside] = left << half | right
        outside = values >= np.uint64(count)
    return values.astype(np.int64)


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Apply splitmix64's finaliser, a bijection of 64 bits each of whose output bits depends on all input bits; arrays wrap silently."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def draw(view: ViewConfig, seed: int, epoch: int, ids: Ints, slot: int, sizes: Ints | tuple[int, int]) -> Draws:
    """Draw the parameters of one view of each sample, B rows, which depend on what those of `uniforms` do.

    `sizes` are height and width of the source images, (H, W) for all or [B,2].
    """
    end = _RANDAUGMENT + 4 * view.randaugment
    u = uniforms(seed, epoch, ids, slot, _SOLARIZE + 1 if view.solarize else end)
    # As torchvision's RandomAffine: angle and zoom uniform, shift uniform and then rounded to whole pixels.
    affine, reach = u[:, _AFFINE] < view.affine, view.translate * view.size
    shift = np.rint(_between(u[:, _AFFINE + 2 : _AFFINE + 4], -reach, reach))
    # As torchvision's ColorJitter: factors uniform in [max(0, 1 - b), 1 + b], hue in [-h, h], applied in a random order.
    jitter, widths = u[:, _JITTER] < view.jitter, np.array([view.brightness, view.contrast, view.saturation])
    factors = _between(u[:, _JITTER + 2 : _JITTER + 5], np.maximum(0.0, 1.0 - widths), 1.0 + widths)
    # As FixMatch's RandAugment with m = 10: operations with replacement, each applied with probability 0.5 at a level 1..9
    # (np.random.randint(1, 10)) and, where it has a direction, either way alike.
    op, applied, level, sign = np.moveaxis(u[:, _RANDAUGMENT:end].reshape(len(u), view.randaugment, 4), 2, 0)
    levels = 1 + (9 * level).astype(np.int64)
    return Draws(
        crop=_crop(view, u, sizes),
        angle=np.where(affine, _between(u[:, _AFFINE + 1], -view.degrees, view.degrees), 0.0),
        shift=np.where(affine[:, None], shift, 0).astype(np.int64),
        zoom=np.where(affine, _between(u[:, _AFFINE + 4], *view.zoom), 1.0),
        flip=u[:, _FLIP] < view.flip,
        ops=(len(POOL) * op).astype(np.int64),
        ops_applied=applied < 0.5,
        levels=np.where(sign < 0.5, -levels, levels),
        jitter=jitter,
        order=_ORDERS[(u[:, _JITTER + 1] * len(_ORDERS)).astype(np.int64)],
        factors=np.where(jitter[:, None], factors, 1.0),
        hue=np.where(jitter, _between(u[:, _JITTER + 5], -view.hue, view.hue), 0.0),
        grey=u[:, _GREY] < view.grey,
        sigma=np.where(u[:, _BLUR] < view.blur, _between(u[:, _BLUR + 1], *view.blur_sigma), 0.0),
        solarize=u[:, _SOLARIZE] < view.solarize if view.solarize else np.zeros(len(u), np.bool_),
    )


def draw_crops(view: ViewConfig, seed: int, epoch: int, ids: Ints, slot: int, sizes: Ints | tuple[int, int]) -> Ints:
    """Draw the crops [B,4] of `draw` alone: all that depends on the images' sizes."""
    return _crop(view, uniforms(seed, epoch, ids, slot, _AFFINE), sizes)


def _crop(view: ViewConfig, u: Floats, sizes: Ints | tuple[int, int]) -> Ints:
    """Draw boxes [B,4] distributed as torchvision's RandomResizedCrop.get_params; the whole image without a scale."""
    height, width = np.broadcast_to(np.asarray(sizes, dtype=np.int64), (len(u), 2)).T
    if view.scale is None:
        return np.stack([np.zeros_like(height), np.zeros_like(width), height, width], axis=1)
    area = (height * width)[:, None] * _between(u[:, : 2 * _ATTEMPTS : 2], *view.scale)
    ratio = np.exp(_between(u[:, 1 : 2 * _ATTEMPTS : 2], *np.log(view.ratio)))
    widths, heights = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (widths > 0) & (widths <= width[:, None]) & (heights > 0) & (heights <= height[:, None])
    rows, first, fitting = np.arange(len(u)), fits.argmax(axis=1), fits.any(axis=1)
    # torchvision's fallback when no attempt fits: the largest central crop of an allowed ratio.
    central_h = np.where(width / height < view.ratio[0], np.rint(width / view.ratio[0]), height)
    central_w = np.where(width / height > view.ratio[1], np.rint(height * view.ratio[1]), width)
    h = np.where(fitting, heights[rows, first], central_h).astype(np.int64)
    w = np.where(fitting, widths[rows, first], central_w).astype(np.int64)
    top = np.where(fitting, u[:, _AFFINE - 2] * (height - h + 1), (height - h) // 2).astype(np.int64)
    left = np.where(fitting, u[:, _AFFINE - 1] * (width - w + 1), (width - w) // 2).astype(np.int64)
    return np.stack([top, left, h, w], axis=1)


def _between(u: Floats, low: float | Floats, high: float | Floats) -> Floats:
    return low + (high - low) * u
