"""Backbone features of whole data sets, by one fixed view an image: made once, kept, and taken from the disk the next time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from relssl.data.folder import cache_root
from relssl.data.images import Images
from relssl.data.plain import Reader
from relssl.data.subsets import identity
from relssl.engine import Engine
from relssl.errors import DataError, NumericError
from relssl.files import storing, sweep, temporary, to_json, write_all


class Rows:
    """The rows of a feature matrix [N,D] of any real dtype, or those at `kept`, without a copy of the whole.

    Attributes:
        name: whose they are, for errors.
        features: [N,D].
        kept: int64 places of the rows that take part, or None for all.
        count: rows that take part.
    """

    def __init__(self, name: str, features: Tensor, kept: Tensor | None = None) -> None:
        if features.dim() != 2 or not features.shape[1] or features.is_complex():
            raise ValueError(f"{name} features must be real and [rows, dimensions], got {features.dtype} {list(features.shape)}")
        self.name, self.features, self.kept = name, features, kept
        self.count = len(features) if kept is None else len(kept)

    def chunks(self, size: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """The place of the first row and up to `size` rows as they are, on `device`."""
        if size < 1:
            raise ValueError(f"chunk and bank_chunk must be at least 1, got {size}")
        for start in range(0, self.count, size):
            which = slice(start, start + size) if self.kept is None else self.kept[start : start + size]
            yield start, self.features[which].to(device)

    def units(self, size: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """The same, fp32 and of unit norm; ValueError for NaN or Inf."""
        for start, rows in self.chunks(size, device):
            finite = rows.isfinite().all(dim=1).cpu()
            if not bool(finite.all()):
                row = start + int((~finite).nonzero()[0])
                raise ValueError(
                    f"{self.name} features hold NaN or Inf, first in row {row if self.kept is None else self.kept[row]}"
                )
            yield start, unit(rows)


def unit(rows: Tensor) -> Tensor:
    """[n,D] -> fp32 of unit norm. Each row's largest entry is brought to 1 first, so that no square overflows or vanishes."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    largest = rows.abs().amax(dim=1, keepdim=True)
    rows = (rows / torch.where(largest > 0, largest, 1)).float()
    norm: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / norm.clamp_min(1.0)  # a row of zeros stays zero, and similar to nothing


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in true fp32, without gradients: TF32 or bf16 would reorder near neighbours."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass
class Features:
    """Features [N, F] fp32 on the CPU, the rows of the data set they belong to, and what could not be read.

    `vectors` may be a memory map of a file that is read as it is needed.
    """

    vectors: Tensor
    rows: np.ndarray
    bad: list[tuple[str, str]] = field(default_factory=list)


@torch.no_grad()
def stream(
    backbone: nn.Module,
    images: Images,
    reader: Reader,
    device: torch.device,
    autocast: AbstractContextManager[object] | None = None,
) -> Iterator[tuple[np.ndarray, Tensor, list[tuple[str, str]]]]:
    """(rows, features [B, F] fp32 on the CPU, unreadable files) batch by batch.

    The backbone runs in eval mode and is put back as it was, so measuring never changes what is measured.
    """
    with evaluating(backbone):
        for rows, views, bad in reader.batches(images):
            with autocast or nullcontext():
                made = backbone(views.to(device).contiguous(memory_format=torch.channels_last)) if len(rows) else views
            yield rows, made.float().cpu(), bad


@contextmanager
def evaluating(backbone: nn.Module) -> Iterator[None]:
    """The backbone in eval mode, each module put back into its own mode after."""
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def frozen(backbone: nn.Module) -> Iterator[str]:
    """`evaluating`, with the hash of all weights and batch-norm statistics before; they must be the same after.

    A frozen evaluation that lets batch norm count the images it sees measures another network with each batch, and nobody
    can tell from the figure.
    """
    before = state_hash(backbone)
    with evaluating(backbone):
        yield before
    if state_hash(backbone) != before:
        raise AssertionError("a frozen evaluation changed the backbone's weights or batch-norm statistics")


