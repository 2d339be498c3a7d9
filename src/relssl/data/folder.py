"""The image files of a folder: every image once, whatever its name, and nothing else; what is left out is counted."""

from __future__ import annotations

import contextlib
import os
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from relssl.data.images import Fault, Files, Images
from relssl.errors import DataError, StorageError

EXTENSIONS = frozenset(
    b"jpg jpeg jpe jfif png webp gif bmp tif tiff ppm pgm pbm pnm jp2 j2k avif".split()  # of the formats that `decode` reads
)
# Endings of pictures that it does not read: one alone is worth a line.
_OTHER_PICTURES = frozenset(
    b"heic heif hif dcm dicom dng cr2 cr3 nef nrw arw orf raf rw2 pef raw psd svg exr hdr jxl tga fits fit".split()
)
_APPLE_DOUBLE, _HIDDEN = "._* of macOS", "hidden"
# Names of the parts of a folder; the first there is wins.
TRAIN, TEST = ("train", "training"), ("val", "valid", "validation", "test", "testing")


def cache_root() -> Path:
    """Return the folder of what can be computed again: $RELSSL_CACHE, else ~/.cache/relssl; StorageError if there is no home."""
    root = os.path.expanduser(os.environ.get("RELSSL_CACHE") or "~/.cache/relssl")
    if root.startswith("~"):
        raise StorageError("no home folder for caches is known here; set RELSSL_CACHE to a folder")
    return Path(root)


def shown(path: str) -> str:
    """Return a path for a message: as it is if that is one line of plain text, else with escapes."""
    return path if path.isprintable() else ascii(path)


@dataclass
class LeftOut:
    """The entries that `walk` passes over.

    Attributes:
        faults: by name, why an image file or a folder cannot be used.
        kinds: how many files there are of each ending that is not read.
    """

    faults: dict[bytes, str] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)

    def counts(self) -> str:
        """Return `200 .heic, 3 .dcm and 5 others`."""
        most = self.kinds.most_common(3)
        others = self.kinds.total() - sum(count for _, count in most)
        return ", ".join(f"{count} {kind}" for kind, count in most) + (f" and {others} others" if others else "")

    def note(self, folder: str, images: int) -> list[str]:
        """Return a line on the kinds in a folder that are not read, if pictures are among them, or if they outnumber the images."""
        pictures = any(kind in (_APPLE_DOUBLE, _HIDDEN) or kind[1:].encode() in _OTHER_PICTURES for kind in self.kinds)
        if self.kinds.total() <= images and not pictures:
            return []
        return [f"left out of {folder}/, as files of other kinds: {self.counts()}"]


def scan(folder: str) -> tuple[Files, LeftOut]:
    """List all image files below a folder by the bytes of their paths, and what is left out.

    Links are followed, wherever they lead, each folder once: loops and second ways into a folder are left out. Hidden files and
    folders are passed over. DataError if the folder itself cannot be read.
    """
    left = LeftOut()
    files = Files.of(folder, walk(folder, left))
    return files.take(np.array(sorted(range(len(files)), key=files.names.__getitem__), np.int64)), left


def walk(folder: str, left: LeftOut) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name below the folder, bytes, time of change) of each usable image file as `scan` lists them, in no order; `left` takes
    up the others."""
    root = os.fsencode(folder)
    above, inside = Path(os.path.realpath(folder)), os.path.join(root, b"")
    seen = {_place(os.fsencode(each)) for each in (above, *above.parents) if each.exists()}
    pending, links = [b""], list[bytes]()
    while pending or links:
        if not pending:  # links last and in order: which of two ways into a folder is taken must not depend on the disk
            links.sort()
            pending.append(links.pop(0))
        below = pending.pop()
        try:
            if below:
                if (place := _place(inside + below)) in seen:
                    left.faults[below] = "leads to a folder that is read already, or around this one"
                    continue
                seen.add(place)
            # One by one, for a folder may hold a million files of which the caller wants the first.
            with os.scandir(inside + below) as entries:
                for entry in entries:
                    name = entry.name
                    ending = name.rpartition(b".")[2].lower() if b"." in name else b""
                    if _is_hidden(name):
                        if ending in EXTENSIONS:
                            left.kinds[_APPLE_DOUBLE if name.startswith(b"._") else _HIDDEN] += 1
                    elif _is_folder(entry):
                        (links if entry.is_symlink() else pending).append(below + name + b"/")
                    elif ending not in EXTENSIONS:
                        kind = f".{ending.decode('ascii', 'replace')}" if 0 < len(ending) < 9 else "without ending"
                        left.kinds[kind] += 1
                    else:
                        size, time, fault = judge(entry.path)
                        if fault:
                            left.faults[below + name] = fault
                        else:
                            yield below + name, size, time
        except OSError as error:
            if not below:
                raise DataError(f"{shown(folder)}: cannot be read: {error.strerror}") from error
            left.faults[below] = f"folder cannot be read: {error.strerror}"


def _is_hidden(name: bytes) -> bool:
    """`.name`, and so the `._name` companions that macOS leaves; `..name` is only an odd name."""
    return name.startswith(b".") and not name.startswith(b"..")


def _is_folder(entry: os.DirEntry[Any]) -> bool:
    """True for a folder and a link to one; false, without an error, for a link that leads nowhere."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir(follow_symlinks=False)


