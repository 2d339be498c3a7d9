"""Data sets that are handed over from Python: any with `len` and `[i]`, and arrays or tensors of all the images.

An item is a PIL image, an array or a tensor, the path or the bytes of an image file, or a tuple or mapping that holds one of these.
What files are turned into, items are too: 8 bits, upright, without transparency. PIL images, paths and bytes are RGB; arrays and tensors
have the channels that they have, 1 to 16. Integers of 16 bits are scaled by 255/65535, floats must lie in 0..1.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageFile
from torch import Tensor, as_tensor, empty, from_numpy, uint8

from relssl.data.decode import BadImage, Opened, from_16_bits, open_image, upright_rgb
from relssl.data.folder import TEST, TRAIN
from relssl.data.images import Channels, Images, Pixels
from relssl.data.subsets import spread
from relssl.data.transforms import seeded
from relssl.errors import DataError
from relssl.settings.run import MOST_CHANNELS, LoaderConfig

_KEYS = ("image", "img")  # of the image of an item that is a mapping; else it is the first value that can be one
_LABEL_KEYS = ("label", "labels", "target", "targets", "class")
_TRIED = 16  # items, until one can be read
_SAMPLE = 32  # items that the fingerprint looks at
_MEASURED = 128  # images of which means and deviations are taken
_MOST_PIXELS = LoaderConfig().max_pixels
_FEW = 1 / 255  # least deviation of a channel


@dataclass(frozen=True, eq=False)
class Items:
    """Items of a map-style data set; a source of `Images`.

    What an item draws at random is seeded by its position, so it is the same whenever and wherever it is read.
    """

    dataset: Any
    rows: np.ndarray  # int64 [N], their positions in it
    title: str  # what the name of each image begins with; its position follows
    channels: int = 3

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: np.ndarray) -> Items:
        return replace(self, rows=self.rows[rows])

    def fingerprint(self) -> str:
        """Compute 16 hex digits of the number of images and the pixels of up to 32 of them, evenly spread."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(f"items {len(self)} ".encode())
        for row in spread(0, len(self), _SAMPLE):
            digest.update(self.beginning(row))
        return digest.hexdigest()[:16]

    def name(self, row: int) -> str:
        return f"{self.title}/{self.rows[row]:06}"

    def beginning(self, row: int) -> bytes:
        """Return size and pixels of one image, by which copies are known."""
        try:
            with self.open(row, _MOST_PIXELS) as opened:
                pixels = np.asarray(opened.whole())
            return f"{pixels.shape} ".encode() + pixels.tobytes()
        except BadImage:
            return f"unreadable {self.name(row)}".encode()

    def item(self, row: int) -> Any:
        """Return what one item is, or holds as its image; BadImage if it raises."""
        place = int(self.rows[row])
        try:
            with seeded(0, 0, place, 0):
                image = _image_of(self.dataset[place])
        except Exception as error:  # whatever a user's code raises
            raise BadImage(f"raises {repr(error)[:160]}") from error
        if isinstance(image, ImageFile.ImageFile) and isinstance(self.dataset, (list, tuple)) and image.filename:
            return image.filename  # maybe not read yet, and processes must not share its file
        return image

    @contextmanager
    def open(self, row: int, max_pixels: int) -> Iterator[Opened]:
        with open_item(self.item(row), max_pixels) as opened:
            if opened.channels == 1 and self.channels == 3:
                opened = Opened.of(opened.rgb(1))
            if opened.channels != self.channels:
                raise BadImage(f"has {opened.channels} channels, where the first image has {self.channels}")
            yield opened


@contextmanager
def open_item(image: Any, max_pixels: int) -> Iterator[Opened]:
    """Open an image of any kind that an item may be or hold; BadImage if it is none."""
    if isinstance(image, (str, bytes, os.PathLike)):
        with open_image((lambda: image) if isinstance(image, bytes) else os.fspath(image), max_pixels) as opened:
            yield opened
        return
    opened = Opened.of(upright_rgb(image)) if isinstance(image, Image.Image) else Opened.of_bands(to_bands(image))
    if opened.size[0] * opened.size[1] > max_pixels:
        raise BadImage(f"has {opened.size[1]} x {opened.size[0]} pixels, more than max_pixels ({max_pixels})")
    yield opened


