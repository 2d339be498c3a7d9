"""Named arrays in one file that is read whole as it was written, or not at all; no pickle."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from relssl.errors import DataError, StorageError
from relssl.files import replacing, sweep, write_all
from relssl.settings.reading import nearest_word

# Followed by the SHA-256 of the rest: 8 bytes of length, a header in JSON, then the arrays one after another.
_MAGIC = b"relssl arrays 1\n"


def write_arrays(path: Path, kind: str, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray], mode: int = 0o644) -> None:
    """Write arrays and JSON facts to `path`, over whatever lies there.

    Args:
        kind: what the file is and the version of its layout; only a reader that asks for the same gets it.
        mode: permissions of the file.

    Raises:
        StorageError: if it cannot be written; an older file is still there then.
    """
    packed = {name: np.ascontiguousarray(array, array.dtype.newbyteorder("<")) for name, array in arrays.items()}
    layout = {name: [array.dtype.str, list(array.shape)] for name, array in packed.items()}
    header = json.dumps({"kind": kind, "facts": facts, "arrays": layout}).encode("ascii")
    parts = [memoryview(len(header).to_bytes(8, "little") + header)]
    parts += [array.reshape(-1).view(np.uint8).data for array in packed.values()]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    with replacing(path, sum(map(len, parts)), mode) as file:
        for part in [memoryview(_MAGIC + digest.digest()), *parts]:
            write_all(file.fileno(), part)


def read_arrays(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """The facts and arrays of a file, read-only; None if there is none, it is damaged, or of another kind."""
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                return None
            digest, start = file.read(32), file.tell()
            if hashlib.file_digest(file, "sha256").digest() != digest:
                return None
            file.seek(start)
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            if header["kind"] != kind:
                return None
            arrays = {}
            for name, (kept, shape) in header["arrays"].items():
                dtype = np.dtype(kept)
                arrays[name] = np.frombuffer(file.read(dtype.itemsize * math.prod(shape)), dtype).reshape(shape)
            return header["facts"], arrays
    except OSError:
        return None


class Paths(Sequence[str]):
    """The paths of N files below one folder, with their sizes.

    They are held in one block of bytes, not as N strings: loader workers share it with their parent, where counting the
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
    def from_arrays(cls, folder: str, arrays: Mapping[str, np.ndarray]) -> Paths:
        """The paths that `to_arrays` gave, below any folder."""
        made = cls(folder, [], [])
        made.sizes, made._ends, made._block = arrays["sizes"], arrays["ends"], arrays["names"].tobytes()
        return made

    @classmethod
    def of(cls, files: Sequence[str]) -> Paths:
        """Files anywhere, whose sizes are looked up; OSError if one is gone."""
        return cls("", [os.fsencode(file) for file in files], [os.stat(file).st_size for file in files])

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All but the folder: the "names" joined, uint8, where they end, "ends" int64 [N+1], and "sizes" int64 [N]."""
        return {"names": np.frombuffer(self._block, np.uint8), "ends": self._ends, "sizes": self.sizes}

    def __len__(self) -> int:
        return len(self.sizes)

    def names(self) -> Iterator[bytes]:
        """The names of all files, relative to the folder."""
        return (self._block[start:end] for start, end in itertools.pairwise(self._ends.tolist()))

    def name(self, index: int) -> bytes:
        """The name of one file, relative to the folder."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self._block[self._ends[index] : self._ends[index + 1]]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Paths: ...
    def __getitem__(self, index: int | slice) -> str | Paths:
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        return os.fsdecode(os.path.join(self.folder, self.name(index)))

    def take(self, indices: Sequence[int] | np.ndarray) -> Paths:
        """The files at these positions, in this order."""
        rows = [int(index) for index in indices]
        return Paths(os.fsdecode(self.folder), [self.name(row) for row in rows], [int(self.sizes[row]) for row in rows])

    def fingerprint(self) -> str:
        """16 hex digits that change with the count, order, names or sizes of the files, but not with where the folder lies."""
        digest = hashlib.sha256(f"files {len(self)} ".encode())
        for part in (self._ends.astype("<i8").tobytes(), self._block, self.sizes.astype("<i8").tobytes()):
            digest.update(part)
        return digest.hexdigest()[:16]


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

    files: Paths
    notes: Notes


def survey(folder: str, extensions: frozenset[str]) -> Tree:
    """Walk a folder to its end.

    Raises:
        DataError: if the folder itself cannot be read.
    """
    notes = Notes()
    found = sorted(walk(folder, extensions, notes))
    return Tree(Paths(folder, [name for name, _ in found], [size for _, size in found]), notes)


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


