"""The features of any images, with their names and labels, as a file."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from relssl.data.folder import shown
from relssl.data.named import load
from relssl.engine import Engine
from relssl.errors import ConfigError, DataError, NumericError, StorageError
from relssl.evaluation.features import stream
from relssl.files import replacing, storing, write_all
from relssl.weights.opening import Reading, open_backbones

_ROWS = 4096  # names at a time
_CELLS = 1 << 18  # numbers at a time
_GROUP = 1 << 22  # numbers in a row group of parquet


@dataclass(frozen=True)
class _Rows:
    """What is known of the rows besides their features.

    Attributes:
        ids: int64 [N], their places in `names`.
        width: D, the features' number of dimensions.
        names: of all samples, by id.
        labels: int [N], of the rows; or none.
        classes: names of the labels; or none.
    """

    ids: NDArray[np.int64]
    width: int
    names: Sequence[str]
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...] | None

    def word(self, row: int) -> str:
        """The class of a row, empty for label -1."""
        assert self.labels is not None and self.classes is not None
        return self.classes[self.labels[row]] if self.labels[row] >= 0 else ""

    def parts(self, waiting: IO[bytes], cells: int) -> Iterator[tuple[range, NDArray[np.float32]]]:
        """Some rows and their features [b,D], in order, about `cells` numbers at a time."""
        step = max(1, cells // self.width)
        for start in range(0, len(self.ids), step):
            rows = range(start, min(start + step, len(self.ids)))
            yield rows, np.frombuffer(waiting.read(4 * self.width * len(rows)), dtype="<f4").reshape(-1, self.width)


def write_vectors(
    path: Path,
    vectors: Iterable[tuple[ArrayLike, ArrayLike]],
    names: Sequence[str],
    labels: ArrayLike | None = None,
    classes: Sequence[str] | None = None,
) -> int:
    """Write an embedding matrix with the names, labels and classes of its rows, over whatever lies at `path`.

    `.npz` holds `features` [N,D] float32, `ids` [N] int64, `names` [N] and, where given, `labels` [N] int64 and `classes` [C],
    the names of the labels; no pickle. `.csv` has a header and the columns id, name, label and class (where given), f0, f1, ...;
    numbers read back to the same float32. A name that a spreadsheet would run as a formula gets a leading ' there. `.parquet` has
    the columns id, name, label and class (where given), and features, a list of D float32. In its names and the csv's, bytes that
    are no UTF-8 are written as backslash escapes. Rows keep the order in which they come; they wait in an unnamed file beside
    `path`, not in memory.

    Args:
        path: ends in .npz, .csv or .parquet; its folder must exist.
        vectors: batches of ids [b], places in `names`, and features [b,D].
        names: of all samples, by id; may hold surrogate escapes and newlines.
        labels: int, of all samples, by id; -1 = none.
        classes: what the labels stand for; only with labels.

    Returns:
        N, the number of rows.

    Raises:
        ConfigError, StorageError: as `check_target`. StorageError: if the file cannot be written. DataError: if there are no
        vectors. NumericError: for features that are not finite. ValueError: for ids, features, labels or classes that do not fit
        together.
    """
    check_target(path)
    known = None if labels is None else np.asarray(labels)
    if known is not None and (known.dtype.kind not in "iu" or known.shape != (len(names),)):
        raise ValueError(f"labels must be {len(names)} integers, one a name, got {known.dtype} {list(known.shape)}")
    if classes is not None and (known is None or known.max(initial=-1) >= len(classes)):
        raise ValueError(f"{len(classes)} classes do not fit {'no labels' if known is None else f'labels up to {known.max()}'}")
    with storing(path):
        waiting = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  (without a name it vanishes even when we are killed)
    with waiting:
        ids, width = _collect(path, waiting, vectors, names)
        waiting.seek(0)
        rows = _Rows(ids, width, names, None if known is None else known[ids], None if classes is None else tuple(classes))
        with replacing(path, needed=4 * len(ids) * width) as file:
            _KINDS[path.suffix.lower()](file, waiting, rows)
    return len(ids)


def check_target(path: Path) -> None:
    """Refuse, before any work, what no vectors can be written to.

    Raises:
        ConfigError: for another suffix, or .parquet without pyarrow. StorageError: for a folder, or a file in no folder.
    """
    if path.suffix.lower() not in _KINDS:
        raise ConfigError(
            f"{path}: cannot write vectors as {path.suffix or 'a file without suffix'!r}; known: {', '.join(_KINDS)}"
        )
    if path.suffix.lower() == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"{path}: parquet needs pyarrow: pip install 'relssl[parquet]'") from error
    if path.is_dir() or not path.parent.is_dir():
        raise StorageError(f"{path}: {'is a folder' if path.is_dir() else 'its folder does not exist'}; choose another file")


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


def _write_npz(file: BinaryIO, waiting: IO[bytes], rows: _Rows) -> None:
    """What np.savez would write, but streamed: it wants whole arrays."""
    ids, names = rows.ids, rows.names
    letters = max(1, max(len(names[i]) for i in ids))
    with zipfile.ZipFile(file, "w") as archive:
        with _member(archive, "features", (len(ids), rows.width), "<f4") as member:
            shutil.copyfileobj(waiting, member, 1 << 20)
        with _member(archive, "ids", ids.shape, "<i8") as member:
            member.write(ids.astype("<i8").tobytes())
        with _member(archive, "names", ids.shape, f"<U{letters}") as member:
            for start in range(0, len(ids), _ROWS):
                member.write(np.array([names[i] for i in ids[start : start + _ROWS]], dtype=f"<U{letters}").tobytes())
        if rows.labels is not None:
            with _member(archive, "labels", ids.shape, "<i8") as member:
                member.write(rows.labels.astype("<i8").tobytes())
        if rows.classes is not None:
            words = np.array(rows.classes, dtype=f"<U{max(1, *map(len, rows.classes))}")
            with _member(archive, "classes", words.shape, words.dtype.str) as member:
                member.write(words.tobytes())


@contextmanager
def _member(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], descr: str) -> Iterator[IO[bytes]]:
    info = zipfile.ZipInfo(f"{name}.npy")  # dated 1980: equal vectors give equal files
    # Names are padded to the longest, four bytes a letter, which deflates to next to nothing; features hardly shrink.
    info.compress_type = zipfile.ZIP_DEFLATED if name == "names" else zipfile.ZIP_STORED
    with archive.open(info, "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, {"descr": descr, "fortran_order": False, "shape": shape})
        yield member


def _write_csv(file: BinaryIO, waiting: IO[bytes], rows: _Rows) -> None:
    known = [*(["label"] if rows.labels is not None else []), *(["class"] if rows.classes is not None else [])]
    file.write((",".join(["id", "name", *known, *(f"f{i}" for i in range(rows.width))]) + "\n").encode())
    for some, features in rows.parts(waiting, _CELLS):
        for place, row in zip(some, features, strict=True):
            index = rows.ids[place]
            cells = [str(index), _cell(rows.names[index])]
            if rows.labels is not None:
                cells.append(str(rows.labels[place]))
            if rows.classes is not None:
                cells.append(_cell(rows.word(place)))
            # str() of a float32 is the shortest text that reads back to it.
            file.write(f"{','.join(cells)},{','.join(map(str, row))}\n".encode("utf-8", "backslashreplace"))


def _cell(name: str) -> str:
    """A quoted cell that no spreadsheet takes for a formula."""
    guard = "'" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else ""
    return '"' + guard + name.replace('"', '""') + '"'


def _write_parquet(file: BinaryIO, waiting: IO[bytes], rows: _Rows) -> None:
    """A row group for some rows at a time, so that neither we nor a reader need the whole in memory."""
    import pyarrow as pa
    from pyarrow import parquet

    columns = {"id": pa.int64(), "name": pa.string()}
    columns |= {} if rows.labels is None else {"label": pa.int64()}
    columns |= {} if rows.classes is None else {"class": pa.string()}
    schema = pa.schema(columns | {"features": pa.list_(pa.float32(), rows.width)})
    # Only the classes recur; a dictionary of the features would be as large as they are.
    with parquet.ParquetWriter(file, schema, use_dictionary=["class"]) as writer:
        for some, features in rows.parts(waiting, _GROUP):
            ids = rows.ids[some.start : some.stop]
            values: dict[str, Any] = {"id": ids, "name": [_text(rows.names[i]) for i in ids]}
            if rows.labels is not None:
                values["label"] = rows.labels[some.start : some.stop]
            if rows.classes is not None:
                values["class"] = [_text(rows.word(place)) or None for place in some]
            values["features"] = pa.FixedSizeListArray.from_arrays(features.ravel(), rows.width)
            writer.write_batch(pa.record_batch(values, schema=schema))


def _text(name: str) -> str:
    """A name as UTF-8 can hold it, other bytes as backslash escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


