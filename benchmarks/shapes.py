"""A small detection data set: coloured squares, discs and triangles on noise, with boxes and outlines in COCO's layout.

Colours and sizes are drawn alike for all classes, so that a class is told by its shape alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

# Numbers with gaps and out of order, as COCO's are.
CATEGORIES = {7: "square", 3: "disc", 12: "triangle"}
_TRIES = 50

Corners = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """One object: its category and its outline, [corners, 2] in whole pixels."""

    category: int
    corners: Corners

    @property
    def edges(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom."""
        (left, top), (right, bottom) = self.corners.min(axis=0), self.corners.max(axis=0)
        return int(left), int(top), int(right), int(bottom)


def write_coco(folder: Path, *, train: int, test: int, side: int, seed: int = 0) -> None:
    """Write `train` and `test` images of `side` pixels, at most four objects each, as train/ and val/ with their annotations."""
    generator = np.random.Generator(np.random.PCG64(seed))
    (folder / "annotations").mkdir(parents=True)
    for part, count in (("train", train), ("val", test)):
        (folder / part).mkdir()
        made = [draw(generator, side) for _ in range(count)]
        for number, (image, _) in enumerate(made):
            image.save(folder / part / f"{number:04}.png")
        content = coco([shapes for _, shapes in made], side)
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))


def coco(scenes: list[list[Shape]], side: int) -> dict[str, Any]:
    """The annotations of images called 0000.png, 0001.png, ..."""
    images = [{"id": 10 + n, "file_name": f"{n:04}.png", "width": side, "height": side} for n in range(len(scenes))]
    annotations = [
        {"image_id": 10 + n, "category_id": shape.category, **_outline(shape)}
        for n, shapes in enumerate(scenes)
        for shape in shapes
    ]
    for number, annotation in enumerate(annotations):
        annotation["id"] = number + 1
    categories = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def draw(generator: np.random.Generator, side: int) -> tuple[Image.Image, list[Shape]]:
    """An image and the one to four shapes on it, which do not touch."""
    image = Image.fromarray(generator.integers(60, 196, (side, side, 3), dtype=np.uint8))
    canvas = ImageDraw.Draw(image)
    shapes: list[Shape] = []
    wanted = int(generator.integers(1, 5))
    for _ in range(_TRIES):
        shape = _shape(generator, side)
        if len(shapes) < wanted and not any(_touch(shape, other) for other in shapes):
            colour = generator.choice([0, 255], 3) if generator.random() < 0.5 else generator.integers(0, 256, 3)
            canvas.polygon([(float(x), float(y)) for x, y in shape.corners], fill=tuple(int(c) for c in colour))
            shapes.append(shape)
    return image, shapes


def _shape(generator: np.random.Generator, side: int) -> Shape:
    category = int(generator.choice(list(CATEGORIES)))
    corners = {7: 4, 3: 24, 12: 3}[category]
    radius = generator.uniform(0.1, 0.22) * side
    angle = {7: np.pi / 4, 3: 0.0, 12: -np.pi / 2}[category] + np.linspace(0, 2 * np.pi, corners, endpoint=False)
    centre = generator.uniform(radius + 1, side - radius - 1, 2)
    return Shape(category, np.round(centre + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)))


def _touch(one: Shape, other: Shape) -> bool:
    (left, top, right, bottom), (l2, t2, r2, b2) = one.edges, other.edges
    return left <= r2 and l2 <= right and top <= b2 and t2 <= bottom


def _outline(shape: Shape) -> dict[str, Any]:
    left, top, right, bottom = shape.edges
    x, y = shape.corners.T
    area = abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2
    box = [left, top, right - left, bottom - top]
    return {"bbox": box, "segmentation": [shape.corners.ravel().tolist()], "area": area, "iscrowd": 0}