def _place(folder: bytes | str) -> tuple[int, int]:
    """Return what identifies a folder by whatever way it is reached."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def judge(path: bytes) -> tuple[int, int, str | None]:
    """Return (bytes, time of change in ns, None) of a usable file, (0, 0, reason) of what cannot be an image."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # the latter for a name with a zero byte
        reason = f"cannot be read: {getattr(error, 'strerror', error)}"
        return 0, 0, reason if isinstance(error, ValueError) or not os.path.islink(path) else "is a broken link"
    if not stat.S_ISREG(status.st_mode):
        return 0, 0, "is not a regular file"
    return status.st_size, status.st_mtime_ns, None if status.st_size else "is empty"


def complete(name: str, folder: str, names: Sequence[str]) -> Files:
    """Return the files of an official list, relative to a folder; DataError, which names the data set, if one is missing or empty.

    Without it a figure would not be that of the data set.
    """
    judged = [judge(os.fsencode(os.path.join(folder, file))) for file in names]
    if bad := [(file, fault) for file, (*_, fault) in zip(names, judged, strict=True) if fault]:
        unusable = f"{len(bad)} of {len(names)} images cannot be used, the first: {shown(bad[0][0])} {bad[0][1]}"
        raise DataError(f"{name}: {unusable}; remove {shown(folder)} and unpack it anew")
    return Files.of(folder, ((os.fsencode(file), size, time) for file, (size, time, _) in zip(names, judged, strict=True)))


def split_folders(folder: str) -> dict[str, str]:
    """Return the subfolder of "train", "bank" and "test", if there are train/ and val/ or others of these names, in small letters,
    capitals or Capitalised; else `folder`, no "test"."""

    def first(names: Sequence[str]) -> str | None:
        ways = (os.path.join(folder, way) for name in names for way in (name, name.title(), name.upper()))
        return next(filter(os.path.isdir, ways), None)

    train, test = first(TRAIN), first(TEST)
    return {"train": train, "bank": train, "test": test} if train and test else {"train": folder, "bank": folder}


def class_labels(files: Files, sides: Iterable[str]) -> tuple[np.ndarray | None, tuple[str, ...] | None, list[str]]:
    """Return the class of each file, int64 [N], the classes, and what to know of them.

    Classes are the folders right below some folders, by their bytes; names that differ in their Unicode form alone are one. Files in
    none of them have label -1. None and None if all are, or if there is but one class.
    """
    rank: dict[str, int] = {}
    for side in sides:
        with os.scandir(os.fsencode(side)) as entries:
            names = {_class_name(entry.name) for entry in entries if not _is_hidden(entry.name) and _is_folder(entry)}
        for name in sorted(names, key=os.fsencode):
            rank.setdefault(name, len(rank))
    labels, below = np.full(len(files), -1, np.int64), defaultdict[str, set[bytes]](set)
    for row in range(len(files)):
        top, slash, rest = files.names[row].partition(b"/")
        if slash:
            labels[row] = rank.get(name := _class_name(top), -1)
            if b"/" in rest:
                below[name].add(rest.partition(b"/")[0])
    if len(rank) < 2 or (labels < 0).all():
        return None, None, []
    stray = int((labels < 0).sum())
    where = os.path.basename(os.fsdecode(files.folder))
    notes = [f"in no class folder of {where}/, so without a part in evaluations: {stray} images"] if stray else []
    if deep := sorted(name for name, folders in below.items() if len(folders) > 1):
        inner = ", ".join(shown(os.fsdecode(each)) for each in sorted(below[deep[0]])[:3])
        notes.append(f"class folders that hold several folders count as one class each: {shown(deep[0])} (of {inner})")
    return labels, tuple(rank), notes


def _class_name(name: bytes) -> str:
    return unicodedata.normalize("NFC", os.fsdecode(name))


