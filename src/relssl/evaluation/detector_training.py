"""Training a detector, and measuring it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from relssl.config import Config
from relssl.data.objects import Scenes, Target
from relssl.data.workers import hand_over, loader_workers, reset_signals, watch
from relssl.engine import Engine
from relssl.errors import DataError, NumericError
from relssl.protocols import DetectionConfig

MOMENTUM = 0.9
_POINTS = 100  # of the loss curve
_FIGURES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")


@dataclass(frozen=True)
class Plan:
    """How long is trained: steps of batch_size images, the learning rate rising over the first `warmup`."""

    steps: int
    batch_size: int
    warmup: int

    @staticmethod
    def of(images: int, settings: DetectionConfig) -> Plan:
        """For that many images; a warm-up longer than a third of the run is cut to it, or the peak would never be reached."""
        steps = max(1, round(settings.epochs * images / settings.batch_size))
        return Plan(steps, settings.batch_size, min(settings.warmup_steps, steps // 3))

    def factor(self, step: int) -> float:
        """Share of the peak learning rate at a step, 0 the first: a linear rise, then tenths from 2/3 and 11/12 on.

        The drops are those of MMDetection's 1x schedule: after 8 and 11 of 12 epochs.
        """
        drops = (3 * step >= 2 * self.steps) + (12 * step >= 11 * self.steps)
        return float(min(1.0, (step + 1) / max(1, self.warmup)) * 0.1**drops)


def train(
    model: nn.Module, images: Scenes, config: Config, engine: Engine, *, settings: DetectionConfig, plan: Plan, seed: int
) -> Iterator[float]:
    """Train torchvision's model, yielding the loss of each step after it.

    Raises:
        NumericError: naming the first step whose loss is not finite; that step changes no weight.
        DataError: if an image cannot be read.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    wanted = plan.steps * plan.batch_size
    order = np.concatenate([generator.permutation(len(images)) for _ in range(-(-wanted // len(images)))])[:wanted]
    flips = generator.random(wanted) < 0.5
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=settings.lr, momentum=MOMENTUM, weight_decay=settings.weight_decay)
    for step, batch in enumerate(_batches(images, order.tolist(), plan.batch_size, config)):
        model.train()
        first = step * plan.batch_size
        pairs = [flipped(*pair) if flips[first + place] else pair for place, pair in enumerate(batch)]
        pictures, targets = zip(*(_placed(image, target, engine.device) for image, target in pairs), strict=True)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * plan.factor(step)
        parts = model(list(pictures), list(targets))
        loss: Tensor = torch.stack(list(parts.values())).sum()
        value = loss.item()
        if not math.isfinite(value):
            named = ", ".join(f"{name} {part.item():g}" for name, part in parts.items())
            raise NumericError(f"detection: the loss is {value} at step {step + 1} of {plan.steps} ({named}); lower detection.lr")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield value


def flipped(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """The mirror image, left for right."""
    left, top, right, bottom = target["boxes"].unbind(1)
    width = image.shape[-1]
    mirrored = {**target, "boxes": torch.stack([width - right, top, width - left, bottom], dim=1)}
    if "masks" in target:
        mirrored["masks"] = target["masks"].flip(-1)
    return image.flip(-1), mirrored


@torch.no_grad()
def measure(
    model: nn.Module, images: Scenes, config: Config, engine: Engine
) -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    """COCO's average precision of a detector, by pycocotools.

    Returns:
        By "boxes" and, if the images are masked, "masks": figures in percent as of `detection`, and map by class.
    """
    from torchmetrics.detection import MeanAveragePrecision

    kinds = {"bbox": "boxes", "segm": "masks"} if images.masked else {"bbox": "boxes"}
    metric = MeanAveragePrecision(iou_type=tuple(kinds), class_metrics=True, backend="pycocotools")
    model.eval()
    for batch in _batches(images, list(range(len(images))), 1, config):
        for image, target in batch:
            picture, _ = _placed(image, {}, engine.device)
            found = {name: value.cpu() for name, value in model([picture])[0].items()}
            if images.masked:
                found["masks"] = found["masks"][:, 0] > 0.5
                target["masks"] = target["masks"].bool()
            metric.update([found], [target])
    computed = metric.compute()
    results = {}
    for kind, of in kinds.items():
        prefix = f"{kind}_" if len(kinds) > 1 else ""
        figures = {name: 100 * float(computed[prefix + name]) for name in _FIGURES}
        labels, values = computed["classes"].reshape(-1).tolist(), computed[f"{prefix}map_per_class"].reshape(-1).tolist()
        # Of sizes and classes that the test images have none of, pycocotools says -1.
        per_class = {images.classes[label - 1]: round(100 * v, 4) for label, v in zip(labels, values, strict=True) if v >= 0}
        results[of] = {name: value for name, value in figures.items() if value >= 0}, per_class
    return results


def curve(losses: list[float]) -> list[list[float]]:
    """[step, mean loss since the point before] of at most 100 points."""
    ends = sorted({round(len(losses) * point / _POINTS) for point in range(1, _POINTS + 1)} - {0})
    starts = [0, *ends[:-1]]
    return [[end, round(float(np.mean(losses[start:end])), 5)] for start, end in zip(starts, ends, strict=True)]


class _Readable(Dataset[tuple[Tensor, Target] | str]):
    """What cannot be read as a line of text: an error that passes through a worker would come out with its traceback."""

    def __init__(self, images: Scenes) -> None:
        self.images = images

    def __getitem__(self, row: int) -> tuple[Tensor, Target] | str:
        try:
            return self.images[row]
        except DataError as error:
            return str(error)


def _batches(images: Scenes, order: list[int], batch_size: int, config: Config) -> Iterator[list[tuple[Tensor, Target]]]:
    loader = DataLoader(
        _Readable(images),
        batch_size=batch_size,
        sampler=order,
        num_workers=loader_workers(config),
        collate_fn=partial(hand_over, list),
        worker_init_fn=reset_signals,
        generator=torch.Generator(),  # what workers are seeded with, drawn from nobody else's
    )
    for batch in watch(loader):
        for item in batch:
            if isinstance(item, str):
                raise DataError(item)
        yield batch


def _placed(image: Tensor, target: Target, device: torch.device) -> tuple[Tensor, Target]:
    """On the device, the image in 0..1."""
    return image.to(device).float() / 255, {name: value.to(device) for name, value in target.items()}
