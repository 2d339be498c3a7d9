"""Object detection and instance segmentation: how far a backbone carries a detector that is trained on it.

torchvision's Faster R-CNN and Mask R-CNN on a feature pyramid (Lin et al. 2017), measured by pycocotools.
"""

import copy
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.utils.data import BatchSampler
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from relssl.data.boxes import Scenes, Target, load
from relssl.data.loader import read_batches
from relssl.errors import ConfigError, NumericError
from relssl.evaluation.features import evaluating
from relssl.evaluation.result import Finding, Task
from relssl.method.backbones import channels_of
from relssl.settings.evaluation import DetectionConfig
from relssl.weights.spec import BackboneSpec

_MOMENTUM = 0.9
_CHANNELS = 256  # of every level of the pyramid (Lin et al., section 3)
_LEVELS = 4
_TRIED = 128  # pixels a side of the image by which strides are measured
_ANCHOR = 8  # side of an anchor in strides of its level: 32 pixels at stride 4, as in the papers
_POINTS = 100  # of the loss curve at most
_FIGURES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")

Autocast = Callable[[], AbstractContextManager[Any]]
Level = tuple[int, int, int]
Sample = tuple[Tensor, Target]


class Pyramid(nn.Module):
    """Images [B, 3, H, W] to fp32 maps {"0": [B, 256, H/s0, W/s0], ..., "pool": half of the last}.

    What lies behind the network's last map is taken off. `autocast` is the precision of the networks; boxes are always computed in
    fp32, as their edges need it.
    """

    def __init__(self, network: Any, levels: list[Level], autocast: Autocast) -> None:
        super().__init__()
        self.indices = network.prune_intermediate_layers([index for index, _, _ in levels], prune_norm=True)
        self.network, self.autocast = network, autocast
        self.fpn = FeaturePyramidNetwork([channels for _, channels, _ in levels], _CHANNELS, extra_blocks=LastLevelMaxPool())
        self.out_channels = _CHANNELS

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        with self.autocast():
            maps = self.network.forward_intermediates(images, indices=self.indices, intermediates_only=True)
            levels = self.fpn({str(level): each for level, each in enumerate(maps)})
        return {name: level.float() for name, level in levels.items()}


def create_detector(
    backbone: nn.Module, spec: BackboneSpec, settings: DetectionConfig, classes: int, *, masks: bool, autocast: Autocast
) -> nn.Module:
    """Return torchvision's Faster R-CNN, or Mask R-CNN for `masks`, in training mode, on a copy of a timm network.

    The background is not one of the classes. What is not the network's is drawn from torch's generator. ConfigError as
    `pyramid_levels` and `freeze`.
    """
    network = copy.deepcopy(backbone).cpu().requires_grad_(True)
    levels = pyramid_levels(network, spec.name)
    freeze(network, spec.name, settings.frozen_stages, all_norms=settings.norm == "frozen")
    # The level made by pooling has twice the stride of the last.
    sides = [_ANCHOR * stride for _, _, stride in levels] + [2 * _ANCHOR * levels[-1][2]]
    pool = partial(MultiScaleRoIAlign, [str(level) for level in range(len(levels))], sampling_ratio=2)
    mask_head = {"mask_roi_pool": pool(output_size=14)} if masks else {}
    model: nn.Module = (MaskRCNN if masks else FasterRCNN)(
        Pyramid(network, levels, autocast),
        classes + 1,
        min_size=settings.min_size,
        max_size=settings.max_size,
        image_mean=list(spec.view.mean),
        image_std=list(spec.view.std),
        rpn_anchor_generator=AnchorGenerator(tuple((side,) for side in sides), ((0.5, 1.0, 2.0),) * len(sides)),
        box_roi_pool=pool(output_size=7),
        box_batch_size_per_image=settings.regions,
        **mask_head,
    )
    return model.train()