def read_folder(folder: str, split: str) -> Images:
    """Read the images of one split of a folder; labelled by the folders below where images lie in several.

    A folder that is not split is pretrained on as a whole, and its folders are no classes; it has no test images: DataError.
    """
    sides = split_folders(folder)
    if split not in sides:
        raise DataError(f"{shown(folder)}: has no test images; lay it out as train/CLASS/ and val/CLASS/ (or test/CLASS/)")
    # Training classes come first, so that a class met only in testing does not renumber them.
    return _read(folder, sides, split, sides.values() if "test" in sides else ())


def _read(folder: str, sides: dict[str, str], split: str, classes_of: Iterable[str]) -> Images:
    """Read the images of one side of a folder, labelled by the class folders of some sides, with notes on what is left out."""
    files, left = scan(sides[split])
    labels, classes, notes = class_labels(files, classes_of)
    bad = [(os.fsdecode(os.path.join(files.folder, name)), left.faults[name]) for name in sorted(left.faults)]
    kinds = left.note(shown(os.path.basename(os.path.normpath(sides[split]))), len(files))
    notes = [*_parts(folder, sides, split), *notes, *kinds, *unusable(bad)]
    return Images(shown(folder), files, labels, classes, bad=bad, notes=tuple(notes))


def unusable(bad: Sequence[Fault]) -> list[str]:
    """Return a line on files that cannot be used, if there are any."""
    return [f"files that cannot be used: {len(bad)}, the first {shown(bad[0][0])} {bad[0][1]}"] if bad else []


def _parts(folder: str, sides: dict[str, str], split: str) -> list[str]:
    """Return what to know of how a folder is split."""
    with os.scandir(folder) as entries:
        visible = {entry.name: _is_folder(entry) for entry in entries if not _is_hidden(os.fsencode(entry.name))}
    folders = sorted(name for name, is_folder in visible.items() if is_folder)
    if "test" not in sides:
        # One unpacked into a folder of its own, say. Where there are many folders, they are classes.
        for name in folders if len(folders) < 10 else ():
            if test := split_folders(os.path.join(folder, name)).get("test"):
                inner = os.path.join(name, os.path.basename(test))
                return [f"all of it is used, {shown(inner)}/ too; name {shown(os.path.join(folder, name))} to keep that apart"]
        return []
    used = {os.path.basename(side) for side in sides.values()}
    train, test = (os.path.basename(sides[part]) for part in ("train", "test"))
    beside = [f"{shown(name)}/" for name in folders if name not in used and _holds_images(os.path.join(folder, name))]
    loose = sum(os.fsencode(name).rpartition(b".")[2].lower() in EXTENSIONS for name in visible.keys() - {*folders})
    beside += [f"images beside these folders ({loose})"] if loose else []
    notes = [f"only {train}/ is used; {test}/ is its test part"] if split == "train" else []
    return [*notes, f"neither used nor the test part, which is {test}/: {', '.join(beside)}"] if beside else notes


def _holds_images(folder: str) -> bool:
    with contextlib.suppress(DataError):
        return next(walk(folder, LeftOut()), None) is not None
    return False


def list_lines(folder: str) -> tuple[list[bytes], Images]:
    """Return a folder's images as the lines of a list file, which stands in its place for pretraining, and the images.

    Each line holds the absolute path, the class folder or nothing, and the size in bytes, so that reading the list takes no
    look at the files. Of a folder with train/ and val/ (or test/) it is the training images.

    Raises:
        DataError: if the folder cannot be read, or holds no image.
    """
    folder = os.path.abspath(os.path.expanduser(folder))
    sides = split_folders(folder)
    images = _read(folder, sides, "train", [sides["train"]])
    lines, odd = list[bytes](), list[Fault]()
    files, labels = images.source, np.full(len(images), -1) if images.labels is None else images.labels
    assert isinstance(files, Files)
    for name, label, size in zip(files, labels.tolist(), files.sizes.tolist(), strict=True):
        word = images.classes[label] if images.classes and label >= 0 else ""
        line = os.fsencode(f"{name}\t{word}\t{size}")
        if line.count(b"\t") == 2 and b"\n" not in line and b"\r" not in line:
            lines.append(line)
        else:
            odd.append((name, "has a tab or a line break in its name"))
    images = replace(images, bad=[*images.bad, *odd], notes=(*images.notes, *unusable(odd)))
    if not lines:
        raise DataError(f"{images.name}: holds no images that can be listed ({'; '.join(images.notes) or 'it is empty'})")
    return lines, images
