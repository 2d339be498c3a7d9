"""Views of one PIL image: torchvision's own on files, and the same view as the batched path makes of the same pixels."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as F

from relssl.data import batched, single
from relssl.data.draws import Draws, draw
from relssl.settings.run import VIEWS, ViewConfig


def view(name: str = "weak", **changes: object) -> ViewConfig:
    return ViewConfig(**{"name": name, **VIEWS[name], **changes})


def photos(height: int, width: int, batch: int = 12) -> Tensor:
    """Smooth random colours with a little noise: what 8-bit operations are made for."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    noise = torch.randn(batch, 3, height, width, generator=generator) * 0.03
    return ((smooth * 0.9 + 0.05 + noise).clamp(0, 1) * 255).round().to(torch.uint8)


def both(config: ViewConfig, x: Tensor) -> tuple[Tensor, Tensor, Draws]:
    """The single and the batched views of x in levels 0..255."""
    draws = draw(config, 0, 0, np.arange(len(x)), 1, tuple(x.shape[-2:]))
    ones = torch.stack([single.apply(F.to_pil_image(image), config, draws, row) for row, image in enumerate(x)])
    return ones.float(), batched.apply(x, config, draws) * 255, draws


# Mean difference in levels of 255 that 8 bits explain. Each of Pillow's operations truncates or rounds anew; its hue has 256
# steps, and its blur is three box blurs, a few levels off a Gaussian at most.
CLOSE = {
    "crop": (view(flip=0.5), 0.5),
    "whole": (ViewConfig(size=24, flip=0.5), 0.5),
    "affine": (view(affine=1.0, degrees=20.0, translate=0.1, zoom=(0.7, 1.3)), 0.7),
    "brightness": (ViewConfig(jitter=1.0, brightness=0.4), 1.0),
    "contrast": (ViewConfig(jitter=1.0, contrast=0.4), 1.0),
    "saturation": (ViewConfig(jitter=1.0, saturation=0.4), 1.0),
    "hue": (ViewConfig(jitter=1.0, hue=0.1), 2.0),
    "grey": (ViewConfig(grey=1.0), 0.5),
    "blur": (ViewConfig(blur=1.0), 1.0),
    "solarize": (ViewConfig(solarize=0.5), 0.5),
    "byol-second": (view("byol-second"), 2.0),
    "weak": (view("weak"), 0.5),
    "contrastive": (view("contrastive"), 2.0),
    "digit-weak": (view("digit-weak"), 0.7),
    "digit-strong": (view("digit-strong"), 1.5),
}


@pytest.mark.parametrize("source", [(32, 32), (50, 37)])
@pytest.mark.parametrize("name", CLOSE)
def test_both_paths_make_the_same_view(name, source):
    config, tolerance = CLOSE[name]
    ones, many, _ = both(config, photos(*source))
    assert (ones - many).abs().mean() < tolerance


def test_randaugment_of_both_paths():
    # Posterize and solarize turn a level's difference into a large one, so most pixels agree rather than all.
    ones, many, _ = both(view("strong", jitter=0.0, grey=0.0, blur=0.0), photos(40, 40, batch=24))
    assert ((ones - many).abs() <= 4).float().mean() > 0.9


def test_it_is_torchvisions_view():
    config, image = view("weak"), F.to_pil_image(photos(60, 45, batch=1)[0])
    draws = draw(config, 0, 0, np.arange(20), 0, (60, 45))
    for row, (top, left, height, width) in enumerate(draws.crop.tolist()):
        expected = F.resized_crop(image, top, left, height, width, [32, 32], transforms.InterpolationMode.BILINEAR)
        expected = F.hflip(expected) if draws.flip[row] else expected
        assert torch.equal(single.apply(image, config, draws, row), F.pil_to_tensor(expected))


