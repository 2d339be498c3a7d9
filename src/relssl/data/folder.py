"""The image files of a folder: every image once, whatever its name, and nothing else; what is left out is counted."""

import contextlib
import os
import re
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from relssl.data.images import Fault, Files, Images
from relssl.errors import DataError, StorageError

EXTENSIONS = {  # of the formats that `decode` reads
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "avif"),
}
_APPLE_DOUBLE, _HIDDEN = "._* of macOS", "hidden"
# Kinds of pictures that are left out: one alone is worth a line.
_PICTURES = {
    *(_APPLE_DOUBLE, _HIDDEN, ".heic", ".heif", ".hif", ".dcm", ".dicom", ".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".orf"),
    *(".raf", ".rw2", ".pef", ".raw", ".psd", ".svg", ".exr", ".hdr", ".jxl", ".tga", ".fits", ".fit"),
}
# Names of the parts of a folder; the first there is wins.
TRAIN, TEST = ("train", "training"), ("val", "valid", "validation", "test", "testing")
Entry = tuple[str, int, int, str | None]  # the name of a file, its bytes, time of change in ns, and why it is no image, if so
_composed = partial(unicodedata.normalize, "NFC")


def cache_root() -> Path:
    """Return the folder of what can be computed again: $RELSSL_CACHE, else ~/.cache/relssl; StorageError if there is no home."""
    root = os.path.expanduser(os.environ.get("RELSSL_CACHE") or "~/.cache/relssl")
    if root.startswith("~"):
        raise StorageError("no home folder for caches is known here; set RELSSL_CACHE to a folder")
    return Path(root)


def shown(path: str) -> str:
    """Return a path for a message: as it is if that is one line of plain text, else with escapes."""
    return path if path.isprintable() else ascii(path)


def walk(folder: str, others: Counter[str]) -> Iterator[Entry]:
    """Yield all image files below a folder, in no order, named from there on; `others` counts other files by their endings.

    Links are followed, wherever they lead, each folder once: a loop or a second way into a folder is no image. Hidden files and folders
    are passed over. DataError if the folder itself cannot be read.
    """
    root, real = os.path.join(folder, ""), Path(os.path.realpath(folder))
    seen = {_place(each) for each in (real, *real.parents) if each.exists()}
    pending, links = [""], list[str]()
    while pending or links:
        if not pending:  # links last and in order: which of two ways into a folder is taken must not depend on the disk
            links.sort()
            pending.append(links.pop(0))
        below = pending.pop()
        try:
            if below and (place := _place(root + below)) in seen:
                yield below, 0, 0, "leads to a folder that is read already, or around this one"
                continue
            if below:
                seen.add(place)
            # One by one, for a folder may hold a million files of which the caller wants the first.
            with os.scandir(root + below) as entries:
                for entry in entries:
                    name, ending = entry.name, _ending(entry.name)
                    if _is_hidden(name):
                        if ending in EXTENSIONS:
                            others[_APPLE_DOUBLE if name.startswith("._") else _HIDDEN] += 1
                    elif _is_folder(entry):
                        (links if entry.is_symlink() else pending).append(f"{below}{name}/")
                    elif ending in EXTENSIONS:
                        yield below + name, *judge(entry.path)
                    else:
                        others[f".{ending}" if 0 < len(ending) < 9 and ending.isprintable() else "without ending"] += 1
        except OSError as error:
            if not below:
                raise DataError(f"{shown(folder)}: cannot be read: {error.strerror}") from error
            yield below, 0, 0, f"folder cannot be read: {error.strerror}"


def _ending(name: str) -> str:
    return name.lower().rpartition(".")[2] if "." in name else ""


def _is_hidden(name: str) -> bool:
    """`.name`, and so the `._name` companions that macOS leaves; `..name` is only an odd name."""
    return name.startswith(".") and not name.startswith("..")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """True for a folder and a link to one; false, without an error, for a link that leads nowhere."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir(follow_symlinks=False)


def _place(folder: str | Path) -> tuple[int, int]:
    """Return what identifies a folder by whatever way it is reached."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def judge(path: str | bytes) -> tuple[int, int, str | None]:
    """Return (bytes, time of change in ns, None) of a usable file, (0, 0, reason) of what cannot be an image."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # the latter for a name with a zero byte
        reason = f"cannot be read: {getattr(error, 'strerror', error)}"
        return 0, 0, reason if isinstance(error, ValueError) or not os.path.islink(path) else "is a broken link"
    if not stat.S_ISREG(status.st_mode):
        return 0, 0, "is not a regular file"
    return status.st_size, status.st_mtime_ns, None if status.st_size else "is empty"


def usable(entries: Iterable[Entry], bad: list[Fault]) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, size and time of change of the images among some entries; `bad` takes up the others."""
    for name, size, time, fault in entries:
        if fault is None:
            yield os.fsencode(name), size, time
        else:
            bad.append((name, fault))


def unusable(bad: Sequence[Fault]) -> list[str]:
    """Return a line on files that cannot be used, if there are any."""
    return [f"files that cannot be used: {len(bad)}, the first {shown(bad[0][0])} {bad[0][1]}"] if bad else []


def complete(name: str, folder: str, names: Sequence[str]) -> Files:
    """Return the files of an official list, relative to a folder; DataError, which names the data set, if one is missing or empty.

    Without it a figure would not be that of the data set.
    """
    bad = list[Fault]()
    files = Files.of(folder, usable(((file, *judge(os.path.join(folder, file))) for file in names), bad))
    if bad:
        raise DataError(f"{name}: lists {len(names)} images; {unusable(bad)[0]}; remove {shown(folder)} and unpack it anew")
    return files


def holds_images(folder: str) -> bool:
    """Return whether a folder can be read and holds a usable image."""
    with contextlib.suppress(DataError):
        return any(fault is None for *_, fault in walk(folder, Counter()))
    return False


def split_folders(folder: str) -> dict[str, str]:
    """Return the subfolder of "train", "bank" and "test", if there are train/ and val/ or others of these names, in small letters,
    capitals or Capitalised; else `folder`, no "test"."""

    def first(names: Sequence[str]) -> str | None:
        ways = (os.path.join(folder, way) for name in names for way in (name, name.title(), name.upper()))
        return next(filter(os.path.isdir, ways), None)

    train, test = first(TRAIN), first(TEST)
    return {"train": train, "bank": train, "test": test} if train and test else {"train": folder, "bank": folder}


def read_folder(folder: str, split: str, labelled: bool = False) -> Images:
    """Read the images of one split of a folder in the order of the bytes of their paths; what is left out is in the notes.

    Classes are the folders right below train/ and val/; those of train/ come first, so that a class met only in testing does not
    renumber them. A folder that is not split has no test images: DataError; and no classes, unless it is to be `labelled`.
    """
    sides, others, bad = split_folders(folder), Counter[str](), list[Fault]()
    if split not in sides:
        raise DataError(f"{shown(folder)}: has no test images; lay it out as train/CLASS/ and val/CLASS/ (or test/CLASS/)")
    files = Files.of(sides[split], usable(walk(sides[split], others), bad))
    files = files.take(np.array(sorted(range(len(files)), key=files.names.__getitem__), np.int64))
    bad = [(os.path.join(sides[split], name), fault) for name, fault in sorted(bad)]
    labels, classes, notes = _class_labels(files, sides.values() if "test" in sides or labelled else ())
    notes = [*_layout(folder, sides, split), *notes, *_left_out(sides[split], others, len(files)), *unusable(bad)]
    return Images(shown(folder), files, labels, classes, bad=bad, notes=tuple(notes))


def _folders(folder: str) -> list[str]:
    """Return the names of the visible folders right below one."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not _is_hidden(entry.name) and _is_folder(entry))


def _class_labels(files: Files, sides: Iterable[str]) -> tuple[np.ndarray | None, tuple[str, ...] | None, list[str]]:
    """Return the class of each file, int64 [N], -1 for none, the classes of all sides, and notes; None and None without two classes.

    Classes are in the order of their bytes; names that differ in their Unicode form alone are one.
    """
    names = (name for side in sides for name in sorted({*map(_composed, _folders(side))}, key=os.fsencode))
    rank = {name: number for number, name in enumerate(dict.fromkeys(names))}
    labels, below = np.full(len(files), -1, np.int64), defaultdict[str, set[str]](set)
    for row in range(len(files)):
        top, *inner = os.fsdecode(files.names[row]).split("/", 2)
        labels[row] = rank.get(_composed(top), -1) if inner else -1
        if len(inner) > 1:
            below[_composed(top)].add(inner[0])
    if len(rank) < 2 or (labels < 0).all():
        return None, None, []
    stray, where = int((labels < 0).sum()), os.path.basename(os.fsdecode(files.folder))
    notes = [f"in no class folder of {where}/, so without a part in evaluations: {stray} images"] if stray else []
    if deep := sorted(name for name, folders in below.items() if len(folders) > 1):
        some = ", ".join(map(shown, sorted(below[deep[0]])[:3]))
        notes.append(f"class folders that hold several folders count as one class each: {shown(deep[0])} (of {some})")
    return labels, tuple(rank), notes


def _layout(folder: str, sides: dict[str, str], split: str) -> list[str]:
    """Return what to know of how a folder is split."""
    folders = _folders(folder)
    if "test" not in sides:
        # One unpacked into a folder of its own, say. Where there are many folders, they are classes.
        for inner in (os.path.join(folder, name) for name in folders if len(folders) < 10):
            if test := split_folders(inner).get("test"):
                return [f"all of it is used, {shown(os.path.relpath(test, folder))}/ too; name {shown(inner)} to keep that apart"]
        return []
    train, test = (os.path.basename(sides[part]) for part in ("train", "test"))
    unused = [f"{shown(name)}/" for name in folders if name not in (train, test) and holds_images(os.path.join(folder, name))]
    loose = sum(_ending(name) in EXTENSIONS and not _is_hidden(name) for name in {*os.listdir(folder)} - {*folders})
    unused += [f"images beside these folders ({loose})"] if loose else []
    notes = [f"only {train}/ is used; {test}/ is its test part"] if split == "train" else []
    return [*notes, f"neither used nor the test part, which is {test}/: {', '.join(unused)}"] if unused else notes


def _left_out(folder: str, others: Counter[str], images: int) -> list[str]:
    """Return a line on the files of other kinds in a folder, if pictures are among them, or if they outnumber the images."""
    if others.total() <= images and not others.keys() & _PICTURES:
        return []
    most = others.most_common(3)
    rest = others.total() - sum(count for _, count in most)
    counts = ", ".join(f"{count} {kind}" for kind, count in most) + (f" and {rest} others" if rest else "")
    return [f"left out of {shown(os.path.basename(os.path.abspath(folder)))}/, as files of other kinds: {counts}"]


def list_lines(folder: str, images: Images | None = None) -> tuple[list[bytes], Images]:
    """Return a folder's (training) images, or `images` of it, as the lines of a list file, which stands in its place for pretraining, and
    the images.

    Each line holds the absolute path, the class folder or nothing, and the size in bytes, so that reading the list takes no
    look at the files. DataError if the folder cannot be read, or holds no image.
    """
    images = images or read_folder(folder, "train", labelled=True)
    files, lines, odd = images.source, list[bytes](), list[Fault]()
    assert isinstance(files, Files)
    words, labels = (*(images.classes or ()), ""), np.full(len(images), -1) if images.labels is None else images.labels
    for row, (label, size) in enumerate(zip(labels.tolist(), files.sizes.tolist(), strict=True)):
        if re.search("[\t\n\r]", name := files.name(row)):
            odd.append((name, "has a tab or a line break in its name"))
        else:
            lines.append(os.fsencode(f"{name}\t{words[label]}\t{size}"))
    images = replace(images, bad=[*images.bad, *odd], notes=(*images.notes, *unusable(odd)))
    if not lines:
        raise empty(images)
    return lines, images


def empty(images: Images, advice: str = "") -> DataError:
    """Return the error of a data set without an image that can be used, with the reasons and what to do."""
    reasons = "; ".join(images.notes) or "nothing is in it"
    return DataError(f"{images.name}: holds no usable image ({reasons}){advice and '; '}{advice}")
