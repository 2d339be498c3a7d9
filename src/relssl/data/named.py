"""Data sets that torchvision reads: as they lie on the disk, else downloaded once."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from relssl.data import digits
from relssl.data.folder import (
    Files,
    Listing,
    class_folders,
    complete,
    data_root,
    exists,
    locate,
    read_list,
    scan,
    shown,
    split_folders,
)
from relssl.data.images import Channels, Images, Pixels
from relssl.errors import ConfigError, DataError
from relssl.settings.reading import nearest_word

T = TypeVar("T")


def fetch(name: str, root: str, read: Callable[[bool], T], place: str, source: str) -> T:
    """What `read(False)` gives, or where that fails, `read(True)`, which downloads first.

    Args:
        name: of the data set.
        root: where named data sets lie.
        read: makes torchvision's data set, given whether it may download; torchvision checks what it downloads by its hash.
        place: where below `root` the files belong.
        source: where they can be had.

    Raises:
        DataError: if the files are not complete and cannot be downloaded.
    """
    try:
        return read(False)
    except MemoryError:
        raise
    except Exception:  # missing and damaged files make the readers raise all sorts of errors
        pass
    try:
        with _one_at_a_time(root, name):
            return read(True)
    except MemoryError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{name}: not complete in {shown(place)} and cannot be downloaded ({reason}); "
            f"put the files of {source} there, or set data_root to where they are"
        ) from error


@contextlib.contextmanager
def _one_at_a_time(root: str, name: str) -> Iterator[None]:
    """Let one process of this machine download while the others wait, then find it done; and never wait for a dead server."""
    Path(root).mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    with Path(root, f".{name}.lock").open("w") as lock:
        with contextlib.suppress(ImportError, OSError):  # not on Windows, not on every network drive
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        socket.setdefaulttimeout(30)
        try:
            yield
        finally:
            socket.setdefaulttimeout(timeout)


# HobbitLong/CMC, imagenet100.txt, sorted.
_WORDS = """
n01558993 n01692333 n01729322 n01735189 n01749939 n01773797 n01820546 n01855672 n01978455 n01980166
n01983481 n02009229 n02018207 n02085620 n02086240 n02086910 n02087046 n02089867 n02089973 n02090622
n02091831 n02093428 n02099849 n02100583 n02104029 n02105505 n02106550 n02107142 n02108089 n02109047
n02113799 n02113978 n02114855 n02116738 n02119022 n02123045 n02138441 n02172182 n02231487 n02259212
n02326432 n02396427 n02483362 n02488291 n02701002 n02788148 n02804414 n02859443 n02869837 n02877765
n02974003 n03017168 n03032252 n03062245 n03085013 n03259280 n03379051 n03424325 n03492542 n03494278
n03530642 n03584829 n03594734 n03637318 n03642806 n03764736 n03775546 n03777754 n03785016 n03787032
n03794056 n03837869 n03891251 n03903868 n03930630 n03947888 n04026417 n04067472 n04099969 n04111531
n04127249 n04136333 n04229816 n04238763 n04336792 n04418357 n04429376 n04435653 n04485082 n04493381
n04517823 n04589890 n04592741 n07714571 n07715103 n07753275 n07831146 n07836838 n13037406 n13040303
"""
CLASSES = tuple(_WORDS.split())


def select(labels: np.ndarray | None, classes: tuple[str, ...] | None) -> tuple[np.ndarray, np.ndarray]:
    """Which of ImageNet's images belong to ImageNet-100: their positions [M], and their labels [M] int64 as positions in CLASSES.

    Args:
        labels: int64 [N] of all images, as positions in `classes`; None if not every image lies in a class's folder.
        classes: names of the class folders.

    Raises:
        DataError: if some of the classes have no image.
    """
    if labels is None or classes is None:
        raise DataError("imagenet100: every image in imagenet/ must lie in the folder of its class, imagenet/train/CLASS/")
    there = {classes[label] for label in np.unique(labels)}
    if missing := [word for word in CLASSES if word not in there]:
        raise DataError(f"imagenet100: imagenet/ has no image of {missing[0]}; {len(missing)} of the 100 classes are missing")
    rank = np.array([CLASSES.index(word) if word in CLASSES else -1 for word in classes], np.int64)
    rows = np.flatnonzero(rank[labels] >= 0)
    return rows, rank[labels[rows]]


FOLDER = "tiny-imagenet-200"
# The figures of the paper's small-set code.
MEAN, STD = (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)
_SOURCE = f"http://cs231n.stanford.edu/{FOLDER}.zip"
_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


def read(root: str, split: str) -> Listing:
    """The images of a split: the training images as train and bank, the validation images (its test labels are secret) as test.

    Raises:
        DataError: if it is missing and cannot be downloaded, damaged, or not complete.
    """
    folder = os.path.join(root, FOLDER)

    def found(download: bool) -> None:
        if download:
            from torchvision.datasets.utils import download_and_extract_archive

            download_and_extract_archive(_SOURCE, root, md5=_MD5)
        for name in ("wnids.txt", "train", "val/val_annotations.txt"):
            os.stat(os.path.join(folder, name))

    fetch("tiny-imagenet", root, found, folder, _SOURCE)
    classes = tuple(sorted(word for (word,) in _rows(os.path.join(folder, "wnids.txt"), 1)))
    told = _validation(folder) if split == "test" else _training(folder, classes)
    rank = {word: position for position, word in enumerate(classes)}
    if strange := sorted({word for _, word in told} - rank.keys()):
        raise DataError(f"{shown(folder)}: {shown(strange[0])} is none of the classes of wnids.txt; unpack it anew")
    files = complete("tiny-imagenet", folder, [os.fsencode(file) for file, _ in told])
    return Listing(files, np.array([rank[word] for _, word in told], np.int64), classes, [])


def _training(folder: str, classes: tuple[str, ...]) -> list[tuple[str, str]]:
    """(file, class) of the training images, which the list of each class's boxes names."""
    told = []
    for word in classes:
        rows = _rows(os.path.join(folder, "train", word, f"{word}_boxes.txt"), 5)
        told += [(f"train/{word}/images/{row[0]}", word) for row in rows]
    return told


