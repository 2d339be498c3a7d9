"""ResNets in detectron2's layout, as MoCo's converter writes it: a pickle of numpy arrays under detectron2's names.

detectron2 reads files of other programs in this form alone. Ours names one class, numpy's array, and is read back by an
unpickler that knows no other.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor

from relssl.config import Config
from relssl.errors import CheckpointError
from relssl.method.backbones import TORCHVISION
from relssl.weights.formats import unsuited
from relssl.weights.twins import TWINS, bare
from relssl.weights.written import Snippet, Source, Written, quote


def as_detectron2(source: Source) -> Written:
    """The pickle, and the part of detectron2's configuration that goes with it."""
    network = _torchvision_resnet(source)
    weights = {to_detectron(name): value.numpy() for name, value in source.backbone.state_dict().items()}
    buffer = io.BytesIO()
    # The author's name keeps detectron2 from taking the file for Caffe2's; the heuristics match names by their endings.
    _Pickler(buffer, protocol=5).dump({"model": weights, "__author__": "relssl", "matching_heuristics": True})

    def lines(file: str) -> list[str]:
        return [
            "import timm",
            "from relssl.weights.detectron import read",
            f"backbone = timm.create_model({quote(source.config.backbone)}, num_classes=0).eval()",
            f"backbone.load_state_dict(read({quote(file)}))",
        ]

    def notes(file: str) -> str:
        settings = _settings(source.config, network, file)
        return f"In detectron2's configuration (images are RGB, in 0..255):\n\n{settings}"

    return Written(buffer.getvalue(), (Snippet("timm, to look into the file without detectron2", lines),), notes=notes)


def _torchvision_resnet(source: Source) -> torchvision.models.ResNet:
    """torchvision's network of equal names and shapes, which detectron2's layout is told by."""
    config, name = source.config, TWINS.get(source.config.backbone, "")
    if config.backbone.startswith(TORCHVISION):
        raise unsuited("detectron2", f"is written of timm's ResNets, not of {config.backbone}")
    network = bare(name)[0] if "resne" in name and config.encoder.stem == "standard" else None
    shapes = {key: value.shape for key, value in source.backbone.state_dict().items()}
    if network is None or {key: value.shape for key, value in network.state_dict().items()} != shapes:
        what = f"{config.backbone} with {config.encoder.stem} stem" + (" and backbone_args" if config.backbone_args else "")
        raise unsuited("detectron2", f"takes ResNets as torchvision has them, not {what}")
    assert isinstance(network, torchvision.models.ResNet)
    return network


def _settings(config: Config, network: torchvision.models.ResNet, file: str) -> str:
    """YAML of detectron2's configuration, indented as code."""
    depth, out = re.findall(r"\d+", config.backbone)[0], network.layer1[0].conv1.in_channels * (4 if _bottleneck(network) else 1)
    mean, std = ([round(255 * value, 3) for value in channels or ()] for channels in (config.views.mean, config.views.std))
    lines = [
        "MODEL:",
        f"  WEIGHTS: {file}",
        f"  PIXEL_MEAN: {mean}",
        f"  PIXEL_STD: {std}",
        "  RESNETS:",
        f"    DEPTH: {depth}",
        "    STRIDE_IN_1X1: False",
        f"    NUM_GROUPS: {network.groups}",
        f"    WIDTH_PER_GROUP: {network.base_width}",
        f"    RES2_OUT_CHANNELS: {out}",
        "INPUT:",
        "  FORMAT: RGB",
    ]
    return "\n".join("    " + line for line in lines)


def _bottleneck(network: torchvision.models.ResNet) -> bool:
    return hasattr(network.layer1[0], "conv3")


# A ResNet's block 0 of layer 1 is detectron2's res2.0; the stem's two layers are grouped under `stem`.
_TO = (
    (r"^(?!layer)", "stem."),
    (r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}"),
    (r"\bbn(\d)", r"conv\1.norm"),
    (r"\bdownsample\.0", "shortcut"),
    (r"\bdownsample\.1", "shortcut.norm"),
)
_FROM = (
    (r"\bshortcut\.norm", "downsample.1"),
    (r"\bshortcut\b", "downsample.0"),
    (r"\bconv(\d)\.norm", r"bn\1"),
    (r"^res(\d)", lambda found: f"layer{int(found[1]) - 1}"),
    (r"^stem\.", ""),
)


def to_detectron(name: str) -> str:
    """detectron2's name of a ResNet's weight."""
    return _replaced(name, _TO)


def _replaced(name: str, rules: Any) -> str:
    for pattern, other in rules:
        name = re.sub(pattern, other, name)
    return name


def read(file: str | Path) -> dict[str, Tensor]:
    """The weights in a file that `relssl export --format detectron2` wrote, under timm's names.

    Raises:
        CheckpointError: if it holds anything but numpy arrays under names.
    """
    try:
        with open(file, "rb") as opened:
            held = _Unpickler(opened).load()
        return {_replaced(name, _FROM): torch.from_numpy(value) for name, value in held["model"].items()}
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
