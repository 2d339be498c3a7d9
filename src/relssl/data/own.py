"""Data sets that are handed over from Python: any with `len` and `[i]`, and arrays or tensors of all the images.

An item is a PIL image, an array or a tensor, the path or the bytes of an image file, a tuple that begins with one of these, or a mapping
that holds one as `image` or `img`. What files are turned into, items are too: 8 bits, upright, without transparency. PIL images, paths
and bytes are RGB; arrays and tensors have the channels that they have, 1 to 16.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import numpy as np
from PIL import Image, ImageFile
from torch import Tensor, from_numpy
from torch.utils.data import Subset, TensorDataset, get_worker_info

from relssl.data.decode import BadImage, Opened, from_16_bits, open_image, upright_rgb
from relssl.data.folder import TEST, TRAIN, judge
from relssl.data.images import Channels, Images, Pixels
from relssl.data.subsets import spread
from relssl.data.transforms import seeded
from relssl.errors import DataError, RelsslError
from relssl.settings.run import MOST_CHANNELS, LoaderConfig

_IMAGES, _LABELS = ("image", "img"), ("label", "labels", "target", "targets", "class")  # their names in mappings
_TRIED = 16  # items, until one can be read
_SAMPLE = 32  # items that the fingerprint looks at
_MEASURED = 128  # images of which means and deviations are taken
_MOST_PIXELS = LoaderConfig().max_pixels
_LEAST_STD = 1 / 255  # of a channel


@dataclass(frozen=True, eq=False)
class Items:
    """Items of a map-style data set. What an item draws at random is seeded by its position, so it is the same wherever it is read."""

    dataset: Any
    rows: np.ndarray  # int64 [N], their positions in it
    title: str  # what the name of each image begins with; its position follows
    channels: int = 3
    near: Any = None  # a copy that this process reads: files that it opens on the way must not be shared with loader processes

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:  # for loader processes that are not forked
        return {**self.__dict__, "near": None}

    def take(self, rows: np.ndarray) -> Items:
        return replace(self, rows=self.rows[rows])

    def fingerprint(self) -> str:
        """Compute 16 hex digits of the number of images and the pixels of up to 32 of them, evenly spread."""
        digest = hashlib.sha256(f"items {len(self)} ".encode())
        for row in spread(0, len(self), _SAMPLE):
            digest.update(self.beginning(row))
        return digest.hexdigest()[:16]

    def name(self, row: int) -> str:
        return f"{self.title}/{self.rows[row]:06}"

    def beginning(self, row: int) -> bytes:
        """Return size and pixels of one image, by which copies are known."""
        with suppress(BadImage), self.open(row, _MOST_PIXELS) as opened:
            pixels = np.asarray(opened.whole())
            return f"{pixels.shape} ".encode() + pixels.tobytes()
        return f"unreadable {self.name(row)}".encode()

    def marks(self) -> bytes:
        """Return a digest that changes with any image of a list: of paths by path, size and time of change, of others by content. Empty where
        code of the user's makes the images, to ask for all of which would take as long as to decode them."""
        if not isinstance(self.dataset, (list, tuple)):
            return b""
        digest = hashlib.sha256()
        for row, place in enumerate(self.rows.tolist()):
            image = _parts(self.dataset[place])[0]
            is_path = isinstance(image, (str, os.PathLike))
            digest.update(
                f"{os.fspath(image)} {judge(image)}".encode("utf-8", "surrogateescape") if is_path else self.beginning(row)
            )
        return digest.digest()

    def item(self, row: int) -> Any:
        """Return the image that one item is, or holds; BadImage if it raises or holds none."""
        place = int(self.rows[row])
        dataset = self.dataset if self.near is None or get_worker_info() else self.near
        try:
            with seeded(0, 0, place, 0):
                image = _parts(dataset[place])[0]
        except RelsslError:  # a request to stop
            raise
        except Exception as error:  # whatever a user's code raises
            raise BadImage(f"raises {repr(error)[:160]}", lasting=not isinstance(error, (OSError, MemoryError))) from error
        unread = isinstance(image, ImageFile.ImageFile) and image.tile and not image.tell()
        if unread and isinstance(self.dataset, (list, tuple)) and image.filename:
            return image.filename  # processes must not share the open file
        return image

    @contextmanager
    def open(self, row: int, max_pixels: int) -> Iterator[Opened]:
        with open_item(self.item(row), max_pixels) as opened:
            if opened.channels == 1 and self.channels == 3:
                opened = Opened.of(opened.rgb(1))
            if opened.channels != self.channels:
                raise BadImage(f"has {opened.channels} channels, where the first image has {self.channels}")
            yield opened


