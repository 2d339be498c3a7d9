"""The features of any images, with their names and labels, as a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from relssl.data.paths import shown
from relssl.data.sources import Images, load
from relssl.engine import Engine
from relssl.errors import DataError
from relssl.evaluation.features import stream
from relssl.evaluation.vectors import check_target, write_vectors
from relssl.sections import EngineConfig
from relssl.weights.opening import Reading, open_backbones


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
    config, (_, backbone) = opened.sees(reading.size), opened.one()
    engine = Engine(EngineConfig(device=device, precision=precision))
    images = load(data, data_root or config.data_root, split, index=config.loader.index)
    bad, count, dim = list(images.bad), 0, 0

    def rows() -> Iterator[tuple[npt.NDArray[np.int64], Tensor]]:
        nonlocal count, dim
        for ids, vectors, faults in stream(engine.place(backbone), images, config, engine.device, engine.autocast()):
            bad.extend(faults)
            if len(ids):
                count, dim = count + len(ids), vectors.shape[1]
                yield ids, vectors
        if not count:
            first = f"the first is {shown(bad[0][0])}: {bad[0][1]}"
            raise DataError(f"{images.name}: none of its {len(images)} images can be read, {first}")

    classes = images.classes if images.labels is not None else None
    write_vectors(Path(out), rows(), _names(images, split), images.labels, classes)
    return {"out": str(out), "images": count, "dim": dim, "bad": bad, "notes": list(opened.notes)}


def _names(images: Images, split: str) -> Sequence[str]:
    """The files' paths; pixels in memory are named by their place in the data set."""
    return images.files if images.files is not None else [f"{images.name}/{split}/{row:06}" for row in range(len(images))]
