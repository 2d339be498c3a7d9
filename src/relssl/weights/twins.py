"""The same architecture in timm and in torchvision: which weight of one is which of the other, proven by running both.

Only ResNets and MNASNets carry equal names. Elsewhere weights are paired in order among those of one shape, and a pairing counts only
once two networks with randomised weights give equal outputs, so a wrong one is refused rather than written.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from relssl.data import digits
from relssl.errors import CheckpointError, ConfigError
from relssl.method.backbones import drop_classifier
from relssl.settings.reading import nearest_word

TOLERANCE = 1e-4  # largest difference of outputs, relative to the largest output, in fp32
SIDE = 64  # pixels of the images of a comparison, where the network takes any size

_SAME_NAME = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
    *("densenet121", "densenet161", "densenet169", "densenet201"),
    *("vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"),
    *("convnext_tiny", "convnext_small", "convnext_base", "convnext_large"),
    *(f"efficientnet_b{number}" for number in range(8)),
)
# timm's name -> torchvision's. timm rounds the widths of a few RegNets to other numbers: their `_tv` forms are the twins.
TWINS = {name: name for name in _SAME_NAME} | {
    "mobilenetv2_100": "mobilenet_v2",
    "mobilenetv3_large_100": "mobilenet_v3_large",
    "mobilenetv3_small_100": "mobilenet_v3_small",
    "mnasnet_050": "mnasnet0_5",
    "mnasnet_100": "mnasnet1_0",
    "regnetx_004_tv": "regnet_x_400mf",
    "regnetx_008": "regnet_x_800mf",
    "regnetx_016": "regnet_x_1_6gf",
    "regnetx_032": "regnet_x_3_2gf",
    "regnetx_080": "regnet_x_8gf",
    "regnetx_160": "regnet_x_16gf",
    "regnetx_320": "regnet_x_32gf",
    "regnety_004": "regnet_y_400mf",
    "regnety_008_tv": "regnet_y_800mf",
    "regnety_016": "regnet_y_1_6gf",
    "regnety_032": "regnet_y_3_2gf",
    "regnety_080_tv": "regnet_y_8gf",
    "regnety_160": "regnet_y_16gf",
    "regnety_320": "regnet_y_32gf",
    "vit_base_patch16_224": "vit_b_16",
    "vit_base_patch32_224": "vit_b_32",
    "vit_large_patch16_224": "vit_l_16",
    "vit_large_patch32_224": "vit_l_32",
}


def to_torchvision(backbone: nn.Module, timm_name: str) -> tuple[str, dict[str, Tensor]]:
    """A backbone's weights under torchvision's names.

    Args:
        backbone: the timm network without classifier, on the CPU, with its own (`standard`) stem.
        timm_name: its name in timm.

    Returns:
        torchvision's name of the network, and its state dict less the last linear layer. Where the two libraries
        differ in batch norm's epsilon (MobileNetV3, large EfficientNets) the norms' weights are scaled to make up for
        it: in eval mode the networks are equal.

    Raises:
        ConfigError: if torchvision has no such network.
        CheckpointError: if a shape differs, or the outputs do on random or real images.
    """
    name = _twin(timm_name)
    other, _ = bare(name)
    moved = _move(backbone, other, pairs(timm_name), f"{timm_name} to torchvision's {name}")
    return name, moved


def from_torchvision(weights: Mapping[str, Tensor], timm_name: str) -> dict[str, Tensor]:
    """torchvision's weights under timm's names; the other way round than `to_torchvision`, as strict.

    Args:
        weights: a state dict of torchvision's network, with or without its last linear layer.

    Raises:
        ConfigError: if torchvision has no such network.
        CheckpointError: if names or shapes do not match, or the networks' outputs differ.
    """
    name = _twin(timm_name)
    source, classifier = bare(name)
    weights = {key: value for key, value in weights.items() if not key.startswith(f"{classifier}.")}
    _same(source.state_dict(), weights, f"torchvision's {name}")
    _fill(source, weights)
    back = {theirs: ours for ours, theirs in pairs(timm_name).items()}
    return _move(source, _timm(timm_name), back, f"torchvision's {name} to timm's {timm_name}")


def bare(name: str, args: Mapping[str, Any] | None = None) -> tuple[nn.Module, str]:
    """torchvision's network without its last layer, in eval mode with random weights, and that layer's name."""
    with torch.random.fork_rng(devices=[]):
        network: nn.Module = torchvision.models.get_model(name, weights=None, **(args or {}))
    return network.eval(), drop_classifier(network)


@functools.lru_cache
def pairs(timm_name: str) -> Mapping[str, str]:
    """timm's name of every weight -> torchvision's, without the classifiers.

    Raises:
        ConfigError: if torchvision has no such network, or in the installed versions the two are not the same function.
    """
    name = _twin(timm_name)
    ours, (theirs, _) = _timm(timm_name), bare(name)
    found = _pair(ours.state_dict(), theirs.state_dict())
    if found is None:
        raise ConfigError(f"backbone: {timm_name} and torchvision's {name} differ in these versions of the two libraries")
    _randomise(ours)
    try:
        _move(ours, theirs, found, timm_name)
    except CheckpointError as error:
        raise ConfigError(f"backbone: the pairing of {timm_name} with torchvision's {name} is not proven ({error})") from error
    return found


def _twin(timm_name: str) -> str:
    if timm_name not in TWINS:
        raise ConfigError(
            f"backbone: torchvision's twin of {timm_name!r} is not known; near: {nearest_word(timm_name, list(TWINS))}"
        )
    return TWINS[timm_name]


def _timm(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        network: nn.Module = timm.create_model(name, num_classes=0)
    return network.eval()


def _pair(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, str] | None:
    """Names in order among weights of one shape; None where the counts differ."""
    if ours.keys() == theirs.keys():
        return {name: name for name in ours}
    left, right = _by_shape(ours), _by_shape(theirs)
    if {shape: len(names) for shape, names in left.items()} != {shape: len(names) for shape, names in right.items()}:
        return None
    return {one: other for shape, names in left.items() for one, other in zip(names, right[shape], strict=True)}


def _by_shape(state: Mapping[str, Tensor]) -> dict[tuple[int, ...], list[str]]:
    """Names by shape. A 1x1 convolution is a linear layer, VGG's 7x7 one too: outputs and the number of values decide."""
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    starts: dict[str, int] = {}
    for position, name in enumerate(state):
        block = re.match(r"s\d+\.b\d+\.", name)
        starts[name] = starts.setdefault(block[0], position) if block else position
    # timm's RegNet blocks list their shortcut last, torchvision's first.
    for name in sorted(state, key=lambda name: (starts[name], ".downsample." not in name)):
        groups[(*state[name].shape[:1], state[name].numel())].append(name)
    return groups