def open_item(image: Any, max_pixels: int) -> AbstractContextManager[Opened]:
    """Open an image of any kind that an item may be or hold; BadImage if it is none."""
    if isinstance(image, bytes):
        return open_image(lambda: image, max_pixels)
    if isinstance(image, (str, os.PathLike)):
        return open_image(os.fspath(image), max_pixels)
    opened = Opened.of(upright_rgb(image)) if isinstance(image, Image.Image) else Opened.of_bands(to_bands(image))
    if opened.size[0] * opened.size[1] > max_pixels:
        raise BadImage(f"has {opened.size[1]} x {opened.size[0]} pixels, more than max_pixels ({max_pixels})")
    return nullcontext(opened)


def to_bands(image: Any) -> np.ndarray:
    """Return an array or tensor [H,W], [H,W,C] or [C,H,W] as uint8 [C,H,W], C from 1 to 16; BadImage if it is none.

    Where both layouts fit, arrays have their channels last and tensors first. Integers may have 16 bits, floats lie in 0..1.
    """
    values = image
    if isinstance(image, Tensor):
        values = (image.float() if image.is_floating_point() else image).detach().cpu().numpy()
    elif not isinstance(image, np.ndarray):
        needs = "a PIL image, an array or tensor, or the path or bytes of an image file, as `image` or `img` in a mapping"
        raise BadImage(f"is or holds no image, but a {type(image).__name__}; needs {needs}")
    if values.ndim == 2:
        values = values[None]
    first, last = (values.ndim == 3 and values.shape[axis] <= MOST_CHANNELS for axis in (0, -1))
    if not values.size or not (first or last):
        raise BadImage(f"has shape {[*image.shape]}; needs [H, W], [H, W, C] or [C, H, W] with 1 to {MOST_CHANNELS} channels")
    if last and image.ndim == 3 and not (first and isinstance(image, Tensor)):
        values = values.transpose(2, 0, 1)
    if values.dtype.kind == "f":
        low, high = float(values.min()), float(values.max())
        if not (low > -0.01 and high < 1.01):  # filters overshoot a little; NaN is neither
            raise BadImage(f"has floats from {low:.3g} to {high:.3g}; they must lie in 0..1, not normalised")
        values = np.rint(values.clip(0, 1) * 255).astype(np.uint8)
    elif values.dtype in (np.uint16, np.int32):
        values = from_16_bits(values)
    elif values.dtype != np.uint8:
        raise BadImage(f"has {values.dtype} pixels; needs uint8, uint16, int32 of 16 bits, or floats in 0..1")
    return np.ascontiguousarray(values)


def measured(images: Images) -> tuple[Channels, Channels]:
    """Return means and deviations, in 0..1, of the channels, which are not 3, of a sample of up to 128 images."""
    moments = []
    for row in spread(0, len(images), _MEASURED):
        with suppress(BadImage), images.source.open(row, _MOST_PIXELS) as opened:
            assert opened.bands is not None
            values = opened.bands.reshape(images.channels, -1) / 255
            moments.append((values.mean(1), (values**2).mean(1)))
    mean, square = np.mean(moments, 0)
    std = np.sqrt(np.maximum(square - mean**2, _LEAST_STD**2))
    return tuple(mean.round(4).tolist()), tuple(std.round(4).tolist())


