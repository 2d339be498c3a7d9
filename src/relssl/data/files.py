"""Images as files: what a data set's name, folder or list file stands for, found without reading an image or importing torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from relssl.data.index import indexed
from relssl.data.paths import Paths, shown
from relssl.data.walk import Bad, Judgement, Notes, is_hidden, judge_stat, survey, walk
from relssl.errors import DataError
from relssl.schema import nearest_word

# Data sets known by name; a folder of the same name is meant by `./NAME`.
NAMES = (
    *("digits", "fashion-mnist", "cifar10", "cifar100", "stl10", "tiny-imagenet", "imagenet", "imagenet100", "svhn"),
    *("food101", "flowers102", "oxford-pets", "fgvc-aircraft", "dtd", "stanford-cars", "voc07"),
)
# Of these, the ones that lie in DATA_ROOT/imagenet, where nobody but the user can put them.
IMAGENETS = ("imagenet", "imagenet100")
EXTENSIONS = frozenset(
    {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "avif"}
)
LIST_SUFFIXES = (".txt", ".lst")


@dataclass(frozen=True)
class Listing:
    """What a list names: files, label of each as int64 [N] (-1 = none) with the classes' names, and unusable lines.

    Where images have several labels each, `targets` holds them instead: int8 [N, C], 1 yes, 0 no, -1 not told.
    """

    files: Paths
    labels: np.ndarray | None
    classes: tuple[str, ...] | None
    bad: Bad
    targets: np.ndarray | None = None


def data_root(root: str | None) -> str:
    """The folder of the named data sets: `root`, else $RELSSL_DATA, else ~/.cache/relssl."""
    return os.path.expanduser(root or os.environ.get("RELSSL_DATA") or "~/.cache/relssl")


def scan(folder: str, extensions: frozenset[str] = EXTENSIONS, *, index: bool = False) -> tuple[Paths, Bad]:
    """All image files below a folder, by the bytes of their path below it, and (path, reason) of what only looks like one.

    Links to folders are not followed, links to files only to inside the folder. Hidden files and folders are passed over.

    Args:
        index: take what an earlier scan found if the folders have not changed since, and keep what this one finds.

    Raises:
        DataError: if the folder itself cannot be read.
    """
    tree = (indexed if index else survey)(folder, extensions)
    return tree.files, tree.notes.bad(folder)


def read_list(path: str) -> Listing:
    """Read a list file: a path a line, absolute or relative to the list's folder, then optionally a tab and a label.

    Blank lines and lines that begin with # are passed over. Lines may hold any bytes; a file may be named more than once,
    have any extension and lie anywhere: what is written down is meant.

    Raises:
        DataError: if the list cannot be read.
    """
    try:
        with open(path, "rb") as opened:
            lines = opened.read().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {error.strerror}") from error
    folder = os.path.dirname(path) or "."
    names, sizes, words, bad = [], [], [], Bad()
    for line in lines:
        name, _, word = line.removesuffix(b"\r").partition(b"\t")
        if not name.strip() or name.startswith(b"#"):
            continue
        size, fault = _judge_named(os.path.join(os.fsencode(folder), name))
        if fault:
            bad.append((os.fsdecode(name), fault))
        else:
            names.append(name)
            sizes.append(size)
            words.append(word.strip().decode("utf-8", "backslashreplace"))
    return Listing(Paths(folder, names, sizes), *_number(words), bad)


def complete(name: str, folder: str, names: Sequence[bytes]) -> Paths:
    """The files of an official list, each of which must be there, or a figure would not be that of the data set.

    Args:
        name: of the data set, for the message.
        folder: what `names` are relative to.

    Raises:
        DataError: if any is missing or empty.
    """
    judged = [_judge_named(os.path.join(os.fsencode(folder), file)) for file in names]
    bad = [(os.fsdecode(file), fault) for file, (_, fault) in zip(names, judged, strict=True) if fault]
    if bad:
        raise DataError(
            f"{name}: {len(bad)} of {len(names)} images cannot be used, the first: {shown(bad[0][0])} {bad[0][1]}; "
            f"remove {shown(folder)} and unpack it anew"
        )
    return Paths(folder, names, [size for size, _ in judged])


def _judge_named(path: bytes) -> Judgement:
    try:
        return judge_stat(os.stat(path))
    except OSError as error:
        return 0, f"cannot be read: {error.strerror}"
    except ValueError:
        return 0, "cannot be read: the name holds a zero byte"


def _number(words: Sequence[str]) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Labels from the words of a label column; whole numbers are ordered as such."""
    found = set(words) - {""}
    if not found:
        return None, None
    numeric = all(word.isascii() and word.isdigit() and len(word) < 19 for word in found)
    classes = tuple(sorted(found, key=lambda word: (int(word), word) if numeric else (0, word)))
    rank = {word: position for position, word in enumerate(classes)} | {"": -1}
    return np.array([rank[word] for word in words], np.int64), classes


