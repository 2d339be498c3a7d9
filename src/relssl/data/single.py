"""A view of one PIL image, for images decoded from files in workers: torchvision's and Pillow's own operations on 8-bit pixels.

The same `Draws` through `batched.apply` give the same view up to 8-bit rounding, Pillow's coarser hue (256 steps) and its
Gaussian blur, which is three box blurs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torchvision.transforms.functional as F
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode

from relssl.data import ops
from relssl.data.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, Draws, Floats, Ints
from relssl.settings.run import ViewConfig


def apply(image: Image.Image | Tensor, view: ViewConfig, draws: Draws, row: int, reduction: int = 1) -> Tensor:
    """Apply row `row` of `draws`, drawn for `view` and this image's size.

    Args:
        image: RGB, any size, or its pixels, uint8 [3,H,W]: these torch crops, faster than Pillow and to one level the same.
        view: the view's settings; S is its size.
        draws: its parameters.
        row: which of them.
        reduction: how many of the pixels that `draws` were drawn for one of the image's stands for, a side; 1 for a tensor.

    Returns:
        uint8 [3,S,S], so that it travels small and is normalised in batches on the device.
    """
    moved = _geometric(image, view, draws, row, reduction)
    coloured = draws.jitter[row] or draws.grey[row] or draws.sigma[row] > 0 or draws.solarize[row]
    untouched = not (coloured or draws.ops_applied[row].any())
    return _pixels(moved if untouched else _photometric(_picture(moved), view, draws, row))


def geometric(image: Image.Image | Tensor, view: ViewConfig, draws: Draws, row: int, reduction: int = 1) -> Tensor:
    """`apply` without what `batched.photometric` does to the result: crop, affine and flip alone; uint8 [3,S,S]."""
    return _pixels(_geometric(image, view, draws, row, reduction))


def largest_reduction(reductions: Iterable[int], views: Sequence[tuple[ViewConfig, Draws]]) -> int:
    """The largest of `reductions` at which no view's crop has fewer pixels than the view; 1 if there is none.

    Args:
        reductions: what the image's sides may be divided by.
        views: the views of one image with their draws, of one row each.
    """
    spare = min(draws.crop[0, 2:].min() / view.size for view, draws in views)
    return max((reduction for reduction in reductions if reduction <= spare), default=1)


def _geometric(image: Image.Image | Tensor, view: ViewConfig, draws: Draws, row: int, reduction: int) -> Image.Image | Tensor:
    moved: Image.Image | Tensor
    if isinstance(image, Tensor):
        moved = _crop_pixels(image, view, draws.crop[row])
    else:
        moved = _crop(image, view, draws.crop[row] / reduction)
    if draws.affine[row]:
        moved = _affine(_picture(moved), draws, row)
    if draws.flip[row]:
        moved = F.hflip(moved)
    return moved


def _photometric(image: Image.Image, view: ViewConfig, draws: Draws, row: int) -> Image.Image:
    if draws.jitter[row]:
        image = _jitter(image, view, draws, row)
    if draws.grey[row]:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if draws.sigma[row] > 0:
        image = image.filter(ImageFilter.GaussianBlur(radius=float(draws.sigma[row])))
    if draws.solarize[row]:
        image = F.solarize(image, 128)
    for op, applied, level in zip(draws.ops[row], draws.ops_applied[row], draws.levels[row], strict=True):
        if applied:
            image = ops.apply_pil(image, int(op), int(level))
    return image


def _pixels(image: Image.Image | Tensor) -> Tensor:
    pixels: Tensor = image if isinstance(image, Tensor) else F.pil_to_tensor(image)
    assert pixels.dtype == torch.uint8
    return pixels


def _picture(image: Image.Image | Tensor) -> Image.Image:
    picture: Image.Image = F.to_pil_image(image) if isinstance(image, Tensor) else image
    return picture


def _crop_pixels(pixels: Tensor, view: ViewConfig, box: Ints) -> Tensor:
    """The view [3,S,S] of a box (top, left, height, width) of uint8 [3,H,W]."""
    top, left, height, width = box.tolist()
    part = pixels[None, :, top : top + height, left : left + width]
    return interpolate(part, (view.size, view.size), mode="bilinear", antialias=True)[0]


def _crop(image: Image.Image, view: ViewConfig, box: Floats) -> Image.Image:
    """The view of a box (top, left, height, width), in pixels and parts of them. Cut out first, as torchvision does: a resize
    alone would look past the box."""
    top, left, bottom, right = *box[:2], *(box[:2] + box[2:])
    x, y = math.floor(left), math.floor(top)
    part = image.crop((x, y, math.ceil(right), math.ceil(bottom)))
    inside = (left - x, top - y, right - x, bottom - y)
    return part.resize((view.size, view.size), Image.Resampling.BILINEAR, inside)


def _affine(image: Image.Image, draws: Draws, row: int) -> Image.Image:
    """Rotate, shift and zoom about the centre over black. The ring of black makes Pillow blend the image's edge into black, as
    tensors do; without it Pillow repeats the edge for half a pixel and then stops."""
    ringed = F.pad(image, [1])
    shift = draws.shift[row].tolist()
    zoom, angle = float(draws.zoom[row]), float(draws.angle[row])
    moved: Image.Image = F.affine(ringed, angle, shift, zoom, [0.0, 0.0], InterpolationMode.BILINEAR)
    return moved.crop((1, 1, 1 + image.width, 1 + image.height))


def _jitter(image: Image.Image, view: ViewConfig, draws: Draws, row: int) -> Image.Image:
    brightness, contrast, saturation = draws.factors[row].tolist()
    for op in draws.order[row]:
        if op == BRIGHTNESS and view.brightness:
            image = F.adjust_brightness(image, brightness)
        elif op == CONTRAST and view.contrast:
            image = F.adjust_contrast(image, contrast)
        elif op == SATURATION and view.saturation:
            image = F.adjust_saturation(image, saturation)
        elif op == HUE and view.hue:
            image = F.adjust_hue(image, float(draws.hue[row]))
    return image
