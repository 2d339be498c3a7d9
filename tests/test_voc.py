"""VOC's lists as a matrix of targets, and what is wrong with a folder told in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from relssl.data.images import Images
from relssl.data.named import load
from relssl.errors import DataError

TRAINVAL = {"cat": [("000005", 1), ("000007", -1), ("000009", 0)], "potted_plant": [("000005", -1), ("000007", 1), ("000009", 1)]}
TEST = {"cat": [("000001", -1), ("000002", 1)], "potted_plant": [("000001", 0), ("000002", -1)]}


def write(folder: Path, part: str, lists: dict[str, list[tuple[str, int]]]) -> None:
    """A part of a VOC year as its archive holds it: signs right-aligned, images shared by the lists."""
    main = folder / "ImageSets/Main"
    for place in (main, folder / "JPEGImages", folder / "SegmentationClass"):
        place.mkdir(parents=True, exist_ok=True)
    for word, told in lists.items():
        (main / f"{word}_{part}.txt").write_text("".join(f"{image} {value:>2}\n" for image, value in told))
        for image, _ in told:
            (folder / f"JPEGImages/{image}.jpg").write_bytes(b"an image")
            (folder / f"SegmentationClass/{image}.png").write_bytes(b"no photograph")
    (main / f"{part}.txt").write_text("".join(f"{image}\n" for image, _ in next(iter(lists.values()))))


def names(found: Images) -> list[str]:
    assert found.labels is None
    return [Path(found.source.name(row)).name for row in range(len(found))]


@pytest.fixture
def year(tmp_path: Path) -> Path:
    folder = tmp_path / "VOCdevkit/VOC2007"
    write(folder, "trainval", TRAINVAL)
    write(folder, "test", TEST)
    write(folder, "train", {word: told[:1] for word, told in TRAINVAL.items()})
    write(folder, "val", {word: told[1:] for word, told in TRAINVAL.items()})
    return folder


@pytest.mark.parametrize("named", [True, False])
def test_targets_of_trainval_and_test(named: bool, year: Path, tmp_path: Path) -> None:
    data = "voc07" if named else str(year)
    train, bank, test = (load(data, str(tmp_path), split) for split in ("train", "bank", "test"))
    assert names(bank) == names(train) == ["000005.jpg", "000007.jpg", "000009.jpg"]
    assert bank.targets is not None and test.targets is not None and bank.targets.dtype == np.int8
    assert bank.targets.tolist() == [[1, 0], [0, 1], [-1, 1]]  # difficult: not told; absent: 0
    assert names(test) == ["000001.jpg", "000002.jpg"] and test.targets.tolist() == [[0, -1], [1, 0]]
    assert bank.classes == test.classes == ("cat", "potted_plant")
    assert bank.subset([2]).targets.tolist() == [[-1, 1]] and bank.name == ("voc07" if named else f"{year} (trainval)")


def test_a_year_without_told_test_labels_is_tested_on_val(tmp_path: Path) -> None:
    folder = tmp_path / "VOC2012"
    write(folder, "trainval", TRAINVAL)
    write(folder, "train", {word: told[:1] for word, told in TRAINVAL.items()})
    write(folder, "val", {word: told[1:] for word, told in TRAINVAL.items()})
    bank, test = load(str(folder), None, "bank"), load(str(folder), None, "test")
    assert (names(bank), names(test)) == (["000005.jpg"], ["000007.jpg", "000009.jpg"])
    assert bank.name.endswith("VOC2012 (train)") and test.name.endswith("VOC2012 (val)")


def test_only_trainval_has_a_bank_but_no_test(tmp_path: Path) -> None:
    write(tmp_path, "trainval", TRAINVAL)
    assert len(load(str(tmp_path), None, "bank")) == 3
    with pytest.raises(DataError, match=r"has no lists ImageSets/Main/CLASS_test.txt"):
        load(str(tmp_path), None, "test")


def test_boxes_without_lists_of_classes_stay_a_plain_folder(tmp_path: Path) -> None:
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\n")
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "JPEGImages/a.jpg").write_bytes(b"an image")
    found = load(str(tmp_path), None, "train")
    assert names(found) == ["a.jpg"] and found.targets is None


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("cat", "000005 1\n000007 2\n000009 0\n"),
        ("cat", "000005 1\n000005 1\n000009 0\n"),
        ("cat", "000005\n"),
        ("potted_plant", "000005 1\n000007 1\n"),
        ("potted_plant", "000007 1\n000005 1\n000009 1\n"),
        ("cat", ""),
    ],
)
def test_damaged_lists(file: str, text: str, year: Path, tmp_path: Path) -> None:
    (year / f"ImageSets/Main/{file}_trainval.txt").write_text(text)
    for data in ("voc07", str(year)):
        with pytest.raises(DataError, match=file) as caught:
            load(data, str(tmp_path), "bank")
        assert str(caught.value).isprintable()


def test_missing_images_are_refused(year: Path, tmp_path: Path) -> None:
    (year / "JPEGImages/000007.jpg").unlink()
    with pytest.raises(DataError, match=r"voc07: 1 of 3 images cannot be used, the first: 000007.jpg"):
        load("voc07", str(tmp_path), "bank")


def test_the_test_archive_is_fetched_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "VOCdevkit/VOC2007", "trainval", TRAINVAL)
    asked = []

    def unpack(url: str, root: str, **options: object) -> None:
        asked.append(url.rpartition("/")[2])
        write(tmp_path / "VOCdevkit/VOC2007", "test", TEST)

    monkeypatch.setattr(datasets.voc, "download_and_extract_archive", unpack)
    assert len(load("voc07", str(tmp_path), "bank")) == 3 and asked == []
    assert len(load("voc07", str(tmp_path), "test")) == 2 and asked == ["VOCtest_06-Nov-2007.tar"]
