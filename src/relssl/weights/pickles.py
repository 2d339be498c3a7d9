"""What other programs saved with torch.save, read without running anything of theirs.

torch's restricted unpickler makes tensors and plain containers only. Training programs save a few harmless objects beside
their weights, such as parsed arguments; the names of those are bound to a class of ours that forgets what it is given, so
that such a file can be read and still no foreign code runs. Every other name is refused.
"""

from __future__ import annotations

import collections
import re
import tarfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from relssl.errors import CheckpointError
from relssl.weights import tensorfile
from relssl.weights.tensorfile import one_line


class Forgotten:
    """Stands for an object that is no weight; takes whatever it is given and keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Forgotten:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None: ...


def empty(*_: Any) -> collections.OrderedDict[Any, Any]:
    """Stands for a defaultdict, whose factory is forgotten."""
    return collections.OrderedDict()


_NUMPY = ("core.multiarray", "_core.multiarray")
_FORGOTTEN = (
    "argparse.Namespace",  # MoCo v3's and DINO's arguments
    "numpy.dtype",  # DINO's optimizer keeps learning rates as numpy scalars
    "numpy.ndarray",
    *(f"numpy.{module}.{name}" for module in _NUMPY for name in ("scalar", "_reconstruct")),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float64", "Float32", "Int64", "Int32", "Bool")),
    *(f"pathlib.{kind}" for kind in ("Path", "PosixPath", "WindowsPath", "PurePosixPath")),
    *("typing.Any", "builtins.dict", "builtins.list", "builtins.int", "builtins.float", "builtins.str"),
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),  # settings of solo-learn
    *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "omegaconf.nodes.AnyNode"),
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",  # old versions key the state of callbacks by their class
)
# The unpickler fills only dictionaries of Python's own.
_DICTIONARIES = (
    "lightning.fabric.utilities.data.AttributeDict",  # hyper-parameters of Lightning's checkpoints
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)


def read(path: Path) -> Mapping[str, Any]:
    """The top level of a file of weights: safetensors, or whatever torch.save wrote.

    Returns:
        Names to tensors, to nested mappings of them, or to anything else that was saved beside them. Tensors may lie in a
        memory map of the file and claim more elements than the file holds: check shapes before copying them.

    Raises:
        CheckpointError: naming the file and why it is not read: damaged, of a format that only full unpickling opens,
            holding an object that is not known to be harmless, or no mapping.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: is no file")
    if path.suffix == ".safetensors":
        return tensorfile.read(path)
    try:
        old = not zipfile.is_zipfile(path) and tarfile.is_tarfile(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if old:
        raise CheckpointError(f"{path}: is in torch's tar format of before 2018, which cannot be read safely; {_CONVERT}")
    raw = _unpickle(path)
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{path}: holds a {type(raw).__name__}, not names and weights; {_CONVERT}")
    return raw


_CONVERT = "open it with the program that wrote it and save model.state_dict() as safetensors"


def _unpickle(path: Path) -> Any:
    harmless: list[Any] = [(Forgotten, name) for name in _FORGOTTEN]
    harmless += [(collections.OrderedDict, name) for name in _DICTIONARIES] + [(empty, "collections.defaultdict")]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(harmless):
            warnings.simplefilter("ignore")  # torch's remarks on pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises KeyError, RuntimeError, EOFError ... over files that are none of its own
        text = str(error)
        refused = re.search(r"GLOBAL ([\w.]+)", text)
        if refused:
            raise CheckpointError(
                f"{path}: holds a {refused[1]}, which is refused, as making one could run code of the file; {_CONVERT}"
            ) from error
        if "TorchScript" in text:
            raise CheckpointError(f"{path}: is a TorchScript program, not weights; {_CONVERT}") from error
        reason = one_line(error) if isinstance(error, RuntimeError) else "it is damaged or of another kind"
        raise CheckpointError(f"{path}: is not a file of weights ({reason[:120]})") from error
