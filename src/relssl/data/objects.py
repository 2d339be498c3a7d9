"""Images with the boxes, and masks, of the objects on them, from a folder in COCO's or in PASCAL VOC's layout."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from relssl.data.decode import decode
from relssl.data.paths import shown
from relssl.data.refusal import BadImage
from relssl.errors import DataError

Target = dict[str, Any]

# Pixels below which a side is nothing: boxes of no width divide by zero in a detector.
_THINNEST = 0.01


@dataclass(frozen=True, eq=False)
class Scene:
    """What is known of one image before it is read.

    Attributes:
        file: its path.
        size: (height, width) in pixels, as its annotation says.
        boxes: float32 [n, 4], left, top, right, bottom in pixels; the right and bottom edge are the first beyond the object.
        labels: int64 [n] in 1..C.
        areas: float32 [n] in pixels, by which objects count as small, medium or large.
        ignored: bool [n]; crowds and difficult objects, which are never trained on and neither hit nor missed in evaluation.
        masks: n run-length encoded masks (COCO's compressed counts), or None where an object has no mask.
    """

    file: str
    size: tuple[int, int]
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    areas: npt.NDArray[np.float32]
    ignored: npt.NDArray[np.bool_]
    masks: tuple[bytes | None, ...]

    def keep(self, which: npt.NDArray[np.bool_]) -> Scene:
        """The same image with some of its objects."""
        masks = tuple(mask for mask, kept in zip(self.masks, which, strict=True) if kept)
        parts = (self.boxes[which], self.labels[which], self.areas[which], self.ignored[which])
        return Scene(self.file, self.size, *parts, masks)


class SceneDraft:
    """The objects of an image as a reader meets them; boxes are cut at the image's edges, and those without extent counted.

    Args:
        file, size: as of Scene.
        max_pixels: images that are said to have more are refused, for outlines in them cost memory by their size.

    Raises:
        DataError: if it is said to have more.
    """

    def __init__(self, file: str, size: tuple[int, int], max_pixels: int) -> None:
        if size[0] * size[1] > max_pixels:
            raise DataError(
                f"{shown(file)}: its annotation says {size[1]} x {size[0]} pixels, more than loader.max_pixels ({max_pixels}); "
                "correct the annotation, or take the image out"
            )
        self.file, self.size, self.dropped = file, size, 0
        self._rows: list[tuple[list[float], int, float, bool, bytes | None]] = []

    def add(self, edges: Sequence[float], label: int, *, ignored: bool, area: float = 0, mask: bytes | None = None) -> None:
        """One object: its edges left, top, right, bottom, and its area if that is known and not the box's."""
        height, width = self.size
        with np.errstate(invalid="ignore", over="ignore"):  # NaN stays NaN, and is dropped below
            left, top, right, bottom = np.clip(np.array(edges, np.float32), 0, [width, height, width, height]).tolist()
        if not (right - left >= _THINNEST and bottom - top >= _THINNEST):
            self.dropped += 1
            return
        known = area if area > 0 and np.isfinite(area) else (right - left) * (bottom - top)
        self._rows.append(([left, top, right, bottom], label, known, ignored, mask))

    def scene(self) -> Scene:
        """All of them together."""
        boxes, labels, areas, ignored, masks = zip(*self._rows, strict=True) if self._rows else ((),) * 5
        return Scene(
            self.file,
            self.size,
            np.array(boxes, np.float32).reshape(-1, 4),
            np.array(labels, np.int64),
            np.array(areas, np.float32),
            np.array(ignored, np.bool_),
            tuple(masks),
        )


@dataclass(frozen=True, eq=False)
class Scenes(Dataset[tuple[Tensor, Target]]):
    """A split of a detection data set; images are decoded when asked for.

    Attributes:
        name: for messages.
        layout: coco or voc.
        scenes: one an image.
        classes: what label 1, 2, ... stands for.
        ids: the data set's own number of each class.
        max_pixels: images with more pixels are refused.
        masked: whether targets have masks.
        dropped: how many objects were left out, by the reason.
    """

    name: str
    layout: str
    scenes: Sequence[Scene]
    classes: tuple[str, ...]
    ids: tuple[int, ...]
    max_pixels: int
    masked: bool
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, row: int) -> tuple[Tensor, Target]:
        """An image, uint8 [3, H, W], and its target as torchvision's detection models and COCO's evaluation want it.

        The target holds boxes fp32 [n, 4], labels int64 [n], area fp32 [n], iscrowd int64 [n] and, if `masked`, masks uint8
        [n, H, W].

        Raises:
            DataError: if the file cannot be read, or is not of the size that its annotation says.
        """
        scene = self.scenes[row]
        try:
            image: Tensor = pil_to_tensor(decode(scene.file, self.max_pixels))
        except (BadImage, OSError) as error:
            reason = error if isinstance(error, BadImage) else f"cannot be read: {error.strerror}"
            raise DataError(f"{shown(scene.file)}: {reason}; replace it, or take it out of {self.name}") from error
        if tuple(image.shape[1:]) != scene.size:
            (height, width), (said_height, said_width) = image.shape[1:], scene.size
            raise DataError(
                f"{shown(scene.file)}: has {width} x {height} pixels, {self.name} says {said_width} x {said_height}; "
                "its boxes do not fit, annotate it anew or take it out"
            )
        return image, self._target(scene)

    def _target(self, scene: Scene) -> Target:
        target: Target = {
            "boxes": torch.from_numpy(scene.boxes),
            "labels": torch.from_numpy(scene.labels),
            "area": torch.from_numpy(scene.areas),
            "iscrowd": torch.from_numpy(scene.ignored.astype(np.int64)),
        }
        if self.masked:
            target["masks"] = _drawn(scene)
        return target

    def fingerprint(self) -> str:
        """16 hex digits that change with the images' names, sizes, order or annotations, but not with where the folder lies."""
        digest = hashlib.sha256(json.dumps([self.classes, self.masked, len(self)]).encode())
        for scene in self.scenes:
            digest.update(json.dumps([os.path.basename(scene.file), scene.size, len(scene.labels)]).encode())
            for column in (scene.boxes, scene.labels, scene.areas, scene.ignored):
                digest.update(column.tobytes())
            for mask in scene.masks if self.masked else ():
                digest.update(mask or b"")
        return digest.hexdigest()[:16]

    def objects(self) -> int:
        """How many objects count."""
        return sum(int((~scene.ignored).sum()) for scene in self.scenes)

    def has_masks(self) -> bool:
        """Whether any object has a mask."""
        return any(mask is not None for scene in self.scenes for mask in scene.masks)

    def with_masks(self) -> Scenes:
        """With masks in the targets; objects that have none are dropped and counted."""
        kept = [scene.keep(np.array([mask is not None for mask in scene.masks], np.bool_)) for scene in self.scenes]
        lost = sum(len(before.labels) - len(after.labels) for before, after in zip(self.scenes, kept, strict=True))
        return replace(self, scenes=kept, masked=True, dropped=counted(self.dropped, "without a mask", lost))

    def for_training(self) -> Scenes:
        """The images that have an object to learn, and of those the objects that are not ignored."""
        kept = [scene.keep(~scene.ignored) for scene in self.scenes]
        return replace(self, scenes=[scene for scene in kept if len(scene.labels)])

    def subset(self, rows: Iterable[int]) -> Scenes:
        """The images at these positions, in this order."""
        return replace(self, scenes=[self.scenes[row] for row in rows])


