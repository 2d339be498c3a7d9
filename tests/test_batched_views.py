"""Batched views against torchvision's functional operations, one image at a time with the same parameters."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from relssl.data import batched
from relssl.data.draws import POOL, Draws, draw
from relssl.settings.run import VIEWS, ViewConfig

BATCH = 24


def view(name: str = "weak", **changes: object) -> ViewConfig:
    return ViewConfig(**{"name": name, **VIEWS[name], **changes})


def images(height: int = 32, width: int = 32, batch: int = BATCH) -> Tensor:
    return torch.randint(0, 256, (batch, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def draws_for(config: ViewConfig, x: Tensor) -> Draws:
    return draw(config, 0, 0, np.arange(len(x)), 1, tuple(x.shape[-2:]))


def blur(x: Tensor, sigma: float) -> Tensor:
    """A Gaussian with a kernel far wider than ours, on an image whose edges are repeated."""
    radius = math.ceil(6 * sigma)
    wide = torch.nn.functional.pad(x[None], [radius] * 4, mode="replicate")[0]
    return F.gaussian_blur(wide, [2 * radius + 1] * 2, [sigma] * 2)[..., radius:-radius, radius:-radius]


def jitter(x: Tensor, config: ViewConfig, draws: Draws, row: int) -> Tensor:
    operations = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    strengths = (config.brightness, config.contrast, config.saturation, config.hue)
    factors = [*draws.factors[row], draws.hue[row]]
    for op in draws.order[row]:
        if strengths[op]:
            x = operations[op](x, float(factors[op]))
    return x


def reference(image: Tensor, config: ViewConfig, draws: Draws, row: int) -> Tensor:
    """torchvision on one float image [3,H,W] in 0..1."""
    top, left, height, width = draws.crop[row].tolist()
    x = F.resized_crop(image, top, left, height, width, [config.size, config.size], antialias=True)
    if config.affine:
        shift = draws.shift[row].tolist()
        bilinear = F.InterpolationMode.BILINEAR
        x = F.affine(x, float(draws.angle[row]), shift, float(draws.zoom[row]), [0.0, 0.0], bilinear)
    if draws.flip[row]:
        x = F.hflip(x)
    if draws.jitter[row]:
        x = jitter(x, config, draws, row)
    if draws.grey[row]:
        x = F.rgb_to_grayscale(x, 3)
    x = blur(x, float(draws.sigma[row])) if draws.sigma[row] else x
    return F.solarize(x, 0.5) if draws.solarize[row] else x


def check(x: Tensor, config: ViewConfig, tolerance: float) -> Tensor:
    draws = draws_for(config, x)
    before = x.clone()
    ours = batched.apply(x, config, draws)
    assert ours.dtype == torch.float32 and ours.shape == (len(x), 3, config.size, config.size)
    assert torch.equal(x, before)
    theirs = torch.stack([reference(image, config, draws, row) for row, image in enumerate(x.float() / 255)])
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
    return ours


@pytest.mark.parametrize("source", [(32, 32), (33, 47), (64, 96), (20, 17), (5, 7)])
@pytest.mark.parametrize("size", [32, 21])
@pytest.mark.parametrize("flip", [0.0, 0.5])
@pytest.mark.parametrize("scale", [None, (0.08, 1.0)])
def test_crop_and_flip(source, size, flip, scale):
    check(images(*source), view(size=size, flip=flip, scale=scale), 1e-5)


def test_an_image_that_is_not_changed_keeps_its_pixels():
    x = images()
    plain = ViewConfig()
    torch.testing.assert_close(batched.apply(x, plain, draws_for(plain, x)), x / 255, atol=0, rtol=0)
    full = view(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    torch.testing.assert_close(batched.apply(x, full, draws_for(full, x)), x / 255, atol=1e-7, rtol=0)


def test_the_crop_does_not_look_past_its_edge():
    x = torch.zeros(BATCH, 3, 32, 32)
    config = view(flip=0.0)
    draws = draws_for(config, x)
    for row, (top, left, height, width) in enumerate(draws.crop.tolist()):
        x[row, :, top : top + height, left : left + width] = 1
    torch.testing.assert_close(batched.apply(x, config, draws), torch.ones_like(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [32, 21])
@pytest.mark.parametrize("name", ["digit-weak", "digit-strong"])
def test_affine(size, name):
    moves = {"affine": 0.7, "degrees": 180.0 if name == "digit-strong" else 5.0, "flip": 0.5, "jitter": 0.0, "blur": 0.0}
    check(images(), view(name, size=size, **moves), 1e-4)
    check(images(40, 50), view(size=size, affine=1.0, degrees=20.0, translate=0.2, zoom=(0.5, 2.0)), 1e-4)  # after a crop


ONE = {
    "brightness": {"brightness": 0.8},
    "contrast": {"contrast": 0.8},
    "saturation": {"saturation": 1.0},
    "hue": {"hue": 0.5},
    "all": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
}


@pytest.mark.parametrize("operation", ONE)
def test_jitter(operation):
    check(images(), ViewConfig(jitter=0.7, **ONE[operation]), 1e-5)


def test_jitter_of_grey_black_and_white():
    x = images()
    x[:8] = x[:8, :1]
    x[8], x[9], x[10] = 0, 255, torch.tensor([255, 0, 255]).view(3, 1, 1)
    check(x, ViewConfig(jitter=1.0, **ONE["all"]), 1e-5)


def test_every_order_of_the_jitter():
    x = images(8, 8, batch=400)
    config = ViewConfig(size=8, jitter=1.0, **ONE["all"])
    assert len(np.unique(draws_for(config, x).order, axis=0)) == 24
    check(x, config, 1e-5)


@pytest.mark.parametrize("size, sigma", [(32, (0.1, 2.0)), (32, (0.1, 1.0)), (7, (1.0, 5.0)), (64, (3.0, 4.0))])
def test_blur(size, sigma):
    # Ours is cut at 4 deviations of the widest; what lies beyond weighs 6e-5.
    check(images(size, size), ViewConfig(size=size, blur=0.7, blur_sigma=sigma), 1e-4)


@pytest.mark.parametrize("probability", [1.0, 0.3])
def test_solarize(probability):
    x, config = images(), ViewConfig(solarize=probability)
    check(x, config, 1e-6)
    applied = draws_for(config, x).solarize
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(BATCH, 3, 16, 16)
    expected = torch.where(torch.from_numpy(applied)[:, None, None, None], F.solarize(levels, 128), levels)
    made = batched.apply(levels, ViewConfig(size=16, solarize=probability), draws_for(config, x))
    assert torch.equal((made * 255).round().byte(), expected) and applied.any() and applied.all() == (probability == 1)


@pytest.mark.parametrize("name", [name for name in VIEWS if name != "strong"])
def test_whole_views(name):
    ours = check(images(), view(name), 1e-4)
    assert ours.min() >= 0 and ours.max() <= 1 + 1e-6


@pytest.mark.parametrize("cropped", [True, False])
def test_neither_kind_of_numbers_nor_layout_nor_autocast_nor_the_batch_changes_a_view(cropped):
    x, config = images(), view("strong") if cropped else view("contrastive", scale=None)
    draws, rows, given = draws_for(config, x), np.array([17, 3, 8]), x / 255
    views, before = batched.apply(x, config, draws), given.clone()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(batched.apply(x, config, draws), views)
    last = batched.apply(x.to(memory_format=torch.channels_last), config, draws)
    torch.testing.assert_close(last, views, atol=1e-6, rtol=0)
    torch.testing.assert_close(batched.apply(x[rows], config, draws.take(rows)), views[rows], atol=1e-6, rtol=0)
    assert batched.apply(x[:0], config, draws.take(slice(0))).shape == (0, 3, 32, 32)
    if not cropped:  # RandAugment works on whole levels
        torch.testing.assert_close(batched.apply(given, config, draws), views, atol=1e-5, rtol=0)
        assert torch.equal(given, before)


@pytest.mark.parametrize("channels", [3, 1])
def test_normalise(channels):
    x = images()
    mean, std = (0.4914, 0.4822, 0.4465)[:channels], (0.2023, 0.1994, 0.2010)[:channels]
    seen = x / 255 if channels == 3 else F.rgb_to_grayscale(x / 255)
    for levels in (x, x / 255):
        torch.testing.assert_close(batched.normalise(levels, mean, std), F.normalize(seen, mean, std), atol=1e-5, rtol=0)


def forced(x: Tensor, op: int) -> tuple[ViewConfig, Draws]:
    """Draws that apply POOL[op] alone, over all levels and both directions."""
    config = ViewConfig(size=x.shape[-1], randaugment=1)
    levels = np.array([[sign * (1 + i % 9)] for i, sign in zip(range(len(x)), [1, -1] * len(x), strict=False)])
    ops = np.full_like(levels, op)
    return config, dataclasses.replace(draws_for(config, x), ops=ops, levels=levels, ops_applied=np.ones_like(ops, dtype=bool))


def by_pillow(x: Tensor, op: int, level: int) -> Tensor:
    """FixMatch's operation of one image in its usual code: Pillow's own, at magnitude |level| of 10 and the sign's direction."""
    image, share, side = F.to_pil_image(x), abs(level) / 10, x.shape[-1]
    name, signed = POOL[op], 0.3 * level / 10
    matrices = {
        "shear_x": (1, signed, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, signed, 1, 0),
        "translate_x": (1, 0, int(signed * side), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, int(signed * side)),
    }
    if name in matrices:
        image = image.transform(image.size, Image.Transform.AFFINE, matrices[name])
    elif name in ("brightness", "color", "contrast", "sharpness"):
        image = getattr(ImageEnhance, name.capitalize())(image).enhance(0.9 * share + 0.05)
    elif name == "posterize":
        image = ImageOps.posterize(image, 4 + int(4 * share))
    elif name == "solarize":
        image = ImageOps.solarize(image, 256 - int(256 * share))
    elif name == "rotate":
        image = image.rotate(3 * level)
    elif name != "identity":
        image = getattr(ImageOps, name)(image)
    return F.pil_to_tensor(image)


