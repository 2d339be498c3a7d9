"""The names that other programs give to weights, and files of theirs opened without running any code in them."""

from __future__ import annotations

import collections
import functools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relssl.errors import CheckpointError
from relssl.method.backbones import weightless
from relssl.weights import store


@dataclass(frozen=True)
class Layout:
    """The names that one program gives to weights, by their prefixes; of alternatives, the first that occurs counts."""

    student: tuple[str, ...] = ("",)
    teacher: tuple[str, ...] = ()
    default: str = "student"  # the network that is taken where both exist: the one its authors evaluate
    small_stem: str = "small"  # of its networks whose first convolution is 3x3
    small_std: tuple[float, float, float] | None = None  # what it divides CIFAR-10 by, in 0..1; None: ImageNet's


# Among the backbone's names, but no part of it: classifiers, projections, what only masked training uses, a counter of averages.
HEADS = (
    *("fc.", "head.", "heads.", "head_dist.", "classifier.", "last_linear.", "pooler."),
    *("projection_head.", "prediction_head.", "projector.", "predictor.", "prototypes.", "mask_token", "decoder_", "n_averaged"),
)
LAYOUTS = {
    "official": Layout(("encoder_q.net.", "net.net."), ("encoder_k.net.",), small_std=(0.2023, 0.1994, 0.2010)),
    "solo": Layout(
        ("backbone.", "encoder."),
        ("momentum_backbone.", "momentum_encoder.", "backbone_momentum."),  # the last is Lightly's
        small_stem="small-wide",
        small_std=(0.2470, 0.2435, 0.2616),
    ),
    # And byol-pytorch's.
    "moco": Layout(("encoder_q.", "base_encoder.", "online_encoder."), ("encoder_k.", "momentum_encoder.", "target_encoder.")),
    "dino": Layout(("student.backbone.", "student_backbone."), ("teacher.backbone.", "teacher_backbone."), default="teacher"),
    "torchvision": Layout(),
    "timm": Layout(),
}
PLAIN = ("torchvision", "timm")
AVERAGES = ("state_dict_ema", "model_ema")  # what timm and DeiT keep beside the weights and evaluate


class _Ignored:
    """A stand-in for objects beside the weights: takes any arguments and keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Ignored:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None: ...


_IGNORED = """
    argparse.Namespace
    numpy.dtype numpy.ndarray numpy.core.multiarray.scalar numpy.core.multiarray._reconstruct
    numpy._core.multiarray.scalar numpy._core.multiarray._reconstruct
    numpy.dtypes.Float64DType numpy.dtypes.Float32DType numpy.dtypes.Int64DType numpy.dtypes.Int32DType numpy.dtypes.BoolDType
    pathlib.Path pathlib.PosixPath pathlib.WindowsPath pathlib.PurePosixPath
    typing.Any builtins.dict builtins.list builtins.int builtins.float builtins.str
    omegaconf.dictconfig.DictConfig omegaconf.listconfig.ListConfig omegaconf.nodes.AnyNode
    omegaconf.base.ContainerMetadata omegaconf.base.Metadata
    pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint
