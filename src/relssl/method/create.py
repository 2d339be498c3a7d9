"""A run's networks and method from its settings: the only file here that reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from relssl.method.backbones import feature_width, run_backbone
from relssl.method.base import Method
from relssl.method.batchnorm import split_batch_norms
from relssl.method.byol import BYOL
from relssl.method.encoder import Encoder
from relssl.method.moco import MoCo
from relssl.method.ressl import ReSSL
from relssl.method.sce import SCE
from relssl.method.simclr import SimCLR
from relssl.method.simsiam import SimSiam
from relssl.method.supervised import Classifier, Supervised
from relssl.settings.run import METHODS, Config


def create_method(config: Config, generator: torch.Generator | None = None, loss_form: str = "plain", classes: int = 0) -> Method:
    """Create the student, drawn from torch's global random state, and what belongs to it.

    Args:
        config: the resolved settings.
        generator: source of the memory's first, random keys.
        loss_form: of methods with a memory, see ReSSL.
        classes: number of labels, for supervised learning.

    Raises:
        ConfigError: if the network cannot be built, or images of the views' sizes do not pass through it.
    """
    method, student = config.method, create_student(config, classes)
    memory: dict[str, Any] = {"memory_size": method.memory_size, "dim": config.encoder.dim, "generator": generator}
    match method.name:
        case "moco":
            return MoCo(student, **memory, loss_form=loss_form, symmetric=method.symmetric)
        case "sce":
            return SCE(student, **memory, symmetric=method.symmetric)
        case "simclr":
            return SimCLR(student)
        case "byol":
            return BYOL(student)
        case "simsiam":
            return SimSiam(student)
        case "supervised":
            assert isinstance(student, Classifier)
            return Supervised(student)
        case _:
            return ReSSL(student, **memory, loss_form=loss_form)


def create_student(config: Config, classes: int = 0) -> Encoder:
    """Create the network that a run trains: an encoder, or for methods that train on labels a classifier of `classes`."""
    backbone, width = _backbone(config)
    if METHODS[config.method.name].labels:
        return Classifier(backbone, width, classes)
    settings = config.encoder
    return Encoder(
        backbone,
        width,
        projector_hidden=settings.projector_hidden,
        dim=settings.dim,
        projector_layers=settings.projector_layers,
        projector_norm=settings.projector_norm,
        projector_output_norm=settings.projector_output_norm,
        predictor=settings.predictor,
        predictor_hidden=settings.predictor_hidden,
        predictor_norm=settings.predictor_norm,
    )


def _backbone(config: Config) -> tuple[nn.Module, int]:
    """The backbone, its batch norms split as the run has it, and the number of its features; every view's size has to pass."""
    backbone = run_backbone(config)
    split_batch_norms(backbone, config.norm_splits)
    widths = {size: feature_width(backbone, size) for size in {view.size for view in config.all_views}}
    return backbone, widths[config.views.weak.size]
