"""The image files that a folder or a list file names, and what DATA may be; no torch."""

from __future__ import annotations

import hashlib
import itertools
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from relssl.data.decode import Opened
from relssl.errors import DataError
from relssl.settings.reading import nearest_word


class Files:
    """The paths of N image files below one folder, with their sizes: a source of images that are read when they are wanted.

    The names lie in one block of bytes, not as N strings: loader workers share it with their parent, where counting the
    references of a million strings would copy them into each worker. Names that are no text keep their bytes
    (`surrogateescape`), so every file can be opened again.

    Args:
        folder: what the names are relative to.
        names: path of each file below `folder`, or absolute.
        sizes: bytes of each file.
    """

    def __init__(self, folder: str, names: Sequence[bytes], sizes: Sequence[int]) -> None:
        self.folder = os.fsencode(folder)
        self.sizes = np.array(sizes, np.int64)
        self._block = b"".join(names)
        self._ends = np.cumsum([0, *map(len, names)], dtype=np.int64)

    @classmethod
    def of(cls, paths: Iterable[str]) -> Files:
        """Return files anywhere, whose sizes are looked up; one that is gone counts as empty."""
        names = [os.fsencode(path) for path in paths]
        return cls("", names, [os.path.getsize(name) if os.path.exists(name) else 0 for name in names])

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[str]:
        return map(self.name, range(len(self)))

    def name(self, row: int) -> str:
        """Return the path of one file, of the rows 0..N-1."""
        return os.fsdecode(os.path.join(self.folder, self._block[self._ends[row] : self._ends[row + 1]]))

    def names(self) -> Iterator[bytes]:
        """Yield the path of each file, relative to the folder."""
        return (self._block[start:end] for start, end in itertools.pairwise(self._ends.tolist()))

    def take(self, rows: np.ndarray) -> Files:
        """Return the files at these positions, int64 [M], in this order."""
        ends = zip(self._ends[rows].tolist(), self._ends[rows + 1].tolist(), strict=True)
        return Files(os.fsdecode(self.folder), [self._block[start:end] for start, end in ends], self.sizes[rows].tolist())

    def fingerprint(self) -> str:
        """Compute 16 hex digits that change with the count, order, names or sizes of the files, but not with where the folder lies."""
        digest = hashlib.sha256(f"files {len(self)} ".encode())
        for part in (self._ends.astype("<i8").tobytes(), self._block, self.sizes.astype("<i8").tobytes()):
            digest.update(part)
        return digest.hexdigest()[:16]

    def open(self, row: int, max_pixels: int) -> Opened:
        """Open one image, whose pixels are still to be read; BadImage if it cannot be, or has more pixels than `max_pixels`."""
        return Opened(self.name(row), max_pixels)


def shown(path: str) -> str:
    """A path for a message: as it is if that is one line of plain text, else with escapes."""
    return path if path.isprintable() else ascii(path)


Bad = list[tuple[str, str]]
Judgement = tuple[int, str | None]
Stamp = tuple[int, int, int, int]

_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


@dataclass
class Notes:
    """What a walk met besides usable files; names are bytes, relative to the folder walked.

    Attributes:
        folders: stamp of each folder walked, taken before it was listed; b"" is the folder itself, others end with a slash.
        doubtful: judgement of each link, and of each other file that cannot be an image.
        closed: reason why a folder cannot be read.
    """

    folders: dict[bytes, Stamp] = field(default_factory=dict)
    doubtful: dict[bytes, Judgement] = field(default_factory=dict)
    closed: dict[bytes, str] = field(default_factory=dict)

    def bad(self, folder: str) -> Bad:
        """(path, reason) of all that cannot be used, by the bytes of the paths."""
        faults = self.closed | {name: fault for name, (_, fault) in self.doubtful.items() if fault}
        return [(os.fsdecode(os.path.join(os.fsencode(folder), name)), faults[name]) for name in sorted(faults)]


@dataclass(frozen=True)
class Tree:
    """The usable files below a folder, by the bytes of their names, and what else was met."""

    files: Files
    notes: Notes


def survey(folder: str, extensions: frozenset[str]) -> Tree:
    """Walk a folder to its end.

    Raises:
        DataError: if the folder itself cannot be read.
    """
    notes = Notes()
    found = sorted(walk(folder, extensions, notes))
    return Tree(Files(folder, [name for name, _ in found], [size for _, size in found]), notes)


