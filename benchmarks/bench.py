"""Training steps and loaders beside the conventional pipeline: prints tables, writes JSON.

    python benchmarks/bench.py [--only small,files,loss] [--rounds 3] [--images FOLDER] [--out FILE]

`small`: whole steps on CIFAR-shaped images, ResNet-18 with a 3x3 stem, in fp32 and bf16, and of the floor, the rate at which this
device could do a step's products were there nothing else. `files`: photographs at 224 pixels, those of a folder, or JPEGs made
here: 500 x 375, as in ImageNet, and 3000 x 2000, as cameras give; the loader alone and whole steps. Images per second of a core
count the processor time of all of a contender's processes, so they do not depend on how many cores were free. `loss`: the loss and
its gradient over the memory. `networks`: steps of the named networks on 8 images of 224 pixels, over 4096 keys, in fp32. `peers`:
beside lightly, which `make bench-peers` installs.

For figures worth quoting the machine has to be quiet: absolute speeds drift with whatever else it does, ratios within a turn do not.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import contenders
from contenders import Measures, Record, Work, conventional_training, floor, measure, settings_of, training
from relssl.data.cache import shrunken
from relssl.engine import available_cores, fast_bf16, prepare_process
from relssl.method import backbones
from relssl.method.backbones import NAMED, create_backbone, feature_width
from relssl.method.base import OBJECTIVES
from relssl.settings.run import Config
from relssl.train.console import Display
from relssl.train.run import create_run

PRECISIONS = ("fp32", "bf16")
STYLES = {"conventional, Pillow": contenders.pillow, "conventional, tensors": contenders.tensors}


def loading(settings: Record, source: str) -> Work:
    """Return our views alone as work. Each turn starts and ends its loader, so that no worker runs ahead while others are measured."""
    config, images = contenders.start(settings, source)
    engine, begin = contenders.engine_of(config), 0
    if config.loader.cache is not None:  # before anything is timed
        with Display(show=False) as silent:
            images = dataclasses.replace(images, source=shrunken(images, config.loader, silent))
    stream = create_run(config, engine, images).loader.stream

    def run(count: int) -> None:
        nonlocal begin
        for _ in stream(begin, begin + count):
            pass
        begin += count
        engine.synchronise()

    return Work(run, config.batch_size)


def compare_small(args: argparse.Namespace, peer: str, other: Callable[..., Work]) -> Record:
    """Compare whole steps of small images, by the recipe cifar10, with another pipeline's, and with the floor."""
    base = settings_of(args, recipe="cifar10") | ({} if args.memory is None else {"method.memory_size": args.memory})
    source, works = (64 if args.tiny else 20 * 256, 32), {peer: other, "relssl": training, "floor": floor}
    pairs = [(name, precision) for precision in PRECISIONS for name in works]
    rows = {f"{name} {each}": partial(works[name], base | {"engine.precision": each}, source) for name, each in pairs}
    bases = [f"{name} {precision}" for name in (peer, "floor") for precision in PRECISIONS]
    title = f"Small images: training steps, {args.threads} threads"
    return {"settings": base, "records": measure(args, title, rows, bases, units=4)}


def file_settings(args: argparse.Namespace, batch: int) -> Record:
    """Return the recipe for folders, with a network that a processor can train."""
    size = {"views.weak.size": 32, "views.strong.size": 32} if args.tiny else {}
    return settings_of(args, recipe="folder", backbone="resnet18") | size | {"batch_size": batch}


def measure_files(args: argparse.Namespace) -> Record:
    """Compare loaders alone, and whole steps, on photographs."""
    results: Record = {}
    with tempfile.TemporaryDirectory() as folder:
        sets = {} if args.images is None else {args.images.name: (str(args.images), 32)}
        if not sets:
            for width, height, count, batch in ((100, 75, 16, 8),) if args.tiny else ((500, 375, 512, 32), (3000, 2000, 64, 8)):
                sets[f"{width} x {height}"] = (write_folder(Path(folder, f"{width}"), count, width, height), batch)
        caching = {"loader.cache": 256, "loader.cache_folder": str(Path(folder, "cache"))}
        ways: dict[str, Record] = {"": {}, ", decoding at full size": {"loader.reduced_decode": False}, ", cache": caching}
        for name, (source, batch) in sets.items():
            base, title = file_settings(args, batch), f"Files, loader alone: {name}, {args.workers} workers"
            rows = {label: partial(contenders.conventional_loading, base, source, style) for label, style in STYLES.items()}
            rows |= {f"relssl{way}": partial(loading, base | change, source) for way, change in ways.items()}
            results[f"loader, {name}"] = measure(args, title, rows, [*STYLES], 16 if batch > 8 else 8, per_core=True)
        name, (source, batch) = next(iter(sets.items()))
        precision = "bf16" if fast_bf16(torch.device("cpu")) else "fp32"
        base = file_settings(args, batch) | {"engine.precision": precision}
        rows = {label: partial(conventional_training, base, source, style) for label, style in STYLES.items()}
        rows["relssl"] = partial(training, base, source)
        title = f"Files, training steps: {name}, ResNet-18, {precision}"
        results[f"steps, {name}"] = measure(args, title, rows, [*STYLES], units=4)
    return results


