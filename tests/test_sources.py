"""DATA as a name, a folder or a list: the right images, labels only for reporting, and a clear word when something is missing."""

import os
import pickle
import shutil
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision import datasets

from bad_images import jpeg
from relssl.data import digits, named
from relssl.data.images import IMAGENET_MEAN, IMAGENET_STD, Images, Pixels
from relssl.data.named import load
from relssl.errors import ConfigError, DataError


def plant(root: Path, *names: str, data: bytes | None = None) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg() if data is None else data)


def names(images: Images, root: Path) -> list[str]:
    assert not images.in_memory
    return [os.path.relpath(images.source.name(row), root) for row in range(len(images))]


def random_bytes(*shape: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(0)).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def classes(tmp_path):
    plant(tmp_path, "train/cat/1.jpg", "train/cat/sub/2.jpg", "train/dog/3.jpg", "val/ant/4.jpg", "val/dog/5.jpg", "other/6.jpg")
    return tmp_path


def test_digits():
    train, bank, test = (load("digits", None, split) for split in ("train", "bank", "test"))
    assert (len(train), len(bank), len(test)) == (5748, 5748, 1440)
    assert train.in_memory and train.source.tensor.shape[1:] == (3, 32, 32)
    assert train.fingerprint() == bank.fingerprint() != test.fingerprint()
    assert train.labels.dtype == np.int64 and train.classes == tuple("0123456789")
    assert (train.mean, train.std, train.bad) == (digits.MEAN, digits.STD, [])


def test_a_flat_folder_has_no_labels_and_no_test_part(tmp_path):
    plant(tmp_path, "b.jpg", "a/c.jpg", "train/d.jpg")
    plant(tmp_path, "empty.jpg", data=b"")
    for split in ("train", "bank"):
        images = load(str(tmp_path), None, split)
        assert names(images, tmp_path) == ["a/c.jpg", "b.jpg", "train/d.jpg"]
        assert images.labels is None and images.classes is None
        assert (images.mean, images.std) == (IMAGENET_MEAN, IMAGENET_STD)
        assert images.bad == [(str(tmp_path / "empty.jpg"), "is empty")]
    with pytest.raises(DataError, match=r"has no test images; lay it out as train/CLASS/ and val/CLASS/"):
        load(str(tmp_path), None, "test")


def test_a_split_folder_is_labelled_by_its_class_folders(classes):
    for split in ("train", "bank"):
        images = load(str(classes), None, split)
        assert names(images, classes) == ["train/cat/1.jpg", "train/cat/sub/2.jpg", "train/dog/3.jpg"]
        assert images.labels.tolist() == [0, 0, 1]
    test = load(str(classes), None, "test")
    assert names(test, classes) == ["val/ant/4.jpg", "val/dog/5.jpg"]
    assert test.labels.tolist() == [2, 1] and test.classes == images.classes == ("cat", "dog", "ant")


def test_one_image_outside_a_class_folder_takes_the_labels_of_its_side(classes):
    plant(classes, "train/stray.jpg")
    assert load(str(classes), None, "bank").labels is None
    assert load(str(classes), None, "test").labels.tolist() == [2, 1]


def test_one_folder_is_not_a_class(tmp_path):
    plant(tmp_path, "train/images/1.jpg", "test/images/2.jpg")
    assert load(str(tmp_path), None, "test").labels is None


