"""Images of 1 to 16 channels: views against torchvision's and Pillow's operations, and a run from start to export."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor

import relssl
from relssl.data import batched, ops
from relssl.data.draws import CONTRAST, POOL, draw
from relssl.data.plain import PlainView
from relssl.errors import ConfigError
from relssl.settings.run import VIEWS, ViewConfig
from small_runs import SMALL, equal_runs

ROWS = np.arange(40)


def images(channels: int, count: int = 40, side: int = 24) -> Tensor:
    return torch.from_numpy(np.random.default_rng(channels).integers(0, 256, (count, channels, side, side), np.uint8))


def view(**changes: Any) -> ViewConfig:
    return ViewConfig(**{"size": 24, **changes})


def made(pixels: Tensor, config: ViewConfig) -> Tensor:
    return batched.apply(pixels, config, draw(config, 0, 0, ROWS, 0, (24, 24)))


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
@pytest.mark.parametrize(
    "config",
    [
        view(size=16, scale=(0.2, 1.0), flip=0.5),
        view(affine=1.0, degrees=30, translate=0.1, zoom=(0.8, 1.2), flip=0.5),
        view(blur=0.7),
        view(solarize=0.5),
        view(jitter=1.0, brightness=0.4),
    ],
)
def test_each_channel_goes_through_an_operation_as_a_colour_does(channels: int, config: ViewConfig) -> None:
    """The three-channel path equals torchvision's (test_batched_views); here any channels equal it three at a time."""
    pixels = images(channels)
    for first in range(channels):
        three = pixels[:, [first] * 3]
        torch.testing.assert_close(made(pixels, config)[:, first], made(three, config)[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 4])
def test_contrast_is_against_the_mean_of_all_channels_and_colour_is_left_out(channels: int) -> None:
    config, pixels = view(jitter=1.0, contrast=0.5, saturation=0.5, hue=0.2, grey=1.0), images(channels)
    factors = draw(config, 0, 0, ROWS, 0, (24, 24)).factors[:, CONTRAST]
    x = pixels.double() / 255
    expected = torch.stack([(f * one + (1 - f) * one.mean()).clamp(0, 1) for f, one in zip(factors.tolist(), x, strict=True)])
    torch.testing.assert_close(made(pixels, config).double(), expected, rtol=1e-5, atol=1e-5)
    if channels == 1:
        theirs = [F.adjust_contrast(one, f) for f, one in zip(factors.tolist(), x, strict=True)]
        torch.testing.assert_close(torch.stack(theirs), expected)
    assert batched.left_out([config], channels) == ["grey", "saturation", "hue"] and batched.left_out([config], 3) == []


@pytest.mark.parametrize("name", [name for name in POOL if name not in ("color", "contrast")])
def test_randaugment_treats_each_channel_alike(name: str) -> None:
    pixels = images(4, 9).float()
    levels = np.arange(1, 10)
    if name == "identity":
        return
    many = ops._apply(name, levels, pixels.clone(), np.arange(9))
    for channel in range(4):
        three = ops._apply(name, levels, pixels[:, [channel] * 3].clone(), np.arange(9))
        assert torch.equal(many[:, channel], three[:, 0])


def test_a_whole_recipe_runs_on_any_channels() -> None:
    config = view(**{**VIEWS["strong"], "size": 24})
    for channels in (1, 2, 16):
        x = made(images(channels), config)
        assert x.shape == (40, channels, 24, 24) and x.isfinite().all() and x.min() >= 0 and x.max() <= 1


def test_grey_images_are_seen_in_colour_by_networks_of_three_channels() -> None:
    pixels = images(1).float() / 255
    seen = batched.normalise(pixels, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    torch.testing.assert_close(seen, batched.normalise(pixels.expand(-1, 3, -1, -1), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))


RUN: dict[str, Any] = {
    **{key: value for key, value in SMALL.items() if key not in ("data", "max_images")},
    "recipe": "cifar10",
    "epochs": 1,
    "log": {"every": 1, "knn_every": 1, "to": [], "report": False},
    "quiet": True,
}


def sides(channels: int, sixteen: bool = False) -> dict[str, Any]:
    def side(count: int, seed: int) -> tuple[Any, list[int]]:
        pixels = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, channels), np.uint8)
        return (pixels.astype(np.uint16) * 257 if sixteen else pixels), [row % 2 for row in range(count)]

    return {"train": side(64, 0), "test": side(8, 1)}


@pytest.mark.parametrize(("channels", "format"), [(1, "safetensors"), (4, "onnx"), (13, "safetensors")])
def test_other_channels_from_training_to_an_exported_file(tmp_path: Path, channels: int, format: str) -> None:
    data = sides(channels)
    run = relssl.pretrain(data, out=str(tmp_path / "run"), **RUN)
    assert "knn_top1" in run.rows[-1]
    backbone = relssl.load_backbone(run.folder)
    one = data["test"][0][0]
    assert backbone(backbone.transform(one)[None]).shape == (1, backbone.num_features)
    assert backbone.transform.channels == channels
    relssl.export(run.folder, format=format, out=tmp_path / f"x.{format}")
    measured = relssl.evaluate(run.folder, data, protocol="knn", knn={"k": [3]}, device="cpu", cache=False)
    assert measured["results"][0]["figures"]
    relssl.embed(run.folder, data, tmp_path / "x.npz")
    assert np.load(tmp_path / "x.npz")["features"].shape == (64, backbone.num_features)
    if channels > 3:
        with pytest.raises(ConfigError, match=r"^views.channels"):
            relssl.embed(run.folder, "digits", tmp_path / "y.npz")


def test_16_bits_train_as_the_8_bits_that_they_become(tmp_path: Path) -> None:
    for name, sixteen in (("a", False), ("b", True)):
        relssl.pretrain(sides(4, sixteen), out=str(tmp_path / name), **RUN)
    assert equal_runs(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(("over", "setting"), [({"channels": 3}, "views.channels"), ({"mean": [0.5] * 3}, "views.mean")])
def test_channels_that_do_not_fit_are_refused(tmp_path: Path, over: dict[str, Any], setting: str) -> None:
    with pytest.raises(ConfigError, match=f"^{setting}"):
        relssl.pretrain(sides(4), out=str(tmp_path / "run"), **RUN, views=over)


def test_the_card_and_the_plain_view_name_the_channels() -> None:
    plain = PlainView(8, 1.0, "bilinear", (0.5,) * 4, (0.5,) * 4)
    assert "4 channels" in str(plain) and plain(np.zeros((9, 9, 4), np.uint8)).shape == (4, 8, 8)