def test_each_of_the_jitters_orders_is_torchvisions():
    config = ViewConfig(jitter=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    image = F.to_pil_image(photos(32, 32, batch=1)[0])
    draws = draw(config, 0, 0, np.arange(30), 1, (32, 32))
    operations = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for row in range(30):
        expected: Image.Image = image
        factors = [*draws.factors[row].tolist(), float(draws.hue[row])]
        for op in draws.order[row]:
            expected = operations[op](expected, factors[op])
        assert torch.equal(single.apply(image, config, draws, row), F.pil_to_tensor(expected))


def test_solarize_is_torchvisions():
    image = F.to_pil_image(photos(32, 32, batch=1)[0])
    made = single.apply(image, ViewConfig(solarize=1.0), draw(ViewConfig(solarize=1.0), 0, 0, np.arange(1), 1, (32, 32)), 0)
    assert torch.equal(made, F.pil_to_tensor(F.solarize(image, 128)))


def test_an_untouched_image_keeps_its_bytes():
    x = photos(32, 32)
    ones, many, _ = both(ViewConfig(), x)
    assert torch.equal(ones, x.float())
    torch.testing.assert_close(many, x.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [16, 96])
def test_the_result_is_small_and_owns_its_memory(size):
    config, image = view("strong", size=size), F.to_pil_image(photos(37, 51, batch=1)[0])
    before = image.tobytes()
    made = single.apply(image, config, draw(config, 0, 0, np.arange(1), 1, (37, 51)), 0)
    assert made.dtype == torch.uint8 and made.shape == (3, size, size)
    made.zero_()
    assert image.tobytes() == before


def test_affine_pads_with_black_as_the_batched_path_does():
    config = ViewConfig(affine=1.0, degrees=45.0, translate=0.3, zoom=(0.5, 0.9))
    ones, many, _ = both(config, torch.full((12, 3, 32, 32), 255, dtype=torch.uint8))
    assert (ones - many).abs().max() <= 2 and (ones == 0).any()


def test_the_reduction_leaves_every_view_its_resolution():
    small, large = ViewConfig(size=16, scale=(0.3, 0.3), ratio=(1, 1)), ViewConfig(size=64, scale=(1.0, 1.0), ratio=(1, 1))

    def views(side: int) -> list[tuple[ViewConfig, Draws]]:
        return [(view, draw(view, 0, 0, np.arange(1), 0, (side, side))) for view in (small, large)]

    assert [single.largest_reduction((1, 2, 4, 8), views(side)) for side in (20, 127, 128, 255, 256, 5000)] == [1, 1, 2, 2, 4, 8]
    assert single.largest_reduction((1, 2), views(5000)) == 2
    assert single.largest_reduction((1,), views(5000)) == 1


@pytest.mark.parametrize("reduction", [2, 4])
def test_a_reduced_image_gives_the_view_of_the_whole_one(reduction):
    image = F.to_pil_image(photos(401, 603, batch=1)[0])
    reduced, config = image.reduce(reduction), view("weak")
    draws = draw(config, 0, 0, np.arange(20), 0, (401, 603))
    for row in range(20):
        whole, part = (
            single.apply(*of).float() for of in ((image, config, draws, row), (reduced, config, draws, row, reduction))
        )
        assert (whole - part).abs().mean() < 1 and (whole - part).abs().max() < 16


@pytest.mark.parametrize("source", [(32, 32), (50, 37), (301, 403), (9, 11)])
@pytest.mark.parametrize("config", [view("weak"), ViewConfig(size=32, flip=0.5), view("weak", affine=0.5, degrees=20.0)])
def test_crops_of_pixels_are_those_of_pictures(config, source):
    pixels = photos(*source, batch=1)[0]
    image, before = F.to_pil_image(pixels), pixels.clone()
    draws = draw(config, 0, 0, np.arange(30), 0, source)
    for row in range(30):
        one, other = single.apply(image, config, draws, row).int(), single.apply(pixels, config, draws, row).int()
        # A rotation spreads a level's difference, no more.
        assert (one - other).abs().max() <= 1 + draws.affine[row] and (one - other).abs().float().mean() < 0.5
        single.geometric(pixels, config, draws, row).zero_()
    assert torch.equal(pixels, before)


def test_whole_views_of_pixels_are_those_of_pictures():
    config, pixels = view("contrastive"), photos(60, 45, batch=1)[0]
    draws = draw(config, 0, 0, np.arange(30), 1, (60, 45))
    image = F.to_pil_image(pixels)
    made = [torch.stack([single.apply(of, config, draws, row) for row in range(30)]).float() for of in (image, pixels)]
    assert (made[0] - made[1]).abs().mean() < 0.2