def _move(source: nn.Module, target: nn.Module, names: Mapping[str, str], what: str) -> dict[str, Tensor]:
    """Fill `target` with the source's weights under its own names, prove that both now compute the same, return them."""
    state, wanted = source.state_dict(), target.state_dict()
    _same({name: wanted[other] for name, other in names.items()}, state, what, flat=True)
    moved = {other: state[name].reshape(wanted[other].shape).clone() for name, other in names.items()}
    _even_out(source, target, names, moved)
    _fill(target, moved)
    difference = _difference(source, target)
    if not difference <= TOLERANCE:  # NaN is refused as well
        raise CheckpointError(
            f"{what}: outputs differ by {difference:.1e} of the largest, more than {TOLERANCE:g}; nothing is written"
        )
    return moved


def _same(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str, flat: bool = False) -> None:
    missing, extra = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    shapes = [
        f"{name} {list(given[name].shape)} for {list(wanted[name].shape)}"
        for name in wanted.keys() & given.keys()
        if (wanted[name].numel() != given[name].numel() if flat else wanted[name].shape != given[name].shape)
    ]
    faults = (("missing", missing), ("unexpected", extra), ("other shape", sorted(shapes)))
    lists = [f"{kind} ({len(names)}): {', '.join(names[:3])}" for kind, names in faults if names]
    if lists:
        raise CheckpointError(f"{what}: the weights do not match; {'; '.join(lists)}")


def _even_out(source: nn.Module, target: nn.Module, names: Mapping[str, str], moved: dict[str, Tensor]) -> None:
    """Where batch norms differ in epsilon, scale the norm's weight so that weight / sqrt(variance + epsilon) stays."""
    for name, other in names.items():
        if not name.endswith("running_var"):
            continue
        path = other.removesuffix("running_var")
        before, after = (module.get_submodule(key.rpartition(".")[0]).eps for module, key in ((source, name), (target, other)))
        if before != after:
            variance = moved[other].double()
            scale = ((variance + after) / (variance + before)).sqrt()  # type: ignore[operator]
            moved[path + "weight"] = (moved[path + "weight"].double() * scale).to(moved[other].dtype)


@torch.no_grad()
def _fill(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    # Not load_state_dict: torchvision's MNASNet refuses a state dict that carries no version.
    for name, value in network.state_dict().items():
        value.copy_(weights[name])


@torch.no_grad()
def _randomise(network: nn.Module) -> None:
    """Norms, biases and layer scales start out constant, and a constant hides a swap: give them random values."""
    generator = torch.Generator().manual_seed(0)
    for value in network.state_dict().values():
        if value.is_floating_point() and value.numel() and bool((value == value.flatten()[0]).all()):
            drawn = torch.rand(value.shape, generator=generator)
            value.copy_(drawn * 0.2 - 0.1 if value.flatten()[0] == 0 else drawn * 0.5 + 0.75)


@torch.no_grad()
def _difference(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of two networks' outputs on two random and two real images, relative to the largest output."""
    cfg: Any = next((net.pretrained_cfg for net in (one, other) if hasattr(net, "pretrained_cfg")), {})
    side = int(cfg["input_size"][-1]) if cfg.get("fixed_input_size") else SIDE
    noise = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    real = _digits().float() / 127.5 - 1
    images = torch.cat([noise, F.interpolate(real, (side, side), mode="bilinear")])
    modes = [(net, net.training) for net in (one, other)]
    expected, got = (net.eval()(images).flatten(1) for net in (one, other))
    for net, training in modes:
        net.train(training)
    if expected.shape != got.shape:
        return float("inf")
    return float((expected - got).abs().max() / expected.abs().max())


@functools.lru_cache
def _digits() -> Tensor:
    return torch.from_numpy(digits.load("test")[0][[0, 40]])
