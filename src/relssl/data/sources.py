"""Data sets by name, folder or list file, as pixels in memory or as files to be read one by one."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from relssl.data import digits, imagenet100, tiny_imagenet, transfer_sets
from relssl.data.fetching import fetch
from relssl.data.files import Listing, class_folders, data_root, exists, locate, read_list, scan, split_folders
from relssl.data.paths import Paths, shown
from relssl.data.shrunk import Shrunk
from relssl.data.voc import is_voc, read_voc
from relssl.data.walk import Bad
from relssl.errors import ConfigError, DataError
from relssl.schema import nearest_word

Channels = tuple[float, float, float]

SPLITS = ("train", "bank", "test")
IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class Images:
    """A set of images, either in memory or as files.

    Attributes:
        name: for messages.
        pixels: uint8 [N, 3, H, W], contiguous, on the CPU; None for files.
        files: N paths, undecodable bytes in their names kept as surrogates; None for pixels.
        labels: int64 [N], -1 = none; for reporting, and to train on for supervised learning alone.
        classes: what the labels stand for.
        mean, std: of the channels, for pixels scaled to 0..1.
        bad: (file, reason) of what the scan already found unusable; not counted in N.
        shrunk: the files' images, decoded and made smaller beforehand, to be read in place of the files; None for the files.
        targets: int8 [N, C] of images with several labels each: 1 yes, 0 no, -1 not told; `labels` is then None.
    """

    name: str
    pixels: torch.Tensor | None = None
    files: Sequence[str] | None = None
    labels: np.ndarray | None = None
    classes: tuple[str, ...] | None = None
    mean: Channels = IMAGENET_MEAN
    std: Channels = IMAGENET_STD
    bad: Bad = field(default_factory=list)
    shrunk: Shrunk | None = None
    targets: np.ndarray | None = None

    def __post_init__(self) -> None:
        assert (self.pixels is None) != (self.files is None)
        assert self.pixels is None or (self.pixels.dtype == torch.uint8 and self.pixels.is_contiguous())
        assert self.shrunk is None or (self.files is not None and len(self.shrunk) == len(self))
        assert self.labels is None or (self.labels.dtype == np.int64 and len(self.labels) == len(self))
        assert self.targets is None or (self.targets.dtype == np.int8 and len(self.targets) == len(self) and self.labels is None)

    def __len__(self) -> int:
        return len(self.pixels) if self.pixels is not None else len(self.files or ())

    def subset(self, indices: Sequence[int] | np.ndarray) -> Images:
        """The images at these positions, in this order; of files, the files themselves."""
        rows = np.asarray(indices, np.int64)
        files = self.files
        if files is not None:
            files = files.take(rows) if isinstance(files, Paths) else [files[row] for row in rows]
        return replace(
            self,
            pixels=None if self.pixels is None else self.pixels[torch.from_numpy(rows)],
            files=files,
            labels=None if self.labels is None else self.labels[rows],
            targets=None if self.targets is None else self.targets[rows],
            shrunk=None,
        )

    @property
    def class_count(self) -> int:
        """How many classes one label an image tells apart, those without an image among these included; 0 if one has no label."""
        if self.labels is None or self.labels.min() < 0:
            return 0
        return max(len(self.classes or ()), int(self.labels.max()) + 1)

    def fingerprint(self) -> str:
        """16 hex digits of the SHA-256 of the pixels, or of the files' count, names and sizes; labels do not count."""
        if self.pixels is not None:
            digest = hashlib.sha256(f"pixels {tuple(self.pixels.shape)} ".encode())
            digest.update(self.pixels.numpy().data)
            return digest.hexdigest()[:16]
        files = self.files or ()
        if not isinstance(files, Paths):
            files = Paths.of(files)
        return files.fingerprint()


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


