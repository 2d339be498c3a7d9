"""Files as other programs write them: names and nesting of their repositories, around a network that looks trained."""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn


@functools.lru_cache
def resnet18(stem: str = "standard", seed: int = 0) -> nn.Module:
    """torchvision's ResNet-18 without its last layer, as each of the programs builds it, in eval mode; not to be changed."""
    torch.manual_seed(seed)
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    if stem != "standard":
        network.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=2 if stem == "small-wide" else 1, bias=False)
        if stem != "small-pool":
            network.maxpool = nn.Identity()
    return trained(network)


@torch.no_grad()
def trained(network: nn.Module) -> nn.Module:
    """Moved away from where it started, in eval mode."""
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            noise = torch.rand(value.shape)
            value.mul_(0.8 + 0.5 * noise) if value.ndim > 1 or "var" in name else value.add_(0.2 * noise)
    return network.eval()


def under(prefix: str, network: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: value.clone() for name, value in network.state_dict().items()}


def head(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{part}": torch.randn(4, 4) for part in ("linear1.weight", "linear2.weight")}


def sgd() -> dict[str, Any]:
    return {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


def queue(prefix: str = "module.") -> dict[str, Tensor]:
    return {prefix + "queue": torch.randn(8, 16), prefix + "queue_ptr": torch.zeros(1, dtype=torch.long)}


def official(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    """ReSSL's own ressl.py, from within DistributedDataParallel."""
    q, k = "module.encoder_q.", "module.encoder_k."
    model = under(q + "net.", student) | head(q + "head.") | under(k + "net.", teacher) | head(k + "head.") | queue()
    return {"model": model, "optimizer": sgd(), "epoch": 200}


def official_small(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    """The small-set code: the ResNet's children by number, those without weights counted, the max-pool only if it is kept."""
    q, k = (nn.Sequential(*(part for part in net.children() if not isinstance(part, nn.Identity))) for net in (student, teacher))
    return {"model": under("net.net.", q) | under("encoder_k.net.", k) | head("head_q.") | head("head_k.") | queue("")}


def solo(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    """A Lightning checkpoint of solo-learn."""
    state = under("backbone.", student) | under("momentum_backbone.", teacher) | queue("")
    for name in ("classifier", "projector.0", "momentum_projector.0"):
        state[f"{name}.weight"] = torch.randn(4, 4)
    return {"epoch": 3, "state_dict": state, "optimizer_states": [sgd()], "hyper_parameters": argparse.Namespace(lr=0.1)}


def moco_v2(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    q, k = "module.encoder_q.", "module.encoder_k."
    state = under(q, student) | under(k, teacher) | queue() | head(q + "fc.") | head(k + "fc.")
    return {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": sgd()}


def moco_v3(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    q, k = "module.base_encoder.", "module.momentum_encoder."
    state = under(q, student) | under(k, teacher) | head(q + "fc.") | head(k + "fc.") | head("module.predictor.")
    return {"epoch": 300, "arch": "resnet18", "state_dict": state, "optimizer": sgd(), "scaler": {"scale": 1.0}}


def dino(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    """DINO's checkpoint.pth: the student within DistributedDataParallel, learning rates as numpy scalars, arguments parsed."""
    optimizer = sgd()
    optimizer["param_groups"][0]["lr"] = np.float64(1e-4)
    sides = {"student": under("module.backbone.", student) | head("module.head.")}
    sides["teacher"] = under("backbone.", teacher) | head("head.")
    args = argparse.Namespace(arch="resnet18", patch_size=16)
    return {**sides, "optimizer": optimizer, "epoch": 100, "args": args, "dino_loss": {"center": torch.zeros(1, 16)}}


def plain(student: nn.Module, _: nn.Module) -> dict[str, Any]:
    """torchvision's own files: names and weights, with the classifier."""
    return {**under("", student), "fc.weight": torch.randn(1000, 512), "fc.bias": torch.randn(1000)}


WRITERS: dict[str, tuple[str, str, Callable[[nn.Module, nn.Module], dict[str, Any]]]] = {
    "official": ("official", "standard", official),
    "official small": ("official", "small", official_small),
    "official small with max-pool": ("official", "small-pool", official_small),
    "solo": ("solo", "standard", solo),
    "solo on CIFAR": ("solo", "small-wide", solo),
    "moco v2": ("moco", "standard", moco_v2),
    "moco v3": ("moco", "standard", moco_v3),
    "dino": ("dino", "standard", dino),
    "torchvision": ("timm", "standard", plain),
}