@torch.no_grad()
def pyramid_levels(network: nn.Module, name: str) -> list[Level]:
    """Return (index, channels, stride) of the maps for a pyramid: the last of each stride, of the four largest strides.

    Strides are measured on an image, as a small stem changes what timm says of them. A map as large as the image is left out: it
    would cost more than all others together. ConfigError for a network with fewer than two strides, or for grey images.
    """
    other = "; take a convolutional backbone such as resnet50, or one with stages such as convnext_tiny"
    if channels_of(network) != 3:
        raise ConfigError(f"detection: takes colour images, and {name} was made for {channels_of(network)} channels")
    image = torch.zeros(1, 3, _TRIED, _TRIED, device=next(network.parameters()).device)
    try:
        with evaluating(network):
            maps = network.forward_intermediates(image, intermediates_only=True)  # type: ignore[operator]
    except Exception as error:  # whatever a network raises that has none, or over a size that it was not made for
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"detection: {name} gives no feature maps of images of any size ({reason}){other}") from error
    last = {2 ** round(math.log2(_TRIED / each.shape[-1])): index for index, each in enumerate(maps)}
    strides = sorted(stride for stride in last if stride > 1)[-_LEVELS:]
    if len(strides) < 2:
        raise ConfigError(f"detection: the feature maps of {name} are all of one size, of which no pyramid is built{other}")
    return [(last[stride], int(maps[last[stride]].shape[1]), stride) for stride in strides]


def freeze(network: nn.Module, name: str, stages: int, *, all_norms: bool) -> None:
    """Fix the first stages, and batch norm in them or everywhere, which then is a constant scale and shift.

    Stage n ends with timm's last map of stride 2^n or less, by the network's usual stem; where there is none, the stem alone is
    fixed. ConfigError if the stages are no modules of their own.
    """
    paths = [path for path, _ in network.named_modules()]  # in the order in which timm's networks build and run them
    first: list[str] = []
    if stages:
        known: Any = network.feature_info
        ends = {entry["module"]: entry["reduction"] for entry in (known if isinstance(known, list) else known.info)}
        if not set(ends) <= set(paths):
            raise ConfigError(f"detection.frozen_stages: the stages of {name} cannot be told apart; set it to 0")
        within = [path for path, reduction in ends.items() if reduction <= 2**stages]
        inside = [position for position, path in enumerate(paths) if within and f"{path}.".startswith(f"{within[-1]}.")]
        first = paths[: inside[-1] + 1 if inside else paths.index(next(iter(ends)))]
    for path, module in [*network.named_modules()]:
        for parameter in module.parameters(recurse=False) if path in first else ():
            parameter.requires_grad_(False)
        if isinstance(module, nn.BatchNorm2d) and (all_norms or path in first):
            network.set_submodule(path, freeze_batch_norm_2d(module))


def rate_share(step: int, steps: int, warmup: int) -> float:
    """Return the share of the peak learning rate at a step, 0 the first: a linear rise, then tenths from 2/3 and 11/12 on.

    The drops are those of MMDetection's 1x schedule: after 8 and 11 of 12 epochs.
    """
    drops = (3 * step >= 2 * steps) + (12 * step >= 11 * steps)
    return float(min(1.0, (step + 1) / max(1, warmup)) * 0.1**drops)


def mirror(image: Tensor, target: Target) -> Sample:
    """Return the mirror image, left for right, of an image [3, H, W] with boxes [n, 4] and, if there are any, masks [n, H, W]."""
    left, top, right, bottom = target["boxes"].unbind(1)
    flipped: Target = {"boxes": torch.stack([image.shape[-1] - right, top, image.shape[-1] - left, bottom], dim=1)}
    flipped |= {name: value.flip(-1) for name, value in target.items() if name == "masks"}
    return image.flip(-1), target | flipped