"""  # arguments of MoCo v3 and DINO, DINO's learning rates, settings of solo-learn; old versions key callbacks' states by class
# Lightning keeps hyper-parameters in dictionaries of its own; the unpickler fills Python's alone.
_LIGHTNING = ("lightning.fabric.utilities.data", "lightning_fabric.utilities.data", "pytorch_lightning.utilities.parsing")
_HARMLESS: list[Any] = [
    *((_Ignored, name) for name in _IGNORED.split()),
    *((collections.OrderedDict, f"{module}.AttributeDict") for module in _LIGHTNING),
    (lambda *_: collections.OrderedDict(), "collections.defaultdict"),  # its factory is dropped
]


def read(path: Path) -> Mapping[str, Any]:
    """Read the top level of a file of weights: safetensors, or whatever torch.save wrote. No code in it is ever run.

    Raises:
        CheckpointError: if it is damaged, holds an object that is not known to be harmless, or is no mapping.
    """
    kind = store.peek(path)
    if "safetensors" in (kind, path.suffix.removeprefix(".")):  # torch goes by that suffix too
        return store.read(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_HARMLESS):
            warnings.simplefilter("ignore")  # torch's remarks on pickle protocols
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")
        if not isinstance(content, Mapping):
            raise RuntimeError(f"it holds a {type(content).__name__}, not names and weights")
    except Exception as error:  # torch raises KeyError, RuntimeError, EOFError ... over files that are none of its own
        reason = store.one_line(error)[:120] if isinstance(error, (OSError, RuntimeError)) else "it is damaged or of another kind"
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"it holds a {refused[1]}, which is refused, as making one could run code of the file"
        if "TorchScript" in str(error):
            reason = "it is a TorchScript program, which torch.jit.load opens"
        advice = "open it with the program that wrote it and save model.state_dict() as safetensors"
        raise CheckpointError(f"{path}: is not read as weights: {reason}; {advice}") from error
    return content


def find_state(content: Mapping[str, Any], outer: str = "") -> tuple[dict[str, Tensor], dict[str, int]]:
    """Take the state dict out of what a program saved: under student and teacher, an averaged state, state_dict, model, or at the top.

    Where these hold no tensors, or `outer` begins with a dictionary of the file, all that is nested is searched, names joined by dots.

    Returns:
        The tensors by name, without what wrappers put in front, and the number of tensors in whatever else there is.

    Raises:
        CheckpointError: if there are no tensors, or two of one name.
    """
    everything = isinstance(content.get(outer.partition(".")[0]), Mapping)
    keys = [key for key in ("student", "teacher", *AVERAGES, "state_dict", "model") if isinstance(content.get(key), Mapping)]
    sides = [key for key in keys if key in ("student", "teacher")]
    keys = [] if everything else sides or keys[:1]
    left_out = collections.Counter({str(key): _count(value) for key, value in content.items() if keys and key not in keys})
    tensors: dict[str, Tensor] = {}
    for side, weights in [(f"{key}." if sides else "", content[key]) for key in keys] or [("", content)]:
        flat = not everything and any(isinstance(value, Tensor) for value in weights.values())
        for key, value in weights.items() if flat else _nested(weights):
            name = side + bare_name(str(key))
            if _is_plain(value):
                _add(tensors, name, value)
            else:
                left_out[name if flat else name.partition(".")[0]] += _count(value) if flat else isinstance(value, Tensor)
    if not tensors:
        places, listed = "state_dict, model, student, teacher or at its top", ", ".join(map(str, list(content)[:4]))
        raise CheckpointError(f"holds no weights under {places}; it holds {listed or 'nothing'}")
    return _timm_names(tensors), dict(left_out)


def bare_name(name: str) -> str:
    """Return a name without what wrappers put in front; `module` inside is a network's own, what torch.compile and FSDP put there is not."""
    return re.sub(r"^(module\.)+", "", re.sub(r"\b_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.", "", name))


def _is_plain(value: Any) -> bool:
    """Return whether it is a tensor whose values lie in the file: dense, and no expanded view that claims more than is there."""
    odd = not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested or value.is_quantized or value.is_meta
    return not odd and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _nested(tree: Any) -> Iterator[tuple[str, Any]]:
    """Walk through dictionaries and lists, each once however often the file holds it: names joined by dots, and what lies there."""
    stack: list[tuple[str, Any]] = [("", tree)]
    seen = set()
    while stack:
        name, node = stack.pop()
        if isinstance(node, (Mapping, list, tuple)) and id(node) not in seen:
            seen.add(id(node))
            items = list(node.items() if isinstance(node, Mapping) else enumerate(node))
            stack += [(f"{name}.{key}" if name else str(key), value) for key, value in reversed(items)]
        else:
            yield name, node


def _count(value: Any) -> int:
    """Count the tensors in a nested state, such as an optimizer's."""
    return sum(isinstance(node, Tensor) for _, node in _nested(value))


