"""The names that other programs give to weights, and files of theirs opened without running any code in them."""

from __future__ import annotations

import collections
import functools
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from relssl.errors import CheckpointError
from relssl.weights import store


@dataclass(frozen=True)
class Layout:
    """The names that one program gives to weights, by their prefixes; of alternatives, the first that occurs counts."""

    student: tuple[str, ...] = ("",)
    teacher: tuple[str, ...] = ()
    default: str = "student"  # the network that is taken where both exist: the one its authors evaluate
    small_stem: str = "small"  # of its networks whose first convolution is 3x3
    small_std: tuple[float, float, float] | None = None  # what it divides CIFAR-10 by, in 0..1; None: ImageNet's


HEADS = ("fc.", "head.", "heads.", "head_dist.", "classifier.", "last_linear.")  # among the backbone's names, but no part of it
LAYOUTS = {
    "official": Layout(("encoder_q.net.", "net.net."), ("encoder_k.net.",), small_std=(0.2023, 0.1994, 0.2010)),
    "solo": Layout(
        ("backbone.", "encoder."),
        ("momentum_backbone.", "momentum_encoder."),
        small_stem="small-wide",
        small_std=(0.2470, 0.2435, 0.2616),
    ),
    "moco": Layout(("encoder_q.", "base_encoder."), ("encoder_k.", "momentum_encoder.")),
    "dino": Layout(("student.backbone.",), ("teacher.backbone.",), default="teacher"),
    "torchvision": Layout(),
    "timm": Layout(),
}
PLAIN = ("torchvision", "timm")


class Ignored:
    """A stand-in for objects beside the weights: takes any arguments and keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Ignored:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None: ...


_IGNORED = (
    "argparse.Namespace",  # MoCo v3's and DINO's arguments
    *("numpy.dtype", "numpy.ndarray"),  # DINO's optimizer keeps learning rates as numpy scalars
    *(f"numpy.{module}.multiarray.{name}" for module in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float64", "Float32", "Int64", "Int32", "Bool")),
    *(f"pathlib.{kind}" for kind in ("Path", "PosixPath", "WindowsPath", "PurePosixPath")),
    *("typing.Any", "builtins.dict", "builtins.list", "builtins.int", "builtins.float", "builtins.str"),
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),  # settings of solo-learn
    *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "omegaconf.nodes.AnyNode"),
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",  # old versions key the state of callbacks by their class
)
# Lightning keeps hyper-parameters in dictionaries of its own; the unpickler fills Python's alone.
_LIGHTNING = ("lightning.fabric.utilities.data", "lightning_fabric.utilities.data", "pytorch_lightning.utilities.parsing")
_HARMLESS: list[Any] = [
    *((Ignored, name) for name in _IGNORED),
    *((collections.OrderedDict, f"{module}.AttributeDict") for module in _LIGHTNING),
    (lambda *_: collections.OrderedDict(), "collections.defaultdict"),  # its factory is dropped
]


def read(path: Path) -> Mapping[str, Any]:
    """Read the top level of a file of weights: safetensors, or whatever torch.save wrote. No code in it is ever run.

    Tensors may lie in a memory map of the file and claim more elements than it holds: check shapes before copying them.

    Raises:
        CheckpointError: if it is damaged, holds an object that is not known to be harmless, or is no mapping.
    """
    if path.suffix == ".safetensors":
        return store.read(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_HARMLESS):
            warnings.simplefilter("ignore")  # torch's remarks on pickle protocols
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if not isinstance(content, Mapping):
            raise RuntimeError(f"it holds a {type(content).__name__}, not names and weights")
    except Exception as error:  # torch raises KeyError, RuntimeError, EOFError ... over files that are none of its own
        plain = isinstance(error, (OSError, RuntimeError))
        reason = store.one_line(error)[:120] if plain else "it is damaged or of another kind"
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"it holds a {refused[1]}, which is refused, as making one could run code of the file"
        advice = "open it with the program that wrote it and save model.state_dict() as safetensors"
        raise CheckpointError(f"{path}: is not read as weights: {reason}; {advice}") from error
    return content


def find_state(content: Mapping[str, Any], path: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Take the state dict out of what a program saved: under student and teacher, state_dict, model, or at the top.

    Returns:
        The tensors by name, without what wrappers put in front, and the number of tensors in whatever else there is.

    Raises:
        CheckpointError: if there are no tensors, or two of one name.
    """
    holders = [key for key in ("student", "teacher", "state_dict", "model") if isinstance(content.get(key), Mapping)]
    sides = [key for key in holders if key in ("student", "teacher")]
    holders = sides or holders[:1]
    left_out = {str(key): _count(value) for key, value in content.items() if holders and key not in holders}
    tensors: dict[str, Tensor] = {}
    for prefix, weights in [(f"{key}." if sides else "", content[key]) for key in holders] or [("", content)]:
        for key, value in weights.items():
            name = prefix + bare_name(str(key))
            if isinstance(value, Tensor) and not value.is_nested:  # those have no shape to compare
                _add(tensors, name, value, path)
            else:
                left_out[name] = _count(value)
    if not tensors:
        looked, held = "state_dict, model, student, teacher or at its top", ", ".join(map(str, list(content)[:4]))
        raise CheckpointError(f"{path}: holds no weights under {looked}; it holds {held or 'nothing'}")
    return tensors, left_out


