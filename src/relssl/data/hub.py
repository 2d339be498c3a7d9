"""Data sets of the `datasets` library: by their name on the Hugging Face hub, or as a folder of parquet, arrow or image files.

Images are decoded by `decode`, from the bytes as they are stored, so that they look as from a folder of the same files.
"""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from relssl.data.decode import BadImage
from relssl.data.folder import TEST, judge, shown
from relssl.data.images import Images, Stored, table
from relssl.errors import ConfigError, DataError


@dataclass(frozen=True, eq=False)
class Hub(Stored):
    """N images of a table on the disk, whose column holds their bytes, or the paths of their files.

    Names are the base names of the files that the images were made of, where they are known; sizes are 0 where the table holds paths,
    and `times` where it holds bytes.
    """

    dataset: Any  # datasets.Dataset with the column of the images alone, not decoded
    title: str  # what the name of each image begins with; its row in the table follows
    rows: np.ndarray  # int64 [N], of the table
    columns = ("names", "sizes", "times", "rows")

    def name(self, row: int) -> str:
        return f"{self.title}/{self.rows[row]:06}"

    def read(self, row: int, at_most: int | None = None) -> bytes:
        image = self.dataset[int(self.rows[row])].popitem()[1] or {}
        if not (data := image.get("bytes") or (Path(image["path"]).read_bytes() if image.get("path") else b"")):
            raise BadImage("is empty")
        return bytes(data[:at_most])


def located(text: str) -> tuple[str, str, list[str]]:
    """Return what follows `hf:`, NAME[:SPLIT][#COLUMN,...], in parts: the name, or the folder from the root on, the split and the columns.

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
        place = os.path.abspath(place)
    elif not place or place.startswith((".", os.sep)) or place.count("/") > 1:
        raise DataError(f"hf:{shown(place)}: no such folder (looked in {shown(os.getcwd())})")
    return place, part, [*filter(None, columns.split(","))]


def read_hub(text: str, split: str) -> Images:
    """Read the images of one split: train, or the one that is named, for pretraining and as the bank, and one of `folder.TEST`.

    Raises:
        DataError: if the set cannot be loaded, has no such split, or not just one column of images and at most one of classes.
    """
    place, part, columns = located(text)
    tables = _tables(place)
    train = part or (next(iter(tables)) if len(tables) == 1 else "train")
    name = train if split != "test" else next((name for name in TEST if name in tables and name != train), "for tests")
    if missing := [each for each in (train, name) if each not in tables]:
        raise DataError(
            f"hf:{shown(place)}: has no split {shown(missing[0])}, only {', '.join(tables)}; name one, as hf:NAME:SPLIT"
        )
    return _read_table(tables[name], f"hf:{shown(place)}:{name}", columns)


def _tables(place: str) -> Mapping[str, Any]:
    """Return the tables by their splits."""
    import datasets
    import huggingface_hub

    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    saved = any(os.path.exists(os.path.join(place, file)) for file in ("state.json", "dataset_dict.json"))
    try:
        tables = datasets.load_from_disk(place) if saved else datasets.load_dataset(place)
    except Exception as error:  # readers of a dozen formats, and of the network
        reason = " ".join((str(error) or type(error).__name__).split())[:200]
        is_folder = os.path.isabs(place)
        advice = "give a folder of parquet, arrow or image files" if is_folder else "is there a network, or is the name wrong?"
        raise DataError(f"hf:{shown(place)}: cannot be loaded ({reason}); {advice}") from error
    return tables if isinstance(tables, Mapping) else {"train": tables}


def _read_table(dataset: Any, title: str, columns: list[str]) -> Images:
    """Read one table, of which `columns` names those of images and classes if it has others."""
    import datasets
    import pyarrow.compute as pc

    features = dataset.features
    images, labels = (
        [name for name in columns or features if isinstance(features.get(name), kind)]
        for kind in (datasets.Image, datasets.ClassLabel)
    )
    if len(images) != 1 or len(labels) > 1 or {*columns} - {*images, *labels}:
        there = ", ".join(f"{shown(name)} ({type(feature).__name__})" for name, feature in features.items())
        needs = "needs one column of images (Image), and one of classes (ClassLabel) or none"
        raise DataError(f"{title}: {needs}, of {there}; name them, as hf:...#IMAGES,CLASSES")
    stored = dataset.cast_column(images[0], datasets.Image(decode=False)).select_columns(images)
    arrow = stored.with_format("arrow")[:][images[0]]  # mapped into memory, not read
    sizes = pc.fill_null(pc.binary_length(pc.struct_field(arrow, "bytes")), 0).to_numpy().astype(np.int64)
    paths = (path or "" for chunk in pc.struct_field(arrow, "path").chunks for path in chunk.to_pylist())
    rows = ((os.path.basename(os.fsencode(path)), 0 if size else judge(path)[1]) for path, size in zip(paths, sizes, strict=True))
    names, (times,) = table(rows, 1)
    source = Hub(names, sizes, times, stored, title, np.arange(len(dataset)))
    if not labels:
        return Images(title, source)
    numbers = pc.fill_null(dataset.select_columns(labels).with_format("arrow")[:][labels[0]], -1).to_numpy().astype(np.int64)
    return Images(title, source, None if (numbers < 0).all() else numbers, tuple(features[labels[0]].names))