def _add(tensors: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in tensors:
        raise CheckpointError(f"holds two weights of one name, {name}, in two spellings")
    tensors[name] = value


# Hugging Face transformers' names in vision transformers (ViT, DINOv2), and timm's.
_TRANSFORMERS = {
    **{".embeddings.cls_token": ".cls_token", ".embeddings.mask_token": ".mask_token"},
    **{".embeddings.position_embeddings": ".pos_embed", ".embeddings.patch_embeddings.projection.": ".patch_embed.proj."},
    **{".encoder.layer.": ".blocks.", ".attention.attention.": ".attn.", ".attention.output.dense.": ".attn.proj."},
    **{".intermediate.dense.": ".mlp.fc1.", ".output.dense.": ".mlp.fc2.", ".layer_scale1.lambda1": ".ls1.gamma"},
    **{".layer_scale2.lambda1": ".ls2.gamma", ".layernorm_before.": ".norm1.", ".layernorm_after.": ".norm2."},
    **{".layernorm.": ".norm."},
}


def _timm_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give vision transformers of transformers, and those whose blocks DINOv2's training put into chunks, timm's names."""
    theirs = any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in tensors)
    places = {match.groups() for name in tensors if (match := re.search(r"\bblocks\.(\d+)\.(\d+)\.norm1\.weight$", name))}
    chunked = places and len({block for _, block in places}) == len(places)  # blocks of stages count anew in each
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if theirs:
            name = functools.reduce(lambda text, pair: text.replace(*pair), _TRANSFORMERS.items(), f".{name}")[1:]
        elif chunked:
            name = re.sub(r"(?<=\bblocks\.)\d+\.(?=\d+\.)", "", name, count=1)
        _add(renamed, name, value)
    for name in [name for name in renamed if theirs and ".attn.query." in name]:
        names = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        parts = [renamed[part] for part in names if part in renamed]
        if len(parts) == 3 and len({part.shape for part in parts} - {()}) == 1:
            _add(renamed, name.replace(".query.", ".qkv."), torch.cat(parts))
            renamed = {key: value for key, value in renamed.items() if key not in names}
    return renamed


def first(prefixes: Iterable[str], names: Iterable[str]) -> str | None:
    """Return the first of the prefixes that any of the names begins with."""
    return next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in names)), None)


def find_layout(tensors: Mapping[str, Tensor]) -> str:
    """Recognise the layout by the longest prefix that occurs; timm, if there is none."""
    if {"class_token", "conv_proj.weight"} <= tensors.keys():  # torchvision's vision transformers, with solo-learn's `encoder.`
        return "torchvision"
    # `encoder_q.` begins the official names as well as MoCo's.
    layouts = {name: layout for name, layout in LAYOUTS.items() if name not in PLAIN}
    prefixes = {prefix: name for name, layout in layouts.items() for prefix in layout.student + layout.teacher * (name == "dino")}
    return prefixes.get(first(sorted(prefixes, key=len, reverse=True), tensors) or "", "timm")


def inner_prefix(names: set[str], expected: list[str]) -> str:
    """Return what stands before the `expected` names of a network, or, without any, those that ResNets and vision transformers have."""
    ends = expected[:1] or ["layer1.0.conv1.weight", "3.0.conv1.weight", "4.0.conv1.weight", "patch_embed.proj.weight"]
    starts = {key.removesuffix(end) for key in names for end in ends if f".{key}".endswith(f".{end}")}
    inner = sorted(start for start in starts if 2 * sum(start + key in names for key in expected) >= len(expected))
    if len(inner) > 1 and "" not in inner:
        raise CheckpointError(f"holds several networks, {', '.join(inner)}; name one with --prefix")
    return inner[0] if inner else ""


def name_children(weights: Mapping[str, Tensor], small_stem: str) -> tuple[dict[str, Tensor], str]:
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
        _add(named, f"{children.get(number, f'fc.{number}')}.{rest}" if numbered else name, value)
    if "conv1.weight" not in named or named["conv1.weight"].shape[-1:] != (3,):
        return named, "standard"
    return named, ("small" if layers[0] == 3 else "small-pool") if layers else small_stem


def guess(weights: Mapping[str, Tensor]) -> str:
    """Say which plain vision transformer the shapes are those of, if of any; how many heads it has does not show."""
    patches = weights.get("patch_embed.proj.weight", torch.zeros(0))
    size = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}.get(patches.shape[0])
    return f", but perhaps of vit_{size}_patch{patches.shape[-1]}_224" if size and "blocks.0.attn.qkv.weight" in weights else ""


_RESNETS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"),
    *("resnext50_32x4d", "resnext101_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
)


def infer_resnet(weights: Mapping[str, Tensor]) -> str | None:
    """Return timm's name of the ResNet whose blocks have these convolutions, all but a few; None if it is none of those known."""
    blocks = _convolutions(weights)
    for name in _RESNETS if blocks else ():
        if len(_resnet(name) & blocks) >= 0.8 * max(len(_resnet(name)), len(blocks)):
            return name
    return None


@functools.lru_cache
def _resnet(name: str) -> set[tuple[str, torch.Size]]:
    return _convolutions(weightless(name).state_dict())


def _convolutions(weights: Mapping[str, Tensor]) -> set[tuple[str, torch.Size]]:
    return {(name, value.shape) for name, value in weights.items() if re.fullmatch(r"layer\d\.\d+\.conv\d\.weight", name)}