def _validation(folder: str) -> list[tuple[str, str]]:
    rows = _rows(os.path.join(folder, "val", "val_annotations.txt"), 6)
    return [(f"val/images/{row[0]}", row[1]) for row in rows]


def _rows(path: str, columns: int) -> list[list[str]]:
    """The lines of a list, of so many words each."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as lines:
            rows = [line.split() for line in lines if line.strip()]
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {error.strerror}") from error
    if not rows or any(len(row) != columns for row in rows):
        raise DataError(f"{shown(path)}: needs lines of {columns} word{'s' if columns > 1 else ''} each; unpack the set anew")
    return rows


_TOLD = {"1": 1, "-1": 0, "0": -1}
_SOURCE_voc = "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/"


def is_voc(folder: str) -> bool:
    """Whether a folder is that of a VOC year: JPEGImages/ and lists of classes in ImageSets/Main/."""
    return os.path.isdir(os.path.join(folder, "JPEGImages")) and bool(_parts(folder))


def voc07(root: str, split: str) -> Listing:
    """VOC2007 below `root`: `trainval`, 5,011 images, as train and bank, and `test`, 4,952 images.

    Raises:
        DataError: if it is missing and cannot be downloaded, or damaged.
    """
    import torchvision.datasets

    part = "test" if split == "test" else "trainval"
    folder = os.path.join(root, "VOCdevkit", "VOC2007")

    def found(download: bool) -> object:
        return torchvision.datasets.VOCDetection(root, year="2007", image_set=part, download=download)

    fetch("voc07", root, found, folder, _SOURCE_voc)
    return _read("voc07", folder, part)


def read_voc(folder: str, split: str) -> tuple[Listing, str]:
    """The images of a split of a VOC folder, and which of the folder's parts that is.

    Tested is on `test` after `trainval`; on `val` after `train` where the labels of `test` were never told, as for VOC2012.

    Raises:
        DataError: if there is no such part, a list is damaged or does not fit the others, or images are missing.
    """
    parts = _parts(folder)
    known = ("trainval", "test") if "test" in parts or not {"train", "val"} <= parts.keys() else ("train", "val")
    part = known[split == "test"]
    if part not in parts:
        raise DataError(f"{shown(folder)}: has no lists ImageSets/Main/CLASS_{part}.txt, nor those of both train and val")
    return _read(shown(folder), folder, part), part


def _parts(folder: str) -> dict[str, list[str]]:
    """The classes, sorted, that have a list for each of the parts."""
    parts: dict[str, list[str]] = {}
    main = os.path.join(folder, "ImageSets", "Main")
    for file in sorted(os.listdir(main)) if os.path.isdir(main) else ():
        word, _, part = file.removesuffix(".txt").rpartition("_")
        if word and part in ("train", "val", "trainval", "test") and file.endswith(".txt"):
            parts.setdefault(part, []).append(word)
    return {part: sorted(words) for part, words in parts.items()}


def _read(name: str, folder: str, part: str) -> Listing:
    classes = _parts(folder).get(part, [])
    lists = [_column(os.path.join(folder, "ImageSets", "Main", f"{word}_{part}.txt")) for word in classes]
    if not lists or not lists[0]:
        raise DataError(f"{name}: {shown(folder)} has no images in ImageSets/Main/CLASS_{part}.txt")
    images = list(lists[0])
    for word, column in zip(classes, lists, strict=True):
        if list(column) != images:
            raise DataError(f"{name}: the lists of {classes[0]} and {word} for {part} name other images; get the folder anew")
    files = complete(name, os.path.join(folder, "JPEGImages"), [os.fsencode(f"{image}.jpg") for image in images])
    targets = np.array([list(column.values()) for column in lists], np.int8).T
    return Listing(files, None, tuple(classes), [], np.ascontiguousarray(targets))


def _column(path: str) -> dict[str, int]:
    """What one class's list says of each image."""
    told: dict[str, int] = {}
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                words = line.split()
                if len(words) != 2 or words[1] not in _TOLD or words[0] in told:
                    raise DataError(f"{shown(path)}, line {number}: must be a new image and 1, 0 or -1, got {line.strip()!a}")
                told[words[0]] = _TOLD[words[1]]
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {error.strerror}") from error
    return told


