"""The optimizer and what it decays."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim.lars import Lars
from torch import nn

from relssl.settings.run import OptimizerConfig

# How the learning rate of all but the predictor goes.
PLAIN = {"times": 1.0, "constant": False}
_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.normalization.LocalResponseNorm,
)


def parameter_groups(student: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The student's parameters as one group that decays and one that does not; the predictor's as two of their own.

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
    groups = []
    for of_predictor in (False, True):
        own = {"times": config.predictor_lr, "constant": config.predictor_schedule == "constant"} if of_predictor else PLAIN
        for decays in (True, False):
            found = [
                parameter
                for name, parameter in student.named_parameters()
                if parameter.requires_grad and (name not in spared) == decays and name.startswith("predictor.") == of_predictor
            ]
            groups.append({"params": found, "weight_decay": config.weight_decay if decays else 0.0, **own})
    return [group for group in groups if group["params"]]


def create_optimizer(student: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """SGD with momentum, without Nesterov, as in every run of the papers; or LARS (You et al. 2017, timm's), which adapts only what
    decays, or AdamW. The learning rate is set at each step: that of a group is `times` the schedule's, or of its peak if `constant`.

    On CPUs and CUDA SGD and AdamW are the fused forms, which leave everything as it was where their `found_inf` [] says so; SGD's
    momentum starts as zeros, which gives the same first step, so that a first step that is left out leaves no undefined momentum
    behind.
    """
    groups = parameter_groups(student, config)
    if config.name == "lars":
        lars: torch.optim.Optimizer = Lars(groups, lr=config.lr, momentum=config.momentum)
        return lars
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in student.parameters())
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)
    optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)
    if config.momentum > 0:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
