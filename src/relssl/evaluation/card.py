"""The card of a number: everything that two numbers must share before they can be compared."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from typing import Any

from relssl import __version__
from relssl.config import Config
from relssl.data.plain import enlarged
from relssl.data.sources import Images
from relssl.engine import Engine
from relssl.evaluation.classifier import training_view
from relssl.evaluation.pairs import LabelledPair, labels_hash
from relssl.protocols import Evaluation

# What may change a figure's digits. Python and the operating system do not.
_PACKAGES = ("torch", "torchvision", "timm", "pillow", "numpy", "scikit-learn", "scipy")
_OF_DETECTION = ("torchmetrics", "pycocotools")
# Settings whose every value gives a finding of its own; the others are the same for all findings of a protocol.
SWEPT = {
    "knn": {"k", "temperature"},
    "linear": {"lr"},
    "semi": {"fractions"},
    "lowshot": {"shots"},
    "retrieval": {"at"},
}
# Who is measured, rather than how; a comparison does not ask for these to be equal.
SUBJECT = ("source", "weights", "backbone")


def card(
    protocol: str, network: str, weights: str, origin: dict[str, Any], config: Config, settings: Evaluation, engine: Engine
) -> dict[str, Any]:
    """What all findings of one protocol on one network share, but for the data.

    Args:
        protocol, network: their names.
        weights: hash of the network before the evaluation.
        origin: where it comes from.
        config: how it was made and what it sees.
    """
    section = getattr(settings, "probe" if protocol == "transfer" else protocol)
    return {
        "protocol": protocol,
        "network": network,
        "layer": "backbone",
        "settings": {name: value for name, value in dataclasses.asdict(section).items() if name not in SWEPT.get(protocol, ())},
        "view": _scenes(config, settings) if protocol == "detection" else view(config) | _mirrored(protocol, config),
        "batch_norm": _norms(protocol, settings),
        "precision": engine.precision,
        "device": engine.device.type,
        "seed": settings.seed,
        "resamples": settings.resamples,
        "versions": versions(*(_OF_DETECTION if protocol == "detection" else ())),
        "backbone": {"name": config.backbone, "args": config.backbone_args, "stem": config.encoder.stem},
        "weights": weights,
        "source": origin,
    }


def view(config: Config) -> dict[str, Any]:
    """What the network sees of an image."""
    mean, std = config.views.statistics() if config.views.mean and config.views.std else ((), ())
    return {
        "size": config.views.weak.size,
        "shorter_side": enlarged(config.views),
        "crop": "centre",
        "interpolation": f"{config.views.interpolation} with antialias",
        "mean": list(mean),
        "std": list(std),
        "max_pixels": config.loader.max_pixels,
    }


def _mirrored(protocol: str, config: Config) -> dict[str, Any]:
    """Whether a classifier that is trained on images sees them mirrored too."""
    trains = protocol in ("linear", "finetune", "semi")
    return {"flip_in_training": training_view(config, (1.0, 1.0)).flip} if trains else {}


def _scenes(config: Config, settings: Evaluation) -> dict[str, Any]:
    """What a detector sees of an image."""
    seen = {key: value for key, value in view(config).items() if key in ("mean", "std")}
    return {"shorter_side": settings.detection.min_size, "longer_side": settings.detection.max_size, "crop": "none", **seen}


def _norms(protocol: str, settings: Evaluation) -> str:
    if protocol in ("finetune", "semi") or (protocol == "detection" and settings.detection.norm == "train"):
        return "trained with the network"
    if protocol == "detection":
        return "statistics and weights frozen, the rest is trained"
    return "eval mode; statistics hashed before and after, unchanged"


def split(pair: LabelledPair) -> dict[str, Any]:
    """Which images and labels were used, by their content: the same folder elsewhere is the same."""
    whole = pair.of or (len(pair.bank), len(pair.test))
    return {"bank": _side(pair.bank, whole[0]), "test": _side(pair.test, whole[1]), "classes": pair.classes}


def _side(images: Images, of: int) -> dict[str, Any]:
    return {"images": len(images), "of": of, "hash": labels_hash(images)}


def versions(*more: str) -> dict[str, str]:
    """Versions of what computes a figure, and of `more` packages."""
    found = {"relssl": __version__}
    for name in (*_PACKAGES, *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