@dataclass(frozen=True)
class _Set:
    """A data set of files: torchvision's class, its folder below the root, the parts that make the bank, and where it is from."""

    reader: str
    folder: str
    bank: tuple[str, ...]
    source: str


_VGG = "https://www.robots.ox.ac.uk/~vgg/data"
_SETS = {
    "food101": _Set("Food101", "food-101", ("train",), "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz"),
    "flowers102": _Set("Flowers102", "flowers-102", ("train", "val"), f"{_VGG}/flowers/102/"),
    "oxford-pets": _Set("OxfordIIITPet", "oxford-iiit-pet", ("trainval",), f"{_VGG}/pets/"),
    "fgvc-aircraft": _Set("FGVCAircraft", "fgvc-aircraft-2013b", ("trainval",), f"{_VGG}/fgvc-aircraft/"),
    "dtd": _Set("DTD", "dtd", ("train", "val"), f"{_VGG}/dtd/"),
    # Its home is gone; the thread tells of mirrors.
    "stanford-cars": _Set("StanfordCars", "stanford_cars", ("train",), "https://github.com/pytorch/vision/issues/7545"),
}
NAMES = (*_SETS, "voc07")


def read_transfer_sets(name: str, root: str, split: str) -> Listing:
    """The images of a data set in the order of its official lists; its training and validation images are both train and bank.

    Args:
        name: one of `NAMES`.
        root: where named data sets lie.
        split: train, bank or test.

    Raises:
        DataError: if it is missing and cannot be downloaded, damaged, or not complete.
    """
    if name == "voc07":
        return voc07(root, split)
    known = _SETS[name]
    folder = os.path.join(root, known.folder)
    files: list[str] = []
    labels: list[int] = []
    classes: list[str] | None = None
    for part in ("test",) if split == "test" else known.bank:
        found = _fetch(name, known, root, part, folder)
        words = [str(word) for word in found.classes]
        if classes not in (None, words):  # torchvision numbers the classes that it meets in each part
            raise DataError(f"{name}: its parts {' and '.join(known.bank)} have other classes; get {folder} anew")
        classes = words
        some, told = _listed(found)
        files += some
        labels += told
    names = [os.fsencode(os.path.relpath(file, folder)) for file in files]
    return Listing(complete(name, folder, names), np.array(labels, np.int64), tuple(classes or ()), [])