def test_imagenet_is_a_split_folder_below_the_root(classes, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    (root / "imagenet").symlink_to(classes)
    assert load("imagenet", str(root), "test").labels.tolist() == [2, 1]
    with pytest.raises(DataError, match="imagenet: not found; put train/CLASS/"):
        load("imagenet", str(classes), "train")


def test_imagenet100_is_100_classes_of_imagenet(tmp_path):
    assert len(set(named.IMAGENET100)) == 100 and named.IMAGENET100[0] == "n01558993" and "n02869837" in named.IMAGENET100
    chosen = named.IMAGENET100
    folders = ["n00000001", *chosen[:50], "n01600000", *chosen[50:], "n99999999"]
    plant(tmp_path, *(f"imagenet/train/{word}/{i}.jpg" for word in folders for i in range(2)))
    plant(tmp_path, *(f"imagenet/val/{word}/v.jpg" for word in folders))
    train, test = (load("imagenet100", str(tmp_path), split) for split in ("train", "test"))
    assert train.labels.tolist() == [label for label in range(100) for _ in range(2)] and train.classes == test.classes == chosen
    assert names(test, tmp_path) == [f"imagenet/val/{word}/v.jpg" for word in chosen] and test.labels.tolist() == list(range(100))
    shutil.rmtree(tmp_path / "imagenet/train" / chosen[7])
    with pytest.raises(DataError, match=f"no image of {chosen[7]}; 1 of the 100 classes"):
        load("imagenet100", str(tmp_path), "train")
    with pytest.raises(DataError, match=r"imagenet100: not found; put train/CLASS/"):
        load("imagenet100", str(tmp_path / "imagenet"), "train")


@pytest.fixture
def tiny(tmp_path):
    """Two classes of Tiny-ImageNet, in its layout."""
    base = tmp_path / "tiny-imagenet-200"
    plant(base, "wnids.txt", data=b"n02\nn01\n")
    for word in ("n01", "n02"):
        plant(base, *(f"train/{word}/images/{word}_{i}.JPEG" for i in range(2)))
        plant(
            base,
            f"train/{word}/{word}_boxes.txt",
            data=b"".join(b"%s_%d.JPEG\t0\t0\t63\t63\n" % (word.encode(), i) for i in (0, 1)),
        )
    plant(base, *(f"val/images/val_{i}.JPEG" for i in range(3)), "test/images/test_0.JPEG")
    told = b"".join(b"val_%d.JPEG\t%s\t0\t0\t63\t63\n" % (i, word) for i, word in enumerate((b"n02", b"n01", b"n02")))
    plant(base, "val/val_annotations.txt", data=told)
    return tmp_path


def test_tiny_imagenet(tiny):
    base = tiny / "tiny-imagenet-200"
    train, bank, test = (load("tiny-imagenet", str(tiny), split) for split in ("train", "bank", "test"))
    assert names(train, base) == [f"train/{word}/images/{word}_{i}.JPEG" for word in ("n01", "n02") for i in (0, 1)]
    assert train.labels.tolist() == bank.labels.tolist() == [0, 0, 1, 1] and train.classes == test.classes == ("n01", "n02")
    assert names(test, base) == [f"val/images/val_{i}.JPEG" for i in range(3)] and test.labels.tolist() == [1, 0, 1]
    assert train.mean == (0.4802, 0.4481, 0.3975) and train.std == (0.2302, 0.2265, 0.2262)


def test_a_damaged_tiny_imagenet_is_refused(tiny):
    base = tiny / "tiny-imagenet-200"
    plant(base, "val/val_annotations.txt", data=b"val_0.JPEG\tn03\t0\t0\t63\t63\n")
    with pytest.raises(DataError, match=r"n03 is none of the classes of wnids\.txt"):
        load("tiny-imagenet", str(tiny), "test")
    plant(base, "val/val_annotations.txt", data=b"val_0.JPEG\n")
    with pytest.raises(DataError, match="needs lines of 6 words each"):
        load("tiny-imagenet", str(tiny), "test")
    (base / "train/n01/images/n01_1.JPEG").unlink()
    with pytest.raises(DataError, match="1 of 4 images cannot be used"):
        load("tiny-imagenet", str(tiny), "train")


def test_tiny_imagenet_is_downloaded_whole_and_checked(tiny, tmp_path_factory, monkeypatch):
    asked = []

    def unpack(url: str, root: str, md5: str) -> None:
        asked.append((url, md5))
        shutil.copytree(tiny, root, dirs_exist_ok=True)

    monkeypatch.setattr(datasets.utils, "download_and_extract_archive", unpack)
    root = tmp_path_factory.mktemp("root")
    assert len(load("tiny-imagenet", str(root), "train")) == 4 and len(load("tiny-imagenet", str(root), "test")) == 3
    assert asked == [("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")]
    monkeypatch.setattr(datasets.utils, "download_and_extract_archive", lambda *_, **__: None)  # an archive of something else
    with pytest.raises(DataError, match=r"tiny-imagenet: not complete in .*tiny-imagenet-200 and cannot be downloaded"):
        load("tiny-imagenet", str(tiny / "elsewhere"), "train")


def test_a_list_file(classes):
    (classes / "list.txt").write_text("val/ant/4.jpg\tb\ntrain/dog/3.jpg\ta\nmissing.jpg\n")
    images = load(str(classes / "list.txt"), None, "train")
    assert names(images, classes) == ["val/ant/4.jpg", "train/dog/3.jpg"]
    assert images.labels.tolist() == [1, 0] and images.classes == ("a", "b") and len(images.bad) == 1
    with pytest.raises(DataError, match="a list file has no test images"):
        load(str(classes / "list.txt"), None, "test")


def test_a_list_of_nothing_usable_says_why(tmp_path):
    (tmp_path / "list.txt").write_text("# nothing\ngone.jpg\n")
    with pytest.raises(DataError, match=r"no usable image \(1 unusable, the first: gone.jpg cannot be read"):
        load(str(tmp_path / "list.txt"), None, "train")


def test_wrong_names_and_splits():
    with pytest.raises(DataError, match="nearest is cifar100"):
        load("cifar-100", None, "train")
    with pytest.raises(ConfigError, match=r"split: must be one of train, bank, test, got 'tset' \(nearest: test\)"):
        load("digits", None, "tset")


def test_subset_keeps_everything_in_step(classes):
    images = load(str(classes), None, "train")
    part = images.subset(np.array([2, 0]))
    assert names(part, classes) == ["train/dog/3.jpg", "train/cat/1.jpg"] and part.labels.tolist() == [1, 0]
    assert len(part) == 2 and part.fingerprint() != images.fingerprint()
    assert images.subset(range(3)).fingerprint() == images.fingerprint()
    held = Images("held", Pixels(torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2)), np.array([7, 8]))
    assert held.subset([1]).source.tensor.flatten().tolist() == list(range(12, 24)) and held.subset([1]).labels.tolist() == [8]


