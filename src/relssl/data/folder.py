"""The image files of a folder or a list file: every image once, whatever its name, and nothing else."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from relssl.data.images import Fault, Files, Images
from relssl.errors import DataError

EXTENSIONS = frozenset(
    b"jpg jpeg jpe jfif png webp gif bmp tif tiff ppm pgm pbm pnm jp2 j2k avif".split()  # of the formats that `decode` reads
)
LIST_SUFFIXES = (".txt", ".lst")


def cache_root() -> Path:
    """Return the folder of what can be computed again: $RELSSL_CACHE, else ~/.cache/relssl."""
    return Path(os.environ.get("RELSSL_CACHE") or "~/.cache/relssl").expanduser()


def shown(path: str) -> str:
    """Return a path for a message: as it is if that is one line of plain text, else with escapes."""
    return path if path.isprintable() else ascii(path)


def scan(folder: str) -> tuple[Files, list[Fault]]:
    """List all image files below a folder, and the (path, reason) of those that only look like one, by the bytes of their paths.

    Links to folders are not followed, links to files only to inside the folder. Hidden files and folders are passed over.
    DataError if the folder itself cannot be read.
    """
    faults: dict[bytes, str] = {}
    entries = sorted(walk(folder, faults))
    bad = [(os.fsdecode(os.path.join(os.fsencode(folder), name)), faults[name]) for name in sorted(faults)]
    return Files(folder, entries), bad


def walk(folder: str, faults: dict[bytes, str]) -> Iterator[tuple[bytes, int]]:
    """Yield (name below the folder, bytes) of each usable image file as `scan` lists them, in no order.

    `faults` takes up the name of each file that cannot be used, with the reason.
    """
    root = os.fsencode(folder)
    inside = os.path.join(os.path.realpath(root), b"")
    pending = [b""]
    while pending:
        below = pending.pop()
        try:
            # One by one, for a folder may hold a million files of which the caller wants the first.
            with os.scandir(os.path.join(root, below) if below else root) as entries:
                for entry in entries:
                    if _is_hidden(entry.name):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(below + entry.name + b"/")
                    elif b"." in entry.name and entry.name.rpartition(b".")[2].lower() in EXTENSIONS:
                        size, fault = _judge(entry.path, inside if entry.is_symlink() else b"")
                        if fault:
                            faults[below + entry.name] = fault
                        elif size:
                            yield below + entry.name, size
        except OSError as error:
            if not below:
                raise DataError(f"{shown(folder)}: cannot be read: {error.strerror}") from error
            faults[below] = f"folder cannot be read: {error.strerror}"


def _is_hidden(name: bytes) -> bool:
    """`.name`, and so the `._name` companions that macOS leaves; `..name` is only an odd name."""
    return name.startswith(b".") and not name.startswith(b"..")


def _judge(path: bytes, inside: bytes = b"") -> tuple[int, str | None]:
    """Return (bytes, None) of a usable file, (0, reason) of what cannot be an image, (0, None) of a folder to pass over.

    A link that was met in a folder must lead to a path that begins with `inside`.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # the latter for a name with a zero byte
        return 0, "is a broken link" if inside else f"cannot be read: {getattr(error, 'strerror', error)}"
    if inside and stat.S_ISDIR(status.st_mode):
        return 0, None
    if not stat.S_ISREG(status.st_mode):
        return 0, "is not a regular file"
    if inside and not os.path.realpath(path).startswith(inside):
        return 0, "is a link to outside the folder; copy the file, or name it in a list file"
    return status.st_size, None if status.st_size else "is empty"


def read_list(path: str) -> Images:
    """Read a list file: a path a line, absolute or relative to the list's folder, then optionally a tab and a label.

    A third column is the size of the file in bytes; such a line is believed, which spares a look at the file. Blank lines and
    lines that begin with # are passed over. Lines may hold any bytes; a file may be named more than once, have any extension
    and lie anywhere: what is written down is meant.

    Raises:
        DataError: if the list cannot be read.
    """
    try:
        with open(path, "rb") as opened:
            lines = opened.read().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {error.strerror}") from error
    folder = os.path.dirname(path) or "."
    usable: list[tuple[bytes, int, str]] = []
    bad: list[Fault] = []
    for line in lines:
        name, word, size, *_ = (*line.removesuffix(b"\r").split(b"\t"), b"", b"")
        if not name.strip() or name.startswith(b"#"):
            continue
        count, fault = (int(size), None) if size.isdigit() else _judge(os.path.join(os.fsencode(folder), name))
        if fault:
            bad.append((os.fsdecode(name), fault))
        else:
            usable.append((name, count, word.strip().decode("utf-8", "backslashreplace")))
    images = Images(shown(path), Files(folder, [(name, size) for name, size, _ in usable]), bad=bad)
    if not (distinct := {word for *_, word in usable} - {""}):
        return images
    numeric = all(word.isascii() and word.isdigit() and len(word) < 19 for word in distinct)  # ordered as numbers
    classes = tuple(sorted(distinct, key=lambda word: (int(word), word) if numeric else (0, word)))
    rank = {word: position for position, word in enumerate(classes)} | {"": -1}
    return replace(images, labels=np.array([rank[word] for *_, word in usable], np.int64), classes=classes)


