"""Backbones from other programs' files, strictly: every name in the file is matched, known to be something else, or refused."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from relssl.config import Config, from_mapping
from relssl.data.sources import IMAGENET_MEAN, IMAGENET_STD
from relssl.errors import CheckpointError, ConfigError
from relssl.method.backbones import TORCHVISION, create_backbone, feature_width
from relssl.weights import layouts, pickles, resnets, twins
from relssl.weights.account import LoadReport, account
from relssl.weights.layouts import Found, State
from relssl.weights.opening import NO_DATA
from relssl.weights.probe import dead, untrained
from relssl.weights.runs import build
from relssl.weights.tensorfile import one_line

# What the code that trains small-stem networks of these layouts normalises CIFAR-10 by.
_CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
_CIFAR10_STD = {"official": (0.2023, 0.1994, 0.2010), "solo": (0.2470, 0.2435, 0.2616)}
_SIZES = {"standard": 224, "small": 32, "small-wide": 32, "small-pool": 64}


def load_foreign(
    path: str | Path,
    *,
    layout: str | None = None,
    backbone: str | None = None,
    stem: str | None = None,
    network: str | None = None,
    allow: Sequence[str] = (),
    size: int | None = None,
) -> tuple[nn.Module, LoadReport]:
    """The backbone in a file that another program wrote, in eval mode.

    Args:
        path: safetensors, or what torch.save wrote; nothing in it is run.
        layout: one of `layouts.LAYOUTS`; None: found from the names.
        backbone: timm's name; None: inferred, for ResNets.
        stem: a choice of `encoder.stem`; None: standard, or for a 3x3 first convolution that of the layout. A max-pool has no
            weights and cannot be seen: say small-pool for STL-10 and Tiny-ImageNet networks.
        network: student or teacher, where the file holds both; None: the one its authors evaluate.
        allow: names, or beginnings of names that end in `.` or `*`, that may be missing or unexpected; `untrained` allows
            weights that look like those of a fresh network.
        size: pixels of its images; None: 224, 32 for small stems, 64 for small-pool.

    Returns:
        The network as `load_backbone` gives it, with `.num_features`, `.transform` and `.config`, and the account.

    Raises:
        ConfigError: for an argument that is unknown or does not fit.
        CheckpointError: if the file cannot be read safely, is of no known layout, does not match the network exactly, or
            holds weights that look untrained.
    """
    if stem not in (None, *_SIZES):
        raise ConfigError(f"stem: must be one of {', '.join(_SIZES)}, got {stem!r}")
    state = layouts.opened(pickles.read(Path(path)), Path(path))
    chosen = layouts.find(layout, state) or _plain(state, backbone)
    found = layouts.split(state, chosen, network)
    name = backbone or resnets.infer_resnet(found.weights)
    if name is None:
        raise ConfigError(
            f"backbone: {path} is of layout {chosen.name}, but no ResNet known here; give timm's name of its network"
        )
    args = {"num_heads": 12} if chosen.name == "moco" and name.startswith("vit_small") else {}
    stem = stem or _stem(found)
    report = LoadReport(Path(path).name, chosen.name, layout is None, found.network, name, stem, 0, 0, found.left_out)
    if args:
        report.notes.append("12 attention heads, as MoCo v3's small ViT has, where timm's has 6")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what is allowed to be missing is the same in every process
        fresh = create_backbone(name, stem, args)
    weights = account(state, found, _wanted(chosen.name, name, stem, fresh), _heads(found, name, fresh), allow, report)
    if chosen.name == "torchvision" and stem == "standard" and not name.startswith(TORCHVISION):
        weights = twins.from_torchvision(weights, name)
    config = _config(report, args, size, getattr(fresh, "pretrained_cfg", {}))
    made = build(config, weights, Path(path))
    feature_width(made, config.views.weak.size)
    fault = dead(made, config) or untrained(made, fresh)
    if fault and "untrained" not in allow:
        raise CheckpointError(f"{path}: the {report.network} looks untrained: {fault}; --allow untrained loads it all the same")
    return made, report


def _plain(state: State, backbone: str | None) -> layouts.Layout:
    """timm's or torchvision's own names: whichever share more with the network; of ResNets they are the same.

    Raises:
        CheckpointError: if the names are neither's.
    """
    name = backbone or resnets.infer_resnet(state.tensors)
    sought = f"its names fit no known layout: looked for {layouts.prefixes()}, and for the bare names of "
    if name is None:
        raise CheckpointError(
            f"{state.path}: {sought}a ResNet; they begin {', '.join(list(state.names.values())[:3])}; "
            "for another network with its own names give timm's name with --backbone"
        )
    if name.startswith(TORCHVISION):
        return layouts.LAYOUTS["torchvision"]
    ours = len(create_backbone(name).state_dict().keys() & state.tensors.keys())
    theirs = len(twins.bare(twins.TWINS[name])[0].state_dict().keys() & state.tensors.keys()) if name in twins.TWINS else 0
    if not ours and not theirs:
        raise CheckpointError(f"{state.path}: {sought}{name}; they begin {', '.join(list(state.names.values())[:3])}")
    return layouts.LAYOUTS["timm" if ours >= theirs else "torchvision"]


def _stem(found: Found) -> str:
    first = found.weights.get("conv1.weight")
    return found.stem or (found.layout.small_stem if first is not None and first.shape[-1] == 3 else "standard")


def _wanted(layout: str, name: str, stem: str, fresh: nn.Module) -> dict[str, Tensor]:
    """The weights a file has to give, under the layout's names."""
    if layout == "torchvision" and stem == "standard" and not name.startswith(TORCHVISION):
        if name not in twins.TWINS:
            raise ConfigError(f"backbone: torchvision's twin of {name!r} is not known; if the names are timm's, say --from timm")
        return twins.bare(twins.TWINS[name])[0].state_dict()
    return fresh.state_dict()