def test_fingerprints_follow_the_content():
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    changed = pixels.clone()
    changed[1, 2, 3, 3] = 1
    prints = [Images("a", Pixels(p)).fingerprint() for p in (pixels, changed, pixels.reshape(2, 3, 2, 8))]
    assert len(set(prints)) == 3 and Images("b", Pixels(pixels.clone()), labels=np.array([0, 1])).fingerprint() == prints[0]


def test_the_same_folder_elsewhere_has_the_same_fingerprint(classes, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy")
    plant(copy, "cat/1.jpg", "cat/sub/2.jpg", "dog/3.jpg")
    images = load(str(classes), None, "train")
    assert load(str(copy), None, "train").fingerprint() == images.fingerprint()
    plant(copy, "dog/3.jpg", data=jpeg() + b"more")
    assert load(str(copy), None, "train").fingerprint() != images.fingerprint()


@pytest.fixture
def unhashed(monkeypatch):
    """Small made-up files in place of torchvision's, whose hashes they do not have."""
    for module in (datasets.cifar, datasets.stl10):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: os.path.isfile(path))


@pytest.mark.parametrize(
    ("name", "folder", "key"), [("cifar10", "cifar-10-batches-py", "labels"), ("cifar100", "cifar-100-python", "fine_labels")]
)
def test_cifar(name, folder, key, tmp_path, unhashed):
    reader = getattr(datasets, name.upper())
    images = random_bytes(4, 3, 32, 32)
    for file, _ in [*reader.train_list, *reader.test_list]:
        plant(tmp_path, f"{folder}/{file}", data=pickle.dumps({"data": images.reshape(4, -1), key: [3, 1, 2, 0]}))
    plant(tmp_path, f"{folder}/{reader.meta['filename']}", data=pickle.dumps({reader.meta["key"]: ["a", "b", "c", "d"]}))
    test, train = load(name, str(tmp_path), "test"), load(name, str(tmp_path), "train")
    assert len(test) == 4 and len(train) == 4 * len(reader.train_list)
    np.testing.assert_array_equal(test.source.tensor.numpy(), images)
    assert test.source.tensor.is_contiguous() and test.labels.tolist() == [3, 1, 2, 0] and test.classes == ("a", "b", "c", "d")
    assert train.fingerprint() == load(name, str(tmp_path), "bank").fingerprint()
    assert train.mean[0] in (0.4914, 0.5071)