def load(data: str, root: str | None, split: str, *, index: bool = True) -> Images:
    """The images that DATA names.

    Args:
        data: a name (`files.NAMES`), a folder, or a list file (.txt, .lst).
        root: where named data sets lie; None: $RELSSL_DATA, else ~/.cache/relssl.
        split: "train" (what pretraining uses), "bank" (training images with labels) or "test". The first two are one and
            the same but for stl10, whose `train` holds its unlabelled images (label -1) as well.
        index: find the files of a folder by the index of an earlier scan, if that is still true.

    Raises:
        DataError: if it is missing and cannot be downloaded, holds no image, or has no such part.
        ConfigError: for another split.
    """
    if split not in SPLITS:
        raise ConfigError(f"split: must be one of {', '.join(SPLITS)}, got {split!r} (nearest: {nearest_word(split, SPLITS)})")
    if data == "digits":
        pixels, labels = digits.load("test" if split == "test" else "train")
        names = tuple("0123456789")
        return Images(data, torch.from_numpy(pixels), None, labels, names, digits.MEAN, digits.STD)
    if data in _NAMED:
        return _named(data, data_root(root), split)
    if data in transfer_sets.NAMES:
        return _listed(data, transfer_sets.read(data, data_root(root), split))
    if data == "tiny-imagenet":
        images = _listed(data, tiny_imagenet.read(data_root(root), split))
        return replace(images, mean=tiny_imagenet.MEAN, std=tiny_imagenet.STD)
    exists(data, root)
    path = locate(data, root)
    images = _folder(data, path, split, index) if Path(path).is_dir() else _list(data, path, split)
    if len(images) == 0:
        first = f", the first: {shown(images.bad[0][0])} {images.bad[0][1]}" if images.bad else ""
        raise DataError(f"{images.name}: no usable image ({len(images.bad)} unusable{first})")
    if data == "imagenet100":
        rows, labels = imagenet100.select(images.labels, images.classes)
        images = replace(images.subset(rows), labels=labels, classes=imagenet100.CLASSES)
    return images


def at_hand(data: str, root: str | None) -> bool:
    """Whether `load` finds DATA without a download."""
    folders = {name: known.folder for name, known in _NAMED.items()} | {"tiny-imagenet": tiny_imagenet.FOLDER}
    return data not in folders or Path(data_root(root), folders[data]).exists()


def _folder(data: str, path: str, split: str, index: bool) -> Images:
    """All images of a split; labelled by VOC's lists, or by the folders below if each image lies in one of several."""
    if is_voc(path):
        listing, part = read_voc(path, split)
        return _listed(f"{shown(data)} ({part})", listing)
    layout = split_folders(path)
    if layout is None:
        if split == "test":
            raise DataError(f"{shown(data)}: has no test images; lay it out as train/CLASS/ and val/CLASS/ (or test/CLASS/)")
        files, bad = scan(path, index=index)
        return Images(shown(data), files=files, bad=bad)
    files, bad = scan(layout[split], index=index)
    # Training classes come first, so that a class met only in testing does not renumber them.
    classes = tuple(dict.fromkeys(class_folders(layout["train"]) + class_folders(layout["test"])))
    labels = _labels(files, classes)
    return Images(shown(data), files=files, labels=labels, classes=None if labels is None else classes, bad=bad)


def _labels(files: Paths, classes: tuple[str, ...]) -> np.ndarray | None:
    """The class folder that each file lies in; the files of one are neighbours, since the names are sorted."""
    labels = np.full(len(files), -1, np.int64)
    for position, word in enumerate(classes):
        top, rows = os.fsencode(word), range(len(files))
        labels[bisect_left(rows, top + b"/", key=files.name) : bisect_left(rows, top + b"0", key=files.name)] = position
    return labels if len(classes) > 1 and (labels >= 0).all() else None


def _list(data: str, path: str, split: str) -> Images:
    if split == "test":
        raise DataError(f"{shown(data)}: a list file has no test images; use a folder with train/CLASS/ and val/CLASS/")
    return _listed(shown(data), read_list(path))


def _listed(name: str, listing: Listing) -> Images:
    return Images(
        name, files=listing.files, labels=listing.labels, classes=listing.classes, bad=listing.bad, targets=listing.targets
    )


def _named(name: str, root: str, split: str) -> Images:
    known = _NAMED[name]
    found = _fetch(name, root, split)
    if name == "stl10":
        labels, pixels = found.labels, _contiguous(found.data)
    elif name == "svhn":
        labels, pixels = found.labels, torch.from_numpy(np.ascontiguousarray(found.data))
    elif name == "fashion-mnist":
        labels, pixels = found.targets, found.data[:, None].expand(-1, 3, -1, -1).contiguous()
    else:
        labels, pixels = found.targets, torch.from_numpy(np.ascontiguousarray(found.data.transpose(0, 3, 1, 2)))
    classes = tuple("0123456789") if name == "svhn" else tuple(getattr(found, "classes", ())) or None
    return Images(name, pixels, None, np.asarray(labels, np.int64), classes, known.mean, known.std)


def _contiguous(images: np.ndarray) -> torch.Tensor:
    """STL-10's images, which torchvision gives as a transposed view, turned in place: a copy would double 2.8 GB."""
    stored = images.transpose(0, 1, 3, 2)
    for start in range(0, len(images), 1000):
        stored[start : start + 1000] = images[start : start + 1000].copy()
    return torch.from_numpy(np.ascontiguousarray(stored))


def _fetch(name: str, root: str, split: str) -> Any:
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
