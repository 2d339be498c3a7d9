"""What the benchmarks train on: noise in memory, or JPEG files that compress and decode about as photographs do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from relssl.data.images import Images, Pixels
from relssl.data.named import load


@dataclass(frozen=True)
class Noise:
    """Random images in memory; the time of a step does not depend on what images show.

    Attributes:
        count: how many.
        size: side in pixels.
    """

    count: int
    size: int


# Where a contender's images come from: memory, or the files of a folder.
Source = Noise | str


def images_of(source: Source) -> Images:
    """The images of a source, the same in every process."""
    if isinstance(source, str):
        return load(source, None, "train")
    shape = (source.count, 3, source.size, source.size)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    return Images("random images", Pixels(pixels), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def picture(width: int, height: int, seed: int) -> Image.Image:
    """A cloudy picture with as much contrast at each scale as photographs tend to have: noise of all octaves, added up."""
    random = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    cell = max(width, height)
    while cell >= 1:
        shape = (height // cell + 2, width // cell + 2)
        grey = random.standard_normal(shape)
        for channel in range(3):
            # Mostly grey, as colours in photographs vary far less than brightness.
            coarse = Image.fromarray((grey + 0.3 * random.standard_normal(shape)).astype(np.float32))
            # Finer detail is weaker: at equal strength a JPEG would be far larger than a photograph.
            total[..., channel] += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) * cell**0.25
        cell //= 2
    total = 128 + 48 * (total - total.mean()) / total.std()
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def write_folder(folder: Path, count: int, width: int, height: int, different: int = 32) -> str:
    """Write `count` JPEGs of quality 90, of which `different` differ, as drawing one takes longer than reading it."""
    folder.mkdir(parents=True)
    for number in range(min(count, different)):
        picture(width, height, number).save(folder / f"{number:05}.jpg", quality=90)
    for number in range(different, count):
        (folder / f"{number:05}.jpg").write_bytes((folder / f"{number % different:05}.jpg").read_bytes())
    return str(folder)