@pytest.mark.parametrize("op", range(len(POOL)), ids=POOL)
@pytest.mark.parametrize("side", [32, 21])
@pytest.mark.parametrize("kind", ["noise", "narrow"])
def test_randaugment_equals_pillow(op, side, kind):
    x = images(side, side)
    if kind == "narrow":  # few levels a channel, some of one only
        x = x // 9 + 100
        x[0, 0], x[1] = 77, 0
    config, draws = forced(x, op)
    ours = (batched.apply(x, config, draws) * 255).round()
    theirs = [by_pillow(x[i], op, int(draws.levels[i, 0])) for i in range(len(x))]
    difference = (ours - torch.stack(theirs)).abs()
    # Pillow keeps autocontrast's table in floating point, whose whole numbers may fall a level short.
    assert difference.max() <= (1 if POOL[op] == "autocontrast" else 0)
    assert difference.mean() < 0.2


def test_randaugment_in_a_row_equals_pillow():
    x, config = images(), ViewConfig(randaugment=5)
    draws = draws_for(config, x)
    ours = batched.apply(x, config, draws) * 255
    for row in range(len(x)):
        image = x[row]
        for op, applied, level in zip(draws.ops[row], draws.ops_applied[row], draws.levels[row], strict=True):
            image = by_pillow(image, int(op), int(level)) if applied else image
        assert (ours[row] - image).abs().mean() < 1