def state_hash(module: nn.Module) -> str:
    """16 hex digits of every parameter and buffer: names, types, shapes, values."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def extract(
    backbone: nn.Module,
    images: Images,
    reader: Reader,
    device: torch.device,
    autocast: AbstractContextManager[object] | None = None,
) -> Features:
    """All features of a data set, in memory."""
    vectors: list[Tensor] = []
    rows: list[np.ndarray] = []
    bad: list[tuple[str, str]] = []
    for some, made, faults in stream(backbone, images, reader, device, autocast):
        bad += faults
        if len(some):
            rows.append(some)
            vectors.append(made)
    if not vectors:
        raise DataError(f"{images.name}: none of its {len(images)} images can be read")
    return Features(torch.cat(vectors), np.concatenate(rows), bad)


def require_varied(features: Tensor, name: str, *, chunk: int = 16384) -> None:
    """Refuse features [N,F] that no protocol can use, a chunk at a time.

    Features count as constant if no dimension's range exceeds a millionth of the largest magnitude: that is what rounding
    leaves of one vector.

    Args:
        name: whose features they are, for the message, such as "bank".

    Raises:
        NumericError: if they hold NaN or Inf, or are all the same.
    """
    low, high = features.new_full((features.shape[1],), torch.inf), features.new_full((features.shape[1],), -torch.inf)
    for start in range(0, len(features), chunk):
        rows = features[start : start + chunk]
        low, high = torch.minimum(low, rows.amin(dim=0)), torch.maximum(high, rows.amax(dim=0))
        if not bool((low.isfinite() & high.isfinite()).all()):  # NaN passes through both
            row = start + int((~rows.isfinite().all(dim=1)).nonzero()[0])
            raise NumericError(f"{name} features hold NaN or Inf, first in row {row}; check the weights and their precision")
    scale = torch.maximum(low.abs(), high.abs()).max()
    if len(features) > 1 and bool((high.double() - low.double()).max() <= 1e-6 * scale.double()):
        raise NumericError(
            f"{name} features are constant over all {len(features)} images: the network has collapsed or is broken"
        )


LAYOUT = 1
# Bytes that all entries may take together.
LIMIT = 20 << 30


def features(backbone: nn.Module, images: Images, reader: Reader, engine: Engine) -> Features:
    """The features of a data set: from the disk if they were made before, else made and kept.

    Raises:
        DataError: if no image can be read.
        StorageError: if the cache cannot be written; `$RELSSL_CACHE` says where it lies.
    """
    root = cache_root() / "features"
    place = root / key(backbone, images, reader, engine)
    found = _read(place)
    if found is None:
        with storing(root):
            root.mkdir(parents=True, exist_ok=True)
        sweep(root)
        _make(place, backbone, images, reader, engine)
        _evict(root, keep=place)
        found = _read(place)
    if found is None:  # another process needed the room, or a damaged entry cannot be replaced
        return extract(backbone, images, reader, engine.device, engine.autocast())
    with contextlib.suppress(OSError):
        os.utime(place)
    return found


def key(backbone: nn.Module, images: Images, reader: Reader, engine: Engine) -> str:
    """32 hex digits of the weights, the network, the images, their view, and what computes."""
    parts = {
        "layout": LAYOUT,
        "weights": state_hash(backbone),
        "network": repr(backbone),  # two networks may have equal weights and differ in a stride
        "images": identity(images),
        "view": [str(reader.view), reader.view.mean, reader.view.std, reader.max_pixels],
        "compute": [engine.precision, engine.device.type, torch.__version__, engine.threads],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _make(place: Path, backbone: nn.Module, images: Images, reader: Reader, engine: Engine) -> None:
    unfinished = temporary(place.parent)
    rows: list[np.ndarray] = []
    bad: list[tuple[str, str]] = []
    width = 0
    with storing(place):
        unfinished.mkdir(mode=0o700)
        try:
            with (unfinished / "vectors.f32").open("wb") as file:
                for some, made, faults in stream(backbone, images, reader, engine.device, engine.autocast()):
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
