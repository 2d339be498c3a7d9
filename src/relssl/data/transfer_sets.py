"""The data sets that transfer is customarily measured on, with the splits of Kornblith et al. 2019, table 1.

"Do Better ImageNet Models Transfer Better?" trains its final classifiers on training and validation images together. torchvision
reads the official lists; no image is decoded here. Of that table's sets SUN397 and Caltech-101 are left out, for torchvision does
not read SUN397's official partitions and Caltech-101 has none, and Birdsnap, which can no longer be had.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from relssl.data.fetching import fetch
from relssl.data.files import Listing, complete
from relssl.data.voc import voc07
from relssl.errors import DataError


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


def read(name: str, root: str, split: str) -> Listing:
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
