"""The optimizer and what it decays."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from relssl.sections import OptimizerConfig

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.normalization.LocalResponseNorm,
)


def parameter_groups(student: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The student's parameters as one group that decays and one that does not.

    `all` decays everything (the papers' small sets); `weights` spares every bias and every parameter of a norm, found by
    module type; `official` spares names that contain "bn" or "bias", the ImageNet code's rule, under which the norms of
    downsampling branches decay.
    """
    spared = set()
    if config.decay == "weights":
        for path, module in student.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                # Vectors outside norm modules (layer scale, class tokens aside) are scales or shifts as well.
                if name == "bias" or isinstance(module, _NORMS) or parameter.ndim == 1:
                    spared.add(f"{path}.{name}" if path else name)
    elif config.decay == "official":
        spared = {name for name, _ in student.named_parameters() if "bn" in name or "bias" in name}
    named = [(name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad]
    decays = [parameter for name, parameter in named if name not in spared]
    rests = [parameter for name, parameter in named if name in spared]
    groups = [{"params": decays, "weight_decay": config.weight_decay}, {"params": rests, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def create_optimizer(student: nn.Module, config: OptimizerConfig) -> torch.optim.SGD:
    """SGD with momentum, without Nesterov, as in every run of the papers; the learning rate is set at each step.

    On CPUs and CUDA it is the fused form, which leaves everything as it was where its `found_inf` [] says so; the momentum starts
    as zeros, which gives the same first step, so that a first step that is left out leaves no undefined momentum behind.
    """
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in student.parameters())
    optimizer = torch.optim.SGD(parameter_groups(student, config), lr=config.lr, momentum=config.momentum, fused=fused)
    if config.momentum > 0:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
