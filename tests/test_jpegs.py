"""JPEGs that the device decodes give the views that Pillow's give, and what it cannot decode is left to Pillow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bad_images import CONTENTS, jpeg, oriented, picture, save
from relssl.data import loader
from relssl.data.decode import BadImage, Opened
from relssl.data.images import Images
from relssl.data.loader import FromFiles, Plan, Unreadable
from relssl.data.named import load
from relssl.errors import ConfigError
from relssl.settings.run import Config, resolve

CPU = torch.device("cpu")
BROKEN = {"03_cut.jpg": lambda: jpeg()[:300], "07_text.jpg": lambda: b"no image", "08_damaged.jpg": CONTENTS["jpeg_cut_50"][2]}
OTHERS = {
    "00.png": lambda: save(picture(), "PNG"),
    "04_cmyk.jpg": lambda: jpeg(picture().convert("CMYK")),
    "05_colours.jpg": lambda: save(picture(), "JPEG", keep_rgb=True, quality=95),
    "10_pair.jpg": CONTENTS["jpeg_mpo"][2],
    "11_no_end.jpg": lambda: jpeg() + b"trailing",
}
FILES = {
    "01_grey.jpg": lambda: jpeg(picture().convert("L")),
    "02_large.jpg": lambda: jpeg(picture().resize((301, 203))),
    "06_progressive.jpg": lambda: jpeg(progressive=True, subsampling=2),
    "09_plain.jpg": jpeg,
} | {f"1{turn}_turned.jpg": (lambda turn=turn: oriented(turn)) for turn in range(2, 9)}  # type: ignore[misc]


def written(folder: Path, files: dict[str, Callable[[], bytes]]) -> Images:
    for name, make in files.items():
        (folder / name).write_bytes(make())
    return load(str(folder), None, "train")


def settings(decoder: str, strong: str = "contrastive", **loader: Any) -> Config:
    views = {"weak": {"name": "weak", "size": 32}, "strong": {"name": strong, "size": 24}, "mean": [0.5] * 3, "std": [0.25] * 3}
    return resolve({"data": "digits", "views": views, "loader": {"workers": 0, "decoder": decoder, **loader}})


def batches(images: Images, config: Config, plan: Plan, stop: int = 2) -> list[tuple[list[Tensor], list[tuple[str, str]]]]:
    stream = FromFiles(images, config, plan, CPU).stream(0, stop)
    return [([part.ids, part.weak, *part.strong], part.bad) for parts in stream for part in parts]


def levels(a: Tensor, b: Tensor) -> Tensor:
    """Mean difference of each image's views in grey levels of 255."""
    return (a - b).abs().mean(dim=(1, 2, 3)) * 0.25 * 255


@pytest.mark.parametrize("strong", ["contrastive", "digit-strong"])
def test_views_samples_and_faults_are_pillows(strong: str, tmp_path: Path) -> None:
    images = written(tmp_path, FILES | OTHERS | BROKEN)
    plan = Plan(len(images), len(images), seed=1)
    options = {"photometric": "device", "reduced_decode": False}
    expected = batches(images, settings("pillow", strong, **options), plan)
    made = batches(images, settings("torchvision", strong), plan)
    for (wanted, faults), (found, same) in zip(expected, made, strict=True):
        assert torch.equal(wanted[0], found[0])
        assert sorted(faults) == sorted(same) and {Path(name).name for name, _ in same} == set(BROKEN)
        for a, b in zip(wanted[1:], found[1:], strict=True):
            # One library decodes both here, so what differs is the rounding of crops and turns; nvJPEG's own adds a few levels.
            assert levels(a, b).mean() < 0.5 and levels(a, b).max() < 3
        whole = [row for row in range(len(images)) if Path(images.source.name(row)).name in OTHERS]
        by_pillow = torch.isin(found[0], torch.tensor(whole))
        assert by_pillow.sum() >= len(OTHERS)
        torch.testing.assert_close(found[1][by_pillow], wanted[1][by_pillow], atol=1e-5, rtol=0)


def test_workers_and_parts_change_nothing(tmp_path: Path) -> None:
    images = written(tmp_path, FILES | OTHERS | BROKEN)
    alone = batches(images, settings("torchvision"), Plan(len(images), 8), 4)
    helped = batches(images, settings("torchvision", workers=2), Plan(len(images), 8), 4)
    cut = batches(images, settings("torchvision"), Plan(len(images), 8, parts=2), 4)
    for step, ((wanted, faults), (found, same)) in enumerate(zip(alone, helped, strict=True)):
        assert all(map(torch.equal, wanted, found)) and faults == same
        for a, *b in zip(wanted, *(cut[2 * step + part][0] for part in range(2)), strict=True):
            torch.testing.assert_close(a, torch.cat(b), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [*FILES, *OTHERS, "08_damaged.jpg"])