_KINDS = {".csv": _write_csv, ".npz": _write_npz, ".parquet": _write_parquet}


def embed(
    source: str | Path,
    data: str,
    out: str | Path,
    *,
    network: str | None = None,
    split: str = "train",
    data_root: str | None = None,
    device: str = "auto",
    precision: str = "fp32",
    reading: Reading | None = None,
) -> dict[str, Any]:
    """Write the backbone's feature of every image, with its name, label and class, to a .npz, .csv or .parquet file.

    Images go by in batches, so a folder may be larger than memory. Unreadable ones are left out. Of images with several labels
    each, as VOC's, no label is written.

    Args:
        source: a run folder, an exported file, another program's file, or a timm name; see `open_backbones`.
        data: any data set, folder or list.
        out: the file to write, as `vectors.write_vectors` describes; its folder must exist.
        network: student or teacher, of a run (default: student) or of another program's file that holds both.
        split: train, bank or test, for sets that have them.
        precision: fp32; bf16, faster on much hardware, rounds the features by about one percent; auto: where it is faster.
        reading: how to read another program's file, and the size of the view.

    Returns:
        {"out", "images", "dim", "bad": [(file, reason)], "notes": what to know of the weights}.

    Raises:
        ConfigError: for another kind of file, an unknown network, or .parquet without pyarrow.
        DataError, CheckpointError: for images or weights that cannot be read. StorageError: if the file cannot be written.
    """
    check_target(Path(out))
    reading = reading or Reading()
    opened = open_backbones(source, replace(reading, network=network or reading.network))
    reader, (_, backbone) = opened.reader(reading.size), opened.one()
    engine = Engine.local(device, precision)
    images = load(data, data_root or opened.data_root, split)
    bad, count, dim = list(images.bad), 0, 0

    def rows() -> Iterator[tuple[npt.NDArray[np.int64], Tensor]]:
        nonlocal count, dim
        for ids, vectors, faults in stream(engine.place(backbone), images, reader, engine.device, engine.autocast()):
            bad.extend(faults)
            if len(ids):
                count, dim = count + len(ids), vectors.shape[1]
                yield ids, vectors
        if not count:
            first = f"the first is {shown(bad[0][0])}: {bad[0][1]}"
            raise DataError(f"{images.name}: none of its {len(images)} images can be read, {first}")

    classes = images.classes if images.labels is not None else None
    names = [images.source.name(row) for row in range(len(images))]
    write_vectors(Path(out), rows(), names, images.labels, classes)
    return {"out": str(out), "images": count, "dim": dim, "bad": bad, "notes": list(opened.notes)}
