"""The names that DATA may be: a data set of the table here, as it lies on the disk, else downloaded once, or a folder, or a list file."""

import contextlib
import os
import re
import socket
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from relssl.data import digits
from relssl.data.folder import EXTENSIONS, complete, empty, holds_images, read_folder, shown, split_folders, usable, walk
from relssl.data.hub import located, read_hub
from relssl.data.images import IMAGENET_MEAN, IMAGENET_STD, Channels, Files, Images, Pixels
from relssl.data.lists import LIST_SUFFIXES, read_list
from relssl.data.shards import listed, read_shards
from relssl.errors import ConfigError, DataError, RelsslError
from relssl.files import locked
from relssl.settings import parts
from relssl.settings.reading import nearest_word

SPLITS = ("train", "bank", "test")
IMAGENET100 = tuple(Path(__file__).with_name("imagenet100.txt").read_text("ascii").split())  # HobbitLong/CMC's list, sorted


@dataclass(frozen=True)
class NamedSet:
    """A data set known by its name; `named.toml` says what the fields mean."""

    kind: str
    reader: str = ""
    folder: str = ""
    source: str = ""  # empty for sets that are never downloaded
    parts: tuple[list[Any], ...] = ()
    mean: Channels = IMAGENET_MEAN
    std: Channels = IMAGENET_STD


