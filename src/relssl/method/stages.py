"""The depth of a backbone's parameters: learning rates that fall towards the images, and first stages that stay as they are."""

from __future__ import annotations

from types import MethodType

from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from relssl.errors import ConfigError


def depths(backbone: nn.Module, coarse: bool = False) -> dict[str, int]:
    """Number the parameters' groups from the images on, {name: group}: those that timm's networks name themselves, of other networks the
    children that have parameters, with those of an nn.Sequential or an only child one by one.

    Args:
        coarse: the stages of a timm network instead of its blocks.
    """
    if hasattr(backbone, "group_matcher"):
        return dict(group_parameters(backbone, backbone.group_matcher(coarse=coarse), reverse=True))  # type: ignore[operator]
    parts = [(name, child) for name, child in backbone.named_children() if any(True for _ in child.parameters())]
    while len(parts) == 1 and (inner := [*parts[0][1].named_children()]):
        parts = [(f"{parts[0][0]}.{name}", child) for name, child in inner if any(True for _ in child.parameters())]
    paths = list[str]()
    for path, part in parts:
        inside = part.named_children() if isinstance(part, nn.Sequential) else ()
        paths += [f"{path}.{name}." for name, child in inside if any(True for _ in child.parameters())] or [f"{path}."]
    return {
        name: next((number for number, path in enumerate(paths) if name.startswith(path)), 0)
        for name, _ in backbone.named_parameters()
    }


def layer_rates(backbone: nn.Module, decay: float) -> dict[str, float]:
    """Return the learning rate of each parameter in times that of the last group; ConfigError if there is only one group."""
    groups = depths(backbone)
    last = max(groups.values())
    if last == 0:
        raise ConfigError("optimizer.layer_decay: the backbone is one block without layers to tell apart; needs null")
    return {name: decay ** (last - group) for name, group in groups.items()}


def freeze_stages(backbone: nn.Module, count: int) -> None:
    """Keep the first stages of a backbone, in place, as they are, batch-norm statistics included; the stem is the first.

    Raises:
        ConfigError: if it has not more than `count` stages.
    """
    if count == 0:
        return
    groups = depths(backbone, coarse=True)
    if count > max(groups.values()):
        raise ConfigError(f"encoder.frozen_stages: the backbone has {max(groups.values()) + 1} stages; one at least has to train")
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(groups[name] >= count)
    for module in backbone.modules():
        if isinstance(module, _BatchNorm) and module.weight is not None and not module.weight.requires_grad:
            module.eval()
            module.train = MethodType(_stay, module)  # type: ignore[method-assign]  # whoever puts the network into training mode


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module