def split_folders(folder: str) -> dict[str, str] | None:
    """The subfolder of each of "train", "bank" and "test", if there are train/ and val/, or train/ and test/; else None."""
    train = os.path.join(folder, "train")
    for name in ("val", "test"):
        test = os.path.join(folder, name)
        if os.path.isdir(train) and os.path.isdir(test):
            return {"train": train, "bank": train, "test": test}
    return None


def class_folders(folder: str) -> list[str]:
    """Names of the folders right below, sorted by their bytes."""
    with os.scandir(os.fsencode(folder)) as entries:
        names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    return [os.fsdecode(name) for name in sorted(names) if not is_hidden(name)]


def exists(data: str, root: str | None) -> None:
    """Check that DATA can be what it names, before anything slow is imported; images are not read.

    Raises:
        DataError: for a name that is not known, a path that does not exist, a folder without images, an empty list file.
    """
    if data in NAMES and data not in IMAGENETS:
        return
    path = locate(data, root)
    if os.path.isdir(path):
        layout = split_folders(path)
        for folder in sorted(set(layout.values())) if layout else [path]:
            notes = Notes()
            if next(walk(folder, EXTENSIONS, notes), None) is None:
                bad = notes.bad(folder)
                reason = f" ({len(bad)} cannot be used; {shown(bad[0][0])} {bad[0][1]})" if bad else ""
                raise DataError(f"{shown(folder)}: holds no images{reason}; needs files such as .jpg or .png")
    elif os.path.splitext(path)[1].lower() not in LIST_SUFFIXES or not os.path.isfile(path):
        raise DataError(f"{shown(path)}: is neither a folder of images nor a list file ({' or '.join(LIST_SUFFIXES)})")
    elif os.path.getsize(path) == 0:
        raise DataError(f"{shown(path)}: is an empty list; needs the path of an image on each line")


def locate(data: str, root: str | None) -> str:
    """The path of a folder, a list file or the names of `IMAGENETS`.

    Raises:
        DataError: if there is nothing there; says where it was looked for and what name may have been meant.
    """
    if data in IMAGENETS:
        path = os.path.join(data_root(root), "imagenet")
        if split_folders(path) is None:
            raise DataError(f"{data}: not found; put train/CLASS/ and val/CLASS/ below {shown(path)}, or set data_root")
        return path
    path = os.path.expanduser(data)
    if "\0" not in path and os.path.exists(path):
        return path
    if any(separator in data for separator in (os.sep, os.altsep) if separator) or data.lower().endswith(LIST_SUFFIXES):
        raise DataError(f"{shown(data)}: no such folder or list file (looked in {shown(os.getcwd())})")
    guess = nearest_word(data, NAMES)
    raise DataError(f"{shown(data)}: neither a folder nor a known data set; the nearest is {guess} (known: {', '.join(NAMES)})")
