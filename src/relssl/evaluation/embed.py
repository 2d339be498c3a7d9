"""The features of any images, as a file for other programs."""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from relssl.data.named import load
from relssl.engine import Engine
from relssl.errors import ConfigError, NumericError, StorageError
from relssl.evaluation.features import extract
from relssl.evaluation.result import writable
from relssl.files import replacing
from relssl.settings import parts
from relssl.weights.foreign import Reading
from relssl.weights.opening import open_backbones

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run begins with one of these
_GROUP = 1 << 22  # numbers in a row group of parquet


@parts.takes_data
def embed(
    source: str | Path,
    data: Any,
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

    Features are in memory, images are not. Unreadable ones are left out; several labels an image, as VOC's, are not written.

    Args:
        source: a run folder, an exported file, another program's file, or a timm name; see `open_backbones`.
        data: any data set, folder or list, by name or as an object.
        out: the file to write, as `write_vectors` describes; its folder must exist.
        network: student or teacher, of a run (default: student) or of another program's file that holds both.
        split: train, bank or test, for sets that have them.
        precision: fp32; bf16, faster on much hardware, rounds the features by about one percent; auto: where it is faster.
        reading: how to read another program's file, and the size of the view.

    Returns:
        {"out", "images", "dim", "bad": [(file, reason)], "notes": what to know of the weights and images}.

    Raises:
        ConfigError, DataError, CheckpointError, StorageError: each with what to do about it.
    """
    check_target(Path(out))
    reading = reading or Reading()
    opened = open_backbones(source, replace(reading, network=network or reading.network))
    engine, root = Engine.local(device, precision), data_root or (opened.config.data_root if opened.config else None)
    images = load(str(data), root, split)
    features = extract(engine.place(opened.backbone), images, opened.reader(reading.size), engine)
    rows, vectors = features.rows, features.vectors.numpy()
    names, labels = [images.source.name(row) for row in rows.tolist()], None if images.labels is None else images.labels[rows]
    write_vectors(Path(out), vectors, rows, names, labels, images.classes)
    bad = [*images.bad, *features.bad]
    return {"out": str(out), "images": len(rows), "dim": vectors.shape[1], "bad": bad, "notes": [*opened.notes, *images.notes]}


def write_vectors(
    path: Path,
    features: NDArray[np.float32],
    ids: NDArray[np.int64],
    names: Sequence[str],
    labels: NDArray[np.int64] | None = None,
    classes: Sequence[str] | None = None,
) -> None:
    """Write features [N,D] with the ids, names and labels [N] of their rows (-1: none), over whatever lies at `path`.

    `.npz` holds `features` float32, `ids` int64, `names` and, where known, `labels` int64 and `classes`, the names of the labels.
    `.csv` has a header and the columns id, name, label and class (where known), f0, f1, ...; numbers read back to the same
    float32, and a name that a spreadsheet would run as a formula gets a leading '. `.parquet` has a column `features`, a list of D
    float32, in place of f0, f1, ... Both write bytes that are not UTF-8 as backslash escapes.

    Raises:
        StorageError: if the file cannot be written. NumericError: for NaN or Inf.
    """
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise NumericError(f"{names[int(finite.argmin())]!r}: its features hold NaN or Inf; check the weights")
    with replacing(path, needed=features.nbytes) as file:
        if path.suffix.lower() == ".npz":
            known = {} if labels is None else {"labels": labels, "classes": classes and np.array(classes)}
            present: dict[str, Any] = {name: values for name, values in known.items() if values is not None}
            np.savez(file, features=features, ids=ids, names=np.array(names), **present)
            return
        columns: dict[str, Any] = {"id": ids, "name": [escaped(name) for name in names]}
        if labels is not None:
            columns["label"] = labels
            if classes is not None:
                columns["class"] = [escaped(classes[label]) if label >= 0 else None for label in labels.tolist()]
        TABLES[path.suffix.lower()](file, columns, "features", features)


def check_target(path: Path) -> None:
    """Refuse, before any work, what no table can be written to: ConfigError for the kind of file, StorageError for its place."""
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".npz", ".parquet"):
        raise ConfigError(f"{path}: cannot be {suffix or 'without suffix'!r}; use .csv, .npz or .parquet")
    if suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(f"{path}: parquet needs pyarrow: pip install 'relssl[parquet]'")
    if path.is_dir() or not path.parent.is_dir():
        raise StorageError(f"{path}: must be a file in a folder that exists; choose another")
    writable(path.parent)


def escaped(text: str) -> str:
    """Return text with bytes that are not UTF-8 as backslash escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _write_csv(file: BinaryIO, columns: dict[str, Any], title: str, features: NDArray[np.float32]) -> None:
    text = io.TextIOWrapper(file, "utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, *(f"f{place}" for place in range(features.shape[1]))])
    for *cells, row in zip(*columns.values(), features, strict=True):
        # str() of a float32 is the shortest text that reads back to it.
        writer.writerow([*("'" + cell if isinstance(cell, str) and cell.startswith(_FORMULA) else cell for cell in cells), *row])
    text.detach()


def _write_parquet(file: BinaryIO, columns: dict[str, Any], title: str, features: NDArray[np.float32]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    vectors = pa.FixedSizeListArray.from_arrays(features.ravel(), features.shape[1])
    if "class" in columns:
        columns["class"] = pa.array(columns["class"], pa.string())
    # Only the classes recur; a dictionary of the features would be as large as they are.
    size = max(1, _GROUP // features.shape[1])
    parquet.write_table(pa.table(columns | {title: vectors}), file, row_group_size=size, use_dictionary=["class"])


TABLES = {".csv": _write_csv, ".parquet": _write_parquet}  # of a file, columns of N values, and vectors [N,D] with their title
