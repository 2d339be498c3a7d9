"""A table for other programs of the features of any images, or of the classes that a classifier sees in them."""

import csv
import importlib.util
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relssl.data.images import Images
from relssl.data.named import load
from relssl.engine import usual_torch
from relssl.errors import ConfigError, NumericError, StorageError
from relssl.evaluation.features import Features, extract
from relssl.evaluation.result import Task, writable
from relssl.files import replacing
from relssl.method.backbones import feature_width
from relssl.settings import parts
from relssl.settings.evaluation import Measuring
from relssl.settings.reading import build
from relssl.weights.foreign import Reading
from relssl.weights.opening import Opened, is_exported, open_backbones, open_whole

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run begins with one of these
_GROUP = 1 << 22  # numbers in a row group of parquet
Columns = Mapping[str, Any]  # of N values each


@usual_torch()
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
        out: `.npz` with `features` float32 [N,D], `ids` int64, `names` and, where known, `labels` int64 (-1: none) and `classes`, the
            names of the labels; `.csv` with the columns id, name, label and class (where known), f0, f1, ..., whose numbers read back
            to the same float32; or `.parquet` with a column `features`, a list of D float32, in their place. Its folder must exist.
        network: student or teacher, of a run (default: student) or of another program's file that holds both.
        split: train, bank or test, for sets that have them.
        precision: fp32; bf16, faster on much hardware, rounds the features by about one percent; auto: where it is faster.
        reading: how to read another program's file, and the size of the view.

    Returns:
        {"out", "images", "dim", "bad": [(file, reason)], "notes": what to know of the weights and images}.

    Raises ConfigError, DataError, CheckpointError, StorageError, each with what to do about it; NumericError for NaN or Inf.
    """
    check_target(Path(out))
    reading = reading or Reading()
    opened = open_backbones(source, replace(reading, network=network or reading.network))
    where = {"data_root": data_root, "size": reading.size, "device": device, "precision": precision}
    images, features = _pass(opened, str(data), split, where)
    arrays: dict[str, Any] = {"ids": features.rows, "names": features.names(images)}
    columns: dict[str, Any] = {"id": arrays["ids"], "name": arrays["names"]}
    if images.labels is not None:
        arrays["labels"] = columns["label"] = images.labels[features.rows]
        if (classes := images.classes) is not None:
            arrays["classes"] = classes
            columns["class"] = [classes[label] if label >= 0 else None for label in columns["label"].tolist()]
    write_table(Path(out), "features", features.vectors.numpy(), arrays, columns)
    count, dim = features.vectors.shape
    notes = [*opened.notes, *images.notes]
    return {"out": str(out), "images": count, "dim": dim, "bad": [*images.bad, *features.bad], "notes": notes}


@usual_torch()
@parts.takes_data
def predict(
    model: str | Path,
    data: Any,
    out: str | Path,
    *,
    split: str = "train",
    data_root: str | None = None,
    device: str = "auto",
    precision: str = "fp32",
    workers: int | None = None,
) -> dict[str, Any]:
    """Classify images by a file that `finetune` wrote, and write the name, class and score of each.

    Unreadable images are left out. The score is the class's share of the softmax, 0..1.

    Args:
        model: the `.safetensors` file, with its settings beside it.
        data, split, precision: as for `embed`.
        out: a `.csv` with the columns name, class, score; a `.parquet` with a column `scores` of all classes besides; or a `.npz` with
            `names`, `predicted` int64 [N], `scores` float32 [N, C] and `classes`, the names of the C columns. Its folder must exist.

    Returns:
        {"out", "images", "classes", "bad": [(file, reason)], "notes": what to know of the images}.

    Raises ConfigError, DataError, CheckpointError, NumericError, StorageError, each with what to do about it.
    """
    path, source = Path(out), Path(model)
    check_target(path)
    opened = open_whole(source) if source.is_file() and is_exported(source) else None
    if opened is None or not opened.spec.classes:
        raise ConfigError(
            f"{model}: is no classifier; `relssl finetune {quote(str(model))} DATA --out MODEL.safetensors` trains one"
        )
    where = {"data_root": data_root, "device": device, "precision": precision, "workers": workers}
    images, features = _pass(opened, str(data), split, where)
    names, classes, scores = features.names(images), np.array(opened.spec.classes), features.vectors.softmax(dim=1).numpy()
    best = scores.argmax(axis=1)
    columns = {"name": names, "class": classes[best].tolist(), "score": scores.max(axis=1)}
    write_table(path, "scores", scores, {"names": names, "predicted": best, "classes": classes}, columns, spread=False)
    bad = [*images.bad, *features.bad]
    return {"out": str(out), "images": len(names), "classes": classes.tolist(), "bad": bad, "notes": list(images.notes)}


def _pass(opened: Opened, data: str, split: str, where: Mapping[str, Any]) -> tuple[Images, Features]:
    """Return the images of a data set and what the opened network says of them."""
    measuring = build(Measuring, where)
    task = Task.of(opened, measuring)
    if measuring.size:
        feature_width(opened.backbone, measuring.size)
    images = load(data, task.root, split)
    return images, extract(task.engine.place(opened.backbone), images, task.reader, task.engine)


def write_table(
    path: Path, title: str, vectors: NDArray[np.float32], arrays: Columns, columns: Columns, *, spread: bool = True
) -> None:
    """Write vectors [N,D] under their title over whatever lies at `path`: with `arrays`, the `names` of the rows among them, to a .npz,
    with `columns` to a .csv or .parquet; a .csv has them in columns of their own if they are to be `spread`, else not at all.

    In a .csv and .parquet bytes that are not UTF-8 are backslash escapes, and in a .csv what a spreadsheet would run as a formula
    gets a leading '. StorageError if the file cannot be written, NumericError for NaN or Inf.
    """
    finite, suffix = np.isfinite(vectors).all(axis=1), path.suffix.lower()
    if not finite.all():
        raise NumericError(f"{arrays['names'][int(finite.argmin())]!r}: its {title} hold NaN or Inf; check the weights")
    columns = {name: [*map(escaped, values)] if isinstance(values, list) else values for name, values in columns.items()}
    with replacing(path, needed=vectors.nbytes) as file:
        if suffix == ".npz":
            present: dict[str, Any] = {title: vectors} | {name: np.array(values) for name, values in arrays.items()}
            np.savez(file, **present)
        elif suffix == ".csv":
            text, vectors = io.TextIOWrapper(file, "utf-8", newline=""), vectors if spread else vectors[:, :0]
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow([*columns, *(f"f{place}" for place in range(vectors.shape[1]))])
            for *cells, row in zip(*columns.values(), vectors, strict=True):
                safe = ("'" + each if isinstance(each, str) and each.startswith(_FORMULA) else each for each in cells)
                writer.writerow([*safe, *row])  # str() of a float32 is the shortest text that reads back to it
            text.detach()
        else:
            import pyarrow as pa
            from pyarrow import parquet

            texts = {name: pa.array(values, pa.string()) for name, values in columns.items() if isinstance(values, list)}
            lists, rows = pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1]), max(1, _GROUP // vectors.shape[1])
            # Only the classes recur; a dictionary of the features would be as large as they are.
            parquet.write_table(pa.table({**columns, **texts, title: lists}), file, row_group_size=rows, use_dictionary=["class"])


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


def escaped(text: str | None) -> str | None:
    """Return text with bytes that are not UTF-8 as backslash escapes."""
    return text and text.encode("utf-8", "backslashreplace").decode()