def walk(folder: str, extensions: frozenset[str], notes: Notes) -> Iterator[tuple[bytes, int]]:
    """(name below the folder, size) of each usable file, in no order; in bytes, for names need not be text.

    Links to folders are not followed, links to files only to inside the folder. Hidden files and folders are passed over.

    Raises:
        DataError: if the folder itself cannot be read.
    """
    wanted = {extension.encode() for extension in extensions}
    root = os.fsencode(folder)
    inside = inside_of(root)
    pending = [b""]
    while pending:
        below = pending.pop()
        for entry in _entries(root, below, notes):
            if is_hidden(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                pending.append(below + entry.name + b"/")
            elif b"." in entry.name and entry.name.rpartition(b".")[2].lower() in wanted:
                size, fault = judgement = judge(entry.path, inside)
                if fault or not size or entry.is_symlink():
                    notes.doubtful[below + entry.name] = judgement
                if size and not fault:
                    yield below + entry.name, size


def _entries(root: bytes, below: bytes, notes: Notes) -> Iterator[os.DirEntry[bytes]]:
    """What is in one folder, one by one, for it may hold a million files of which the caller wants the first."""
    place = os.path.join(root, below) if below else root
    try:
        notes.folders[below] = stamp(place)
        with os.scandir(place) as listed:
            yield from listed
    except OSError as error:
        if not below:
            raise DataError(f"{shown(os.fsdecode(root))}: cannot be read: {error.strerror}") from error
        notes.closed[below] = f"folder cannot be read: {error.strerror}"


def is_hidden(name: bytes) -> bool:
    """`.name`, which also covers the `._name` companions that macOS leaves; `..name` is only an odd name."""
    return name.startswith(b".") and not name.startswith(b"..")


def inside_of(root: bytes) -> bytes:
    """What the real path of everything inside a folder begins with."""
    return os.path.join(os.path.realpath(root), b"")


def stamp(folder: bytes) -> Stamp:
    """Device, inode, and times in ns of a folder, all as unsigned 64 bits: it changes when an entry comes, goes or is renamed.

    The change time is in it because the modification time can be set back, as archive programs do.
    """
    facts = os.stat(folder)
    device, inode, modified, changed = (
        value & 0xFFFF_FFFF_FFFF_FFFF for value in (facts.st_dev, facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns)
    )
    return device, inode, modified, changed


def judge(path: bytes, inside: bytes) -> Judgement:
    """(size, None) of a usable file, (0, None) of a link to a folder, (size, reason) of all that cannot be an image."""
    linked = False
    try:
        facts = os.lstat(path)
        linked = stat.S_ISLNK(facts.st_mode)
        if not linked:
            return judge_stat(facts)
        facts = os.stat(path)
    except OSError as error:
        return 0, "is a broken link" if linked else f"cannot be read: {error.strerror}"
    if stat.S_ISDIR(facts.st_mode):
        return 0, None
    if stat.S_ISREG(facts.st_mode) and not os.path.realpath(path).startswith(inside):
        return 0, "is a link to outside the folder; copy the file, or name it in a list file"
    return judge_stat(facts)


def judge_stat(facts: os.stat_result) -> Judgement:
    """The same by what the file system says of a file, links already followed."""
    if not stat.S_ISREG(facts.st_mode):
        return 0, f"is {_KINDS.get(stat.S_IFMT(facts.st_mode), 'a folder')}, not a file"
    return facts.st_size, None if facts.st_size else "is empty"


def cache_root() -> Path:
    """Return the folder of what can be computed again: $RELSSL_CACHE, else ~/.cache/relssl."""
    return Path(os.environ.get("RELSSL_CACHE") or "~/.cache/relssl").expanduser()


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

    files: Files
    labels: np.ndarray | None
    classes: tuple[str, ...] | None
    bad: Bad
    targets: np.ndarray | None = None


def data_root(root: str | None) -> str:
    """The folder of the named data sets: `root`, else $RELSSL_DATA, else ~/.cache/relssl."""
    return os.path.expanduser(root or os.environ.get("RELSSL_DATA") or "~/.cache/relssl")


def scan(folder: str, extensions: frozenset[str] = EXTENSIONS) -> tuple[Files, Bad]:
    """All image files below a folder, by the bytes of their path below it, and (path, reason) of what only looks like one.

    Links to folders are not followed, links to files only to inside the folder. Hidden files and folders are passed over.

    Raises:
        DataError: if the folder itself cannot be read.
    """
    tree = survey(folder, extensions)
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
    return Listing(Files(folder, names, sizes), *_number(words), bad)


def complete(name: str, folder: str, names: Sequence[bytes]) -> Files:
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
    return Files(folder, names, [size for size, _ in judged])


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
