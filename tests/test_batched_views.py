"""Batched views against torchvision's functional operations and Pillow's, one image at a time with the same parameters."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from relssl.data import batched
from relssl.data.draws import CONTRAST, POOL, Draws, draw
from relssl.settings.run import VIEWS, ViewConfig

BATCH = 24


def view(name: str = "weak", **changes: object) -> ViewConfig:
    return ViewConfig(**{"name": name, **VIEWS[name], **changes})


def images(height: int = 32, width: int = 32, batch: int = BATCH, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, channels, height, width), generator=generator, dtype=torch.uint8)


def draws_for(config: ViewConfig, x: Tensor) -> Draws:
    return draw(config, 0, 0, np.arange(len(x)), 1, tuple(x.shape[-2:]))


def views_of(x: Tensor, config: ViewConfig) -> Tensor:
    return batched.apply(x, config, draws_for(config, x))


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


ALL = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
MOVED = {"affine": 1.0, "degrees": 20.0, "translate": 0.2, "zoom": (0.5, 2.0)}
# Sides of the images, the view, and how far it may be off; ours of the blur is cut at 4 deviations, beyond which lies 6e-5.
CASES = [
    *(
        ((height, width), view(size=size, flip=flip, scale=scale), 1e-5)
        for height, width in ((32, 32), (33, 47), (64, 96), (20, 17), (5, 7))
        for size, flip, scale in ((32, 0.0, None), (21, 0.5, (0.08, 1.0)), (32, 0.5, (0.08, 1.0)), (21, 0.5, None))
    ),
    ((32, 32), view(flip=0.5, scale=None), 1e-5),
    *(((32, 32), ViewConfig(**MOVED | {"size": size, "affine": 0.7, "degrees": 180.0, "flip": 0.5}), 1e-4) for size in (32, 21)),
    ((40, 50), view(**MOVED), 1e-4),  # after a crop
    *(((32, 32), ViewConfig(jitter=0.7, **{name: 0.5}), 1e-5) for name in ALL),
    *(
        ((size, size), ViewConfig(size=size, blur=0.7, blur_sigma=sigma), 1e-4)
        for size, sigma in ((32, (0.1, 2.0)), (7, (1.0, 5.0)), (64, (3.0, 4.0)))
    ),
    ((32, 32), ViewConfig(solarize=0.3), 1e-6),
    *(((32, 32), view(name), 1e-4) for name in VIEWS if name != "strong"),
]


def check(x: Tensor, config: ViewConfig, tolerance: float) -> None:
    draws, before = draws_for(config, x), x.clone()
    ours = batched.apply(x, config, draws)
    assert ours.dtype == torch.float32 and torch.equal(x, before)
    theirs = torch.stack([reference(image, config, draws, row) for row, image in enumerate(x.float() / 255)])
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("sides", "config", "tolerance"), CASES)
def test_views_equal_torchvisions(sides, config, tolerance):
    check(images(*sides), config, tolerance)


def test_every_order_of_the_jitter_also_of_grey_black_and_white():
    x, config = images(8, 8, batch=400), ViewConfig(size=8, jitter=1.0, **ALL)
    x[:80] = x[:80, :1]
    x[80:120], x[120:160], x[160:200] = 0, 255, torch.tensor([255, 0, 255]).view(3, 1, 1)
    assert len(np.unique(draws_for(config, x).order, axis=0)) == 24
    check(x, config, 1e-5)


def test_an_image_that_is_not_changed_keeps_its_pixels():
    x = images()
    torch.testing.assert_close(views_of(x, ViewConfig()), x / 255, atol=0, rtol=0)
    torch.testing.assert_close(views_of(x, view(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)), x / 255, atol=1e-7, rtol=0)


def test_the_crop_does_not_look_past_its_edge():
    x, config = torch.zeros(BATCH, 3, 32, 32), view(flip=0.0)
    for row, (top, left, height, width) in enumerate(draws_for(config, x).crop.tolist()):
        x[row, :, top : top + height, left : left + width] = 1
    torch.testing.assert_close(views_of(x, config), torch.ones_like(x), atol=1e-6, rtol=0)


def test_solarize_begins_at_128():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(BATCH, 3, 16, 16)
    assert torch.equal((views_of(levels, ViewConfig(size=16, solarize=1.0)) * 255).round().byte(), F.solarize(levels, 128))


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


@pytest.mark.parametrize(("seen", "channels"), [(3, 3), (3, 1), (1, 3)])
def test_normalise(seen, channels):
    """Networks of one channel see colours grey, and those of three see grey in colour."""
    x = images(channels=channels)
    mean, std = (0.4914, 0.4822, 0.4465)[:seen], (0.2023, 0.1994, 0.2010)[:seen]
    theirs = x / 255 if seen == channels else F.rgb_to_grayscale(x / 255) if seen == 1 else (x / 255).expand(-1, 3, -1, -1)
    for levels in (x, x / 255):
        torch.testing.assert_close(batched.normalise(levels, mean, std), F.normalize(theirs, mean, std), atol=1e-5, rtol=0)


def forced(x: Tensor, op: int) -> tuple[ViewConfig, Draws]:
    """Draws that apply POOL[op] alone, over all levels and both directions."""
    config = ViewConfig(size=x.shape[-1], randaugment=1)
    levels = np.array([[(-1) ** row * (1 + row % 9)] for row in range(len(x))])
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


@pytest.mark.parametrize("channels", [1, 2, 13])
@pytest.mark.parametrize(
    "changes", [{"scale": (0.2, 1.0), "flip": 0.5}, MOVED, {"blur": 0.7}, {"solarize": 0.5}, {"jitter": 1.0, "brightness": 0.4}]
)
def test_each_channel_goes_through_an_operation_as_a_colour_does(channels, changes):
    x, config = images(channels=channels), ViewConfig(size=24, **changes)
    views = views_of(x, config)
    for first in range(channels):
        torch.testing.assert_close(views[:, first], views_of(x[:, [first] * 3], config)[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in POOL if name not in ("color", "contrast")])
def test_so_does_each_of_randaugments_operations(name):
    x = images(channels=4)
    config, draws = forced(x, POOL.index(name))
    views = batched.apply(x, config, draws)
    for first in range(4):
        assert torch.equal(views[:, first], batched.apply(x[:, [first] * 3], config, draws)[:, 0])


@pytest.mark.parametrize("channels", [1, 4])
def test_contrast_is_against_the_mean_of_all_channels_and_colour_is_left_out(channels):
    config, x = ViewConfig(jitter=1.0, contrast=0.5, saturation=0.5, hue=0.2, grey=1.0), images(channels=channels)
    factors = draws_for(config, x).factors[:, CONTRAST].tolist()
    expected = torch.stack([(f * one + (1 - f) * one.mean()).clamp(0, 1) for f, one in zip(factors, x / 255, strict=True)])
    torch.testing.assert_close(views_of(x, config), expected, rtol=1e-5, atol=1e-5)
    assert batched.left_out([config], channels) == ["grey", "saturation", "hue"] and batched.left_out([config], 3) == []
    whole = views_of(x, view("strong"))
    assert whole.shape == x.shape and whole.isfinite().all() and whole.min() >= 0 and whole.max() <= 1
