"""A run's networks and method from its settings: the only file here that reads them."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from relssl.errors import ConfigError
from relssl.method.backbones import create_backbone, feature_width
from relssl.method.base import SCHEDULED, Method
from relssl.method.batchnorm import split_batch_norms
from relssl.method.encoder import Encoder
from relssl.method.optim import create_optimizer, parameter_groups
from relssl.method.stages import freeze_stages
from relssl.method.supervised import Classifier
from relssl.settings import parts
from relssl.settings.run import Config, MethodConfig, derive


def create_method(
    config: Config,
    generator: torch.Generator | None = None,
    loss_form: str = "plain",
    classes: int = 0,
    given: nn.Module | None = None,
) -> Method:
    """Create the student, drawn from torch's global random state, and what belongs to it.

    Args:
        config: the resolved settings.
        generator, loss_form, given: as for Method.
        classes: number of labels, for supervised learning.

    Raises:
        ConfigError: if the network cannot be built, or images of the views' sizes do not pass through it.
    """
    method, student = config.method, create_student(config, classes)
    memory_size = method.memory_size if derive(config).traits.memory else 0
    # Methods of the user's own may know nothing of options that are not theirs.
    options = {"features": student.num_features} if method.relation == "features" else {}
    options |= {"sinkhorn_iterations": method.sinkhorn_iterations} if method.sinkhorn_iterations else {}
    kind, dim = method_class(method.name), config.encoder.dim
    return kind(student, memory_size, dim, generator, loss_form, method.symmetric, given, **options)


def method_class(name: str) -> type[Method]:
    """Return the class of a method: that of the module here of its name, or the user's own.

    Raises:
        ConfigError: if it cannot be found, or its step asks for settings that there are not.
    """
    if parts.is_part(name):
        kind: type[Method] = parts.find("method.name", name)
        known = {"constants": {field.name for field in dataclasses.fields(MethodConfig)}, "scheduled": set(SCHEDULED)}
        for attribute, names in known.items():
            if unknown := [each for each in getattr(kind, attribute) if each not in names]:
                listed = ", ".join(sorted(names))
                raise ConfigError(f"method.name: {kind.__name__}.{attribute} names {unknown[0]!r}; it may name {listed}")
        return kind
    module = importlib.import_module(f"relssl.method.{name}")
    own = [each for each in vars(module).values() if getattr(each, "__module__", None) == module.__name__]
    return next(each for each in own if isinstance(each, type) and issubclass(each, Method))


def create_student(config: Config, classes: int = 0) -> Encoder:
    """Create the network that a run trains: an encoder, or for methods that train on labels a classifier of `classes`.

    Its backbone's batch norms are split as the run has it. ConfigError, as for `create_method`.
    """
    derived, channels = derive(config), {} if config.views.channels == 3 else {"in_chans": config.views.channels}
    backbone = create_backbone(config.backbone, config.encoder.stem, channels | config.backbone_args, config.views.weak.size)
    split_batch_norms(backbone, derived.norm_splits)
    still = freeze_stages(backbone, config.encoder.frozen_stages)
    try:
        widths = {size: feature_width(backbone, size) for size in {view.size for view in derived.views}}
    except ConfigError as error:  # a stem may have several first convolutions, of which one was made small
        advice = "" if config.encoder.stem == "standard" else "; encoder.stem standard may take them"
        raise ConfigError(f"{error}{advice}") from error
    width = widths[config.views.weak.size]
    heads = dataclasses.asdict(config.encoder)
    del heads["stem"], heads["batch_norm_splits"], heads["frozen_stages"]  # which are the backbone's
    student = Classifier(backbone, width, classes) if derived.traits.labels else Encoder(backbone, width, **heads)
    student.still = still
    return student


def step_settings(config: Config, model: Method, now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a method's step takes: its constants, and what the schedules say `now`."""
    return {name: getattr(config.method, name) for name in model.constants} | {name: now[name] for name in model.scheduled}


def create_run_optimizer(config: Config, student: nn.Module) -> torch.optim.Optimizer:
    """Create the optimizer of a run over its student's parameters."""
    settings = config.optimizer
    groups = parameter_groups(
        student,
        decay=settings.decay,
        weight_decay=settings.weight_decay,
        predictor_lr=settings.predictor_lr,
        predictor_constant=settings.predictor_schedule == "constant",
        layer_decay=settings.layer_decay,
    )
    return create_optimizer(groups, settings.name, lr=settings.lr, momentum=settings.momentum, betas=settings.betas)
