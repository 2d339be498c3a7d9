"""DATA as a name, a folder or a list: the right images, in their official order, and a clear word when something is missing."""

import hashlib
import json
import os
import pickle
import shutil
import struct
import unicodedata
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.io
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

from relssl.data import digits, named
from relssl.data.images import IMAGENET_MEAN, IMAGENET_STD, Files, Images, Pixels
from relssl.data.named import SETS, SPLITS, at_hand, load, sample
from relssl.data.subsets import from_index, stratified
from relssl.errors import ConfigError, DataError

Rows = list[tuple[str, int]]


def plant(root: Path, *names: str, data: bytes | str = b"an image, never decoded") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def names(images: Images, root: Path) -> list[str]:
    assert not images.in_memory
    return [os.path.relpath(file, root) for file in images.source]


def splits(data: str, root: Path | None) -> list[Images]:
    return [load(data, root and str(root), split) for split in ("train", "bank", "test")]


def random_bytes(*shape: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(0)).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No download, and small files in place of those whose hashes torchvision knows."""

    def fail(*args: object, **options: object) -> None:
        raise URLError("no network here")

    for module in ("cifar", "stl10", "mnist", "flowers102", "food101", "oxford_iiit_pet", "fgvc_aircraft", "dtd", "voc", "utils"):
        monkeypatch.setattr(getattr(datasets, module), "download_and_extract_archive", fail)
    monkeypatch.setattr(datasets.svhn, "download_url", fail)
    for module in ("cifar", "stl10", "flowers102", "svhn"):
        monkeypatch.setattr(getattr(datasets, module), "check_integrity", lambda path, md5=None: os.path.isfile(path))


# Folders and lists


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    plant(tmp_path, "train/cat/1.jpg", "train/cat/sub/2.jpg", "train/dog/3.jpg", "val/ant/4.jpg", "val/dog/5.jpg", "other/6.jpg")
    return tmp_path


def test_a_flat_folder_has_no_labels_and_no_test_part(tmp_path):
    plant(tmp_path, "b.jpg", "a/c.jpg", "train/d.jpg")
    plant(tmp_path, "empty.jpg", data=b"")
    for split in ("train", "bank"):
        images = load(str(tmp_path), None, split)
        assert names(images, tmp_path) == ["a/c.jpg", "b.jpg", "train/d.jpg"]
        assert images.labels is None and images.classes is None
        assert (images.mean, images.std) == (IMAGENET_MEAN, IMAGENET_STD)
        assert images.bad == [(str(tmp_path / "empty.jpg"), "is empty")]
    with pytest.raises(DataError, match="has no test images"):
        load(str(tmp_path), None, "test")
    with pytest.raises(ConfigError, match=r"split: .*test"):
        load("digits", None, "tset")


def test_a_split_folder_is_labelled_by_its_class_folders(classes):
    train, bank, test = splits(str(classes), None)
    assert names(train, classes) == names(bank, classes) == ["train/cat/1.jpg", "train/cat/sub/2.jpg", "train/dog/3.jpg"]
    assert train.labels.tolist() == bank.labels.tolist() == [0, 0, 1]
    assert names(test, classes) == ["val/ant/4.jpg", "val/dog/5.jpg"]
    assert test.labels.tolist() == [2, 1] and test.classes == train.classes == ("cat", "dog", "ant")
    plant(classes, "one/train/images/1.jpg", "one/test/images/2.jpg")  # one folder is not a class
    assert load(str(classes / "one"), None, "test").labels is None
    plant(classes, "train/stray.jpg")
    stray = load(str(classes), None, "bank")
    assert stray.labels.tolist() == [0, 0, 1, -1] and any("1 images" in note for note in stray.notes)


@pytest.mark.parametrize("train, test", [("train", "valid"), ("Train", "Test"), ("training", "validation"), ("TRAIN", "val")])
def test_a_folder_is_split_by_any_usual_name_and_what_is_not_used_is_said(train, test, tmp_path):
    plant(tmp_path, f"{train}/a/1.jpg", f"{train}/b/2.jpg", f"{test}/a/3.jpg")
    images = load(str(tmp_path), None, "train")
    assert names(images, tmp_path) == [f"{train}/a/1.jpg", f"{train}/b/2.jpg"]
    assert images.notes == (f"only {train}/ is used; {test}/ is its test part",)
    assert names(load(str(tmp_path), None, "test"), tmp_path) == [f"{test}/a/3.jpg"]
    assert load(str(tmp_path), None, "bank").notes == load(str(tmp_path), None, "test").notes == ()  # as an evaluation expects
    plant(tmp_path, "more/4.jpg", "5.jpg", "labels/6.txt")
    for split in SPLITS:
        assert load(str(tmp_path), None, split).notes[-1].endswith(f"which is {test}/: more/, images beside these folders (1)")
    plant(tmp_path / "outer", f"inner/{train}/a.jpg", f"inner/{test}/b.jpg")
    (note,) = load(str(tmp_path / "outer"), None, "train").notes
    assert f"inner/{test}/" in note


def test_files_of_other_kinds_are_counted_where_they_are_pictures_or_many(tmp_path):
    plant(tmp_path, "1.jpg", "2.jpg", "read.me", "._1.txt")
    assert load(str(tmp_path), None, "train").notes == ()
    plant(tmp_path, "3.HEIC")
    assert "1 .heic" in load(str(tmp_path), None, "train").notes[0]
    (tmp_path / "3.HEIC").rename(tmp_path / "._3.jpg")
    assert "1 ._*" in load(str(tmp_path), None, "train").notes[0]
    (tmp_path / "._3.jpg").unlink()
    plant(tmp_path, "4.xyz", "5.xyz", "6")
    assert all(part in load(str(tmp_path), None, "train").notes[0] for part in ("2 .xyz", "1 .me", "1 without ending"))


def test_classes_that_differ_in_their_unicode_form_alone_are_one(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Käfer") for form in ("NFC", "NFD"))
    plant(
        tmp_path,
        f"train/{composed}/1.jpg",
        "train/b/2.jpg",
        f"val/{decomposed}/3.jpg",
        "val/b/4.jpg",
        "val/b/x/5.jpg",
        "val/b/y/6.jpg",
    )
    bank, test = (load(str(tmp_path), None, split) for split in ("bank", "test"))
    assert bank.classes == test.classes == tuple(sorted(["b", composed]))
    assert [bank.classes[label] for label in bank.labels] == [composed, "b"] and sorted(test.labels) == [0, 1, 1, 1]
    assert "b (of x, y)" in test.notes[0] and bank.notes == ()  # classes are not looked for further below


def test_a_sample_downloads_nothing_and_reads_no_folder_to_its_end(classes):
    assert len(sample(str(classes), None, 2)) == 2 and len(sample("digits", None, 2)) == 5748
    assert sample("imagenet", str(classes), 2) is None and sample("gone/", None, 2) is None
    for name in ("cifar10", "svhn", "food101", "tiny-imagenet", "voc07"):
        assert not at_hand(name, str(classes)) and sample(name, str(classes), 2) is None


# Images


def test_a_subset_keeps_everything_in_step_and_fingerprints_follow_the_content(classes, tmp_path_factory):
    images = load(str(classes), None, "train")
    part = images.subset(np.array([2, 0]))
    assert names(part, classes) == ["train/dog/3.jpg", "train/cat/1.jpg"] and part.labels.tolist() == [1, 0] and len(part) == 2
    assert part.fingerprint() != images.fingerprint() == images.subset(range(3)).fingerprint()
    copy = tmp_path_factory.mktemp("copy")
    plant(copy, "cat/1.jpg", "cat/sub/2.jpg", "dog/3.jpg")
    assert load(str(copy), None, "train").fingerprint() == images.fingerprint()
    plant(copy, "dog/3.jpg", data=b"another size")
    assert load(str(copy), None, "train").fingerprint() != images.fingerprint()
    pixels = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2)
    held = Images("held", Pixels(pixels), np.array([7, 8]))
    assert torch.equal(held.subset([1]).source.tensor, pixels[1:]) and held.subset([1]).labels.tolist() == [8]
    assert held.fingerprint() == Images("other", Pixels(pixels.clone())).fingerprint()
    others = [Images("held", Pixels(each)) for each in (pixels + 1, pixels.reshape(2, 3, 1, 4))]
    assert len({each.fingerprint() for each in (held, *others)}) == 3


def test_pixels_and_files_are_read_alike(tmp_path):
    pixels = torch.from_numpy(random_bytes(2, 3, 5, 7))
    for row in range(2):
        Image.fromarray(pixels[row].permute(1, 2, 0).numpy()).save(tmp_path / f"{row}.png")
    for images in (Images("held", Pixels(pixels)), load(str(tmp_path), None, "train")):
        for row in range(2):
            assert torch.equal(torch.from_numpy(np.array(images.read(row, 10**6))).permute(2, 0, 1), pixels[row])
            with images.source.open(row, 10**6) as opened:
                assert opened.size == (5, 7)


# Sets in memory


def test_digits():
    train, bank, test = splits("digits", None)
    assert (len(train), len(bank), len(test)) == (5748, 5748, 1440) and train.source.tensor.shape[1:] == (3, 32, 32)
    assert train.fingerprint() == bank.fingerprint() != test.fingerprint()
    assert train.labels.dtype == np.int64 and train.classes == tuple("0123456789")
    assert (train.mean, train.std, train.bad) == (digits.MEAN, digits.STD, [])


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(name, tmp_path):
    reader, images = getattr(datasets, name.upper()), random_bytes(4, 3, 32, 32)
    folder, key = SETS[name].folder, "labels" if name == "cifar10" else "fine_labels"
    content = pickle.dumps({"data": images.reshape(4, -1), key: [3, 1, 2, 0]})
    plant(tmp_path, *(f"{folder}/{file}" for file, _ in [*reader.train_list, *reader.test_list]), data=content)
    plant(tmp_path, f"{folder}/{reader.meta['filename']}", data=pickle.dumps({reader.meta["key"]: ["a", "b", "c", "d"]}))
    train, bank, test = splits(name, tmp_path)
    assert len(test) == 4 and len(train) == 4 * len(reader.train_list) and train.fingerprint() == bank.fingerprint()
    np.testing.assert_array_equal(test.source.tensor.numpy(), images)
    assert test.labels.tolist() == [3, 1, 2, 0] and test.classes == ("a", "b", "c", "d") and train.mean == SETS[name].mean


def test_stl10_trains_on_its_labelled_and_unlabelled_images(tmp_path):
    upright = random_bytes(3, 3, 96, 96)
    stored = upright.transpose(0, 1, 3, 2).tobytes()
    for part, count in (("train", 2), ("test", 1), ("unlabeled", 3)):
        plant(tmp_path, f"stl10_binary/{part}_X.bin", data=stored[: count * 27648])
        plant(tmp_path, f"stl10_binary/{part}_y.bin", data=bytes(range(1, count + 1)))
    plant(tmp_path, "stl10_binary/class_names.txt", data="airplane\nbird\ncar")
    train, bank, test = splits("stl10", tmp_path)
    np.testing.assert_array_equal(train.source.tensor.numpy(), upright[[0, 1, 0, 1, 2]])
    assert train.labels.tolist() == [0, 1, -1, -1, -1] and bank.labels.tolist() == [0, 1] and test.labels.tolist() == [0]
    assert bank.classes == ("airplane", "bird", "car")


def test_fashion_mnist_becomes_three_equal_channels(tmp_path):
    images = random_bytes(3, 28, 28)
    for part in ("train", "t10k"):
        raw = tmp_path / "FashionMNIST" / "raw"
        plant(raw, f"{part}-images-idx3-ubyte", data=struct.pack(">IIII", 0x803, 3, 28, 28) + images.tobytes())
        plant(raw, f"{part}-labels-idx1-ubyte", data=struct.pack(">II", 0x801, 3) + bytes([9, 0, 4]))
    test = load("fashion-mnist", str(tmp_path), "test")
    np.testing.assert_array_equal(test.source.tensor.numpy(), np.stack([images] * 3, 1))
    assert test.labels.tolist() == [9, 0, 4] and len(test.classes) == 10


def test_svhn_has_zero_as_zero(tmp_path):
    pixels = random_bytes(32, 32, 3, 4)
    for part, labels in (("train", [10, 1, 9, 2]), ("test", [3, 10, 4, 5])):
        scipy.io.savemat(tmp_path / f"{part}_32x32.mat", {"X": pixels, "y": np.array(labels, np.uint8)[:, None]})
    _, bank, test = splits("svhn", tmp_path)
    np.testing.assert_array_equal(bank.source.tensor.numpy(), pixels.transpose(3, 2, 0, 1))
    assert bank.labels.tolist() == [0, 1, 9, 2] and test.labels.tolist() == [3, 0, 4, 5] and bank.classes == tuple("0123456789")


# Sets of files: each writes a small one in torchvision's layout below a root, and returns the rows of bank and test


def food101(root: Path) -> dict[str, Rows]:
    train = {"soup": ["soup/7", "soup/2"], "apple_pie": ["apple_pie/1"]}
    test = {"apple_pie": ["apple_pie/4"], "soup": ["soup/3"]}
    for part, lists in (("train", train), ("test", test)):
        plant(root, f"food-101/meta/{part}.json", data=json.dumps(lists))
        plant(root, *(f"food-101/images/{name}.jpg" for each in lists.values() for name in each))
    bank = [("images/soup/7.jpg", 1), ("images/soup/2.jpg", 1), ("images/apple_pie/1.jpg", 0)]
    return {"bank": bank, "test": [("images/apple_pie/4.jpg", 0), ("images/soup/3.jpg", 1)]}


def flowers102(root: Path) -> dict[str, Rows]:
    base = root / "flowers-102"
    plant(base, *(f"jpg/image_{i:05}.jpg" for i in range(1, 7)))
    scipy.io.savemat(base / "imagelabels.mat", {"labels": np.array([[77, 1, 102, 5, 6, 2]], np.uint8)})
    scipy.io.savemat(base / "setid.mat", {"trnid": np.array([[6, 1]]), "valid": np.array([[3, 2]]), "tstid": np.array([[5, 4]])})
    bank = [(f"jpg/image_{i:05}.jpg", label) for i, label in ((6, 1), (1, 76), (3, 101), (2, 0))]
    return {"bank": bank, "test": [("jpg/image_00005.jpg", 5), ("jpg/image_00004.jpg", 4)]}


def oxford_pets(root: Path) -> dict[str, Rows]:
    lists = {"trainval": "great_pyrenees_9 2 2 1\nAbyssinian_100 1 1 1\n", "test": "Abyssinian_2 1 1 1\ngreat_pyrenees_1 2 2 1\n"}
    for part, text in lists.items():
        plant(root, f"oxford-iiit-pet/annotations/{part}.txt", data=text)
        plant(root, *(f"oxford-iiit-pet/images/{line.split()[0]}.jpg" for line in text.splitlines()))
    bank = [("images/great_pyrenees_9.jpg", 1), ("images/Abyssinian_100.jpg", 0)]
    return {"bank": bank, "test": [("images/Abyssinian_2.jpg", 0), ("images/great_pyrenees_1.jpg", 1)]}


def fgvc_aircraft(root: Path) -> dict[str, Rows]:
    base = root / "fgvc-aircraft-2013b/data"
    lists = {"trainval": "0034309 Boeing 737-200\n0000001 A300B4\n", "test": "0000002 Boeing 737-200\n0000003 A300B4\n"}
    for part, text in lists.items():
        plant(base, f"images_variant_{part}.txt", data=text)
        plant(base, *(f"images/{line.split()[0]}.jpg" for line in text.splitlines()))
    plant(base, "variants.txt", data="A300B4\nBoeing 737-200\n")
    bank = [("data/images/0034309.jpg", 1), ("data/images/0000001.jpg", 0)]
    return {"bank": bank, "test": [("data/images/0000002.jpg", 1), ("data/images/0000003.jpg", 0)]}


def dtd(root: Path) -> dict[str, Rows]:
    lists = {"train1": ("dotted/2", "banded/1"), "val1": ("banded/3", "dotted/4"), "test1": ("dotted/6", "banded/5")}
    for part, each in lists.items():
        plant(root, f"dtd/dtd/labels/{part}.txt", data="".join(f"{name}.jpg\n" for name in each))
        plant(root, *(f"dtd/dtd/images/{name}.jpg" for name in each))
    parts = {"bank": (*lists["train1"], *lists["val1"]), "test": lists["test1"]}
    return {part: [(f"dtd/images/{name}.jpg", int(name[0] == "d")) for name in each] for part, each in parts.items()}


def stanford_cars(root: Path) -> dict[str, Rows]:
    base = root / "stanford_cars"
    plant(base, "cars_train/00001.jpg", "cars_train/00002.jpg", "cars_test/00001.jpg", "cars_test/00002.jpg")
    (base / "devkit").mkdir()
    scipy.io.savemat(base / "devkit/cars_meta.mat", {"class_names": np.array([["AM General Hummer", "Acura RL"]], object)})
    for file, labels in (("devkit/cars_train_annos.mat", (2, 1)), ("cars_test_annos_withlabels.mat", (1, 2))):
        rows = [(1, label, f"{i:05}.jpg") for i, label in enumerate(labels, 1)]
        record = np.array([rows], [("bbox_x1", object), ("class", object), ("fname", object)])
        scipy.io.savemat(base / file, {"annotations": record})
    bank = [("cars_train/00001.jpg", 1), ("cars_train/00002.jpg", 0)]
    return {"bank": bank, "test": [("cars_test/00001.jpg", 0), ("cars_test/00002.jpg", 1)]}


def tiny_imagenet(root: Path) -> dict[str, Rows]:
    base = root / "tiny-imagenet-200"
    plant(base, "wnids.txt", data="n02\nn01\n")
    for word in ("n01", "n02"):
        plant(base, *(f"train/{word}/images/{word}_{i}.JPEG" for i in range(2)))
        plant(base, f"train/{word}/{word}_boxes.txt", data="".join(f"{word}_{i}.JPEG\t0\t0\t63\t63\n" for i in (0, 1)))
    plant(base, *(f"val/images/val_{i}.JPEG" for i in range(2)), "test/images/test_0.JPEG")
    plant(base, "val/val_annotations.txt", data="val_0.JPEG\tn02\t0\t0\t63\t63\nval_1.JPEG\tn01\t0\t0\t63\t63\n")
    bank = [(f"train/{word}/images/{word}_{i}.JPEG", label) for label, word in enumerate(("n01", "n02")) for i in (0, 1)]
    return {"bank": bank, "test": [("val/images/val_0.JPEG", 1), ("val/images/val_1.JPEG", 0)]}


FILES: dict[str, tuple[Callable[[Path], dict[str, Rows]], tuple[str, ...]]] = {
    "food101": (food101, ("apple_pie", "soup")),
    "flowers102": (flowers102, ("pink primrose",)),  # and 101 more
    "oxford-pets": (oxford_pets, ("Abyssinian", "Great Pyrenees")),
    "fgvc-aircraft": (fgvc_aircraft, ("A300B4", "Boeing 737-200")),
    "dtd": (dtd, ("banded", "dotted")),
    "stanford-cars": (stanford_cars, ("AM General Hummer", "Acura RL")),
    "tiny-imagenet": (tiny_imagenet, ("n01", "n02")),
}


@pytest.mark.parametrize("name", FILES)
def test_official_lists_in_their_order(name: str, tmp_path: Path) -> None:
    write, words = FILES[name]
    expected, folder = write(tmp_path), tmp_path / SETS[name].folder
    train, bank, test = splits(name, tmp_path)
    for images, part in ((train, "bank"), (bank, "bank"), (test, "test")):
        assert images.labels is not None and images.labels.dtype == np.int64 and images.bad == []
        assert list(zip(names(images, folder), images.labels.tolist(), strict=True)) == expected[part]
        assert images.classes is not None and images.classes[: len(words)] == words and images.mean == SETS[name].mean
        assert len(images.classes) == (102 if name == "flowers102" else len(words))
    assert bank.fingerprint() == train.fingerprint() != test.fingerprint()
    write(tmp_path / "elsewhere")
    assert load(name, str(tmp_path / "elsewhere"), "bank").fingerprint() == bank.fingerprint()
    (folder / expected["bank"][1][0]).write_bytes(b"")  # an image that is missing is refused, on the side that misses it
    with pytest.raises(
        DataError, match=f"{name}: lists {len(bank)} images; files that cannot be used: 1, the first {expected['bank'][1][0]}"
    ):
        load(name, str(tmp_path), "bank")
    assert len(load(name, str(tmp_path), "test")) == len(test)


@pytest.mark.parametrize("name", [name for name in SETS if name != "digits"])
def test_a_set_that_is_nowhere_or_damaged_is_one_line_that_says_where_it_belongs(name: str, tmp_path: Path) -> None:
    if name in FILES:
        FILES[name][0](tmp_path)
        for file in tmp_path.rglob("*"):
            if file.is_file() and file.suffix in (".json", ".mat", ".txt"):
                file.write_bytes(b"{")
    for split in ("bank", "test"):
        with pytest.raises(DataError, match=f"{name}|tiny-imagenet-200") as caught:
            load(name, str(tmp_path), split)
        assert str(caught.value).isprintable() and str(tmp_path) in str(caught.value)


def test_parts_with_other_classes_are_refused(tmp_path: Path) -> None:
    dtd(tmp_path)
    (tmp_path / "dtd/dtd/labels/val1.txt").write_text("banded/3.jpg\n")  # torchvision would now number banded anew
    with pytest.raises(DataError, match="dtd: its parts train and val have other classes"):
        load("dtd", str(tmp_path), "bank")


def test_tiny_imagenet_is_downloaded_whole_and_checked(tmp_path, monkeypatch):
    downloads = []

    def unpack(url: str, root: str, md5: str) -> None:
        downloads.append((url, md5))
        tiny_imagenet(Path(root))

    monkeypatch.setattr(datasets.utils, "download_and_extract_archive", unpack)
    assert [len(images) for images in splits("tiny-imagenet", tmp_path)] == [4, 4, 2]
    assert downloads == [(SETS["tiny-imagenet"].source, "90528d7ca1a48142e341f4ef8d21d0de")]
    plant(tmp_path, "tiny-imagenet-200/val/val_annotations.txt", data="val_0.JPEG\tn03\t0\t0\t63\t63\n")
    with pytest.raises(DataError, match=r"n03 is none of the classes of wnids\.txt"):
        load("tiny-imagenet", str(tmp_path), "test")


def test_imagenet_is_a_split_folder_and_imagenet100_some_of_its_classes(tmp_path):
    chosen = named.IMAGENET100
    assert len(set(chosen)) == 100 and chosen[0] == "n01558993" and "n02869837" in chosen
    folders = ["n00000001", *chosen[:50], "n01600000", *chosen[50:], "n99999999"]
    plant(tmp_path, *(f"imagenet/train/{word}/{i}.jpg" for word in folders for i in range(2)))
    plant(tmp_path, *(f"imagenet/val/{word}/v.jpg" for word in folders))
    whole = load("imagenet", str(tmp_path), "test")
    assert whole.name == "imagenet" and whole.classes == tuple(sorted(folders)) and whole.labels.tolist() == list(range(103))
    train, _, test = splits("imagenet100", tmp_path)
    assert train.labels.tolist() == [label for label in range(100) for _ in range(2)] and train.classes == test.classes == chosen
    assert names(test, tmp_path) == [f"imagenet/val/{word}/v.jpg" for word in chosen] and test.labels.tolist() == list(range(100))
    shutil.rmtree(tmp_path / "imagenet/train" / chosen[7])
    with pytest.raises(DataError, match=f"no image of {chosen[7]}; 1 of the 100 classes"):
        load("imagenet100", str(tmp_path), "train")


# PASCAL VOC

TRAINVAL = {"cat": [("000005", 1), ("000007", -1), ("000009", 0)], "potted_plant": [("000005", -1), ("000007", 1), ("000009", 1)]}
TEST = {"cat": [("000001", -1), ("000002", 1)], "potted_plant": [("000001", 0), ("000002", -1)]}


def write_voc(folder: Path, part: str, lists: dict[str, Rows]) -> None:
    """A part of a VOC year as its archive holds it: signs right-aligned, images shared by the lists."""
    for word, rows in lists.items():
        plant(folder, f"ImageSets/Main/{word}_{part}.txt", data="".join(f"{image} {sign:>2}\n" for image, sign in rows))
        plant(
            folder,
            *(f"{place}.{end}" for image, _ in rows for place, end in ((f"JPEGImages/{image}", "jpg"), (f"S/{image}", "png"))),
        )
        plant(folder, f"ImageSets/Main/{part}.txt", data="".join(f"{image}\n" for image, _ in rows))


@pytest.fixture
def year(tmp_path: Path) -> Path:
    folder = tmp_path / "VOCdevkit/VOC2007"
    write_voc(folder, "trainval", TRAINVAL)
    write_voc(folder, "train", {word: rows[:1] for word, rows in TRAINVAL.items()})
    write_voc(folder, "val", {word: rows[1:] for word, rows in TRAINVAL.items()})
    return folder


@pytest.mark.parametrize("by_name", [True, False])
def test_voc_targets_of_trainval_and_test(by_name: bool, year: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = []

    def unpack(url: str, root: str, **options: object) -> None:
        downloads.append(url.rpartition("/")[2])
        write_voc(year, "test", TEST)

    monkeypatch.setattr(datasets.voc, "download_and_extract_archive", unpack)
    if not by_name:
        write_voc(year, "test", TEST)
    train, bank, test = splits("voc07" if by_name else str(year), tmp_path)
    assert downloads == (["VOCtest_06-Nov-2007.tar"] if by_name else [])  # by itself: the other archive is there
    images = year / "JPEGImages"
    assert names(bank, images) == names(train, images) == ["000005.jpg", "000007.jpg", "000009.jpg"] and bank.labels is None
    assert bank.targets.dtype == np.int8 and bank.targets.tolist() == [[1, 0], [0, 1], [-1, 1]]  # difficult: unknown; absent: 0
    assert names(test, images) == ["000001.jpg", "000002.jpg"] and test.targets.tolist() == [[0, -1], [1, 0]]
    assert bank.classes == test.classes == ("cat", "potted_plant") and bank.subset([2]).targets.tolist() == [[-1, 1]]
    assert bank.name == ("voc07" if by_name else f"{year} (trainval)")


def test_a_voc_year_without_test_labels_is_tested_on_val(year: Path, tmp_path: Path) -> None:
    _, bank, test = splits(str(year), None)
    assert (names(bank, year), names(test, year)) == (
        ["JPEGImages/000005.jpg"],
        ["JPEGImages/000007.jpg", "JPEGImages/000009.jpg"],
    )
    assert bank.name.endswith("VOC2007 (train)") and test.name.endswith("VOC2007 (val)")
    write_voc(tmp_path / "bank", "trainval", TRAINVAL)  # a bank, but no test images
    assert len(load(str(tmp_path / "bank"), None, "bank")) == 3
    with pytest.raises(DataError, match=r"CLASS_test\.txt"):
        load(str(tmp_path / "bank"), None, "test")
    plant(tmp_path, "plain/ImageSets/Main/train.txt", "plain/JPEGImages/a.jpg")  # no lists of classes: a plain folder
    assert load(str(tmp_path / "plain"), None, "train").targets is None


@pytest.mark.parametrize(
    ("file", "text"),
    [
        *(("cat", "000005 1\n000007 2\n000009 0\n"), ("cat", "000005 1\n000005 1\n000009 0\n"), ("cat", "000005\n"), ("cat", "")),
        *(("potted_plant", "000005 1\n000007 1\n"), ("potted_plant", "000007 1\n000005 1\n000009 1\n")),
    ],
)
def test_damaged_voc_lists_are_refused(file: str, text: str, year: Path, tmp_path: Path) -> None:
    write_voc(year, "test", TEST)
    (year / f"ImageSets/Main/{file}_trainval.txt").write_text(text)
    for data in ("voc07", str(year)):
        with pytest.raises(DataError, match=file) as caught:
            load(data, str(tmp_path), "bank")
        assert str(caught.value).isprintable()


# The built-in digits: fixed for ever, fairly split

# A change of these numbers is a change of every run on the digits: raise a version, do not adjust them.
PINNED = {"train": "8cf0ca09d37184d1", "test": "3153215e007136d8"}


@pytest.fixture(scope="module")
def sides():
    return {split: digits.load(split) for split in ("train", "test")}


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_drawings_never_change(split, sides):
    pixels, labels = sides[split]
    assert hashlib.sha256(pixels.tobytes() + labels.astype("<i8").tobytes()).hexdigest()[:16] == PINNED[split]


def test_no_original_is_on_both_sides():
    labels = load_digits().target
    train, test = digits.split_originals(labels)
    assert (len(train), len(test)) == (1437, 360)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(1797))
    assert np.abs(np.bincount(labels[test]) - np.bincount(labels) / 5).max() <= 1


def test_the_statistics_are_those_of_the_training_drawings(sides):
    scaled = sides["train"][0][:, 0] / 255
    assert abs(scaled.mean() - digits.MEAN[0]) < 1e-4 and abs(scaled.std() - digits.STD[0]) < 1e-4
    assert len(set(digits.MEAN)) == len(set(digits.STD)) == 1


def test_an_upright_drawing_of_twice_the_size_equals_torch_bilinear_interpolation():
    original = load_digits().images[:1]
    size, angle, centre = np.array([16.0]), np.array([0.0]), np.array([[16.0], [16.0]])
    drawing = digits.sample(original.astype(np.int32), *digits.positions(size, angle, centre))
    wanted = F.interpolate(F.pad(torch.from_numpy(original * 255 / 16), (4, 4, 4, 4))[None], scale_factor=2, mode="bilinear")
    np.testing.assert_allclose(drawing, wanted[0].numpy(), atol=1)


# Which images are labelled: the same share of every class, by the seed alone, or those that a file names


LABELS = st.lists(st.integers(-1, 5), max_size=300).map(lambda labels: np.array(labels, np.int64))


@given(labels=LABELS, share=st.floats(0, 0.5, exclude_min=True), seed=st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_each_class_gives_its_share_and_a_smaller_subset_lies_in_a_larger(labels: np.ndarray, share: float, seed: int) -> None:
    rows = stratified(labels, share, seed)
    assert (np.diff(rows) > 0).all() and not (labels[rows] < 0).any()
    for word in set(labels[labels >= 0].tolist()):
        assert (labels[rows] == word).sum() == max(1, round(share * int((labels == word).sum())))
    assert set(rows.tolist()) <= set(stratified(labels, 2 * share, seed).tolist())
    assert np.array_equal(rows, stratified(labels, share, seed))


NAMES = [b"train/dog/n1_10.JPEG", b"train/dog/n1_11.JPEG", b"train/cat/n2_10.JPEG", b"train/cat/same.png", b"train/dog/same.png"]
PETS = Images("pets", Files.of("/data", [(name, 1) for name in NAMES]), np.array([0, 0, 1, 1, 0]))


def write(folder: Path, *lines: str) -> str:
    (folder / "index.txt").write_text("\n".join(lines))
    return str(folder / "index.txt")


def test_an_index_names_images_by_base_name_path_or_position(tmp_path: Path) -> None:
    assert from_index(write(tmp_path, "n2_10.JPEG", "", "dog/same.png\r", "0"), PETS).tolist() == [0, 2, 4]
    assert from_index(write(tmp_path, "/data/train/cat/same.png"), PETS).tolist() == [3]
    assert from_index(write(tmp_path, "7", "3", "0"), load("digits", None, "test")).tolist() == [0, 3, 7]


@pytest.mark.parametrize(
    ("lines", "first"),
    [
        (["n1_10.JPEG", "n9.JPEG", "10.JPEG"], "n9.JPEG names none of the 5 images of pets"),
        (["5", "99999999999999999999"], "5 names none of"),
        (["same.png"], "same.png names several of"),
        (["n1_10.JPEG", "n1_11.JPEG", "dog/n1_10.JPEG", "1"], "dog/n1_10.JPEG names again one of"),
        (["", " "], "names no image"),
    ],
)
def test_a_wrong_index_is_refused_by_its_first_wrong_line(lines: list[str], first: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"index.txt: {first}"):
        from_index(write(tmp_path, *lines), PETS)


def test_an_index_that_is_no_file_or_names_images_in_memory_is_refused(tmp_path: Path) -> None:
    digits = load("digits", None, "test")
    for path in (str(tmp_path / "none.txt"), str(tmp_path), write(tmp_path, "n1.JPEG")):
        with pytest.raises(DataError):
            from_index(path, digits)
