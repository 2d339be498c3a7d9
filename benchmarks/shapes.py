"""A small detection data set: coloured squares, discs and triangles on noise, with boxes and outlines in COCO's layout.

Colours and sizes are drawn alike for all classes, so that a class shows in its shape alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

# Numbers with gaps and out of order, as COCO's are, with name, corners, and the angle of the first.
CATEGORIES = {7: "square", 3: "disc", 12: "triangle"}
_OUTLINES = {7: (4, np.pi / 4), 3: (24, 0.0), 12: (3, -np.pi / 2)}


class Shape(NamedTuple):
    """One object: its category, its outline [corners, 2] in whole pixels, and its edges left, top, right, bottom."""

    category: int
    corners: npt.NDArray[np.float64]
    edges: tuple[int, int, int, int]


def draw(generator: np.random.Generator, side: int) -> tuple[Image.Image, list[Shape]]:
    """Draw an image and the one to four shapes on it, which do not touch."""
    image = Image.fromarray(generator.integers(60, 196, (side, side, 3), dtype=np.uint8))
    canvas, shapes, count = ImageDraw.Draw(image), list[Shape](), int(generator.integers(1, 5))
    for _ in range(50):
        category = int(generator.choice(list(CATEGORIES)))
        (corners, first), radius = _OUTLINES[category], generator.uniform(0.1, 0.22) * side
        angle = first + np.linspace(0, 2 * np.pi, corners, endpoint=False)
        centre = generator.uniform(radius + 1, side - radius - 1, 2)
        outline = np.round(centre + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1))
        left, top, right, bottom = (int(edge) for edge in (*outline.min(axis=0), *outline.max(axis=0)))
        apart = all(left > r or l > right or top > b or t > bottom for l, t, r, b in (shape.edges for shape in shapes))  # noqa: E741
        if len(shapes) < count and apart:
            colour = generator.choice([0, 255], 3) if generator.random() < 0.5 else generator.integers(0, 256, 3)
            canvas.polygon([(float(x), float(y)) for x, y in outline], fill=tuple(int(c) for c in colour))
            shapes.append(Shape(category, outline, (left, top, right, bottom)))
    return image, shapes


def write_coco(folder: Path, *, train: int, test: int, side: int, seed: int = 0) -> None:
    """Write `train` and `test` images of `side` pixels as train/ and val/, called 0000.png, 0001.png, ..., with annotations."""
    generator = np.random.Generator(np.random.PCG64(seed))
    (folder / "annotations").mkdir(parents=True)
    for part, count in (("train", train), ("val", test)):
        (folder / part).mkdir()
        images, annotations = [], list[dict[str, Any]]()
        for number in range(count):
            image, shapes = draw(generator, side)
            image.save(folder / part / f"{number:04}.png")
            images.append({"id": 10 + number, "file_name": f"{number:04}.png", "width": side, "height": side})
            for category, corners, (left, top, right, bottom) in shapes:
                x, y = corners.T
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": 10 + number,
                        "category_id": category,
                        "bbox": [left, top, right - left, bottom - top],
                        "segmentation": [corners.ravel().tolist()],
                        "area": abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2,
                        "iscrowd": 0,
                    }
                )
        content = {"images": images, "annotations": annotations}
        content["categories"] = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
