"""The optimizer and what it decays."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.optim.lars import Lars
from torch import nn

from relssl.method.stages import layer_rates

# How the learning rate of all but the predictor goes.
PLAIN = {"times": 1.0, "constant": False}
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def parameter_groups(
    student: nn.Module,
    *,
    decay: str,
    weight_decay: float,
    predictor_lr: float = 1.0,
    predictor_constant: bool = False,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Group the student's parameters: those that decay, those that do not, and the predictor's likewise.

    Args:
        decay: `all` decays everything (the papers' small sets); `weights` spares every bias and every parameter of a norm, told by
            module type; `official` spares names that contain "bn" or "bias", the ImageNet code's rule, under which the norms of
            downsampling branches decay.
        predictor_lr, predictor_constant: of the predictor's groups, what their learning rate is multiplied by, and true if it
            stays at its peak.
        layer_decay: what the learning rate of each layer of `student.backbone` is in times the next one's, that of the last being the
            heads' own (BEiT, as timm's `param_groups_layer_decay`); None: all alike.

    Returns:
        Groups as torch's optimizers take them, with `times` and `constant` besides.

    Raises:
        ConfigError: if rates are to fall with depth in a backbone whose layers cannot be told.
    """
    times = {} if layer_decay is None else layer_rates(student.backbone, layer_decay)  # type: ignore[arg-type]
    spared = set()
    if decay == "weights":
        for path, module in student.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                # Vectors outside norm modules (layer scale, class tokens aside) are scales or shifts as well.
                if name == "bias" or isinstance(module, _NORMS) or parameter.ndim == 1:
                    spared.add(f"{path}.{name}" if path else name)
    elif decay == "official":
        spared = {name for name, _ in student.named_parameters() if "bn" in name or "bias" in name}
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            rate = times.get(name.removeprefix("backbone."), 1.0)
            groups.setdefault((name.startswith("predictor."), name in spared, rate), []).append(parameter)
    predictor = {"times": predictor_lr, "constant": predictor_constant}
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if spare else weight_decay,
            **(predictor if of_predictor else PLAIN | {"times": rate}),
        }
        for (of_predictor, spare, rate), parameters in sorted(groups.items())
    ]


def create_optimizer(
    groups: Sequence[dict[str, Any]], name: str, *, lr: float, momentum: float = 0.9, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.Optimizer:
    """Create SGD with momentum, without Nesterov, as in every run of the papers; or LARS (You et al. 2017, timm's), which adapts only
    what decays; or AdamW. The learning rate is set at each step: that of a group is `times` the schedule's, or of its peak if `constant`.

    On CPUs and CUDA SGD and AdamW are the fused forms, which leave everything as it was where their `found_inf` [] says so; SGD's
    momentum starts as zeros, which gives the same first step, so that a first step that is left out leaves no undefined momentum
    behind.

    Args:
        groups: of `parameter_groups`.
        name: sgd, lars or adamw.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    if name == "lars":
        lars: torch.optim.Optimizer = Lars(groups, lr=lr, momentum=momentum)
        return lars
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=fused)
    if momentum > 0:
        optimizer.state.update({parameter: {"momentum_buffer": torch.zeros_like(parameter)} for parameter in parameters})
    return optimizer
