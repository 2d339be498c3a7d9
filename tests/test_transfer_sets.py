"""The named sets of transfer: official lists in torchvision's layout, read in order, nothing missing and nothing decoded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from torchvision import datasets

from relssl.data.images import Images, Pixels
from relssl.data.named import load
from relssl.errors import DataError

Expected = dict[str, list[tuple[str, int]]]


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def images(root: Path, *names: str) -> None:
    """Bytes that are no image: a reader that decoded them would fail."""
    write(root, {name: f"image {name}" for name in names})


def food101(root: Path) -> Expected:
    train = {"soup": ["soup/7", "soup/2"], "apple_pie": ["apple_pie/1"]}
    test = {"apple_pie": ["apple_pie/4"], "soup": ["soup/3"]}
    write(root / "food-101/meta", {"train.json": json.dumps(train), "test.json": json.dumps(test)})
    images(root / "food-101/images", *(f"{n}.jpg" for n in ("soup/7", "soup/2", "apple_pie/1", "apple_pie/4", "soup/3")))
    return {
        "bank": [("images/soup/7.jpg", 1), ("images/soup/2.jpg", 1), ("images/apple_pie/1.jpg", 0)],
        "test": [("images/apple_pie/4.jpg", 0), ("images/soup/3.jpg", 1)],
    }


def flowers102(root: Path) -> Expected:
    base = root / "flowers-102"
    images(base / "jpg", *(f"image_{i:05}.jpg" for i in range(1, 7)))
    scipy.io.savemat(base / "imagelabels.mat", {"labels": np.array([[77, 1, 102, 5, 6, 2]], np.uint8)})
    scipy.io.savemat(base / "setid.mat", {"trnid": np.array([[6, 1]]), "valid": np.array([[3, 2]]), "tstid": np.array([[5, 4]])})
    return {
        "bank": [(f"jpg/image_{i:05}.jpg", label) for i, label in ((6, 1), (1, 76), (3, 101), (2, 0))],
        "test": [("jpg/image_00005.jpg", 5), ("jpg/image_00004.jpg", 4)],
    }


def oxford_pets(root: Path) -> Expected:
    base = root / "oxford-iiit-pet"
    lists = {"trainval": "great_pyrenees_9 2 2 1\nAbyssinian_100 1 1 1\n", "test": "Abyssinian_2 1 1 1\ngreat_pyrenees_1 2 2 1\n"}
    write(base / "annotations", {f"{part}.txt": text for part, text in lists.items()})
    images(base / "images", *(f"{n}.jpg" for n in ("great_pyrenees_9", "Abyssinian_100", "Abyssinian_2", "great_pyrenees_1")))
    return {
        "bank": [("images/great_pyrenees_9.jpg", 1), ("images/Abyssinian_100.jpg", 0)],
        "test": [("images/Abyssinian_2.jpg", 0), ("images/great_pyrenees_1.jpg", 1)],
    }


def fgvc_aircraft(root: Path) -> Expected:
    base = root / "fgvc-aircraft-2013b/data"
    lists = {"trainval": "0034309 Boeing 737-200\n0000001 A300B4\n", "test": "0000002 Boeing 737-200\n0000003 A300B4\n"}
    write(
        base, {f"images_variant_{part}.txt": text for part, text in lists.items()} | {"variants.txt": "A300B4\nBoeing 737-200\n"}
    )
    images(base / "images", *(f"{n}.jpg" for n in ("0034309", "0000001", "0000002", "0000003")))
    return {
        "bank": [("data/images/0034309.jpg", 1), ("data/images/0000001.jpg", 0)],
        "test": [("data/images/0000002.jpg", 1), ("data/images/0000003.jpg", 0)],
    }


def dtd(root: Path) -> Expected:
    base = root / "dtd/dtd"
    lists = {"train1": ("dotted/2", "banded/1"), "val1": ("banded/3", "dotted/4"), "test1": ("dotted/6", "banded/5")}
    write(base / "labels", {f"{part}.txt": "".join(f"{n}.jpg\n" for n in names) for part, names in lists.items()})
    images(base / "images", *(f"{n}.jpg" for names in lists.values() for n in names))
    label = {"banded": 0, "dotted": 1}
    bank, test = (*lists["train1"], *lists["val1"]), lists["test1"]
    return {part: [(f"dtd/images/{n}.jpg", label[n[:-2]]) for n in names] for part, names in (("bank", bank), ("test", test))}


def stanford_cars(root: Path) -> Expected:
    base = root / "stanford_cars"
    images(base, "cars_train/00001.jpg", "cars_train/00002.jpg", "cars_test/00001.jpg", "cars_test/00002.jpg")
    (base / "devkit").mkdir()
    names = np.array([["AM General Hummer", "Acura RL"]], object)
    scipy.io.savemat(base / "devkit/cars_meta.mat", {"class_names": names})
    for file, told in (("devkit/cars_train_annos.mat", (2, 1)), ("cars_test_annos_withlabels.mat", (1, 2))):
        rows = [(1, label, f"{i:05}.jpg") for i, label in enumerate(told, 1)]
        record = np.array([rows], [("bbox_x1", object), ("class", object), ("fname", object)])
        scipy.io.savemat(base / file, {"annotations": record})
    return {
        "bank": [("cars_train/00001.jpg", 1), ("cars_train/00002.jpg", 0)],
        "test": [("cars_test/00001.jpg", 0), ("cars_test/00002.jpg", 1)],
    }


SETS: dict[str, tuple[Callable[[Path], Expected], str, int]] = {
    "food101": (food101, "food-101", 2),
    "flowers102": (flowers102, "flowers-102", 102),
    "oxford-pets": (oxford_pets, "oxford-iiit-pet", 2),
    "fgvc-aircraft": (fgvc_aircraft, "fgvc-aircraft-2013b", 2),
    "dtd": (dtd, "dtd", 2),
    "stanford-cars": (stanford_cars, "stanford_cars", 2),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No download, and made-up files in place of those whose hashes are known."""

    def fail(*args: object, **options: object) -> None:
        raise OSError("no network here")

    for module in ("flowers102", "food101", "oxford_iiit_pet", "fgvc_aircraft", "dtd", "voc"):
        monkeypatch.setattr(getattr(datasets, module), "download_and_extract_archive", fail)
    monkeypatch.setattr(datasets.svhn, "download_url", fail)
    for known in (datasets.flowers102, datasets.svhn):
        monkeypatch.setattr(known, "check_integrity", lambda path, md5=None: Path(path).is_file())