# A folder of the same name is meant by `./NAME`.
SETS = TypeAdapter(dict[str, NamedSet]).validate_python(tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8")))


def load(data: str, root: str | None, split: str) -> Images:
    """Return the images that DATA names.

    Args:
        data: a name of `SETS`, a folder, a list file, hf:..., shards:..., or a part from outside, see `own.open_dataset`.
        root: where named data sets lie, see `data_root`.
        split: "train" (what pretraining uses), "bank" (training images with labels) or "test". The first two are the same but for
            stl10, whose `train` holds its unlabelled images (label -1) as well.

    Raises:
        DataError: if it is missing and cannot be downloaded, holds no image, or has no such part.
        ConfigError: for another split.
    """
    if split not in SPLITS:
        raise ConfigError(f"split: must be one of {', '.join(SPLITS)}, got {split!r} (nearest: {nearest_word(split, SPLITS)})")
    exists(data, root)
    path, (prefix, _, rest), advice = os.path.expanduser(data), data.partition(":"), ""
    if prefix == "hf":
        images = read_hub(rest, split)
    elif prefix == "shards":
        images = read_shards(rest, split)
    elif parts.is_part(data):
        from relssl.data.own import open_dataset

        images = open_dataset(parts.find("data", data), parts.title(data), split)
    elif data in SETS:
        images = _READERS[SETS[data].kind](data, data_root(root), split)
    elif os.path.isdir(path):
        images = read_voc(path, split) or read_folder(path, split)
    elif split == "test":
        raise DataError(f"{shown(data)}: a list file has no test images; use a folder with train/CLASS/ and val/CLASS/")
    else:
        images, advice = read_list(path), "paths count from the list's folder or the working folder"
    if len(images) == 0:
        raise empty(images, advice)
    return images


def sample(data: str, root: str | None, count: int) -> Images | None:
    """Return a few of the images that DATA names, at most `count` of a folder, if they lie on this machine; else None.

    Nothing is downloaded, and no large folder is read to its end.
    """
    with contextlib.suppress(DataError, ConfigError):  # what was handed over is not always at hand
        path = exists(data, root)
        if at_hand(data, root) and path and os.path.isdir(path):
            folder = split_folders(path)["train"]
            return Images(data, Files.of(folder, sorted(islice(usable(walk(folder, Counter()), []), count))))
        return load(data, root, "train") if at_hand(data, root) else None
    return None


def at_hand(data: str, root: str | None) -> bool:
    """Return whether `load` needs no download for DATA."""
    if data in SETS and SETS[data].source:
        return Path(data_root(root), SETS[data].folder or "train_32x32.mat").exists()  # SVHN's files lie in the root itself
    return not data.startswith("hf:") or exists(data, root) is not None


def data_root(root: str | None) -> str:
    """Return the folder of the named data sets: `root`, else $RELSSL_DATA, else ~/.cache/relssl."""
    return os.path.expanduser(root or os.environ.get("RELSSL_DATA") or "~/.cache/relssl")


def exists(data: str, root: str | None) -> str | None:
    """Check that DATA can be what it names, before anything slow is imported; images are not read.

    Returns:
        The folder or list file that it names, `hf:FOLDER` and `shards:PATTERN`, from the root on; None for a set that `load` may
        download, draw or call for.

    Raises:
        DataError: for a name that is not known, a path that does not exist, a folder without images, an empty list file.
    """
    path, (prefix, _, rest) = os.path.expanduser(data), data.partition(":")
    if prefix in ("hf", "shards"):
        on_disk = os.path.isabs(located(rest)[0]) if prefix == "hf" else listed(rest)
        return f"{prefix}:{os.path.abspath(os.path.expanduser(rest))}" if on_disk else None
    if parts.is_part(data) or (data in SETS and SETS[data].kind != "imagenet"):
        return None
    if data in SETS:
        path = os.path.join(data_root(root), "imagenet")
        if "test" not in split_folders(path):
            raise DataError(f"{data}: not found; put train/CLASS/ and val/CLASS/ below {shown(path)}, or set data_root")
    elif fault := _fault(data, path):
        raise DataError(f"{shown(data)}: {fault}")
    if os.path.isdir(path):
        for side in dict.fromkeys(split_folders(path).values()):
            if not holds_images(side):
                advice = "convert them, end their names in .jpg or .png, or name them in a list file"
                raise empty(read_folder(side, "train"), advice)
    return os.path.abspath(path)


def _fault(data: str, path: str) -> str | None:
    """Return why DATA is neither a folder nor a list file, and what to do; None if it is one."""
    ending, is_file, is_list = path.lower().rpartition(".")[2], os.path.isfile(path), path.lower().endswith(LIST_SUFFIXES)
    if os.path.isdir(path) or (is_list and is_file and os.path.getsize(path)):
        return None
    archives, suffixes = ("zip", "tar", "gz", "tgz", "bz2", "xz", "zst", "7z", "rar"), ", ".join(LIST_SUFFIXES)
    several = "," in data and all(map(os.path.exists, data.split(",")))
    faults = {  # the first that holds
        "is an empty list; needs the path of an image on each line": is_list and is_file,
        "images are read from disks alone; download them into a folder and name that": re.match(r"\w{2,9}:", data),
        "is an archive; unpack it and name the folder": ending in archives,
        "is a single image; name the folder that it lies in": is_file and ending in EXTENSIONS,
        f"is neither a folder of images nor a list file ({suffixes})": os.path.exists(path),
        "is a pattern; name the folder, or a list file, which `ls PATTERN > list.txt` makes": set("*?") & set(data),
        "names several folders; join them in a list file: (relssl list A; relssl list B) > list.txt": several,
        f"no such folder or list file (looked in {shown(os.getcwd())})": os.sep in data or is_list,
        f"neither a folder nor a known data set; the nearest is {nearest_word(data, SETS)} (known: {', '.join(SETS)})": True,
    }
    return next(fault for fault, holds in faults.items() if holds)


def fetch(name: str, root: str, read: Callable[..., Any]) -> Any:
    """Return `read(download=False)`, or where that fails, `read(download=True)`, which checks what it downloads by its hash.

    One process of a machine downloads while the others wait, and none waits for a dead server. DataError, which says where the files
    belong, if they are not complete and cannot be downloaded.
    """
    lock, timeout = Path(root, f".{name}.lock"), socket.getdefaulttimeout()
    if not os.access(lock, os.W_OK):  # where it is, another process may be unpacking
        with _trying():
            return read(download=False)
    try:
        if root.startswith("~"):
            raise FileNotFoundError("no home folder is known here")
        with locked(lock):
            with _trying():  # to unpack it again would change files that others read
                return read(download=False)
            socket.setdefaulttimeout(30)
            return read(download=True)
    except (MemoryError, RelsslError):  # which may be a request to stop
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{name}: not complete in {shown(os.path.join(root, SETS[name].folder))} and cannot be downloaded ({reason}); "
            f"put the files of {SETS[name].source} there, or set data_root to where they are"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


@contextlib.contextmanager
def _trying() -> Iterator[None]:
    """Pass over all errors but ours, which may be a request to stop: missing and damaged files make readers raise all sorts of them."""
    try:
        yield
    except RelsslError:
        raise
    except Exception:
        pass


def _torchvision(name: str, root: str, split: str, **options: Any) -> list[Any]:
    """Return torchvision's data sets of the parts of a split."""
    import torchvision.datasets

    entry = SETS[name]
    reader, some = getattr(torchvision.datasets, entry.reader), entry.parts[SPLITS.index(split)]
    argument = "split" if isinstance(some[0], str) else "train"
    return [fetch(name, root, partial(reader, root, **{argument: part}, **options)) for part in some]


def _read_pixels(name: str, root: str, split: str) -> Images:
    """Read a set that lies in memory, our digits or one of torchvision's, as uint8 [N, 3, H, W]."""
    import torch

    if name == "digits":
        dataset: Any = None
        pixels, labels = digits.load("test" if split == "test" else "train")
    else:
        (dataset,) = _torchvision(name, root, split)
        pixels, labels = np.asarray(dataset.data), dataset.labels if hasattr(dataset, "labels") else dataset.targets
    if pixels.ndim == 3:
        pixels = np.repeat(pixels[:, None], 3, axis=1)
    elif pixels.shape[-1] == 3:
        pixels = pixels.transpose(0, 3, 1, 2)
    elif name == "stl10":  # a transposed view, turned in place: a copy would double 2.8 GB
        pixels = pixels.transpose(0, 1, 3, 2)
        for image in pixels:
            image[:] = image.transpose(0, 2, 1).copy()
    classes = tuple(getattr(dataset, "classes", "0123456789"))
    source = Pixels(torch.from_numpy(np.ascontiguousarray(pixels)), f"{name}/{split}")
    return Images(name, source, np.asarray(labels, np.int64), classes, SETS[name].mean, SETS[name].std)


def _read_files(name: str, root: str, split: str) -> Images:
    """A set of files in the order of its official lists; its training and validation images are both train and bank."""
    folder, pets = os.path.join(root, SETS[name].folder), name == "oxford-pets"
    datasets = _torchvision(name, root, split, **({} if pets else {"loader": os.fspath}))  # a path in place of an image
    classes = {tuple(map(str, dataset.classes)) for dataset in datasets}
    if len(classes) > 1:  # torchvision numbers the classes that it meets in each part
        raise DataError(f"{name}: its parts {' and '.join(SETS[name].parts[1])} have other classes; get {shown(folder)} anew")
    pairs: list[tuple[Any, int]] = []
    for dataset in datasets:  # the reader of the pets offers no way to its lists but these
        pairs += zip(dataset._images, dataset._labels, strict=True) if pets else map(dataset.__getitem__, range(len(dataset)))
    return _listed(name, folder, [(os.path.relpath(path, folder), label) for path, label in pairs], classes.pop())


def _listed(name: str, folder: str, pairs: list[tuple[str, int]], classes: tuple[str, ...]) -> Images:
    """Return the images of a list of files, relative to a folder, and labels, all of which must be there."""
    files, labels = complete(name, folder, [file for file, _ in pairs]), np.array([label for _, label in pairs], np.int64)
    return Images(name, files, labels, classes, SETS[name].mean, SETS[name].std)


def _read_imagenet(name: str, root: str, split: str) -> Images:
    """ImageNet, or those of its images that belong to ImageNet-100."""
    images = replace(read_folder(os.path.join(root, "imagenet"), split), name=name)
    if name == "imagenet":
        return images
    if images.labels is None or images.classes is None or images.labels.min() < 0:
        raise DataError("imagenet100: every image in imagenet/ must lie in the folder of its class, imagenet/train/CLASS/")
    rank = {word: place for place, word in enumerate(IMAGENET100)}
    labels = np.array([rank.get(word, -1) for word in images.classes], np.int64)[images.labels]
    if missing := [word for word, place in rank.items() if place not in labels]:
        raise DataError(f"imagenet100: imagenet/ has no image of {missing[0]}; {len(missing)} of the 100 classes are missing")
    rows = np.flatnonzero(labels >= 0)
    return replace(images.subset(rows), labels=labels[rows], classes=IMAGENET100)


def _read_tiny_imagenet(name: str, root: str, split: str) -> Images:
    """Read the training images as train and bank, the validation images (the labels of its test images are secret) as test."""
    folder = os.path.join(root, SETS[name].folder)

    def read(download: bool) -> None:
        if download:
            from torchvision.datasets.utils import download_and_extract_archive

            download_and_extract_archive(SETS[name].source, root, md5="90528d7ca1a48142e341f4ef8d21d0de")
        for file in ("wnids.txt", "train", "val/val_annotations.txt"):
            os.stat(os.path.join(folder, file))

    fetch(name, root, read)
    rank = {word: place for place, word in enumerate(sorted(word for (word,) in _rows(1, folder, "wnids.txt")))}
    if split == "test":
        pairs = [(f"val/images/{file}", word) for file, word, *_ in _rows(6, folder, "val", "val_annotations.txt")]
    else:  # the list of each class's boxes names its images
        boxes = ((word, _rows(5, folder, "train", word, f"{word}_boxes.txt")) for word in rank)
        pairs = [(f"train/{word}/images/{file}", word) for word, rows in boxes for file, *_ in rows]
    if strange := sorted({word for _, word in pairs} - rank.keys()):
        raise DataError(f"{shown(folder)}: {shown(strange[0])} is none of the classes of wnids.txt; unpack it anew")
    return _listed(name, folder, [(file, rank[word]) for file, word in pairs], tuple(rank))


def _rows(columns: int, *path: str) -> list[list[str]]:
    """Return the lines of a list, of so many words each."""
    try:
        lines = Path(*path).read_text("utf-8", errors="surrogateescape").split("\n")
    except OSError as error:
        raise DataError(f"{shown(os.path.join(*path))}: cannot be read: {error.strerror}") from error
    rows = [line.split() for line in lines if line.strip()]
    if any(len(row) != columns for row in rows):
        raise DataError(f"{shown(os.path.join(*path))}: needs lines of {columns} words each; get the set anew")
    return rows


def read_voc(folder: str, split: str) -> Images | None:
    """Read the images of a split of a VOC folder, None of another folder; the name says which of the folder's parts that is.

    Tested is on `test` after `trainval`; on `val` after `train` where the labels of `test` were never published, as for VOC2012.
    """
    parts = [part for part in ("train", "val", "trainval", "test") if _voc_classes(folder, part)]
    if not parts or not os.path.isdir(os.path.join(folder, "JPEGImages")):
        return None
    train, test = ("trainval", "test") if "test" in parts or not {"train", "val"} <= {*parts} else ("train", "val")
    part = test if split == "test" else train
    return _read_voc_part(f"{shown(folder)} ({part})", folder, part)


def _read_voc07(name: str, root: str, split: str) -> Images:
    """Read VOC2007: `trainval`, 5,011 images, as train and bank, and `test`, 4,952 images."""
    from torchvision.datasets import VOCDetection

    part = "test" if split == "test" else "trainval"
    fetch(name, root, partial(VOCDetection, root, year="2007", image_set=part))
    return _read_voc_part(name, os.path.join(root, SETS[name].folder), part)


def _voc_classes(folder: str, part: str) -> list[str]:
    """Return the classes, sorted, that have a list for a part (train, val, trainval, test) of a VOC year."""
    lists = Path(folder, "ImageSets", "Main").glob(f"?*_{part}.txt")
    return sorted(file.name.removesuffix(f"_{part}.txt") for file in lists)


def _read_voc_part(name: str, folder: str, part: str) -> Images:
    """Read the lists of a part, one a class: all name the same images, each once, with 1 (yes), -1 (no) or 0 (difficult)."""
    classes, targets = _voc_classes(folder, part), {"1": 1, "-1": 0, "0": -1}
    if not classes:
        raise DataError(f"{name}: {shown(folder)} has no lists ImageSets/Main/CLASS_{part}.txt")
    lists = [_rows(2, folder, "ImageSets", "Main", f"{word}_{part}.txt") for word in classes]
    images = dict(lists[0])
    for word, rows in zip(classes, lists, strict=True):
        if not rows or [image for image, _ in rows] != [*images] or {sign for _, sign in rows} - targets.keys():
            others = f"the images of {classes[0]}_{part}.txt, each once, with 1, 0 or -1"
            raise DataError(f"{name}: ImageSets/Main/{shown(word)}_{part}.txt in {shown(folder)} must name {others}; get it anew")
    files = complete(name, os.path.join(folder, "JPEGImages"), [f"{image}.jpg" for image in images])
    columns = np.array([[targets[sign] for _, sign in rows] for rows in lists], np.int8)
    return Images(name, files, classes=tuple(classes), targets=np.ascontiguousarray(columns.T))


_READERS: dict[str, Callable[[str, str, str], Images]] = {  # of the name, the root of data sets, and one of `SPLITS`
    "pixels": _read_pixels,
    "files": _read_files,
    "imagenet": _read_imagenet,
    "tiny-imagenet": _read_tiny_imagenet,
    "voc07": _read_voc07,
}