def _heads(found: Found, name: str, fresh: nn.Module) -> tuple[str, ...]:
    """The classifier's prefix under plain names; the layout's own heads otherwise."""
    theirs = name.removeprefix(TORCHVISION) if name.startswith(TORCHVISION) else twins.TWINS.get(name)
    if found.layout.name == "torchvision" and theirs is not None:
        return (twins.bare(theirs)[1] + ".",)
    if found.layout.name == "timm":
        classifier = getattr(fresh, "pretrained_cfg", {}).get("classifier") or ()
        return tuple(f"{part}." for part in ((classifier,) if isinstance(classifier, str) else classifier))
    return found.layout.heads


def _config(report: LoadReport, args: Mapping[str, Any], size: int | None, cfg: Mapping[str, Any]) -> Config:
    """A configuration that says how the backbone is built and what it sees; of training it says nothing."""
    fixed = cfg["input_size"][-1] if cfg.get("fixed_input_size") else None
    side = size if size is not None else fixed if fixed and report.stem == "standard" else _SIZES[report.stem]
    if fixed and side != fixed:
        args = {"img_size": fixed, **args}  # the file's position embeddings are those of the network's own size
    small = report.stem != "standard"
    cifar = report.stem in ("small", "small-wide") and report.layout in _CIFAR10_STD
    mean, std = (_CIFAR10_MEAN, _CIFAR10_STD[report.layout]) if cifar else (IMAGENET_MEAN, IMAGENET_STD)
    scaling = "bicubic" if report.layout == "dino" else "bilinear"  # as its authors' evaluations scale
    report.notes.append(
        f"assumed, as the file does not say: images of {side} pixels, scaled {scaling}, normalised by "
        f"{'CIFAR-10' if cifar else 'ImageNet'}'s mean and deviation"
    )
    return neutral(report.backbone, args, report.stem, side, 1.0 if small else 256 / 224, mean, std, scaling)


def load_timm(name: str) -> nn.Module:
    """A network of timm's with the library's own pretrained weights, in eval mode; downloads them unless they are cached.

    Args:
        name: timm's name, with or without `timm:` before it and a tag behind it, such as `resnet50.a1_in1k`.

    Returns:
        The network as `load_backbone` gives it; size, mean, deviation, margin and interpolation are those timm states.

    Raises:
        ConfigError: if timm does not know the name, or has no weights for it.
        CheckpointError: if they cannot be fetched.
    """
    name = name.removeprefix("timm:")
    bare = name.partition(".")[0]
    fresh = create_backbone(bare)  # an unknown name is told before anything is fetched
    try:
        cfg = timm.get_pretrained_cfg(name)
    except Exception as error:  # timm's own types, for a tag it does not know
        raise ConfigError(f"backbone: timm knows no weights {name!r} ({one_line(error)})") from error
    if cfg is None or not cfg.has_weights:
        raise ConfigError(f"backbone: timm has no pretrained weights for {name}")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # which tells of each retry
    try:
        network = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # whatever the network, the hub or the file raise
        raise CheckpointError(f"{name}: its weights cannot be fetched ({one_line(error)}); is there a network?") from error
    size = cfg.input_size[-1]
    margin = math.floor(size / cfg.crop_pct) / size  # timm rounds down to whole pixels
    config = neutral(bare, {}, "standard", size, margin, cfg.mean, cfg.std, cfg.interpolation)
    made = build(config, network.state_dict(), Path(name))
    fault = dead(made, config) or untrained(made, fresh)
    if fault:
        raise CheckpointError(f"{name}: looks untrained: {fault}")
    return made


def neutral(
    backbone: str,
    args: Mapping[str, Any],
    stem: str,
    size: int,
    margin: float,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bilinear",
) -> Config:
    """The configuration of a backbone that no run of ours made."""
    views = {"weak": {"name": "weak", "size": size}, "strong": {"name": "contrastive", "size": size}}
    return from_mapping(
        {
            "data": NO_DATA,
            "recipe": "imported",
            "backbone": backbone,
            "backbone_args": dict(args),
            "encoder": {"stem": stem},
            "views": {**views, "margin": margin, "mean": list(mean), "std": list(std), "interpolation": interpolation},
        }
    )