def counted(counts: dict[str, int], reason: str, more: int) -> dict[str, int]:
    """The counts with more of one reason, which is not named while there are none."""
    return {**counts, reason: counts.get(reason, 0) + more} if more else counts


def present(pictures: str, names: Sequence[str], source: str) -> None:
    """Check that the images a source names lie in its folder.

    Raises:
        DataError: naming how many do not, and the first.
    """
    try:
        listed = set(os.listdir(pictures))
    except OSError as error:
        raise DataError(f"{shown(pictures)}: the images of {shown(source)} cannot be listed: {error.strerror}") from error
    gone = [name for name in names if name not in listed and not os.path.isfile(os.path.join(pictures, name))]
    if gone:
        raise DataError(
            f"{shown(source)}: {len(gone)} of its {len(names)} images are not in {shown(pictures)}, the first is {shown(gone[0])}"
        )


def _drawn(scene: Scene) -> Tensor:
    """uint8 [n, H, W] of the masks of a scene, each of which has one."""
    from pycocotools import mask as coco

    height, width = scene.size
    if not scene.masks:
        return torch.zeros(0, height, width, dtype=torch.uint8)
    planes = coco.decode([{"size": [height, width], "counts": counts} for counts in scene.masks])
    return torch.from_numpy(np.ascontiguousarray(planes.transpose(2, 0, 1)))