def _fetch(name: str, known: _Set, root: str, part: str, folder: str) -> Any:
    import torchvision.datasets

    reader = getattr(torchvision.datasets, known.reader)
    options: dict[str, Any] = {} if name == "oxford-pets" else {"loader": os.fspath}  # a path in place of an image
    return fetch(name, root, lambda download: reader(root, split=part, download=download, **options), folder, known.source)


def _listed(found: Any) -> tuple[list[str], list[int]]:
    """Path and class of each image."""
    if hasattr(found, "loader"):
        pairs = [found[row] for row in range(len(found))]
        return [path for path, _ in pairs], [int(label) for _, label in pairs]
    # The reader of the pets offers no way to its lists but these.
    return [os.fspath(path) for path in found._images], list(found._labels)


SPLITS = ("train", "bank", "test")


@dataclass(frozen=True)
class _Named:
    """A small data set that torchvision reads: its class there, the folder it lies in below the root, channel statistics, source.

    CIFAR's and STL-10's are the figures of the paper's code; Fashion-MNIST's and SVHN's the mean and deviation of all training
    pixels.
    """

    reader: str
    folder: str
    mean: Channels
    std: Channels
    source: str


_CIFAR = "https://www.cs.toronto.edu/~kriz/cifar.html"
_NAMED = {
    "fashion-mnist": _Named(
        "FashionMNIST", "FashionMNIST/raw", (0.2860,) * 3, (0.3530,) * 3, "https://github.com/zalandoresearch/fashion-mnist"
    ),
    "cifar10": _Named("CIFAR10", "cifar-10-batches-py", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), _CIFAR),
    "cifar100": _Named("CIFAR100", "cifar-100-python", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), _CIFAR),
    "stl10": _Named(
        "STL10", "stl10_binary", (0.4408, 0.4279, 0.3867), (0.2682, 0.2610, 0.2686), "http://ai.stanford.edu/~acoates/stl10/"
    ),
    "svhn": _Named("SVHN", "", (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), "http://ufldl.stanford.edu/housenumbers/"),
}


def load(data: str, root: str | None, split: str) -> Images:
    """The images that DATA names.

    Args:
        data: a name (`files.NAMES`), a folder, or a list file (.txt, .lst).
        root: where named data sets lie; None: $RELSSL_DATA, else ~/.cache/relssl.
        split: "train" (what pretraining uses), "bank" (training images with labels) or "test". The first two are one and
            the same but for stl10, whose `train` holds its unlabelled images (label -1) as well.

    Raises:
        DataError: if it is missing and cannot be downloaded, holds no image, or has no such part.
        ConfigError: for another split.
    """
    if split not in SPLITS:
        raise ConfigError(f"split: must be one of {', '.join(SPLITS)}, got {split!r} (nearest: {nearest_word(split, SPLITS)})")
    if data == "digits":
        pixels, labels = digits.load("test" if split == "test" else "train")
        names = tuple("0123456789")
        return Images(data, Pixels(torch.from_numpy(pixels), f"{data}/{split}"), labels, names, digits.MEAN, digits.STD)
    if data in _NAMED:
        return _named(data, data_root(root), split)
    if data in NAMES:
        return _listed_sources(data, read_transfer_sets(data, data_root(root), split))
    if data == "tiny-imagenet":
        images = _listed_sources(data, read(data_root(root), split))
        return replace(images, mean=MEAN, std=STD)
    exists(data, root)
    path = locate(data, root)
    images = _folder(data, path, split) if Path(path).is_dir() else _list(data, path, split)
    if len(images) == 0:
        first = f", the first: {shown(images.bad[0][0])} {images.bad[0][1]}" if images.bad else ""
        raise DataError(f"{images.name}: no usable image ({len(images.bad)} unusable{first})")
    if data == "imagenet100":
        rows, labels = select(images.labels, images.classes)
        images = replace(images.subset(rows), labels=labels, classes=CLASSES)
    return images