def to_bands(image: Any) -> np.ndarray:
    """Return an array or tensor [H,W], [H,W,C] or [C,H,W] as uint8 [C,H,W], C from 1 to 16; BadImage if it is none.

    Where both layouts fit, arrays have their channels last and tensors first.
    """
    values = image
    if isinstance(image, Tensor):
        values = (image.float() if image.is_floating_point() else image).detach().cpu().numpy()
    elif not isinstance(image, np.ndarray):
        needs = "a PIL image, an array or tensor, or the path or bytes of an image file"
        raise BadImage(f"is or holds no image, but a {type(image).__name__}; needs {needs}")
    first, last = (values.ndim == 3 and values.shape[axis] <= MOST_CHANNELS for axis in (0, -1))
    if not values.size or not (values.ndim == 2 or first or last):
        raise BadImage(f"has shape {[*image.shape]}; needs [H, W], [H, W, C] or [C, H, W] with 1 to {MOST_CHANNELS} channels")
    if values.ndim == 2:
        values = values[None]
    elif last and not (first and isinstance(image, Tensor)):
        values = values.transpose(2, 0, 1)
    return np.ascontiguousarray(_eight_bit(values))


def _eight_bit(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return np.where(values, np.uint8(255), np.uint8(0))
    if values.dtype.kind == "f":
        low, high = float(values.min()), float(values.max())
        if not (low > -0.01 and high < 1.01):  # filters overshoot a little; NaN is neither
            raise BadImage(f"has floats from {low:.3g} to {high:.3g}; they must lie in 0..1, not normalised")
        rounded: np.ndarray = np.rint(values.clip(0, 1) * 255).astype(np.uint8)
        return rounded
    if values.dtype in (np.uint16, np.int32):
        return from_16_bits(values)
    raise BadImage(f"has {values.dtype} pixels; needs uint8, uint16, int32 of 16 bits, or floats in 0..1")


def measured(images: Images) -> tuple[Channels, Channels]:
    """Return means and deviations, in 0..1, of the channels, which are not 3, of a sample of up to 128 images."""
    sums = np.zeros((3, images.channels))
    for row in spread(0, len(images), _MEASURED):
        with suppress(BadImage), images.source.open(row, _MOST_PIXELS) as opened:
            assert opened.bands is not None
            values = opened.bands.reshape(images.channels, -1) / 255
            sums += np.stack([np.full(len(values), values.shape[1]), values.sum(1), (values**2).sum(1)])
    mean = sums[1] / sums[0]
    std = np.sqrt(np.maximum(sums[2] / sums[0] - mean**2, _FEW**2))
    return tuple(mean.round(4).tolist()), tuple(std.round(4).tolist())


def open_dataset(dataset: Any, name: str, split: str = "train") -> Images:
    """Return the images of a data set that is handed over, or of what a function returns.

    Args:
        dataset: any with `len` and `[i]`; an array or tensor [N,H,W], [N,H,W,C] or [N,C,H,W], which stays in memory as uint8; (images,
            labels); a mapping of sets by split, such as {"train": ..., "test": ...}; or a function that returns one of these.
        name: for messages.
        split: "train", "bank" (the same) or "test"; a set that is no mapping has no test images.

    Labels are those of (images, labels), of `.targets` or `.labels`, or of a list's own items: integers, or names of classes. Of other
    sets they would cost decoding all images, and are not read.

    Raises:
        DataError: if it is none of these, has no such split, or none of its first items is an image.
    """
    if isinstance(dataset, type) or (callable(dataset) and not hasattr(dataset, "__getitem__")):
        dataset = dataset()
    if isinstance(dataset, Mapping):
        names = TEST if split == "test" else TRAIN
        if (key := next((key for key in names if key in dataset), None)) is None:
            raise DataError(f"{name}: has the parts {', '.join(map(str, dataset))}; needs one named {' or '.join(names)}")
        return open_dataset(dataset[key], f"{name}/{key}")
    if split == "test":
        raise DataError(f'{name}: has no test images; hand over a mapping {{"train": ..., "test": ...}}')
    labels, classes = _labels(dataset)
    dataset = getattr(dataset, "tensors", dataset)
    if (isinstance(dataset, tuple) and len(dataset) in (1, 2) and _is_whole(dataset[0])) or _is_pair(dataset):
        dataset = dataset[0]
    if isinstance(dataset, (str, bytes)) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        needs = "a data set with `len` and `[i]`, or an array or tensor of images [N, H, W, C] or [N, C, H, W]"
        raise DataError(f"{name}: a {type(dataset).__name__} is no data set; hand over {needs}")
    source = _pixels(dataset, name) if _is_whole(dataset) else _items(dataset, name)
    return Images(name, source, labels, classes)


def _is_whole(dataset: Any) -> bool:
    """Return whether this is one array of all images."""
    return isinstance(dataset, (np.ndarray, Tensor)) and dataset.ndim in (3, 4)


def _is_pair(dataset: Any) -> bool:
    """Return whether this is (images, labels)."""
    sized = isinstance(dataset, tuple) and len(dataset) == 2 and all(hasattr(part, "__len__") for part in dataset)
    return sized and len(dataset[0]) == len(dataset[1]) and _coded(dataset[1])[0] is not None


def _pixels(images: Any, name: str) -> Pixels:
    """Return an array or tensor of images as uint8 [N,C,H,W]: itself if it is so already."""
    row, usable = 0, isinstance(images, Tensor) or images.flags.writeable
    try:
        shape = to_bands(images[0]).shape if len(images) else (3, 1, 1)
        if images.shape[1:] == shape and str(images.dtype).endswith("uint8"):
            return Pixels(as_tensor(images if usable else images.copy()).detach().cpu().contiguous(), name)
        pixels = empty((len(images), *shape), dtype=uint8)
        for row in range(len(images)):
            pixels[row] = from_numpy(to_bands(images[row]))
    except BadImage as fault:
        raise DataError(f"{name}/{row:06}: {fault}") from fault
    return Pixels(pixels, name)


def _items(dataset: Any, name: str) -> Items:
    """Return the items of a data set, whose channels are those of the first that can be read."""
    items, faults = Items(dataset, np.arange(len(dataset)), name), list[str]()
    for row in range(min(_TRIED, len(items))):
        try:
            with open_item(items.item(row), _MOST_PIXELS) as opened:
                return replace(items, channels=opened.channels)
        except BadImage as fault:
            faults.append(f"{items.name(row)} {fault}")
    if faults:
        raise DataError(f"{name}: none of its first {len(faults)} items can be read as an image: {faults[0]}")
    return items


def _image_of(item: Any) -> Any:
    """Return the image that an item is, or holds: of a mapping under its usual name, else the first that can be one."""
    if isinstance(item, Mapping):
        item = [item[key] for key in _KEYS if key in item] or [*item.values()]
    if not isinstance(item, (tuple, list)):
        return item
    images = [part for part in item if isinstance(part, (Image.Image, bytes, Mapping)) or getattr(part, "ndim", 0) > 1]
    images += [part for part in item if isinstance(part, (str, os.PathLike))]
    return _image_of(images[0]) if images else item


def _labels(dataset: Any) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Return a data set's labels and classes, where they can be had without decoding images."""
    dataset = getattr(dataset, "tensors", dataset)  # of torch's TensorDataset
    if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):  # torch's Subset
        labels, classes = _labels(dataset.dataset)
        return labels if labels is None else labels[np.asarray(dataset.indices, np.int64)], classes
    if _is_pair(dataset):
        return _coded(dataset[1])
    if isinstance(dataset, (list, tuple)):
        return (
            _coded([_label_of(item) for item in dataset]) if len(dataset) and _label_of(dataset[0]) is not None else (None, None)
        )
    if hasattr(dataset, "column_names") and (column := next((key for key in _LABEL_KEYS if key in dataset.column_names), None)):
        return _coded(dataset[column][:], getattr(dataset.features[column], "names", None))  # Hugging Face's
    for name in ("targets", "labels"):
        values = getattr(dataset, name, None)
        if values is not None and hasattr(values, "__len__") and len(values) == len(dataset):
            return _coded(values, getattr(dataset, "classes", None))
    return None, None


def _label_of(item: Any) -> Any:
    """Return the label beside an item's image: of a tuple the second, of a mapping by its usual name."""
    if isinstance(item, Mapping):
        return next((item[key] for key in _LABEL_KEYS if key in item), None)
    return item[1] if isinstance(item, (tuple, list)) and len(item) > 1 else None


def _coded(labels: Any, classes: Any = None) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Return labels int64 [N] with the names of the classes if these are known, from integers or names; None if they are neither."""
    try:
        values = np.asarray(labels.tolist() if hasattr(labels, "tolist") else [*labels])
    except ValueError:  # of changing lengths
        return None, None
    if values.ndim != 1 or values.dtype.kind not in "iuU" or not len(values):
        return None, None
    if values.dtype.kind == "U":
        words, numbers = np.unique(values, return_inverse=True)
        return numbers.astype(np.int64), tuple(words.tolist())
    named = isinstance(classes, Sequence) and len(classes) > values.max()
    return values.astype(np.int64), tuple(map(str, classes)) if named else None