def bare_name(name: str) -> str:
    """Return a name without what wrappers put in front."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", name)


def _add(tensors: dict[str, Tensor], name: str, value: Tensor, path: Path) -> None:
    if name in tensors:
        raise CheckpointError(f"{path}: holds two weights of one name, {name}, in two spellings")
    tensors[name] = value


def _count(value: Any) -> int:
    """Count the tensors in a nested state, such as an optimizer's."""
    if isinstance(value, (Mapping, list, tuple)):
        return sum(map(_count, value.values() if isinstance(value, Mapping) else value))
    return int(isinstance(value, Tensor))


def _first(prefixes: Iterable[str], names: Iterable[str]) -> str | None:
    return next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in names)), None)


def find_layout(tensors: Mapping[str, Tensor]) -> str:
    """Recognise the layout by the longest prefix that occurs; timm, if there is none."""
    # `encoder_q.` begins the official names as well as MoCo's.
    layouts = {name: layout for name, layout in LAYOUTS.items() if name not in PLAIN}
    prefixes = {prefix: name for name, layout in layouts.items() for prefix in layout.student + layout.teacher * (name == "dino")}
    prefix = _first(sorted(prefixes, key=len, reverse=True), tensors)
    return "timm" if prefix is None else prefixes[prefix]


def split(
    tensors: Mapping[str, Tensor], name: str, network: str | None, left_out: dict[str, int], path: Path
) -> tuple[str, str, dict[str, Tensor]]:
    """Take one network of a layout out of a file, and count in `left_out` what lies beside it: heads, queue, the other network.

    Returns:
        Student, teacher, or backbone where a layout holds a single one; the prefix of its names in the file; and its weights by
        their names in the backbone.
    """
    layout = LAYOUTS[name]
    prefixes = {"student": _first(layout.student, tensors), "teacher": _first(layout.teacher, tensors)}
    chosen = network or next((side for side in (layout.default, *prefixes) if prefixes[side] is not None), layout.default)
    if (prefix := prefixes[chosen]) is None:
        looked, held = " or ".join(layout.student + layout.teacher), ", ".join(list(tensors)[:4])
        raise CheckpointError(f"{path}: holds no {network or 'backbone'} of layout {name} (looked for {looked}); it holds {held}")
    for key in tensors:
        if not key.startswith(prefix):
            part, dot, _ = key.partition(".")
            left_out[part + dot] = left_out.get(part + dot, 0) + 1
    weights = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return "backbone" if name in PLAIN else chosen, prefix, weights


def name_children(weights: Mapping[str, Tensor], small_stem: str, path: Path) -> tuple[dict[str, Tensor], str]:
    """Give the children of a ResNet that was put into an nn.Sequential their names again, and recognise its stem.

    MoCo's CIFAR demo, which the small-set code of ReSSL follows, drops the fully connected layer or appends it, and leaves out the
    max-pool or keeps it: it has no weights, but shows as a gap in the numbers.

    Returns:
        The weights by name, those with other names as they are; and the stem, `small_stem` where only its 3x3 convolution shows.
    """
    layers = sorted({int(name.split(".")[0]) for name in weights if re.match(r"[0-9]{1,2}\.[0-9]+\.", name)})[:4]
    children = {"0": "conv1", "1": "bn1"} | {str(number): f"layer{i + 1}" for i, number in enumerate(layers)}
    named: dict[str, Tensor] = {}
    for name, value in weights.items():
        number, _, rest = name.partition(".")
        numbered = number.isdecimal() and (layers or "0.weight" in weights)
        _add(named, f"{children.get(number, f'fc.{number}')}.{rest}" if numbered else name, value, path)
    if "conv1.weight" not in named or named["conv1.weight"].shape[-1:] != (3,):
        return named, "standard"
    return named, ("small" if layers[0] == 3 else "small-pool") if layers else small_stem


_RESNETS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"),
    *("resnext50_32x4d", "resnext101_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
)


def infer_resnet(weights: Mapping[str, Tensor]) -> str | None:
    """Return timm's name of the ResNet whose blocks have these convolutions, all but a few; None if it is none of those known."""
    blocks = _convolutions(weights)
    for name in _RESNETS if blocks else ():
        if len(_resnet(name).items() & blocks.items()) >= 0.8 * max(len(_resnet(name)), len(blocks)):
            return name
    return None


@functools.lru_cache
def _resnet(name: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return _convolutions(timm.create_model(name).state_dict())


def _convolutions(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in weights.items() if re.fullmatch(r"layer\d\.\d+\.conv\d\.weight", name)}
