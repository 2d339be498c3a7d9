"""detectron2's names and pickle of a ResNet; cards of detectron2 files load them with `read`."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relssl.errors import CheckpointError

# A ResNet's block 0 of layer 1 is detectron2's res2.0; the stem's two layers are grouped under `stem`.
_TO: tuple[tuple[str, Any], ...] = (
    (r"^(?!layer)", "stem."),
    (r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}"),
    (r"\bbn(\d)", r"conv\1.norm"),
    (r"\bdownsample\.0", "shortcut"),
    (r"\bdownsample\.1", "shortcut.norm"),
)
_FROM: tuple[tuple[str, Any], ...] = (
    (r"\bshortcut\.norm", "downsample.1"),
    (r"\bshortcut\b", "downsample.0"),
    (r"\bconv(\d)\.norm", r"bn\1"),
    (r"^res(\d)", lambda match: f"layer{int(match[1]) - 1}"),
    (r"^stem\.", ""),
)


def _renamed(name: str, rules: tuple[tuple[str, Any], ...]) -> str:
    for pattern, other in rules:
        name = re.sub(pattern, other, name)
    return name


def dump(weights: Mapping[str, Tensor]) -> bytes:
    """Return the content of a file that detectron2 reads, of a ResNet's weights under timm's names."""
    buffer = io.BytesIO()
    arrays = {_renamed(name, _TO): value.numpy() for name, value in weights.items()}
    # The author's name keeps detectron2 from taking the file for Caffe2's; the heuristics match names by their endings.
    _Pickler(buffer, protocol=5).dump({"model": arrays, "__author__": "relssl", "matching_heuristics": True})
    return buffer.getvalue()


def read(file: str | Path) -> dict[str, Tensor]:
    """Return the weights in a file that `relssl export --format detectron2` wrote, under timm's names.

    Raises:
        CheckpointError: if it holds anything but numpy arrays under names.
    """
    try:
        with open(file, "rb") as opened:
            content = _Unpickler(opened).load()
        return {_renamed(name, _FROM): torch.from_numpy(value) for name, value in content["model"].items()}
    except (pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: is no file of detectron2 weights from relssl: {error}") from error


class _Pickler(pickle.Pickler):
    """Writes arrays as calls of numpy's class: the functions it would name itself moved between numpy 1 and 2."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, np.ndarray):
            return NotImplemented
        # A bytearray, not bytes: arrays made of it can be written to, as torch wants.
        return np.ndarray, (obj.shape, obj.dtype.newbyteorder("<").str, bytearray(np.ascontiguousarray(obj).tobytes()))


class _Unpickler(pickle.Unpickler):
    """Knows numpy's array and nothing else, so that a file can call nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not loaded")