_KIND = "index 1"
_KEPT = 32
# Files whose size is looked at before an index is believed; a folder of no more than that is scanned as fast.
_SAMPLE = 1000
# Clocks of file systems tick as coarsely as two seconds: in a folder that changed less than this before it was listed, one
# more change might leave the same stamp.
_SETTLED_NS = 5_000_000_000


def cache_root() -> Path:
    """The folder of what can be made again: $RELSSL_CACHE, else ~/.cache/relssl."""
    return Path(os.environ.get("RELSSL_CACHE") or "~/.cache/relssl").expanduser()


def indexed(folder: str, extensions: frozenset[str]) -> Tree:
    """What `survey` gives, from the index where that is still true; one that cannot be read or written does without a word.

    Raises:
        DataError: if the folder itself cannot be read.
    """
    known = _path(folder, extensions)
    tree = _recall(known, folder)
    if tree is None:
        begun = time.time_ns()
        tree = survey(folder, extensions)
        if _trusted(tree, begun):
            with contextlib.suppress(StorageError, OSError):
                _remember(known, tree)
    return tree


def _path(folder: str, extensions: frozenset[str]) -> Path:
    """One file a folder, so that a new index replaces the old."""
    asked = b"\0".join([os.path.realpath(os.fsencode(folder)), *sorted(extension.encode() for extension in extensions)])
    return cache_root() / "index" / f"{hashlib.sha256(asked).hexdigest()[:32]}.index"


def _trusted(tree: Tree, begun: int) -> bool:
    """Whether a later look at the stamps would show every change, and the files are too many to scan each time."""
    settled = all(max(modified, changed) < begun - _SETTLED_NS for _, _, modified, changed in tree.notes.folders.values())
    return settled and not tree.notes.closed and len(tree.files) > _SAMPLE


def _remember(path: Path, tree: Tree) -> None:
    notes, folder = tree.notes, os.fsdecode(tree.files.folder)
    reasons = sorted({fault for _, fault in notes.doubtful.values() if fault})
    number = {reason: position for position, reason in enumerate(reasons)} | {None: -1}
    names = {
        "files": tree.files,
        "doubtful": Paths(folder, list(notes.doubtful), [size for size, _ in notes.doubtful.values()]),
        "folders": Paths(folder, list(notes.folders), [0] * len(notes.folders)),
    }
    arrays = {f"{part}.{name}": array for part, paths in names.items() for name, array in paths.to_arrays().items()}
    arrays["doubtful.reasons"] = np.array([number[fault] for _, fault in notes.doubtful.values()], np.int64)
    arrays["folders.stamps"] = np.array(list(notes.folders.values()), np.uint64).reshape(-1, 4)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_arrays(path, _KIND, {"reasons": reasons}, arrays, mode=0o600)  # names of files are nobody else's business
    sweep(path.parent)
    _prune(path.parent)


def _prune(folder: Path) -> None:
    """Remove all indexes but those used last; another process may do so at the same time."""
    ages = []
    for path in folder.glob("*.index"):
        with contextlib.suppress(OSError):
            ages.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(ages)[:-_KEPT]:
        path.unlink(missing_ok=True)


def _recall(path: Path, folder: str) -> Tree | None:
    """The tree of an index, if nothing has changed since."""
    found = read_arrays(path, _KIND)
    if found is None:
        return None
    facts, arrays = found
    parts: dict[str, dict[str, np.ndarray]] = {"files": {}, "doubtful": {}, "folders": {}}
    for name, array in arrays.items():
        part, _, own = name.partition(".")
        parts[part][own] = array
    files, doubtful, folders = (Paths.from_arrays(folder, held) for held in parts.values())
    reasons = [*facts["reasons"], None]  # -1 is the last
    faults = [reasons[number] for number in parts["doubtful"]["reasons"]]
    judged = zip(doubtful.sizes.tolist(), faults, strict=True)
    stamps: list[Stamp] = [(a, b, c, d) for a, b, c, d in parts["folders"]["stamps"].tolist()]
    notes = Notes(dict(zip(folders.names(), stamps, strict=True)), dict(zip(doubtful.names(), judged, strict=True)))
    tree = Tree(files, notes)
    if not _is_unchanged(tree):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # used last
    return tree


def _is_unchanged(tree: Tree) -> bool:
    root, files = tree.files.folder, tree.files
    try:
        for below, known in tree.notes.folders.items():
            if stamp(os.path.join(root, below) if below else root) != known:
                return False
        inside = inside_of(root)
        for name, judgement in tree.notes.doubtful.items():
            if judge(os.path.join(root, name), inside) != judgement:
                return False
        for row in np.linspace(0, len(files) - 1, min(_SAMPLE, len(files))).astype(np.int64).tolist():
            facts = os.stat(os.path.join(root, files.name(row)))
            if not stat.S_ISREG(facts.st_mode) or facts.st_size != files.sizes[row]:
                return False
    except OSError:
        return False
    return True


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