def test_only_what_every_decoder_reads_alike_is_handed_on(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes((FILES | OTHERS | BROKEN)[name]())
    with Opened(str(path), 10**6) as opened:
        assert (opened.jpeg() == path.read_bytes()) if name in FILES else opened.jpeg() is None


def test_a_file_that_is_refused_is_read_by_pillow_or_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = written(tmp_path, {f"{i}.jpg": lambda i=i: jpeg(picture().resize((40 + i, 40))) for i in range(6)})  # type: ignore[misc]
    plan, config = Plan(6, 6), settings("pillow", photometric="device", reduced_decode=False)
    [(expected, _)] = batches(images, config, plan, 1)
    decode, calls = loader.Decoder._call, []

    def choosy(self: loader.Decoder, files: list[Tensor]) -> list[Tensor]:
        calls.append(len(files))
        found = decode(self, files)
        if any(image.shape[-1] in (42, 44) for image in found):
            raise RuntimeError("cannot")
        return [image[:, :-1] if image.shape[-1] == 43 else image for image in found]  # and one of another size than it says

    monkeypatch.setattr(loader.Decoder, "_call", choosy)
    [(found, bad)] = batches(images, settings("torchvision"), plan, 1)
    assert calls[:3] == [1, 6, 3] and max(calls[2:]) == 3 and 1 in calls[3:]  # the probe, all, then halves of halves
    assert torch.equal(expected[0], found[0]) and not bad
    assert all(levels(a, b).max() < 2 for a, b in zip(expected[1:], found[1:], strict=True))


def test_a_file_that_neither_reads_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, plan = written(tmp_path, {f"{i}.jpg": jpeg for i in range(6)}), Plan(6, 6)
    decode, rgb = loader.Decoder._call, Opened.rgb

    def broken(self: Opened, reduction: int = 1) -> Image.Image:
        if self._path.endswith("4.jpg"):
            raise BadImage("is broken inside")
        return rgb(self, reduction)

    def refused(self: loader.Decoder, files: list[Tensor]) -> list[Tensor]:
        if len(files) > 1 or len(files[0]) == len(content):
            raise RuntimeError("cannot")
        return decode(self, files)

    content = jpeg(picture().resize((50, 50)))
    (tmp_path / "4.jpg").write_bytes(content)
    monkeypatch.setattr(Opened, "rgb", broken)
    monkeypatch.setattr(loader.Decoder, "_call", refused)
    [(expected, faults)] = batches(images, settings("pillow", photometric="device", reduced_decode=False), plan, 1)
    [(found, bad)] = batches(images, settings("torchvision"), plan, 1)
    assert torch.equal(expected[0], found[0]) and sorted(found[0].tolist()) == [0, 1, 2, 3, 5, 5]
    assert bad == faults and [(Path(name).name, reason) for name, reason in bad] == [("4.jpg", "is broken inside")]
    assert all(levels(a, b).max() < 2 for a, b in zip(expected[1:], found[1:], strict=True))


def test_nothing_to_read_is_told_as_ever(tmp_path: Path) -> None:
    images = written(tmp_path, {f"{i}.jpg": lambda: b"\xff\xd8 no" for i in range(4)})
    with pytest.raises(Unreadable, match="16 images in a row cannot be read"):
        batches(images, settings("torchvision"), Plan(4, 4))


def test_large_pictures_are_decoded_a_few_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(loader._chunks(np.array([[1, 1]]))) == [range(1)]
    images = written(tmp_path, {f"{i}.jpg": jpeg for i in range(7)})
    whole = batches(images, settings("torchvision"), Plan(7, 7), 1)
    monkeypatch.setattr(loader, "_AT_ONCE", 2 * 48 * 32 + 1)
    assert list(loader._chunks(np.array([[48, 32]] * 7))) == [range(0, 2), range(2, 4), range(4, 6), range(6, 7)]
    assert list(loader._chunks(np.array([[999, 999], [1, 1], [999, 999]]))) == [range(0, 1), range(1, 2), range(2, 3)]
    for a, b in zip(whole[0][0], batches(images, settings("torchvision"), Plan(7, 7), 1)[0][0], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_device_that_cannot_decode_is_told_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise RuntimeError("not compiled with nvJPEG support\nmore")

    images = written(tmp_path, {"0.jpg": jpeg})
    monkeypatch.setattr("torchvision.io.decode_jpeg", missing)
    with pytest.raises(
        ConfigError, match=r"^loader.decoder: torchvision cannot decode JPEG on cpu \(not compiled .*\); use pillow$"
    ):
        FromFiles(images, settings("torchvision"), Plan(1, 1), CPU)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("Error while decoding JPEG images: CUDA out of memory. Tried to allocate 2 GiB"),  # as torchvision wraps it
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Error while decoding JPEG images: Failed to synchronize CUDA stream: 700"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_device_that_fails_is_no_refusal(error: RuntimeError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = written(tmp_path, {"0.jpg": jpeg})
    loader = FromFiles(images, settings("torchvision"), Plan(1, 1), CPU)

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr("torchvision.io.decode_jpeg", full)
    with pytest.raises(type(error), match=str(error)[:20]):
        next(loader.stream(0, 1))


def test_many_refusals_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = written(tmp_path, {f"{i}.jpg": jpeg for i in range(6)})
    loader = FromFiles(images, settings("torchvision"), Plan(6, 6), CPU)
    assert len(list(loader.stream(0, 3))) == 3 and loader.notice is None

    def refuse(*_: object) -> None:
        raise RuntimeError("cannot")

    monkeypatch.setattr("torchvision.io.decode_jpeg", refuse)
    list(loader.stream(0, 2))
    assert loader.notice is None  # 12 files might be odd ones
    list(loader.stream(0, 2))
    assert loader.notice is not None and loader.notice.startswith("18 of the first 36 JPEGs were refused by torchvision on cpu")


def test_workers_cannot_colour_what_they_do_not_see() -> None:
    with pytest.raises(ConfigError, match=r"^loader.photometric: must be auto or device with loader.decoder torchvision"):
        settings("torchvision", photometric="worker")
