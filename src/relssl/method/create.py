"""A method as a run's settings have it."""

from __future__ import annotations

from typing import Any

import torch

from relssl.method.base import Method
from relssl.method.byol import BYOL
from relssl.method.encoder import Encoder, create_encoder, training_backbone
from relssl.method.moco import MoCo
from relssl.method.ressl import ReSSL
from relssl.method.sce import SCE
from relssl.method.simclr import SimCLR
from relssl.method.simsiam import SimSiam
from relssl.method.supervised import Classifier, Supervised
from relssl.settings.run import METHODS, Config


def create_method(config: Config, generator: torch.Generator | None = None, loss_form: str = "plain", classes: int = 0) -> Method:
    """The student, drawn from torch's global random state, and what belongs to it.

    Args:
        config: the resolved settings.
        generator: source of the memory's first, random keys.
        loss_form: of methods with a memory, see ReSSL.
        classes: of the labels, for supervised learning.

    Raises:
        ConfigError: if the network cannot be built, or images of the views' sizes do not pass through it.
    """
    method, student = config.method, create_student(config, classes)
    kept: dict[str, Any] = {"memory_size": method.memory_size, "dim": config.encoder.dim, "generator": generator}
    match method.name:
        case "moco":
            return MoCo(student, **kept, loss_form=loss_form, symmetric=method.symmetric)
        case "sce":
            return SCE(student, **kept, symmetric=method.symmetric)
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
            return ReSSL(student, **kept, loss_form=loss_form)


def create_student(config: Config, classes: int = 0) -> Encoder:
    """The network that a run trains: an encoder, or for methods that train on labels a classifier of `classes`."""
    labels = METHODS[config.method.name].labels
    return Classifier(*training_backbone(config), classes) if labels else create_encoder(config)