def rows(found: Images, base: Path) -> list[tuple[str, int]]:
    assert found.labels is not None and found.labels.dtype == np.int64
    return [(str(Path(file).relative_to(base)), int(label)) for file, label in zip(found.source, found.labels, strict=True)]


@pytest.mark.parametrize("name", SETS)
def test_official_lists_in_their_order(name: str, tmp_path: Path) -> None:
    make, folder, classes = SETS[name]
    expected = make(tmp_path)
    train, bank, test = (load(name, str(tmp_path), split) for split in ("train", "bank", "test"))
    assert rows(bank, tmp_path / folder) == rows(train, tmp_path / folder) == expected["bank"]
    assert rows(test, tmp_path / folder) == expected["test"]
    assert bank.classes == test.classes and bank.classes is not None and len(bank.classes) == classes
    assert bank.fingerprint() == train.fingerprint() != test.fingerprint() and bank.bad == []


def test_class_names(tmp_path: Path) -> None:
    for make, _, _ in SETS.values():
        make(tmp_path)
    names = {name: load(name, str(tmp_path), "test").classes or () for name in SETS}
    assert names["food101"] == ("apple_pie", "soup") and names["dtd"] == ("banded", "dotted")
    assert names["oxford-pets"] == ("Abyssinian", "Great Pyrenees") and names["flowers102"][0] == "pink primrose"
    assert names["stanford-cars"] == ("AM General Hummer", "Acura RL") and names["fgvc-aircraft"] == ("A300B4", "Boeing 737-200")


def test_where_the_root_lies_does_not_change_the_fingerprint(tmp_path: Path) -> None:
    for place in ("a", "b/c"):
        food101(tmp_path / place)
    assert (
        load("food101", str(tmp_path / "a"), "bank").fingerprint() == load("food101", str(tmp_path / "b/c"), "bank").fingerprint()
    )


@pytest.mark.parametrize("name", [*SETS, "svhn", "voc07"])
def test_a_set_that_is_nowhere_is_one_clear_line(name: str, tmp_path: Path) -> None:
    for split in ("bank", "test"):
        with pytest.raises(DataError, match=f"{name}: not complete in .*cannot be downloaded.*put the files of http") as caught:
            load(name, str(tmp_path), split)
        assert str(caught.value).isprintable() and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("data", [None, b""])
def test_an_image_that_is_missing_is_refused(data: bytes | None, tmp_path: Path) -> None:
    food101(tmp_path)
    file = tmp_path / "food-101/images/soup/2.jpg"
    if data is None:
        file.unlink()
    else:
        file.write_bytes(data)
    with pytest.raises(DataError, match=r"food101: 1 of 3 images cannot be used, the first: images/soup/2.jpg .*unpack it anew"):
        load("food101", str(tmp_path), "bank")
    assert len(load("food101", str(tmp_path), "test")) == 2


def test_parts_with_other_classes_are_refused(tmp_path: Path) -> None:
    dtd(tmp_path)
    (tmp_path / "dtd/dtd/labels/val1.txt").write_text("banded/3.jpg\n")  # torchvision would now number banded anew
    with pytest.raises(DataError, match="dtd: its parts train and val have other classes"):
        load("dtd", str(tmp_path), "bank")


def test_damaged_lists_are_a_data_error(tmp_path: Path) -> None:
    food101(tmp_path)
    (tmp_path / "food-101/meta/train.json").write_text("{")
    stanford_cars(tmp_path)
    (tmp_path / "stanford_cars/devkit/cars_meta.mat").write_bytes(b"no matrix" * 40)
    for name in ("food101", "stanford-cars"):
        with pytest.raises(DataError, match=f"{name}: not complete"):
            load(name, str(tmp_path), "bank")


def test_svhn_lies_in_memory_with_zero_as_zero(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    for part, labels in (("train", [10, 1, 9, 2]), ("test", [3, 10, 4, 5])):
        scipy.io.savemat(tmp_path / f"{part}_32x32.mat", {"X": pixels, "y": np.array(labels, np.uint8)[:, None]})
    bank, test = (load("svhn", str(tmp_path), split) for split in ("bank", "test"))
    assert isinstance(bank.source, Pixels)
    np.testing.assert_array_equal(bank.source.tensor.numpy(), pixels.transpose(3, 2, 0, 1))
    assert bank.labels is not None and test.labels is not None and bank.labels.dtype == np.int64
    assert bank.labels.tolist() == [0, 1, 9, 2] and test.labels.tolist() == [3, 0, 4, 5] and bank.classes == tuple("0123456789")
