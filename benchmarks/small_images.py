"""Images per second of the small-image path against the conventional pipeline, interleaved, as a ratio.

    python benchmarks/small_images.py [--rounds 3] [--steps 4] [--out results/small-images.json]

Both train ReSSL on CIFAR-shaped images with ResNet-18 (3x3 stem), batch 256, memory 4096 x 128. The conventional pipeline is
what the field's code does, without its waste: Pillow views in loader workers, fp32, one forward pass a network, softmax times
log-softmax over a clone of the memory, the teacher updated tensor by tensor. It has a process of its own, as our setting of
the allocator would speed it up as well. Ours runs as `relssl pretrain cifar10` would, in
the precision it picks and, for a fair share, in fp32. Images are random: time does not depend on what they show.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from relssl.config import Config, resolve
from relssl.data.sources import Images
from relssl.engine import Engine
from relssl.method import create_encoder
from relssl.train.assembly import complete_settings
from relssl.train.folder import environment
from relssl.train.trainer import Trainer

BATCH, MEMORY, DIM = 256, 4096, 128


class Blur:
    """Gaussian blur as in MoCo v2."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=float(torch.empty(1).uniform_(0.1, 2.0))))


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    """One weak and one contrastive view of each image, by torchvision's own transforms on Pillow images."""

    def __init__(self, pixels: np.ndarray, config: Config) -> None:
        self.pixels = pixels
        end = [T.ToTensor(), T.Normalize(config.views.mean, config.views.std)]
        start = [T.RandomResizedCrop(32, (0.2, 1.0)), T.RandomHorizontalFlip()]
        colours = [T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), T.RandomGrayscale(0.2), T.RandomApply([Blur()], 0.5)]
        self.weak, self.strong = T.Compose([*start, *end]), T.Compose([*start, *colours, *end])

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        image = Image.fromarray(self.pixels[row])
        return self.weak(image), self.strong(image)


def conventional(config: Config, images: Images, workers: int) -> Callable[[], None]:
    """A function that makes one conventional step."""
    assert images.pixels is not None
    student, teacher = create_encoder(config), create_encoder(config)
    teacher.load_state_dict(student.state_dict())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4, foreach=False)
    memory, pointer = F.normalize(torch.randn(MEMORY, DIM), dim=1), 0
    data = TwoViews(images.pixels.permute(0, 2, 3, 1).numpy(), config)
    loader = DataLoader(data, BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0)
    endless = forever(loader)

    def step() -> None:
        nonlocal pointer
        weak, strong = next(endless)
        with torch.no_grad():
            for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                t.data = t.data * 0.99 + s.data * 0.01
            keys = teacher([weak])[0]
        queries, queue = student([strong])[0], memory.clone()
        target = F.softmax(keys @ queue.T / 0.04, dim=1)
        loss = -(target * F.log_softmax(queries @ queue.T / 0.1, dim=1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        memory[pointer : pointer + BATCH] = keys
        pointer = (pointer + BATCH) % MEMORY

    return step


def forever(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's batches, over and over."""
    while True:
        yield from loader


def _serve(pipe: Connection, config: Config, images: Images, workers: int, threads: int) -> None:
    """Another process: make the asked number of conventional steps, send back the images per second."""
    torch.set_num_threads(threads)
    step = conventional(config, images, workers)
    while steps := pipe.recv():
        pipe.send(speed(step, steps))


def elsewhere(config: Config, images: Images, workers: int, threads: int) -> Callable[[int], float]:
    """The conventional pipeline's speed, measured in a process of its own that rests between the rounds."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=_serve, args=(there, config, images, workers, threads)).start()

    def measure(steps: int) -> float:
        here.send(steps)
        return float(here.recv()) if steps else 0.0

    return measure


def ours(config: Config, images: Images, engine: Engine) -> Callable[[int], float]:
    """The training loop's speed in this process."""
    trainer = Trainer(config, engine, images, None)
    stream = trainer.loader.stream(0, trainer.total_steps)

    def step() -> None:
        trainer.train_step(next(stream))

    return lambda steps: speed(step, steps)


def speed(step: Callable[[], None], steps: int) -> float:
    """Images per second of `steps` steps."""
    begun = time.perf_counter()
    for _ in range(steps):
        step()
    return steps * BATCH / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (20 * BATCH, 3, 32, 32), dtype=np.uint8))
    images = Images("random images", pixels=pixels, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    config = complete_settings(resolve({"recipe": "cifar10", "log.every": 10}), images)
    rival = elsewhere(config, images, args.workers, Engine(config.engine).threads)
    contenders = {"conventional fp32": rival}
    for precision in ("fp32", "auto"):
        engine = Engine(dataclasses.replace(config.engine, precision=precision))
        contenders[f"relssl {engine.precision}"] = ours(config, images, engine)
    rounds: dict[str, list[float]] = {name: [] for name in contenders}
    for measure in contenders.values():
        measure(1)
    for number in range(args.rounds):
        for name, measure in contenders.items():
            rounds[name].append(measure(args.steps))
            print(f"round {number + 1}  {name:18} {rounds[name][-1]:7.1f} images/s", flush=True)
    # Zero steps end the other process, which answers nothing then; our side of the pipe does not wait for it.
    rival(0)
    base = rounds["conventional fp32"]
    table = {}
    for name, speeds in rounds.items():
        ratios = [a / b for a, b in zip(speeds, base, strict=True)]
        table[name] = {"images_per_second": speeds, "ratio": [min(ratios), statistics.median(ratios), max(ratios)]}
        low, middle, high = table[name]["ratio"]
        print(f"{name:18} {statistics.median(speeds):7.1f} images/s   {middle:.2f} x conventional [{low:.2f}..{high:.2f}]")
    if args.out:
        args.out.write_text(
            json.dumps({"batch": BATCH, "steps": args.steps, "table": table, "machine": environment()}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