def train(model: nn.Module, images: Scenes, settings: DetectionConfig, task: Task, steps: int, warmup: int) -> Iterator[float]:
    """Train torchvision's model, yielding the loss of each step after it.

    NumericError naming the first step whose loss is not finite, which changes no weight; DataError if an image cannot be read.
    """
    generator, size = task.bootstrap.generator(), settings.batch_size
    order = np.concatenate([generator.permutation(len(images)) for _ in range(-(-steps * size // len(images)))])[: steps * size]
    flips = (generator.random(steps * size) < 0.5).reshape(steps, size)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=settings.lr, momentum=_MOMENTUM, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate_share, steps=steps, warmup=warmup))
    model.train()
    for step, batch in enumerate(_batches(images, order.tolist(), size, task)):
        samples = [mirror(*sample) if flip else sample for sample, flip in zip(batch, flips[step], strict=True)]
        parts = model([image for image, _ in samples], [target for _, target in samples])
        loss: Tensor = torch.stack(list(parts.values())).sum()
        value = loss.item()
        if not math.isfinite(value):
            each = ", ".join(f"{name} {part.item():g}" for name, part in parts.items())
            raise NumericError(f"detection: the loss is {value} at step {step + 1} of {steps} ({each}); lower detection.lr")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        yield value


@torch.no_grad()
def measure(model: nn.Module, images: Scenes, task: Task) -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    """Compute COCO's average precision of a detector, by pycocotools: figures in percent as of `detection`, and map by class, of
    "boxes" and, if the images are masked, of "masks"."""
    from torchmetrics.detection import MeanAveragePrecision

    kinds = {"bbox": "boxes", "segm": "masks"} if images.masked else {"bbox": "boxes"}
    metric = MeanAveragePrecision(iou_type=tuple(kinds), class_metrics=True, backend="pycocotools")
    model.eval()
    for ((image, target),) in _batches(images, range(len(images)), 1, task):
        objects, truth = ({name: value.cpu() for name, value in each.items()} for each in (model([image])[0], target))
        if images.masked:
            objects["masks"], truth["masks"] = objects["masks"][:, 0] > 0.5, truth["masks"].bool()
        metric.update([objects], [truth])
    computed = metric.compute()
    words, results = [images.classes[label - 1] for label in computed["classes"].reshape(-1).tolist()], {}
    for kind, of in kinds.items():
        prefix = f"{kind}_" if len(kinds) > 1 else ""
        figures = {name: 100 * float(computed[prefix + name]) for name in _FIGURES}
        each_class = dict(zip(words, (100 * computed[f"{prefix}map_per_class"].double()).reshape(-1).tolist(), strict=True))
        # Of sizes and classes that the test images have none of, pycocotools says -1.
        results[of] = (
            {name: value for name, value in figures.items() if value >= 0},
            {name: round(value, 4) for name, value in each_class.items() if value >= 0},
        )
    return results


def _batches(images: Scenes, order: Sequence[int], size: int, task: Task) -> Iterator[list[Sample]]:
    """Yield images in this order, on the device, in 0..1, with their targets."""
    device = task.engine.device
    for batch in read_batches(partial(_read, images), BatchSampler(order, size, drop_last=False), task.reader.workers):
        on_device = ((image.to(device), {name: each.to(device) for name, each in target.items()}) for image, target in batch)
        yield [(image.float() / 255, target) for image, target in on_device]


def _read(images: Scenes, rows: list[int]) -> list[Sample]:
    return [images[row] for row in rows]


def detection(backbone: nn.Module, folder: str, settings: DetectionConfig, task: Task) -> list[Finding]:
    """Train a detector on a copy of a timm network and evaluate it by COCO's mean average precision.

    Horizontal flips are the only augmentation. The same seed gives the same figures on a CPU with the same threads; on GPUs the
    gradients of region pooling are added in any order. ConfigError if a package or the masks asked for are missing, or the backbone
    does not suit; other errors as of `load` and `train`.

    Returns:
        One finding for boxes and, of Mask R-CNN, one for masks: COCO's AP in percent, from recall at 101 points, as map (over IoU
        0.50 to 0.95), map_50, map_75, and by size where there are such objects. The main figure is map, of VOC's layout map_50.
    """
    check(settings)
    spec, engine = task.spec, task.engine
    strides = [stride for _, _, stride in pyramid_levels(backbone, spec.name)]
    whole, test = load(folder, masks=settings.model != "faster-rcnn", max_pixels=task.reader.max_pixels)
    if settings.model == "mask-rcnn" and not whole.masked:
        raise ConfigError(f"detection.model: mask-rcnn needs masks, {folder} has none in both parts; take faster-rcnn or auto")
    # Images without an object teach torchvision's losses nothing but background, and are left out as its own recipes do.
    useful = whole.for_training()
    rows = task.bootstrap.generator().permutation(len(useful))[: settings.max_images]
    drawn = replace(useful, scenes=[useful.scenes[row] for row in np.sort(rows)])
    steps = max(1, round(settings.epochs * len(drawn) / settings.batch_size))
    warmup = min(settings.warmup_steps, steps // 3)  # else no peak would be reached
    kind = "mask-rcnn" if whole.masked else "faster-rcnn"
    task.say(
        f"{kind} on {spec.name}, maps of stride {', '.join(map(str, strides))}: {steps} steps of {settings.batch_size} images"
    )
    times, losses, often = [time.monotonic()], list[float](), max(1, steps // 10)
    with torch.random.fork_rng(devices=[engine.device] if engine.device.type == "cuda" else []):
        torch.manual_seed(task.bootstrap.seed)
        model = create_detector(backbone, spec, settings, len(whole.classes), masks=whole.masked, autocast=engine.autocast)
        for loss in train(engine.place(model), drawn, settings, task, steps, warmup):
            losses.append(loss)
            if len(losses) % often == 0:
                task.say(f"step {len(losses)} of {steps}: loss {np.mean(losses[-often:]):.4g}")
    times.append(time.monotonic())
    task.say(f"evaluating on {len(test)} images")
    results = measure(model, test, task)
    times.append(time.monotonic())
    parts = np.array_split(losses, min(_POINTS, steps))
    ends = np.cumsum([len(part) for part in parts]).tolist()
    details: dict[str, Any] = {
        "steps": steps,
        "warmup_steps": warmup,
        "layout": test.layout,
        "classes": len(whole.classes),
        "images": {"training": len(drawn), "without_objects": len(whole) - len(useful), "test": len(test)},
        "objects": {"training": drawn.objects(), "test": test.objects()},
        "fingerprints": {"training": drawn.fingerprint(), "test": test.fingerprint()},
        "dropped": {"training": whole.dropped, "test": test.dropped},
        "precision": engine.precision,
        "strides": strides,
        "seconds": dict(zip(("training", "evaluation"), np.diff(times).round(1).tolist(), strict=True)),
        "loss": [[end, round(float(part.mean()), 5)] for end, part in zip(ends, parts, strict=True)],
    }
    notes = [f"Of {len(useful)} training images {len(drawn)} were used, chosen by the seed."] if len(drawn) < len(useful) else []
    if warmup < settings.warmup_steps:
        notes.append(f"The warm-up of {settings.warmup_steps} steps was cut to {warmup}, a third of the run.")
    for split in (whole, test):
        notes += [f"{split.name}: {count} objects {reason} were left out." for reason, count in split.dropped.items()]
    if main := "map_50" if test.layout == "voc" else "":
        notes.append("map_50 is read at 101 points of recall, not at the 11 of VOC2007's own rule, which may differ by a point.")
    return [
        Finding({"model": kind, "of": of}, main or "map", figures, {}, tuple(notes), details | {"map_per_class": each_class})
        for of, (figures, each_class) in results.items()
    ]


def check(settings: DetectionConfig) -> None:
    """Raise a ConfigError that names the setting, or the command that installs what is missing, before any work."""
    if missing := [name for name in ("pycocotools", "torchmetrics") if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"detection: needs {' and '.join(missing)}; install with `pip install 'relssl[detection]'`")
    if settings.min_size > settings.max_size:
        raise ConfigError(f"detection.min_size: {settings.min_size} must not exceed detection.max_size ({settings.max_size})")
    if settings.norm == "train" and settings.batch_size < 2:  # the coarsest map may have a single pixel
        raise ConfigError("detection.norm: train needs detection.batch_size of 2 or more; raise it, or take frozen")
