"""Features kept on the disk, so that each network sees each data set once: memory-mapped, a million images need no memory.

An entry is a folder named after all that decides about its numbers. It appears whole or not at all; entries that were not
used for longest go when all together exceed a limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from relssl.atomic import storing, sweep, temporary, to_json, write_all
from relssl.config import Config
from relssl.data.identity import identity
from relssl.data.index import cache_root
from relssl.data.plain import describe
from relssl.data.sources import Images
from relssl.engine import Engine
from relssl.errors import DataError
from relssl.evaluation.features import Features, extract, state_hash, stream

LAYOUT = 1
# Bytes that all entries may take together.
LIMIT = 20 << 30


def features(backbone: nn.Module, images: Images, config: Config, engine: Engine) -> Features:
    """The features of a data set: from the disk if they were made before, else made and kept.

    Raises:
        DataError: if no image can be read.
        StorageError: if the cache cannot be written; `$RELSSL_CACHE` says where it lies.
    """
    root = cache_root() / "features"
    place = root / key(backbone, images, config, engine)
    found = _read(place)
    if found is None:
        with storing(root):
            root.mkdir(parents=True, exist_ok=True)
        sweep(root)
        _make(place, backbone, images, config, engine)
        _evict(root, keep=place)
        found = _read(place)
    if found is None:  # another process needed the room, or a damaged entry cannot be replaced
        return extract(backbone, images, config, engine.device, engine.autocast())
    with contextlib.suppress(OSError):
        os.utime(place)
    return found


def key(backbone: nn.Module, images: Images, config: Config, engine: Engine) -> str:
    """32 hex digits of the weights, the network, the images, their view, and what computes."""
    parts = {
        "layout": LAYOUT,
        "weights": state_hash(backbone),
        "network": repr(backbone),  # two networks may have equal weights and differ in a stride
        "images": identity(images),
        "view": [describe(config.views), config.views.mean, config.views.std, config.loader.max_pixels],
        "compute": [engine.precision, engine.device.type, torch.__version__, engine.threads],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _make(place: Path, backbone: nn.Module, images: Images, config: Config, engine: Engine) -> None:
    unfinished = temporary(place.parent)
    rows: list[np.ndarray] = []
    bad: list[tuple[str, str]] = []
    width = 0
    with storing(place):
        unfinished.mkdir(mode=0o700)
        try:
            with (unfinished / "vectors.f32").open("wb") as file:
                for some, made, faults in stream(backbone, images, config, engine.device, engine.autocast()):
                    bad += faults
                    if len(some):
                        rows.append(some)
                        width = made.shape[1]
                        write_all(file.fileno(), made.contiguous().numpy().data.cast("B"))
            if not rows:
                raise DataError(f"{images.name}: none of its {len(images)} images can be read")
            np.save(unfinished / "rows.npy", np.concatenate(rows))
            (unfinished / "about.json").write_bytes(to_json({"width": width, "bad": [list(fault) for fault in bad]}))
            try:
                unfinished.rename(place)
            except OSError:
                if not place.exists():  # else another process was faster, and its entry is as good
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _read(place: Path) -> Features | None:
    try:
        about: dict[str, Any] = json.loads((place / "about.json").read_bytes())
        rows = np.load(place / "rows.npy", allow_pickle=False)
        shape = (len(rows), int(about["width"]))
        if (place / "vectors.f32").stat().st_size != 4 * shape[0] * shape[1]:
            raise ValueError("cut short")
        # Copy on write: torch wants memory that could be written, and the file must never be.
        vectors = torch.from_numpy(np.memmap(place / "vectors.f32", np.float32, "c", shape=shape))
        return Features(vectors, rows, [(str(file), str(reason)) for file, reason in about["bad"]])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError):
        shutil.rmtree(place, ignore_errors=True)  # damaged: made anew
        return None


def _evict(root: Path, keep: Path) -> None:
    """Remove the entries that were not used for longest until the rest fit the limit."""
    entries = []
    for entry in os.scandir(root):
        if entry.is_dir(follow_symlinks=False):
            with contextlib.suppress(OSError):
                size = sum(file.stat().st_size for file in os.scandir(entry.path))
                entries.append((entry.stat().st_mtime, size, Path(entry.path)))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= LIMIT:
            return
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)
            total -= size
