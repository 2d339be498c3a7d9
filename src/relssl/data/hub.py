"""Data sets of the `datasets` library: by their name on the Hugging Face hub, or as a folder of parquet, arrow or image files.

Images are decoded by `decode`, from the bytes as they are stored, so that they look as from a folder of the same files.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from relssl.data.decode import BadImage, Opened, open_image
from relssl.data.folder import TEST, shown
from relssl.data.images import BEGINNING, Images
from relssl.data.names import Names, table
from relssl.errors import ConfigError, DataError


@dataclass(frozen=True, eq=False)
class Hub:
    """N images of a table on the disk, whose column holds their bytes, or the paths of their files."""

    dataset: Any  # datasets.Dataset with the column of the images alone, not decoded
    column: str
    title: str  # what the name of each image begins with; its row in the table follows
    rows: np.ndarray  # int64 [N], of the table
    names: Names  # base names of the files that the images were made of, where they are known
    sizes: np.ndarray  # int64 [N], in bytes; 0 where the table holds paths

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: np.ndarray) -> Hub:
        return replace(self, rows=self.rows[rows], names=self.names.take(rows), sizes=self.sizes[rows])

    def fingerprint(self) -> str:
        """Compute 16 hex digits of sizes, order, and base names."""
        return self.names.digest("hub", self.sizes)

    def name(self, row: int) -> str:
        return f"{self.title}/{self.rows[row]:06}"

    def beginning(self, row: int) -> bytes:
        try:
            return self._read(row)[:BEGINNING]
        except (BadImage, OSError):
            return b"unreadable " + os.fsencode(self.name(row))

    def open(self, row: int, max_pixels: int) -> AbstractContextManager[Opened]:
        return open_image(partial(self._read, row), max_pixels)

    def _read(self, row: int) -> bytes:
        image = self.dataset[int(self.rows[row])][self.column] or {}
        if not (data := image.get("bytes") or (Path(image["path"]).read_bytes() if image.get("path") else b"")):
            raise BadImage("is empty")
        return bytes(data)


def located(text: str) -> tuple[str, str, str, bool]:
    """Return the name or folder, the split and the columns of what follows `hf:`, NAME[:SPLIT][#COLUMN,...], and whether it is a folder.

    Raises:
        ConfigError: if the library is not installed.
        DataError: for a path at which there is no folder.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError("data: hf: needs datasets; pip install 'relssl[hf]'")
    place, _, columns = os.path.expanduser(text).partition("#")
    part = ""
    if not os.path.isdir(place) and ":" in place:
        place, _, part = place.rpartition(":")
    if os.path.isdir(place):
        return os.path.abspath(place), part, columns, True
    if not place or place.startswith((".", os.sep)) or place.count("/") > 1:
        raise DataError(f"hf:{shown(place)}: no such folder (looked in {shown(os.getcwd())})")
    return place, part, columns, False


def read_hub(text: str, split: str) -> Images:
    """Read the images of one split: train, or the one that is named, for pretraining and as the bank, and one of `folder.TEST`.

    Raises:
        DataError: if the set cannot be loaded, has no such split, or not just one column of images and at most one of classes.
    """
    place, part, columns, is_folder = located(text)
    tables = _tables(place, is_folder)
    train = part or ("train" if "train" in tables else next(iter(tables)))
    test = next((name for name in TEST if name in tables and name != train), "")
    if train not in tables or (split == "test" and not test):
        raise DataError(
            f"hf:{shown(place)}: has no split {shown(train if train not in tables else 'for tests')}, only {', '.join(tables)}"
        )
    return _read_table(
        tables[test if split == "test" else train], f"hf:{shown(place)}:{test if split == 'test' else train}", columns
    )


def _tables(place: str, is_folder: bool) -> Mapping[str, Any]:
    """Return the tables by their splits."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets
    import huggingface_hub

    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # if it was imported before
    saved = is_folder and any(os.path.exists(os.path.join(place, file)) for file in ("state.json", "dataset_dict.json"))
    try:
        tables = datasets.load_from_disk(place) if saved else datasets.load_dataset(place)
    except Exception as error:  # readers of a dozen formats, and of the network
        reason = " ".join((str(error) or type(error).__name__).split())[:200]
        advice = "give a folder of parquet, arrow or image files" if is_folder else "is there a network, or is the name wrong?"
        raise DataError(f"hf:{shown(place)}: cannot be loaded ({reason}); {advice}") from error
    return tables if isinstance(tables, Mapping) else {"train": tables}


def _read_table(dataset: Any, title: str, columns: str) -> Images:
    """Read one table; `columns` names those of images and classes where there are several, with a comma between."""
    import datasets
    import pyarrow.compute as pc

    named = [column for column in columns.split(",") if column]
    if unknown := [column for column in named if column not in dataset.features]:
        raise DataError(f"{title}: has no column {shown(unknown[0])}, only {', '.join(dataset.features)}")
    chosen: dict[str, str] = {}
    for kind, feature in (("images", datasets.Image), ("classes", datasets.ClassLabel)):
        fitting = [name for name, each in dataset.features.items() if isinstance(each, feature)]
        chosen[kind], *others = [name for name in fitting if name in named] or fitting or [""]
        if others:
            raise DataError(
                f"{title}: several columns hold {kind} ({', '.join(fitting)}); name one: hf:...#{','.join([*named, fitting[0]])}"
            )
    if not (image := chosen["images"]) or {*named} - {*chosen.values()}:
        raise DataError(
            f"{title}: has no column of images{f' and classes {columns}' if columns else ''}, only {', '.join(dataset.features)}"
        )
    classes = dataset.features[label].names if (label := chosen["classes"]) else None
    stored = dataset.cast_column(image, datasets.Image(decode=False)).select_columns([image, *filter(None, [label])])
    arrow = stored.with_format("arrow")[:]  # mapped into memory, not read
    sizes = pc.fill_null(pc.binary_length(pc.struct_field(arrow[image], "bytes")), 0).to_numpy().astype(np.int64)
    paths = (path for chunk in pc.struct_field(arrow[image], "path").chunks for path in chunk.to_pylist())
    names = table(((os.path.basename(os.fsencode(path or "")),) for path in paths), 0)[0]
    labels = pc.fill_null(arrow[label], -1).to_numpy().astype(np.int64) if label else None
    source = Hub(stored.select_columns([image]), image, title, np.arange(len(dataset)), names, sizes)
    return Images(title, source, None if labels is None or (labels < 0).all() else labels, tuple(classes) if classes else None)
