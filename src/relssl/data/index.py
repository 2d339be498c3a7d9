"""What scans of folders found, kept for the next start: a million files are found again by a look at their folders.

A folder's stamp changes when an entry comes, goes or is renamed, so an index counts as long as all stamps are what they
were. What stamps cannot show is looked at anew: links and files that could not be used, each one; and of the others, which
may have been written over where they lie, the sizes of a sample.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from pathlib import Path

import numpy as np

from relssl.atomic import sweep
from relssl.data.arrays import read_arrays, write_arrays
from relssl.data.paths import Paths
from relssl.data.walk import Notes, Stamp, Tree, inside_of, judge, stamp, survey
from relssl.errors import StorageError

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
