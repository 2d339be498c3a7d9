"""The conventional pipeline: what the field's code does, without its waste.

Views are made image by image in loader workers, by torchvision's transforms on Pillow images (`pillow`) or on tensors
(`tensors`). One forward pass a network and step, channels first; the loss is softmax times log-softmax over a clone of the
memory; the teacher is updated tensor by tensor. In bf16 the networks run under autocast; the loss stays in fp32, as it has to.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms as v1
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from relssl.data.images import Images, Pixels
from relssl.data.named import load
from relssl.method.create import create_student
from relssl.settings.run import Config, resolve
from relssl.train.pretrain import complete_settings
from turns import Work

# (size, mean, std) -> the transforms of the weak and of the contrastive view
Style = Callable[[int, Any, Any], tuple[Callable[[Any], Any], Callable[[Any], Any]]]
# (weak, strong), each [B, 3, S, S] on the device
Step = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Noise:
    """Random images in memory, so many of so many pixels a side; the time of a step does not depend on what images show."""

    count: int
    size: int


def images_of(source: Noise | str) -> Images:
    """Return the images of a source, noise or a folder, the same in every process."""
    if isinstance(source, str):
        return load(source, None, "train")
    shape = (source.count, 3, source.size, source.size)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    return Images("random images", Pixels(pixels), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def blur(image: Image.Image) -> Image.Image:
    """Blur a Pillow image, as MoCo v2 does."""
    return image.filter(ImageFilter.GaussianBlur(radius=float(torch.empty(1).uniform_(0.1, 2.0))))


def pillow(size: int, mean: Any, std: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Return the weak and the contrastive view of a Pillow image."""
    end = [v1.ToTensor(), v1.Normalize(mean, std)]
    start = [v1.RandomResizedCrop(size, (0.2, 1.0)), v1.RandomHorizontalFlip()]
    jitter = v1.RandomApply([v1.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)
    colours = [jitter, v1.RandomGrayscale(0.2), v1.RandomApply([blur], 0.5)]
    return v1.Compose([*start, *end]), v1.Compose([*start, *colours, *end])


def tensors(size: int, mean: Any, std: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Return the weak and the contrastive view of a uint8 tensor [3, H, W]."""
    end = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    start = [v2.RandomResizedCrop(size, (0.2, 1.0), antialias=True), v2.RandomHorizontalFlip()]
    jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)
    # A kernel of a tenth of the side, as SimCLR and those after it have it.
    blurred = v2.RandomApply([v2.GaussianBlur(size // 10 // 2 * 2 + 1, (0.1, 2.0))], 0.5)
    return v2.Compose([*start, *end]), v2.Compose([*start, jitter, v2.RandomGrayscale(0.2), blurred, *end])


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    """One weak and one contrastive view of each image."""

    def __init__(self, images: Images, style: Style, config: Config) -> None:
        self.images, self.as_tensors = images, style is tensors
        self.weak, self.strong = style(config.views.weak.size, config.views.mean, config.views.std)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        image: Any
        if isinstance(self.images.source, Pixels):
            pixels = self.images.source.tensor[row]
            image = pixels if self.as_tensors else Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        else:
            file = self.images.source.name(row)
            image = decode_image(file, ImageReadMode.RGB) if self.as_tensors else Image.open(file).convert("RGB")
        return self.weak(image), self.strong(image)


def loading(settings: Mapping[str, Any], source: Noise | str, style: Style, workers: int) -> Work:
    """Return views alone as work. Each turn starts and ends its loader, so that no worker runs ahead while others are measured."""
    images = images_of(source)
    config = complete_settings(resolve(settings), images)
    data, batch = TwoViews(images, style, config), config.batch_size

    def run(count: int) -> None:
        rows = np.random.permutation(count * batch) % len(images)
        for _ in DataLoader(Subset(data, rows.tolist()), batch, num_workers=workers):
            pass

    return Work(run, batch)


def training(
    settings: Mapping[str, Any],
    source: Noise | str,
    precision: str,
    workers: int,
    threads: int,
    style: Style = pillow,
    create_step: Callable[[Config, torch.device, str], Step] | None = None,
) -> Work:
    """Return whole steps as work, of the network, memory and temperatures that `settings` have.

    Args:
        precision: fp32 or bf16.
        style: how views are made.
        create_step: given settings, device and precision, returns the step; None for the conventional one.
    """
    torch.set_num_threads(threads)
    images = images_of(source)
    config = complete_settings(resolve(settings), images)
    device = torch.device("cuda" if torch.cuda.is_available() and config.engine.device != "cpu" else "cpu")
    loader = DataLoader(
        TwoViews(images, style, config),
        config.batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    step = (create_step or conventional_step)(config, device, precision)

    def run(count: int) -> None:
        for weak, strong in itertools.islice(endless, count):
            step(weak.to(device, non_blocking=True), strong.to(device, non_blocking=True))
        if device.type == "cuda":
            torch.cuda.synchronize()

    return Work(run, config.batch_size, {"precision": precision})


def conventional_step(config: Config, device: torch.device, precision: str) -> Step:
    """Return a function that makes one conventional step."""
    method, optimizer = config.method, config.optimizer
    student, teacher = create_student(config).to(device), create_student(config).to(device)
    teacher.load_state_dict(student.state_dict())
    sgd = torch.optim.SGD(student.parameters(), lr=optimizer.lr, momentum=optimizer.momentum, weight_decay=optimizer.weight_decay)
    memory = F.normalize(torch.randn(method.memory_size, config.encoder.dim), dim=1).to(device)
    pointer = 0
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=precision == "bf16")

    def step(weak: Tensor, strong: Tensor) -> None:
        nonlocal pointer
        with torch.no_grad(), autocast():
            for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                t.data = t.data * method.teacher_momentum + s.data * (1 - method.teacher_momentum)
            keys = teacher([weak])[0]
        with autocast():
            queries = student([strong])[0]
        loss = conventional_loss(queries, keys, memory, method.student_temperature, method.teacher_temperature)
        sgd.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        sgd.step()
        count = min(len(keys), len(memory) - pointer)
        memory[pointer : pointer + count] = keys[:count]
        pointer = (pointer + count) % len(memory)

    return step


def conventional_loss(queries: Tensor, keys: Tensor, memory: Tensor, student: float, teacher: float) -> Tensor:
    """Return the field's form of the relational loss: softmax times log-softmax over a clone of the memory."""
    queue = memory.clone()
    target = F.softmax(keys @ queue.T / teacher, dim=-1)
    return -(target * F.log_softmax(queries @ queue.T / student, dim=-1)).sum(-1).mean()