def open_dataset(dataset: Any, name: str, split: str = "train") -> Images:
    """Return the images of a split of a data set that is handed over; labels only where no image is decoded for them.

    Args:
        dataset: any with `len` and `[i]`; an array or tensor [N,H,W], [N,H,W,C] or [N,C,H,W], which stays in memory as uint8; (images,
            labels); a mapping of sets by split, such as {"train": ..., "test": ...}; or a function that returns one of these.
        name: for messages.
        split: "train", "bank" (the same) or "test", which only a mapping may have.

    Raises:
        DataError: if it is none of these, has no such split, or none of its first items is an image.
    """
    if isinstance(dataset, type) or (callable(dataset) and not hasattr(dataset, "__getitem__")):
        dataset = dataset()
    if isinstance(dataset, Mapping):
        sides = [next((key for key in names if key in dataset), None) for names in (TRAIN, TEST)]
        if (key := sides[split == "test"]) is None:
            needs = " or ".join(TEST if split == "test" else TRAIN)
            raise DataError(f"{name}: has the parts {', '.join(map(str, dataset))}; needs one named {needs}")
        images = open_dataset(dataset[key], f"{name}/{key}")
        named = [each for side in sides if side is not None and (each := _class_names(dataset[side]))]
        return _renumbered(images, tuple(dict.fromkeys(word for each in named for word in each))) if len(named) > 1 else images
    if split == "test":
        raise DataError(f'{name}: has no test images; hand over a mapping {{"train": ..., "test": ...}}')
    images, labels, classes = _labelled(dataset)
    if not _is_sized(images):
        needs = "a data set with `len` and `[i]`, or an array or tensor of images [N, H, W, C] or [N, C, H, W]"
        raise DataError(f"{name}: a {type(images).__name__} is no data set; hand over {needs}")
    is_whole = isinstance(images, (np.ndarray, Tensor)) and images.ndim in (3, 4) and len(images)
    source = _pixels(images, name) if is_whole else _items(images, name)
    return Images(name, source, *_coded(labels, classes, len(source)))


def _class_names(dataset: Any) -> tuple[str, ...]:
    """Return the names of a part's classes, none where its labels are numbers or there is more to do for them."""
    if isinstance(dataset, type) or not (isinstance(dataset, tuple) or _is_sized(dataset)):
        return ()
    images, labels, classes = _labelled(dataset)
    return (_coded(labels, classes, len(images))[1] or ()) if _is_sized(images) else ()


def _renumbered(images: Images, classes: tuple[str, ...]) -> Images:
    """Return images whose classes are those that both parts have by name, as each part has numbered its own."""
    if not images.classes or images.labels is None:
        return images
    places = np.array([*map(classes.index, images.classes), -1])
    return replace(images, labels=places[np.maximum(images.labels, -1)], classes=classes)


def _is_sized(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("__len__", "__getitem__")) and not isinstance(value, (str, bytes, Mapping))


def _pixels(images: Any, name: str) -> Pixels:
    """Return an array or tensor of images as uint8 [N,C,H,W]: itself if it is so already."""
    row = 0
    try:
        if images.shape[1:] == to_bands(images[0]).shape and str(images.dtype).endswith("uint8"):
            whole = images if isinstance(images, Tensor) else from_numpy(np.require(images, requirements=["C", "W"]))
            return Pixels(whole.detach().cpu().contiguous(), name)
        pixels = np.empty((len(images), *to_bands(images[0]).shape), np.uint8)
        for row in range(len(images)):
            pixels[row] = to_bands(images[row])
    except BadImage as fault:
        raise DataError(f"{name}/{row:06}: {fault}") from fault
    return Pixels(from_numpy(pixels), name)


