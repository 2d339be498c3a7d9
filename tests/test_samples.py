"""Samples as loader workers make them: one decode for all views, as small as they allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from relssl.data.decode import Opened
from relssl.data.images import Images
from relssl.data.loader import Views
from relssl.data.named import load
from relssl.settings.run import Config, resolve


def textured(height: int, width: int, seed: int) -> Image.Image:
    """Noise in octaves, finer ones fainter, as in photographs: the amplitude falls with the frequency."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for octave in range(2, 9):
        noise = rng.normal(size=(2**octave, 2**octave, 3)) * 2.0**-octave
        channels = [Image.fromarray(noise[..., c].astype(np.float32)).resize((width, height)) for c in range(3)]
        total += np.stack([np.asarray(channel) for channel in channels], -1)
    return Image.fromarray(((total - total.min()) / np.ptp(total) * 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large, small and turned JPEGs, and one PNG."""
    path = tmp_path_factory.mktemp("photos")
    for number, (height, width) in enumerate([(300, 420), (303, 421), (30, 41)]):
        textured(height, width, number).save(path / f"{number}.jpg", quality=90)
    for turn in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        textured(304, 416, turn).save(path / f"turned{turn}.jpg", quality=90, exif=exif)
    textured(300, 420, 9).save(path / "whole.png")
    return path


def settings(**overrides: Any) -> Config:
    views = {"weak": {"name": "weak", "size": 32}, "strong": {"name": "contrastive", "size": 32}}
    return resolve({"data": "digits", "views": views} | overrides)


def samples(images: Images, config: Config) -> list[np.ndarray]:
    """[views, 3, S, S] of each image in two epochs."""
    views = Views(images, config, photometric=True)
    found = [views[epoch, row] for epoch in range(2) for row in range(len(images))]
    return [np.stack([view.numpy().astype(int) for view in sample.views]) for sample in found]


def test_views_of_reduced_images_differ_by_what_decoders_round(folder: Path) -> None:
    images = load(str(folder), None, "train")
    whole = samples(images, settings(**{"loader.reduced_decode": False}))
    reduced = samples(images, settings())
    differences = np.array([np.abs(a - b).mean() for a, b in zip(whole, reduced, strict=True)])
    for number, difference in enumerate(differences):
        name = Path(images.source.name(number % len(images))).name
        # Too small a picture, or one that is no JPEG, is decoded whole.
        assert (difference == 0) == (name in ("2.jpg", "whole.png")), name
    assert differences.mean() < 1 and differences.max() < 3


def test_it_is_decoded_once_and_as_small_as_its_largest_view_allows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, images = [], load(str(folder), None, "train")
    rgb = Opened.rgb
    monkeypatch.setattr(Opened, "rgb", lambda self, reduction=1: asked.append(reduction) or rgb(self, reduction))
    whole = {"name": "weak", "size": 32, "scale": [1.0, 1.0], "ratio": [1.0, 1.0]}
    for crops in ([[32, 1.0, 1.0], [16, 1.0, 1.0]], [[150, 1.0, 1.0], [16, 1.0, 1.0]], [[151, 1.0, 1.0]]):
        config = settings(**{"views.weak": whole, "views.strong": whole, "views.crops": crops})
        assert len(Views(images, config, photometric=True)[0, 0].views) == 1 + len(crops)
    assert asked == [8, 2, 1]


def test_torch_scales_crops_as_pillow_does(folder: Path) -> None:
    images, whole = load(str(folder), None, "train"), {"loader.reduced_decode": False}
    pillow = samples(images, settings(**whole, **{"loader.resize": "pillow"}))
    torch = samples(images, settings(**whole))
    assert any((a != b).any() for a, b in zip(pillow, torch, strict=True))
    assert all(np.abs(a[0] - b[0]).max() <= 1 for a, b in zip(pillow, torch, strict=True))
    assert all(np.abs(a[1] - b[1]).mean() < 0.5 for a, b in zip(pillow, torch, strict=True))
