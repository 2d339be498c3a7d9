"""Object detection and instance segmentation: how far a backbone carries a detector that is trained on it."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from relssl.config import Config
from relssl.data.coco import load
from relssl.data.objects import Scenes
from relssl.engine import Engine
from relssl.errors import ConfigError
from relssl.evaluation.detector import create_detector, pyramid_levels
from relssl.evaluation.detector_training import Plan, curve, measure, train
from relssl.evaluation.findings import Finding
from relssl.protocols import DetectionConfig


def detection(
    backbone: nn.Module,
    folder: str,
    config: Config,
    engine: Engine,
    *,
    settings: DetectionConfig,
    seed: int,
    say: Callable[[str], None],
) -> list[Finding]:
    """Train a detector on the backbone and evaluate it by COCO's mean average precision.

    Horizontal flips are the only augmentation. The same seed gives the same figures on a CPU with the same threads; on GPUs the
    gradients of region pooling are added in any order.

    Args:
        backbone: timm network without classifier; left as it is.
        folder: a data set in COCO's or VOC's layout.
        config: the backbone's own: channel statistics and loader.
        seed: of heads, order, flips, the regions that are trained on, and of `max_images`.
        say: takes lines of progress.

    Returns:
        One finding for boxes and, of Mask R-CNN, one for masks. Figures are COCO's AP in percent, from recall at 101 points:
        map over IoU 0.50 to 0.95, map_50, map_75, and map_small, map_medium, map_large where there are such objects. The
        main figure is map, of VOC's layout map_50.

    Raises:
        ConfigError: if an extra package is missing, masks are asked for and there are none, or the backbone does not suit.
        DataError: for what `relssl.data.coco.load` refuses, and for images that cannot be read.
        NumericError: if the loss is not finite.
    """
    check(settings)
    strides = [stride for _, _, stride in pyramid_levels(backbone, config.backbone)]
    train_set, test_set = load(folder, masks=settings.model != "faster-rcnn", max_pixels=config.loader.max_pixels)
    if settings.model == "mask-rcnn" and not train_set.masked:
        raise ConfigError(f"detection.model: mask-rcnn needs masks, {folder} has none in both parts; take faster-rcnn or auto")
    drawn = training_images(train_set, settings, seed)
    classes, masks = len(train_set.classes), train_set.masked
    plan, kind = Plan.of(len(drawn), settings), "mask-rcnn" if masks else "faster-rcnn"
    where = f"{config.backbone}, maps of stride {', '.join(map(str, strides))}"
    say(f"{kind} on {where}: {classes} classes, {len(drawn)} images, {plan.steps} steps of {plan.batch_size}")
    begun = time.monotonic()
    with torch.random.fork_rng(devices=[engine.device] if engine.device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = engine.place(create_detector(backbone, config, settings, classes, masks=masks, autocast=engine.autocast))
        losses = _told(train(model, drawn, config, engine, settings=settings, plan=plan, seed=seed), plan.steps, say)
    trained = time.monotonic()
    say(f"evaluating on {len(test_set)} images")
    found = measure(model, test_set, config, engine)
    details = {
        "precision": engine.precision,
        "strides": strides,
        "steps": plan.steps,
        "warmup_steps": plan.warmup,
        "seconds": {"training": round(trained - begun, 1), "evaluation": round(time.monotonic() - trained, 1)},
        "loss": curve(losses),
        **_counts(train_set, drawn, test_set),
    }
    main, notes = "map_50" if test_set.layout == "voc" else "map", _notes(settings, plan, train_set, drawn, test_set)
    return [
        Finding({"model": kind, "of": of}, main, figures, notes=notes, details={**details, "map_per_class": per_class})
        for of, (figures, per_class) in found.items()
    ]


def _told(steps: Iterator[float], count: int, say: Callable[[str], None]) -> list[float]:
    """The losses of a training, told of ten times."""
    losses: list[float] = []
    often = max(1, count // 10)
    for loss in steps:
        losses.append(loss)
        if len(losses) % often == 0:
            say(f"step {len(losses)} of {count}: loss {np.mean(losses[-often:]):.4g}")
    return losses


def check(settings: DetectionConfig) -> None:
    """Refuse what can be refused before any work.

    Raises:
        ConfigError: naming the setting, or the command that installs what is missing.
    """
    missing = [name for name in ("pycocotools", "torchmetrics") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"detection: needs {' and '.join(missing)}; install with `pip install 'relssl[detection]'`")
    if settings.min_size > settings.max_size:
        raise ConfigError(f"detection.min_size: {settings.min_size} must not exceed detection.max_size ({settings.max_size})")
    if settings.norm == "train" and settings.batch_size < 2:  # the coarsest map may have a single pixel
        raise ConfigError("detection.norm: train needs detection.batch_size of 2 or more; raise it, or take frozen")


def training_images(split: Scenes, settings: DetectionConfig, seed: int) -> Scenes:
    """The images with an object to learn, at most `max_images` of them, drawn by the seed and kept in their order.

    Images without one teach torchvision's losses nothing but background, and are left out as its own recipes do.
    """
    useful = split.for_training()
    if settings.max_images is None or len(useful) <= settings.max_images:
        return useful
    rows = np.random.Generator(np.random.PCG64(seed)).permutation(len(useful))[: settings.max_images]
    return useful.subset(np.sort(rows).tolist())


def _counts(whole: Scenes, drawn: Scenes, test: Scenes) -> dict[str, Any]:
    """What was trained and evaluated on."""
    return {
        "layout": test.layout,
        "classes": len(whole.classes),
        "images": {"training": len(drawn), "without_objects": len(whole) - len(whole.for_training()), "test": len(test)},
        "objects": {"training": drawn.objects(), "test": test.objects()},
        "fingerprints": {"training": drawn.fingerprint(), "test": test.fingerprint()},
        "dropped": {"training": whole.dropped, "test": test.dropped},
    }


def _notes(settings: DetectionConfig, plan: Plan, whole: Scenes, drawn: Scenes, test: Scenes) -> tuple[str, ...]:
    useful = len(whole.for_training())
    notes = [f"Of {useful} training images {len(drawn)} were used, chosen by the seed."] if len(drawn) < useful else []
    if plan.warmup < settings.warmup_steps:
        notes.append(f"The warm-up of {settings.warmup_steps} steps was cut to {plan.warmup}, a third of the run.")
    for split in (whole, test):
        notes += [f"{split.name}: {count} objects {reason} were left out." for reason, count in split.dropped.items()]
    if test.layout == "voc":
        notes.append("map_50 is read at 101 points of recall, not at the 11 of VOC2007's own rule, which may differ by a point.")
    return tuple(notes)
