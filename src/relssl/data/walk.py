"""What lies below a folder: every file that may be an image, by names and sizes alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from relssl.data.paths import Paths, shown
from relssl.errors import DataError

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