def test_stl10_trains_on_its_labelled_and_unlabelled_images(tmp_path, unhashed):
    upright = random_bytes(3, 3, 96, 96)
    stored = upright.transpose(0, 1, 3, 2).tobytes()
    for part, count in (("train", 2), ("test", 1), ("unlabeled", 3)):
        plant(tmp_path, f"stl10_binary/{part}_X.bin", data=stored[: count * 27648])
        plant(tmp_path, f"stl10_binary/{part}_y.bin", data=bytes(range(1, count + 1)))
    plant(tmp_path, "stl10_binary/class_names.txt", data=b"airplane\nbird\ncar")
    train, bank, test = (load("stl10", str(tmp_path), split) for split in ("train", "bank", "test"))
    np.testing.assert_array_equal(train.source.tensor.numpy(), upright[[0, 1, 0, 1, 2]])
    assert train.source.tensor.is_contiguous() and train.labels.tolist() == [0, 1, -1, -1, -1]
    assert bank.labels.tolist() == [0, 1] and test.labels.tolist() == [0] and bank.classes == ("airplane", "bird", "car")


def test_fashion_mnist_becomes_three_equal_channels(tmp_path):
    images = random_bytes(3, 28, 28)
    for part in ("train", "t10k"):
        raw = tmp_path / "FashionMNIST" / "raw"
        plant(raw, f"{part}-images-idx3-ubyte", data=struct.pack(">IIII", 0x803, 3, 28, 28) + images.tobytes())
        plant(raw, f"{part}-labels-idx1-ubyte", data=struct.pack(">II", 0x801, 3) + bytes([9, 0, 4]))
    found = load("fashion-mnist", str(tmp_path), "test")
    assert found.source.tensor.shape == (3, 3, 28, 28) and found.source.tensor.is_contiguous()
    for channel in range(3):
        np.testing.assert_array_equal(found.source.tensor[:, channel].numpy(), images)
    assert found.labels.tolist() == [9, 0, 4] and len(found.classes) == 10


@pytest.mark.parametrize(
    ("name", "module", "folder"),
    [
        ("cifar10", "cifar", "cifar-10-batches-py"),
        ("cifar100", "cifar", "cifar-100-python"),
        ("stl10", "stl10", "stl10_binary"),
        ("fashion-mnist", "mnist", "FashionMNIST/raw"),
    ],
)
@pytest.mark.parametrize("fault", [URLError("no route to host"), RuntimeError("File not found or corrupted.\nmore"), EOFError()])
def test_a_failed_download_says_where_the_files_belong(name, module, folder, fault, tmp_path, monkeypatch):
    def fail(*args: object, **options: object) -> None:
        raise fault

    monkeypatch.setattr(getattr(datasets, module), "download_and_extract_archive", fail)
    with pytest.raises(DataError, match=f"{name}: .*cannot be downloaded.*put the files of http") as caught:
        load(name, str(tmp_path), "train")
    assert str(tmp_path / folder) in str(caught.value) and str(caught.value).isprintable()


def test_a_root_that_cannot_be_made_is_a_data_error(tmp_path):
    plant(tmp_path, "file")
    with pytest.raises(DataError, match="cannot be downloaded"):
        load("cifar10", str(tmp_path / "file" / "below"), "train")