def complete(name: str, folder: str, names: Sequence[str]) -> Files:
    """Return the files of an official list, relative to a folder; DataError, which names the data set, if one is missing or empty.

    Without it a figure would not be that of the data set.
    """
    judged = [_judge(os.fsencode(os.path.join(folder, file))) for file in names]
    if bad := [(file, fault) for file, (_, fault) in zip(names, judged, strict=True) if fault]:
        unusable = f"{len(bad)} of {len(names)} images cannot be used, the first: {shown(bad[0][0])} {bad[0][1]}"
        raise DataError(f"{name}: {unusable}; remove {shown(folder)} and unpack it anew")
    return Files(folder, [(os.fsencode(file), size) for file, (size, _) in zip(names, judged, strict=True)])


def split_folders(folder: str) -> dict[str, str]:
    """Return the subfolder of "train", "bank" and "test", if there are train/ and val/, or train/ and test/; else `folder`, no "test"."""
    train = os.path.join(folder, "train")
    for test in (os.path.join(folder, "val"), os.path.join(folder, "test")):
        if os.path.isdir(train) and os.path.isdir(test):
            return {"train": train, "bank": train, "test": test}
    return {"train": folder, "bank": folder}


def class_labels(files: Files, sides: Iterable[str]) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Return the class of each file, int64 [N], and the classes, which are the folders right below some folders, by their bytes.

    None and None if a file lies in none of them, or there is but one.
    """
    rank: dict[bytes, int] = {}
    for side in sides:
        with os.scandir(os.fsencode(side)) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False) and not _is_hidden(entry.name)]
        for name in sorted(names):
            rank.setdefault(name, len(rank))
    parts = (files.relative(row).partition(b"/") for row in range(len(files)))
    labels = np.array([rank.get(top, -1) if slash else -1 for top, slash, _ in parts], np.int64)
    return (None, None) if len(rank) < 2 or (labels < 0).any() else (labels, tuple(map(os.fsdecode, rank)))


def read_folder(folder: str, split: str) -> Images:
    """Read the images of one split of a folder; labelled by the folders below if each image lies in one of several.

    A folder that is not split is pretrained on as a whole, and its folders are no classes; it has no test images: DataError.
    """
    sides = split_folders(folder)
    if split not in sides:
        raise DataError(f"{shown(folder)}: has no test images; lay it out as train/CLASS/ and val/CLASS/ (or test/CLASS/)")
    files, bad = scan(sides[split])
    # Training classes come first, so that a class met only in testing does not renumber them.
    labels, classes = class_labels(files, sides.values() if "test" in sides else ())
    return Images(shown(folder), files, labels, classes, bad=bad)


def list_lines(folder: str) -> tuple[list[bytes], list[Fault]]:
    """Return a folder's images as the lines of a list file, which stands in its place for pretraining, and what cannot be used.

    Each line holds the absolute path, the class folder or nothing, and the size in bytes, so that reading the list takes no
    look at the files. Of a folder with train/ and val/ (or test/) it is the training images.

    Raises:
        DataError: if the folder cannot be read, or holds no image.
    """
    side = split_folders(os.path.abspath(os.path.expanduser(folder)))["train"]
    files, bad = scan(side)
    labels, classes = class_labels(files, [side])
    lines = []
    for row, (name, size) in enumerate(zip(files, files.sizes.tolist(), strict=True)):
        word = "" if labels is None or classes is None else classes[labels[row]]
        line = os.fsencode(f"{name}\t{word}\t{size}")
        if line.count(b"\t") == 2 and b"\n" not in line and b"\r" not in line:
            lines.append(line)
        else:
            bad.append((name, "has a tab or a line break in its name"))
    if not lines:
        raise DataError(f"{shown(folder)}: holds no images that can be listed ({len(bad)} cannot be used)")
    return lines, bad
