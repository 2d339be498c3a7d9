"""Small labelled pairs and networks for protocols that train."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import nn

from relssl.data.images import Files, Images, Pixels
from relssl.data.plain import PlainView, Reader
from relssl.engine import Engine
from relssl.evaluation.evaluate import LabelledPair
from relssl.settings.run import EngineConfig


def engine() -> Engine:
    return Engine(EngineConfig(device="cpu", precision="fp32", threads=1))


def reader() -> Reader:
    """Views of 16 pixels, mirrored in training."""
    return Reader(PlainView(16, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3))


def coloured(count: int, seed: int, classes: int = 3) -> Images:
    """Noise with a tint for each class, which a crop keeps: easily told apart."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    pixels = generator.integers(60, 120, (count, 3, 16, 16))
    for channel in range(3):
        pixels[labels == channel, channel] += 100
    return Images("tints", Pixels(torch.from_numpy(pixels.astype(np.uint8))), labels.astype(np.int64), ("red", "green", "blue"))


def pair(bank: int = 50, test: int = 33) -> LabelledPair:
    return LabelledPair(coloured(bank, 0), coloured(test, 1))


def as_files(images: Images, folder: Path) -> Images:
    """The same images as PNG files, named as ImageNet names them."""
    assert isinstance(images.source, Pixels) and images.labels is not None
    folder.mkdir()
    names = [f"n{label}_{row}.png" for row, label in enumerate(images.labels)]
    for row, name in enumerate(names):
        images.read(row, 10**6).save(folder / name)
    sizes = [(folder / name).stat().st_size for name in names]
    return dataclasses.replace(
        images, source=Files(str(folder), [(name.encode(), size) for name, size in zip(names, sizes, strict=True)])
    )


def network(width: int = 8, dropout: float = 0.0) -> nn.Module:
    """[B, 3, 16, 16] -> [B, width], with batch norm, from the same weights each time."""
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        made = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        for images in torch.randn(4, 8, 3, 16, 16):  # running statistics of their own
            made(images)
    return made.eval()
