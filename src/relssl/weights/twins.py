"""The same architecture in timm and in torchvision: which weight of one is which of the other, proven by running both.

Only ResNets and MNASNets carry equal names. Elsewhere weights are paired in order among those of one shape, and a pairing counts only
once both networks give equal outputs with them, so a wrong one is refused rather than written.
"""

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
from relssl.errors import ConfigError
from relssl.method.backbones import drop_classifier
from relssl.settings.reading import nearest_word
from relssl.weights.spec import mismatch

TOLERANCE = 1e-4  # largest difference of outputs, relative to the largest output, in fp32
SIDE = 64  # pixels of the images of a comparison, where the network takes any size

# timm rounds the widths of a few RegNets to other numbers than torchvision: their `_tv` forms are the twins.
_REGNETS = {"x": "004_tv 008 016 032 080 160 320", "y": "004 008_tv 016 032 080_tv 160 320"}
_WIDTHS = ("400mf", "800mf", "1_6gf", "3_2gf", "8gf", "16gf", "32gf")
# timm's names and torchvision's.
TWINS = {
    **{name: name for name in torchvision.models.list_models(torchvision.models, exclude="inception*") if timm.is_model(name)},
    **{f"mobilenetv3_{size}_100": f"mobilenet_v3_{size}" for size in ("large", "small")},
    **{"mobilenetv2_100": "mobilenet_v2", "mnasnet_050": "mnasnet0_5", "mnasnet_100": "mnasnet1_0"},
    **{
        f"regnet{kind}_{ours}": f"regnet_{kind}_{theirs}"
        for kind, names in _REGNETS.items()
        for ours, theirs in zip(names.split(), _WIDTHS, strict=True)
    },
    **{f"vit_{size}_patch{patch}_224": f"vit_{size[0]}_{patch}" for size in ("base", "large") for patch in (16, 32)},
}


def bare(name: str, args: Mapping[str, Any] | None = None) -> tuple[nn.Module, str]:
    """Return torchvision's network without its last layer, in eval mode with random weights, and that layer's name."""
    with torch.random.fork_rng(devices=[]):
        network: nn.Module = torchvision.models.get_model(name, weights=None, **(args or {}))
    return network.eval(), drop_classifier(network)


def convert(weights: Mapping[str, Tensor], timm_name: str, *, back: bool = False) -> dict[str, Tensor]:
    """Return the weights of a timm network without classifier, with its own (`standard`) stem, under torchvision's names; `back`:
    torchvision's, without its last linear layer, under timm's.

    Where the two libraries differ in batch norm's epsilon (MobileNetV3, large EfficientNets) the norms' weights are scaled to make
    up for it: in eval mode the networks are equal.

    Raises:
        ConfigError: if torchvision has no such network, or with these weights the two are not the same function.
    """
    if timm_name not in TWINS:
        near = nearest_word(timm_name, list(TWINS))
        raise ConfigError(f"backbone: torchvision's twin of {timm_name!r} is not known; near: {near}")
    with torch.random.fork_rng(devices=[]):
        ours: nn.Module = timm.create_model(timm_name, num_classes=0).eval()
    theirs, _ = bare(TWINS[timm_name])
    source, target = (theirs, ours) if back else (ours, theirs)
    # The networks' own states: torchvision's MNASNet asks for the version in it.
    before, after = source.state_dict(), target.state_dict()
    if fault := mismatch(before, weights):
        raise ConfigError(f"backbone: is no plain {timm_name}: {fault}")
    names = {name: name for name in before}
    if before.keys() != after.keys():
        left, right = _by_shape(before), _by_shape(after)
        names = {one: two for shape, those in left.items() for one, two in zip(those, right.get(shape, ()), strict=False)}
    if len(names) == len(before) == len(after):
        renamed = {other: weights[name].reshape(after[other].shape).clone() for name, other in names.items()}
        _keep_scale(renamed, source, target, names)
        before.update(weights)
        after.update(renamed)
        source.load_state_dict(before)
        target.load_state_dict(after)
        if _difference(ours, theirs) <= TOLERANCE:  # NaN is refused as well
            return renamed
    versions = "in these versions of the two libraries"
    raise ConfigError(f"backbone: {timm_name} and torchvision's {TWINS[timm_name]} are not the same network {versions}")


def _by_shape(state: Mapping[str, Tensor]) -> dict[tuple[int, ...], list[str]]:
    """Group names by shape. A 1x1 convolution is a linear layer, VGG's 7x7 one too: outputs and the number of values decide."""
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    starts: dict[str, int] = {}
    for position, name in enumerate(state):
        block = re.match(r"s\d+\.b\d+\.", name)
        starts[name] = starts.setdefault(block[0], position) if block else position
    # timm's RegNet blocks list their shortcut last, torchvision's first.
    for name in sorted(state, key=lambda name: (starts[name], ".downsample." not in name)):
        groups[(*state[name].shape[:1], state[name].numel())].append(name)
    return groups


def _keep_scale(renamed: dict[str, Tensor], source: nn.Module, target: nn.Module, names: Mapping[str, str]) -> None:
    """Scale the weights of batch norms that differ in epsilon, so that weight / sqrt(variance + epsilon) stays."""
    for name, other in names.items():
        path, _, kind = other.rpartition(".")
        if kind == "running_var":
            before: Any = source.get_submodule(name.rpartition(".")[0]).eps
            after: Any = target.get_submodule(path).eps
            if before != after:
                weight, variance = renamed[f"{path}.weight"], renamed[other].double()
                scale = ((variance + after) / (variance + before)).sqrt()
                renamed[f"{path}.weight"] = (weight.double() * scale).to(weight.dtype)


@torch.no_grad()
def _difference(ours: nn.Module, theirs: nn.Module) -> float:
    """Compute the largest difference of outputs on two random and two real images, relative to the largest."""
    cfg: Any = ours.pretrained_cfg
    side = int(cfg["input_size"][-1]) if cfg.get("fixed_input_size") else SIDE
    real = torch.from_numpy(digits.load("test")[0][[0, 40]]).float() / 127.5 - 1
    noise = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    images = torch.cat([noise, F.interpolate(real, (side, side), mode="bilinear")])
    one, other = (network(images).flatten(1) for network in (ours, theirs))
    return float((one - other).abs().max() / one.abs().max()) if one.shape == other.shape else float("inf")