def at_hand(data: str, root: str | None) -> bool:
    """Whether `load` finds DATA without a download."""
    folders = {name: known.folder for name, known in _NAMED.items()} | {"tiny-imagenet": FOLDER}
    return data not in folders or Path(data_root(root), folders[data]).exists()


def _folder(data: str, path: str, split: str) -> Images:
    """All images of a split; labelled by VOC's lists, or by the folders below if each image lies in one of several."""
    if is_voc(path):
        listing, part = read_voc(path, split)
        return _listed_sources(f"{shown(data)} ({part})", listing)
    layout = split_folders(path)
    if layout is None:
        if split == "test":
            raise DataError(f"{shown(data)}: has no test images; lay it out as train/CLASS/ and val/CLASS/ (or test/CLASS/)")
        files, bad = scan(path)
        return Images(shown(data), files, bad=bad)
    files, bad = scan(layout[split])
    # Training classes come first, so that a class met only in testing does not renumber them.
    classes = tuple(dict.fromkeys(class_folders(layout["train"]) + class_folders(layout["test"])))
    labels = _labels(files, classes)
    return Images(shown(data), files, labels, None if labels is None else classes, bad=bad)


def _labels(files: Files, classes: tuple[str, ...]) -> np.ndarray | None:
    """The class folder that each file lies in; the files of one are neighbours, since the names are sorted."""
    rank = {os.fsencode(word): position for position, word in enumerate(classes)}
    labels = np.array(
        [rank.get(top, -1) if below else -1 for top, below, _ in (name.partition(b"/") for name in files.names())], np.int64
    )
    return labels if len(classes) > 1 and (labels >= 0).all() else None


def _list(data: str, path: str, split: str) -> Images:
    if split == "test":
        raise DataError(f"{shown(data)}: a list file has no test images; use a folder with train/CLASS/ and val/CLASS/")
    return _listed_sources(shown(data), read_list(path))


def _listed_sources(name: str, listing: Listing) -> Images:
    return Images(name, listing.files, listing.labels, listing.classes, bad=listing.bad, targets=listing.targets)


def _named(name: str, root: str, split: str) -> Images:
    known = _NAMED[name]
    found = _fetch_sources(name, root, split)
    if name == "stl10":
        labels, pixels = found.labels, _contiguous(found.data)
    elif name == "svhn":
        labels, pixels = found.labels, torch.from_numpy(np.ascontiguousarray(found.data))
    elif name == "fashion-mnist":
        labels, pixels = found.targets, found.data[:, None].expand(-1, 3, -1, -1).contiguous()
    else:
        labels, pixels = found.targets, torch.from_numpy(np.ascontiguousarray(found.data.transpose(0, 3, 1, 2)))
    classes = tuple("0123456789") if name == "svhn" else tuple(getattr(found, "classes", ())) or None
    source = Pixels(pixels, f"{name}/{split}")
    return Images(name, source, np.asarray(labels, np.int64), classes, known.mean, known.std)


def _contiguous(images: np.ndarray) -> torch.Tensor:
    """STL-10's images, which torchvision gives as a transposed view, turned in place: a copy would double 2.8 GB."""
    stored = images.transpose(0, 1, 3, 2)
    for start in range(0, len(images), 1000):
        stored[start : start + 1000] = images[start : start + 1000].copy()
    return torch.from_numpy(np.ascontiguousarray(stored))


def _fetch_sources(name: str, root: str, split: str) -> Any:
    """torchvision's data set, whose files it checks by their hashes; downloaded if they are not there."""
    import torchvision.datasets

    known = _NAMED[name]
    reader = getattr(torchvision.datasets, known.reader)
    part: dict[str, Any] = {"train": split != "test"}
    if name in ("stl10", "svhn"):
        whole = "train+unlabeled" if name == "stl10" else "train"  # what the papers pretrain on
        part = {"split": {"train": whole, "bank": "train", "test": "test"}[split]}
    place = os.path.join(root, known.folder)
    return fetch(name, root, lambda download: reader(root, download=download, **part), place, known.source)
