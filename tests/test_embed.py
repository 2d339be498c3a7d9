"""Embedding: what lands in the file is the network's own answer for each image, with its name, label and class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import relssl
from relssl.errors import ConfigError, DataError, StorageError
from small_runs import small_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    over = {"epochs": 1, "max_images": 96, "optimizer": {"warmup_epochs": 0}, "log": {"knn_every": 0}}
    return small_run(tmp_path_factory.mktemp("runs") / "whole", **over).folder


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_a_parquet_file_holds_what_the_network_says(network: str, finished: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    files = [tmp_path / "set" / name for name in ("train/cat/1.png", "train/dog/2.png", "val/dog/3.png", "val/cat/4.png")]
    for seed, file in enumerate(files):
        picture(file, seed)
    (tmp_path / "set/val/dog/5.png").write_bytes(b"no image")
    out = tmp_path / "v.parquet"
    told = relssl.embed(finished, str(tmp_path / "set"), out, split="test", network=network, device="cpu")
    assert (told["images"], told["dim"], [Path(name).name for name, _ in told["bad"]]) == (2, 16, ["5.png"])
    backbone = relssl.load_backbone(finished, network)
    with torch.no_grad():
        expected = torch.cat([backbone(backbone.transform(Image.open(file))[None]) for file in (files[3], files[2])])
    read = parquet.read_table(out)
    assert read["name"].to_pylist() == [str(files[3]), str(files[2])]
    assert (read["label"].to_pylist(), read["class"].to_pylist()) == ([0, 1], ["cat", "dog"])
    np.testing.assert_allclose(np.array(read["features"].to_pylist(), np.float32), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_images_of_which_none_can_be_read_are_named(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in ("1.png", "2.png"):
        (tmp_path / "set" / name).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"set: none of its 2 images can be read, the first is .*1.png: is none of JPEG"):
        relssl.embed(finished, str(tmp_path / "set"), tmp_path / "v.npz", device="cpu")
    assert not (tmp_path / "v.npz").exists()


def test_several_labels_an_image_are_left_out(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "voc/ImageSets/Main").mkdir(parents=True)
    for word in ("cat", "dog"):
        (tmp_path / f"voc/ImageSets/Main/{word}_trainval.txt").write_text("1  1\n2 -1\n")
    for seed in (1, 2):
        picture(tmp_path / f"voc/JPEGImages/{seed}.jpg", seed)
    relssl.embed(finished, str(tmp_path / "voc"), tmp_path / "v.npz", device="cpu")
    with np.load(tmp_path / "v.npz", allow_pickle=False) as read:
        assert sorted(read.files) == ["features", "ids", "names"] and read["features"].shape == (2, 16)


def test_pixels_are_named_by_their_place(finished: Path, tmp_path: Path) -> None:
    relssl.embed(finished, "digits", tmp_path / "v.npz", split="test", device="cpu")
    with np.load(tmp_path / "v.npz", allow_pickle=False) as read:
        assert read["names"][[0, -1]].tolist() == ["digits/test/000000", "digits/test/001439"]
        assert read["classes"].tolist() == list("0123456789") and read["labels"].shape == (1440,)


def test_a_target_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot write vectors as '\.feather'"):
        relssl.embed(tmp_path / "no-run", "no-data", tmp_path / "v.feather")
    with pytest.raises(StorageError, match="its folder does not exist"):
        relssl.embed(tmp_path / "no-run", "no-data", tmp_path / "gone/v.npz")