def loss_work(form: str, shape: tuple[int, int, int, int], threads: int) -> Work:
    """Return the loss and its gradient as work, in a form, over K keys of D dimensions, for B samples and V views."""
    torch.set_num_threads(threads)
    size, dim, batch, views = shape
    generator, device = torch.Generator().manual_seed(0), "cuda" if torch.cuda.is_available() else "cpu"
    rows = (torch.randn(count, dim, generator=generator) for count in (size, batch, views * batch))
    memory, keys, queries = (F.normalize(each, dim=1).to(device) for each in rows)
    queries = queries.view(views, batch, dim).requires_grad_()
    prepare_process()  # as in training, and only now: else what drawing took would lie ready, and not count as the loss's
    loss: Any = partial(contenders.conventional_loss, student=0.1, teacher=0.04)
    if form != "conventional":
        loss = partial(OBJECTIVES[form], student_temperature=0.1, teacher_temperature=0.04)

    def run(count: int) -> None:
        for _ in range(count):
            queries.grad = None
            loss(queries, keys, memory).backward()
        if queries.is_cuda:
            torch.cuda.synchronize()

    return Work(run, batch)


def measure_loss(args: argparse.Namespace) -> Record:
    """Compare the forms of the loss over the memory, forward and backward: plain is the paper's formula, tiled ours."""
    results: Record = {}
    shapes = [(4096, 128, 256, 1), (65536, 128, 256, 1), (131072, 512, 256, 1), (131072, 512, 256, 5)]
    for shape in [(64, 8, 16, 2)] if args.tiny else shapes:
        rows = {form: partial(loss_work, form, shape, args.threads) for form in ("conventional", *OBJECTIVES)}
        units = min(16, max(1, 2**31 // math.prod(shape)))  # as many products as one call at the papers' small sizes, or one
        title = "Loss over the memory: K {}, D {}, B {}, V {}".format(*shape)
        results["{}x{} B{} V{}".format(*shape)] = measure(args, title, rows, ["conventional", "plain"], units)
    return results


def measure_networks(args: argparse.Namespace) -> Record:
    """Measure parameters, GFLOPs and steps of the named networks."""
    names, size, batch = (["resnet18"], 32, 16) if args.tiny else (list(NAMED), 224, 8)
    base: Record = {"recipe": "imagenet", "batch_size": batch, "method.memory_size": 4096, "engine.precision": "fp32"}
    base = settings_of(args, **base | {"views.weak.size": size, "views.strong.size": size, "backbone_args": {}})
    rows = {name: partial(training, base | {"backbone": name}, (64, size + 32)) for name in names}
    records = measure(args, f"Named networks: {batch} images of {size} pixels", rows, [])
    return {name: dataclasses.asdict(next(backbones.within([name], size))) | records[name] for name in names}


def write_folder(folder: Path, count: int, width: int, height: int, different: int = 32) -> str:
    """Write `count` JPEGs of quality 90, of which `different` differ, as drawing one takes longer than reading it."""
    folder.mkdir(parents=True)
    files = [folder / f"{number:05}.jpg" for number in range(count)]
    for number, file in enumerate(files[:different]):
        picture(width, height, number).save(file, quality=90)
    for number, file in enumerate(files[different:]):
        shutil.copy(files[number % different], file)
    return str(folder)


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Draw a cloudy picture: noise of all scales that falls off with its frequency as in photographs (Field 1987)."""
    noise = np.random.default_rng(seed).standard_normal((height, width, 4))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None, None], np.fft.rfftfreq(width)[:, None])
    waves = np.fft.rfft2(noise, axes=(0, 1)) / np.maximum(frequency, 1 / max(width, height)) ** 1.33
    clouds = np.fft.irfft2(waves, (height, width), axes=(0, 1))
    pixels = clouds[..., :1] + 0.3 * clouds[..., 1:]  # mostly grey, as colours in photographs vary far less than brightness
    pixels = 128 + 48 * (pixels - pixels.mean()) / pixels.std()
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def lightly_views(size: int, mean: Any, std: Any) -> tuple[Any, Any]:
    """Return lightly's weak and MoCo v2 view of a Pillow image."""
    from lightly.transforms.simclr_transform import SimCLRViewTransform

    crop: Record = {"input_size": size, "min_scale": 0.2, "rr_prob": 0.0, "vf_prob": 0.0}
    crop["normalize"] = {"mean": list(mean), "std": list(std)}
    weak = SimCLRViewTransform(**crop, cj_prob=0.0, random_gray_scale=0.0, gaussian_blur=0.0)
    colours = {"cj_prob": 0.8, "cj_strength": 1.0, "cj_bright": 0.4, "cj_contrast": 0.4, "cj_sat": 0.4, "cj_hue": 0.1}
    return weak, SimCLRViewTransform(**crop, **colours, sigmas=(0.1, 2))


def lightly_step(config: Config, device: torch.device) -> contenders.Step:
    """Return a function that makes one step as lightly's MoCo examples do; it has no ReSSL loss, so the conventional one is taken."""
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.modules.memory_bank import MemoryBankModule
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    method, optimizer, dim = config.method, config.optimizer, config.encoder.dim
    backbone = create_backbone(config.backbone, config.encoder.stem, config.backbone_args)
    width = feature_width(backbone, config.views.weak.size)
    student = nn.Sequential(backbone, MoCoProjectionHead(width, config.encoder.projector_hidden, dim)).to(device)
    teacher = copy.deepcopy(student)
    deactivate_requires_grad(teacher)
    memory = MemoryBankModule(size=(method.memory_size, dim)).to(device)
    sgd = torch.optim.SGD(student.parameters(), lr=optimizer.lr, momentum=optimizer.momentum, weight_decay=optimizer.weight_decay)

    def step(weak: Tensor, strong: Tensor) -> None:
        update_momentum(student, teacher, m=method.teacher_momentum)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.engine.precision == "bf16"):
            with torch.no_grad():
                keys = teacher(weak)
            queries = student(strong)
        keys, queries = (F.normalize(embeddings.float(), dim=1) for embeddings in (keys, queries))
        keys, bank = memory(keys, update=True)  # the bank [D, K] as it was before
        temperatures = (method.student_temperature, method.teacher_temperature)
        contenders.conventional_loss(queries, keys, bank.T, *temperatures).backward()  # type: ignore[no-untyped-call]
        sgd.step()
        sgd.zero_grad()

    return step


def measure_peers(args: argparse.Namespace) -> Record:
    """Compare small images' steps and files' views with lightly's: its transforms, projection head, memory bank and teacher."""
    steps = compare_small(args, "lightly", partial(conventional_training, style=lightly_views, create_step=lightly_step))
    with tempfile.TemporaryDirectory() as folder:
        photos = write_folder(Path(folder, "photos"), *((16, 100, 75) if args.tiny else (512, 500, 375)))
        base = file_settings(args, 8 if args.tiny else 32)
        rows = {"lightly": partial(contenders.conventional_loading, base, photos, lightly_views)}
        rows["relssl"], title = partial(loading, base, photos), "Files: both views of an image beside lightly"
        views = measure(args, title, rows, ["lightly"], 8, per_core=True)
    return {"steps": steps["records"], "views": views}


def main() -> None:
    """Measure the parts asked for."""
    cores, device = available_cores(), "cuda" if torch.cuda.is_available() else "cpu"
    parser = contenders.options(__doc__, ("small", "files", "loss"), f"results/bench-{device}-{cores}-cores.json")
    parser.add_argument("--workers", type=int, default=cores, help="loader processes of each contender (default: the cores)")
    parser.add_argument("--memory", type=int, help="keys in the memory of the small setting (default: the recipe's)")
    parser.add_argument("--images", type=Path, help="a folder of JPEGs for the files part (default: some are made)")
    small = partial(compare_small, peer="conventional", other=conventional_training)
    measures: Measures = {"small": small, "files": measure_files, "loss": measure_loss, "networks": measure_networks}
    contenders.measure_parts(parser.parse_args(), {**measures, "peers": measure_peers})


if __name__ == "__main__":
    main()
