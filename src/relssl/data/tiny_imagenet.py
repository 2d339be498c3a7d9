"""Tiny-ImageNet: 200 classes of ImageNet at 64 x 64 pixels, 500 training and 50 validation images each, as files."""

from __future__ import annotations

import os

import numpy as np

from relssl.data.fetching import fetch
from relssl.data.files import Listing, complete
from relssl.data.paths import shown
from relssl.errors import DataError

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
