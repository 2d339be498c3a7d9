"""Shards: images inside tar files in WebDataset's layout, each read where it lies, by an index that is made once.

A sample's members share the path up to the first dot of the base name: `a/7.jpg`, `a/7.cls` and `a/7.seg.png`. An image is a member whose
whole ending is that of one, its label the text of `.cls`, or `label` in `.json`.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import BinaryIO

import numpy as np

from relssl.data.decode import BadImage, open_regular
from relssl.data.folder import EXTENSIONS, TEST, TRAIN, cache_root, shown
from relssl.data.images import Images, Names, Stored, class_labels, table
from relssl.errors import DataError, StorageError
from relssl.files import locked, read_arrays, replacing

_LABEL_BYTES = 1 << 16  # of a member that may hold a label


@dataclass(frozen=True, eq=False)
class Shards(Stored):
    """N images inside uncompressed tar files; names are those of the members, and `times` has one of each tar file."""

    shards: np.ndarray  # int64 [N], the position of each image's tar file,
    offsets: np.ndarray  # and where in it the image begins
    paths: tuple[str, ...]  # of the tar files
    lengths: np.ndarray  # int64 [shards], their sizes in bytes
    columns = ("names", "sizes", "shards", "offsets")

    def name(self, row: int) -> str:
        return f"{self.paths[self.shards[row]]}/{os.fsdecode(self.names[row])}"

    def read(self, row: int, at_most: int | None = None) -> bytes:
        shard, count = self.shards[row], min(int(self.sizes[row]), at_most or 1 << 62)
        with open(self.paths[shard], "rb", buffering=0, opener=open_regular) as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != (self.lengths[shard], self.times[shard]):
                raise BadImage("lies in a shard that has changed since the run began")
            data = os.pread(file.fileno(), count, int(self.offsets[row]))
        if not data or len(data) < count:
            raise BadImage("is cut off, or empty")
        return data


def listed(pattern: str) -> list[str]:
    """Return the tar files that a pattern names: with * and ?, {0000..0012}, or a folder, which stands for all in it.

    Raises:
        DataError: if there are none, or if one of a range is missing.
    """
    pattern = os.path.expanduser(pattern)
    pattern = os.path.join(glob.escape(pattern), "*.tar") if os.path.isdir(pattern) else pattern
    paths = {each: sorted(glob.glob(each, recursive=True)) for each in _ranges(pattern)}
    missing = [each for each, some in paths.items() if not some or not all(map(os.path.exists, some))]
    if missing := missing or [pattern] * (not paths):  # of a range that runs backwards
        usage = "shards are named as shards:FOLDER, or shards:'FOLDER/part-{000..127}.tar'"
        raise DataError(f"{shown(missing[0])}: no such shard; {usage}")
    return [*chain(*paths.values())]


def _ranges(pattern: str) -> Iterator[str]:
    """Yield a pattern for each combination of the numbers in {first..last}."""
    if not (match := re.search(r"\{(\d+)\.\.(\d+)\}", pattern)):
        yield pattern
        return
    for number in range(int(match[1]), int(match[2]) + 1):
        yield from _ranges(f"{pattern[: match.start()]}{number:0{len(match[1])}}{pattern[match.end() :]}")


def read_shards(pattern: str, split: str) -> Images:
    """Read the images of one split of shards.

    Shards that have train in their names or folders are trained on, those with val (or valid, validation, test) tested; else all are
    trained on. Classes are those of all shards.

    Raises:
        DataError: if a shard is missing, is no tar file, or there is no test part.
    """
    paths = listed(pattern)
    images = _indexed(paths, f"shards:{shown(pattern)}")
    assert isinstance(images.source, Shards)
    root = len(os.path.commonpath([*map(os.path.dirname, paths)]))
    words = [{*re.split("[^a-z]+", path[root:].lower())} for path in paths]
    side = next((name for name in TEST if any(name in each for each in words)), None)
    if side is None or not any(each & {*TRAIN} for each in words):
        if split == "test":
            raise DataError(f"{images.name}: has no test images; have train and val in the names of the shards")
        return images
    chosen = np.array([side in each if split == "test" else not each & {*TEST} for each in words])
    note = f"{chosen.sum()} of {len(paths)} shards are trained on; those of {side} are the test part"
    notes = (*images.notes, note) if split == "train" else images.notes
    return replace(images.subset(np.flatnonzero(chosen[images.source.shards])), notes=notes)


def _indexed(paths: list[str], name: str) -> Images:
    """Return the images of shards, by an index that lies in `cache_root()`, under a key of their paths, sizes and times of change.

    One process makes it.
    """
    status = [*map(os.stat, paths)]
    lengths, times = np.array([(each.st_size, each.st_mtime_ns) for each in status], np.int64).T
    key = hashlib.sha256("\n".join(["2", *map(os.path.abspath, paths)]).encode("utf-8", "surrogateescape"))
    key.update(lengths.tobytes() + times.tobytes())
    index, notes = dict[str, np.ndarray](), list[str]()
    try:
        file = cache_root() / "shards" / f"{key.hexdigest()[:24]}.npz"
        with locked(file.with_suffix(".lock")):
            if not (index := read_arrays(file) or {}):
                index = _index(paths)
                with replacing(file) as opened:
                    np.savez(opened, **index)  # type: ignore[arg-type]
    except StorageError as error:
        notes, index = [f"the index of the shards is not kept: {error}"], index or _index(paths)
    names, sizes, shards = Names(index["block"], index["ends"]), index["sizes"], index["shards"]
    source = Shards(names, sizes, times, shards, index["offsets"], tuple(paths), lengths)
    labels, classes = (index["labels"], tuple(index["classes"].tolist())) if len(index["classes"]) else (None, None)
    return Images(name, source, labels, classes, notes=(*notes, *index["notes"].tolist()))


def _index(paths: list[str]) -> dict[str, np.ndarray]:
    """Read the headers of all members."""
    words, left, notes = dict[bytes, int](), Counter[str](), list[str]()

    def rows() -> Iterator[tuple[bytes, int, int, int, int]]:
        for number, path in enumerate(paths):
            images, labels = list[tuple[str, str, int, int]](), dict[str, bytes]()
            try:
                with open(path, "rb", opener=open_regular) as file:
                    for name, key, ending, offset, size in _members(file):
                        if ending in EXTENSIONS:
                            images.append((name, key, offset, size))
                        elif ending in ("cls", "json") and size <= _LABEL_BYTES:
                            labels[key] = _label(ending, os.pread(file.fileno(), size, offset)) or labels.get(key, b"")
                        elif ending.rpartition(".")[2] in EXTENSIONS:
                            left[ending] += 1
            except (tarfile.TarError, OSError, BadImage) as error:
                if not images:
                    reason = getattr(error, "strerror", None) or error
                    raise DataError(f"{shown(path)}: {reason}; needs an uncompressed tar file") from error
                notes.append(
                    f"{shown(os.path.basename(path))}: is cut off or damaged; the {len(images)} images that are whole are used"
                )
            for name, key, offset, size in images:
                word = labels.get(key, b"")
                yield os.fsencode(name), number, offset, size, words.setdefault(word, len(words))

    names, (shards, offsets, sizes, numbers) = table(rows(), 4)
    if left:
        kinds = ", ".join(f"{count} .{kind}" for kind, count in left.most_common(3))
        notes.append(f"left out, as the ending of each has several parts: {kinds}")
    labels, classes = class_labels(words, numbers)
    numbered = {"shards": shards, "offsets": offsets, "sizes": sizes, "labels": numbers if labels is None else labels}
    worded = {"notes": np.array(notes, str), "classes": np.array(classes or (), str)}
    return {"block": names.block, "ends": names.ends, **numbered, **worded}


def _members(file: BinaryIO) -> Iterator[tuple[str, str, str, int, int]]:
    """Yield name, key, ending, place and size of the files in a tar file that are whole; TarError behind them if it is cut off."""
    length = os.fstat(file.fileno()).st_size
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None and member.offset_data + member.size <= length:
            tar.members = []  # type: ignore[attr-defined]  # which would grow with the tar file
            folder, slash, base = member.name.rpartition("/")
            word, _, ending = base.partition(".")
            if word and member.isreg() and not member.issparse():
                yield member.name, folder + slash + word, ending.lower(), member.offset_data, member.size
        if member is not None or os.pread(file.fileno(), 1, tar.offset) != b"\0":  # a whole one ends in zeros
            raise tarfile.ReadError("is cut off")


def _label(ending: str, content: bytes) -> bytes:
    """Return the word that `.cls` or `.json` give as the label; an empty one for none."""
    if ending == "cls":
        return b" ".join(content.split())
    with contextlib.suppress(ValueError, AttributeError):  # no JSON, or no object
        label = json.loads(content).get("label")
        return str(label).encode("utf-8", "surrogateescape") if isinstance(label, int | str) else b""
    return b""
