"""Runs on images of 1 to 16 channels, from training to an exported file; their views stand in test_batched_views."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import relssl
from relssl.errors import ConfigError
from small_runs import SMALL, equal_runs

RUN: dict[str, Any] = {
    **{key: value for key, value in SMALL.items() if key not in ("data", "max_images")},
    "recipe": "cifar10",
    "epochs": 1,
    "log": {"every": 1, "knn_every": 1, "to": [], "report": False},
    "quiet": True,
}


def sides(channels: int, scale: int = 1) -> dict[str, Any]:
    """Noise of 8 bits, or of 16 for a scale of 257, with labels."""
    data = {}
    for seed, (side, count) in enumerate({"train": 64, "test": 8}.items()):
        pixels = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, channels), np.uint8)
        data[side] = (pixels if scale == 1 else pixels.astype(np.uint16) * scale), [row % 2 for row in range(count)]
    return data


@pytest.mark.parametrize(("channels", "format"), [(1, "safetensors"), (4, "onnx")])
def test_other_channels_from_training_to_an_exported_file(tmp_path: Path, channels: int, format: str) -> None:
    data = sides(channels)
    run = relssl.pretrain(data, out=str(tmp_path / "run"), **RUN)
    assert "knn_top1" in run.rows[-1]
    backbone = relssl.load_backbone(run.folder)
    assert backbone(backbone.transform(data["test"][0][0])[None]).shape == (1, backbone.num_features)
    assert backbone.transform.channels == channels and (channels == 1 or "4 channels" in str(backbone.transform))
    relssl.export(run.folder, format=format, out=tmp_path / f"x.{format}")
    measured = relssl.evaluate(run.folder, data, protocol="knn", knn={"k": [3]}, device="cpu", cache=False)
    assert measured["results"][0]["figures"]
    relssl.embed(run.folder, data, tmp_path / "x.npz")
    assert np.load(tmp_path / "x.npz")["features"].shape == (64, backbone.num_features)
    if channels > 3:
        with pytest.raises(ConfigError, match=r"^views.channels"):
            relssl.embed(run.folder, "digits", tmp_path / "y.npz")
        # 16 bits train as the 8 bits that they become.
        relssl.pretrain(sides(channels, 257), out=str(tmp_path / "again"), **RUN)
        assert equal_runs(run.folder, tmp_path / "again")


def test_weights_and_teachers_of_other_channels(tmp_path: Path) -> None:
    short = RUN | {"max_steps": 2, "log": {"knn_every": 0, "to": [], "report": False}}
    of_five, colour = (relssl.pretrain(sides(count), out=tmp_path / str(count), **short).folder for count in (5, 3))
    less = {name: value for name, value in short.items() if name not in ("backbone", "backbone_args", "encoder")}
    # Grey images are colour to a network of three channels.
    for data, given in ((5, {"start": str(of_five), "teacher": str(of_five)}), (1, {"start": str(colour)})):
        assert relssl.pretrain(sides(data), out=tmp_path / f"on{data}", **given, **less).rows[-1]["step"] == 2
    with pytest.raises(ConfigError, match=r"^teacher: 3 sees 3 channels, the student 5"):
        relssl.pretrain(sides(5), out=tmp_path / "no", teacher=str(colour), **less)
    with pytest.raises(ConfigError, match=r"^views.channels: the network sees 3, the images .* have 5"):
        relssl.pretrain(sides(5), out=tmp_path / "no", start=str(colour), **less)


@pytest.mark.parametrize(("over", "setting"), [({"channels": 3}, "views.channels"), ({"mean": [0.5] * 3}, "views.mean")])
def test_channels_that_do_not_fit_are_refused(tmp_path: Path, over: dict[str, Any], setting: str) -> None:
    with pytest.raises(ConfigError, match=f"^{setting}"):
        relssl.pretrain(sides(4), out=str(tmp_path / "run"), **RUN, views=over)
