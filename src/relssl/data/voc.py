"""PASCAL VOC's image classification: several labels an image, from a list for each class.

The lists are ImageSets/Main/CLASS_PART.txt with an image and 1, 0 or -1 a line: of the class, only difficult to see as such, not
of it (Everingham et al. 2010, "The PASCAL Visual Object Classes Challenge"). Difficult ones count neither way, as there.
"""

from __future__ import annotations

import os

import numpy as np

from relssl.data.fetching import fetch
from relssl.data.files import Listing, complete
from relssl.data.paths import shown
from relssl.errors import DataError

_TOLD = {"1": 1, "-1": 0, "0": -1}
_SOURCE = "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/"


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

    fetch("voc07", root, found, folder, _SOURCE)
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