def _items(dataset: Any, name: str) -> Items:
    """Return the items of a data set, whose channels are those of the first that can be read."""
    items, faults = Items(dataset, np.arange(len(dataset)), name, near=_apart(dataset)), list[str]()
    for row in range(min(_TRIED, len(items))):
        try:
            with open_item(items.item(row), _MOST_PIXELS) as opened:
                return replace(items, channels=opened.channels)
        except BadImage as fault:
            faults.append(f"{items.name(row)} {fault}")
    if faults:
        raise DataError(f"{name}: none of its first {len(faults)} items can be read as an image: {faults[0]}")
    return items


def _apart(dataset: Any) -> Any:
    """Return a copy of a data set that shares arrays, images and code with it, and none of what it opens later; None if it has none."""
    shared, buffers, file = list[Any](), list[pickle.PickleBuffer](), io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> int | None:
            is_read = isinstance(value, Image.Image) and not getattr(value, "tile", None)  # else it is read, and its file closed
            if is_read or isinstance(value, (Tensor, np.ndarray, bytes, FunctionType, type)):
                shared.append(value)
                return len(shared) - 1
            return None

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, place: Any) -> Any:
            return shared[place]

    if isinstance(dataset, (list, tuple)):
        return None
    try:
        Pickler(file, 5, buffer_callback=buffers.append).dump(dataset)
        return Unpickler(io.BytesIO(file.getbuffer()), buffers=buffers).load()
    except Exception:  # whatever a user's objects raise
        return None


def _parts(item: Any) -> tuple[Any, Any]:
    """Return the image that an item is, or holds, and the label beside it, None if there is none."""
    if isinstance(item, Mapping):
        image, label = (next((item[key] for key in keys if key in item), None) for keys in (_IMAGES, _LABELS))
        return image, label
    return (*item, None, None)[:2] if isinstance(item, (tuple, list)) else (item, None)


def _labelled(dataset: Any) -> tuple[Any, Any, Any]:
    """Return a data set's images, and its labels and names of classes where they can be had without decoding images, else None."""
    if isinstance(dataset, TensorDataset) and type(dataset).__getitem__ is TensorDataset.__getitem__:
        return dataset.tensors[0], dataset.tensors[1] if len(dataset.tensors) > 1 else None, None
    if isinstance(dataset, tuple) and len(dataset) in (1, 2) and all(map(_is_sized, dataset)):
        images, labels = (*dataset, None)[:2]
        if labels is None or getattr(images, "ndim", 0) == 4 or _coded(labels, None, len(images))[0] is not None:
            return images, labels, None  # else they are two items
    if isinstance(dataset, (list, tuple)):
        return dataset, [_parts(item)[1] for item in dataset], None
    for name in getattr(dataset, "column_names", ()):  # of Hugging Face's datasets
        if name in _LABELS:
            return dataset, dataset[name][:], getattr(dataset.features[name], "names", None)
    given: list[Any] = [getattr(dataset, name, None) for name in ("targets", "labels")]
    labels = next((each for each in given if _is_sized(each) and len(each) == len(dataset)), None)
    if labels is None and isinstance(dataset, Subset):
        _, labels, classes = _labelled(dataset.dataset)
        return dataset, labels if labels is None else [labels[row] for row in dataset.indices], classes
    return dataset, labels, getattr(dataset, "classes", None)


def _coded(labels: Any, classes: Any, count: int) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Return labels int64 [count] from integers or names, with the names of the classes if these are known; None if they are neither."""
    try:
        values = np.asarray(labels.tolist() if hasattr(labels, "tolist") else [*labels])
    except (TypeError, ValueError):  # not there, or of changing lengths
        return None, None
    if values.dtype.kind == "b" or (values.dtype.kind == "f" and (values == np.rint(values)).all()):
        values = values.astype(np.int64)
    if values.shape != (count,) or values.dtype.kind not in "iuU" or not count:
        return None, None
    if values.dtype.kind == "U":
        words, numbers = np.unique(values, return_inverse=True)
        return numbers.astype(np.int64), tuple(words.tolist())
    named = isinstance(classes, Sequence) and len(classes) > values.max()
    return values.astype(np.int64), tuple(map(str, classes)) if named else None
