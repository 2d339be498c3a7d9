"""Backbone features of whole data sets, by one fixed view an image: computed once, stored in a cache, and read from there.

Legend: N images, F feature dimensions, C classes.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relssl.data.folder import cache_root, shown
from relssl.data.images import Images
from relssl.data.plain import Reader
from relssl.data.subsets import identity
from relssl.engine import Engine
from relssl.errors import DataError, NumericError, StorageError
from relssl.files import read_arrays, replacing, storing, sweep

_LAYOUT = 2  # of the files in the cache
_LIMIT = 20 << 30  # bytes that they may take together
_ROWS = 1 << 14  # features that are scaled at a time, in fp64


@dataclass
class Features:
    """Features of a data set."""

    vectors: Tensor  # fp32 [n,F] on the CPU
    rows: np.ndarray  # int64 [n], the images they belong to: all but the unreadable ones
    bad: list[tuple[str, str]] = field(default_factory=list)  # (file, reason) of those

    def names(self, images: Images) -> list[str]:
        """Return the names of the images they belong to."""
        return [images.source.name(row) for row in self.rows.tolist()]


@torch.no_grad()
def extract(backbone: nn.Module, images: Images, reader: Reader, engine: Engine) -> Features:
    """Compute the features of a data set by the backbone, on the engine's device, in eval mode; it is left in its own mode.

    DataError if no image can be read, with the first reason.
    """
    vectors, rows, bad = torch.empty(0), list[int](), list[tuple[str, str]]()
    with evaluating(backbone):
        for some, views, faults in reader.batches(images):
            bad += faults
            if not len(some):
                continue
            with engine.autocast():
                part = backbone(engine.place(views)).float().cpu()
            if not rows:  # memory for all at once: joining parts at the end would take twice as much
                vectors = torch.empty(len(images), part.shape[1])
            vectors[len(rows) : len(rows) + len(some)] = part
            rows += some.tolist()
    if not rows:
        first = f", the first is {shown(bad[0][0])}: {bad[0][1]}" if bad else ""
        raise DataError(f"{images.name}: none of its {len(images)} images can be read{first}")
    return Features(vectors[: len(rows)], np.array(rows, np.int64), bad)


@contextmanager
def evaluating(backbone: nn.Module) -> Iterator[None]:
    """Put the backbone into eval mode, and each module back into its own mode afterwards."""
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def state_hash(module: nn.Module) -> str:
    """Compute 16 hex digits of every parameter and buffer: names, types, shapes, values."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def cached(
    backbone: nn.Module, images: Images, reader: Reader, engine: Engine, *, most: int = _LIMIT, say: Callable[[str], None] = print
) -> Features:
    """Return `extract`'s features: from $RELSSL_CACHE if they lie there, else computed and written there, or just computed, with a
    line, where that cannot be written.

    All files there take at most `most` bytes; those that were not used for longest go first.
    """
    features: Features | None = None
    try:
        folder = cache_root() / "features"
        path = folder / f"{cache_key(backbone, images, reader, engine)}.npz"
        if (arrays := read_arrays(path)) is not None and not len(arrays["bad"]):  # some, as earlier versions kept
            with suppress(OSError):  # of a cache that is read-only
                os.utime(path)
            return Features(torch.from_numpy(arrays["vectors"]), arrays["rows"])
        features = extract(backbone, images, reader, engine)
        if features.bad:  # which may be mended, and the name of these features would stay
            return features
        with storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        with replacing(path, needed=features.vectors.nbytes) as target:
            np.savez(target, vectors=features.vectors.numpy(), rows=features.rows, bad=np.empty(0))
        with suppress(OSError):  # another process may clean up at the same time
            files = sorted(folder.glob("*.npz"), key=lambda each: (each == path, each.stat().st_mtime), reverse=True)
            for old, total in zip(files, itertools.accumulate(each.stat().st_size for each in files), strict=True):
                if total > most and old != path:
                    old.unlink()
    except StorageError as error:
        say(f"features are not cached: {error}")
    return features or extract(backbone, images, reader, engine)


def cache_key(backbone: nn.Module, images: Images, reader: Reader, engine: Engine) -> str:
    """Compute 32 hex digits of the weights, the network, the images, their view, and what computes."""
    parts = {
        "layout": _LAYOUT,
        "weights": state_hash(backbone),
        # Two networks may have equal weights and differ in a stride, which shows, or in attention heads, which do not.
        "network": [repr(backbone), repr(getattr(backbone, "spec", None))],
        "images": identity(images),
        "view": [str(reader.view), reader.view.mean, reader.view.std, reader.max_pixels],
        "compute": [engine.precision, engine.device.type, torch.__version__, torch.get_num_threads()],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class LabelledFeatures:
    """Features and labels of both sides, for a protocol on features; it works on the device of `test`."""

    bank: Tensor  # fp32 [N,F]
    bank_labels: Tensor  # on the CPU, as of `pairs.labels_of`
    test: Tensor  # fp32 [M,F]
    test_labels: Tensor
    classes: int

    @property
    def several(self) -> bool:
        """True if an image can have several labels."""
        return self.bank_labels.dim() == 2

    def check(self) -> None:
        """Raise a NumericError for features that are NaN, Inf or constant: no dimension's range exceeds a millionth of the largest
        magnitude, which rounding may leave."""
        for side, features in (("bank", self.bank), ("test", self.test)):
            low, high = (bound.double() for bound in torch.aminmax(features, dim=0))
            if not bool((low.isfinite() & high.isfinite()).all()):  # NaN passes through both
                row = int((~features.isfinite().all(dim=1)).nonzero()[0])
                raise NumericError(f"{side} features hold NaN or Inf, first in row {row}; check the weights and their precision")
            if len(features) > 1 and bool((high - low).max() <= 1e-6 * torch.maximum(low.abs(), high.abs()).max()):
                fault = "the network has collapsed or is broken"
                raise NumericError(f"{side} features are constant over all {len(features)} images: {fault}")


def unit(rows: Tensor, device: torch.device | None = None) -> Tensor:
    """Scale [n,F] to fp32 of unit norm, whatever their length, on another device if one is given; ValueError for NaN or Inf."""
    scaled = torch.empty(rows.shape, dtype=torch.float32, device=device or rows.device)
    for part, place in zip(torch.split(rows, _ROWS), torch.split(scaled, _ROWS), strict=True):
        # In fp64 no square overflows or vanishes; a row of zeros stays zero.
        place.copy_(F.normalize(part.to(scaled.device).double(), eps=1e-300))
    if not bool(scaled.isfinite().all()):
        raise ValueError("features hold NaN or Inf")
    return scaled


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute matrix products in true fp32, without gradients: TF32 or bf16 would reorder near neighbours."""
    # The older switch, of all backends, refuses to be read once somebody has set one of these.
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [each.fp32_precision for each in backends]
    for each in backends:
        each.fp32_precision = "ieee"
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for each, precision in zip(backends, before, strict=True):
            each.fp32_precision = precision
