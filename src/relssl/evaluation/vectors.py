"""Embeddings as a file: `.npz` for programs, `.csv` for spreadsheets; whole or not there, and larger than memory if need be."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from relssl.atomic import replacing, storing, write_all
from relssl.errors import ConfigError, DataError, NumericError, StorageError

_ROWS = 4096  # names at a time
_CELLS = 1 << 18  # numbers at a time


def write_vectors(
    path: Path, vectors: Iterable[tuple[ArrayLike, ArrayLike]], names: Sequence[str], labels: ArrayLike | None = None
) -> int:
    """Write an embedding matrix with the names and labels of its rows, over whatever lies at `path`.

    `.npz` holds `features` [N,D] float32, `ids` [N] int64, `names` [N] and, given labels, `labels` [N] int64; no pickle. `.csv`
    has a header and the columns id, name, label (given labels), f0, f1, ...; numbers read back to the same float32. In its names
    bytes that are no UTF-8 are written as backslash escapes, and a name that a spreadsheet would run as a formula gets a
    leading '. Rows keep the order in which they come; they wait in an unnamed file beside `path`, not in memory.

    Args:
        path: ends in .npz or .csv; its folder must exist.
        vectors: batches of ids [b], places in `names`, and features [b,D].
        names: of all samples, by id; may hold surrogate escapes and newlines.
        labels: int, of all samples, by id.

    Returns:
        N, the number of rows.

    Raises:
        ConfigError: for another suffix. StorageError: if the file cannot be written. DataError: if there are no vectors.
        NumericError: for features that are not finite. ValueError: for ids, features or labels that do not fit together.
    """
    kinds = {".csv": _write_csv, ".npz": _write_npz}
    if path.suffix.lower() not in kinds:
        raise ConfigError(
            f"{path}: cannot write vectors as {path.suffix or 'a file without suffix'!r}; known: {', '.join(kinds)}"
        )
    if path.is_dir() or not path.parent.is_dir():
        raise StorageError(f"{path}: {'is a folder' if path.is_dir() else 'its folder does not exist'}; choose another file")
    known = None if labels is None else np.asarray(labels)
    if known is not None and (known.dtype.kind not in "iu" or known.shape != (len(names),)):
        raise ValueError(f"labels must be {len(names)} integers, one a name, got {known.dtype} {list(known.shape)}")
    with storing(path):
        waiting = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  (without a name it vanishes even when we are killed)
    with waiting:
        ids, width = _collect(path, waiting, vectors, names)
        waiting.seek(0)
        with replacing(path, needed=4 * len(ids) * width) as file:
            kinds[path.suffix.lower()](file, waiting, ids, width, names, None if known is None else known[ids])
    return len(ids)


def _collect(
    path: Path, waiting: IO[bytes], vectors: Iterable[tuple[ArrayLike, ArrayLike]], names: Sequence[str]
) -> tuple[NDArray[np.int64], int]:
    """Write the features one after another to `waiting`; return the ids [N] and D."""
    parts: list[NDArray[np.int64]] = []
    width = 0
    for some, features in vectors:
        ids = np.asarray(some)
        with np.errstate(over="ignore"):  # a double beyond float32 becomes Inf, which is refused below
            rows = np.ascontiguousarray(features, dtype="<f4")
        if rows.ndim != 2 or ids.shape != rows.shape[:1] or (len(ids) and ids.dtype.kind not in "iu"):
            raise ValueError(f"ids [b] and features [b,D] are needed, got {ids.dtype} {list(ids.shape)} and {list(rows.shape)}")
        if not len(ids):
            continue
        width = width or rows.shape[1]
        if rows.shape[1] != width or not width:
            raise ValueError(f"all features must have the same number of dimensions, got {rows.shape[1]} after {width}")
        if ids.min() < 0 or ids.max() >= len(names):
            raise ValueError(f"ids must lie in 0..{len(names) - 1}, got {ids.min()}..{ids.max()}")
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            raise NumericError(f"{names[int(ids[finite.argmin()])]!r}: its features hold NaN or Inf; check the weights")
        with storing(path, needed=rows.nbytes):
            write_all(waiting.fileno(), rows.data.cast("B"))
        parts.append(ids.astype(np.int64))
    if not parts:
        raise DataError(f"{path}: there are no vectors to write")
    return np.concatenate(parts), width


def _write_npz(
    file: BinaryIO,
    waiting: IO[bytes],
    ids: NDArray[np.int64],
    width: int,
    names: Sequence[str],
    labels: NDArray[np.int64] | None,
) -> None:
    """What np.savez would write, but streamed: it wants whole arrays."""
    letters = max(1, max(len(names[i]) for i in ids))
    with zipfile.ZipFile(file, "w") as archive:
        with _member(archive, "features", (len(ids), width), "<f4") as member:
            shutil.copyfileobj(waiting, member, 1 << 20)
        with _member(archive, "ids", ids.shape, "<i8") as member:
            member.write(ids.astype("<i8").tobytes())
        with _member(archive, "names", ids.shape, f"<U{letters}") as member:
            for start in range(0, len(ids), _ROWS):
                member.write(np.array([names[i] for i in ids[start : start + _ROWS]], dtype=f"<U{letters}").tobytes())
        if labels is not None:
            with _member(archive, "labels", ids.shape, "<i8") as member:
                member.write(labels.astype("<i8").tobytes())


@contextmanager
def _member(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], descr: str) -> Iterator[IO[bytes]]:
    info = zipfile.ZipInfo(f"{name}.npy")  # dated 1980: equal vectors give equal files
    # Names are padded to the longest, four bytes a letter, which deflates to next to nothing; features hardly shrink.
    info.compress_type = zipfile.ZIP_DEFLATED if name == "names" else zipfile.ZIP_STORED
    with archive.open(info, "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, {"descr": descr, "fortran_order": False, "shape": shape})
        yield member


def _write_csv(
    file: BinaryIO,
    waiting: IO[bytes],
    ids: NDArray[np.int64],
    width: int,
    names: Sequence[str],
    labels: NDArray[np.int64] | None,
) -> None:
    header = ["id", "name", *([] if labels is None else ["label"]), *(f"f{i}" for i in range(width))]
    file.write((",".join(header) + "\n").encode())
    step = max(1, _CELLS // width)
    for start in range(0, len(ids), step):
        some = ids[start : start + step]
        features = np.frombuffer(waiting.read(4 * width * len(some)), dtype="<f4").reshape(-1, width)
        for place, (index, row) in enumerate(zip(some, features, strict=True), start):
            label = "" if labels is None else f"{labels[place]},"
            # str() of a float32 is the shortest text that reads back to it.
            line = f"{index},{_cell(names[index])},{label}{','.join(map(str, row))}\n"
            file.write(line.encode("utf-8", "backslashreplace"))


def _cell(name: str) -> str:
    """A quoted cell that no spreadsheet takes for a formula."""
    guard = "'" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else ""
    return '"' + guard + name.replace('"', '""') + '"'
