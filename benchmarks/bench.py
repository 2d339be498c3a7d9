"""Training steps and loaders beside the conventional pipeline: prints tables, writes JSON.

    python benchmarks/bench.py [--only small,files,loss] [--rounds 3] [--images FOLDER] [--out FILE]

`small`: whole steps on CIFAR-shaped images, ResNet-18 with a 3x3 stem, in fp32 and bf16, and of the floor, the rate at which this
device could do a step's products were there nothing else. `files`: photographs at 224 pixels, those of a folder, or JPEGs made
here: 500 x 375, as in ImageNet, and 3000 x 2000, as cameras give; the loader alone and whole steps. Images per second of a core
count the processor time of all of a contender's processes, so they do not depend on how many cores were free. `loss`: the loss and
its gradient over the memory. `peers`: beside
lightly, which `make bench-peers` installs.

For figures worth quoting the machine has to be quiet: absolute speeds drift with whatever else it does, ratios within a turn do not.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import contenders
from contenders import TINY, Contender, Noise, Record, Work, compare, floor, show_records, training
from relssl.data.cache import shrunken
from relssl.engine import available_cores, fast_bf16, prepare_process
from relssl.method.backbones import create_backbone, feature_width
from relssl.method.ressl import OBJECTIVES
from relssl.settings.run import Config
from relssl.train.run_folder import environment

PRECISIONS = ("fp32", "bf16")
STYLES = {"conventional, Pillow": contenders.pillow, "conventional, tensors": contenders.tensors}


class Quiet:
    """Takes the place of a console."""

    def say(self, line: str) -> None:
        pass

    @contextmanager
    def chore(self, what: str, done: int, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda count: None


def loading(settings: Mapping[str, Any], source: str) -> Work:
    """Return our views alone as work. Each turn starts and ends its loader, so that no worker runs ahead while others are measured."""
    from relssl.train.loop import create_run

    config, images, engine = contenders.start(settings, source)
    if config.loader.cache is not None:  # before anything is timed
        images = dataclasses.replace(images, source=shrunken(images, config.loader, Quiet()))
    stream, start = create_run(config, engine, images).loader.stream, 0

    def run(count: int) -> None:
        nonlocal start
        for _ in stream(start, start + count):
            pass
        start += count
        engine.synchronise()

    return Work(run, config.batch_size)


def compare_small(args: argparse.Namespace, peer: str, more: Record) -> Record:
    """Compare whole steps of small images, by the recipe cifar10, with another pipeline's, and with the floor."""
    base = {"recipe": "cifar10", "engine.threads": args.threads} | (TINY if args.tiny else {})
    base |= {} if args.memory is None else {"method.memory_size": args.memory}
    source, rows = Noise(64 if args.tiny else 20 * 256, 32), list[Contender]()
    for precision in PRECISIONS:
        other = {"settings": base, "source": source, "precision": precision, "workers": args.workers, "threads": args.threads}
        shared = {"settings": base | {"engine.precision": precision}, "source": source}
        rows.append(Contender(f"{peer} {precision}", contenders.conventional_training, other | more))
        rows.append(Contender(f"relssl {precision}", training, shared))
        rows.append(Contender(f"floor {precision}", floor, shared | {"seconds": 0.05 if args.tiny else 1.0}))
    records = compare(rows, args.rounds, units=1 if args.tiny else 4)
    bases = [f"{name} {precision}" for name in (peer, "floor") for precision in PRECISIONS]
    show_records(f"Small images: training steps, {args.threads} threads", records, bases)
    return {"settings": base, "records": records}


def measure_small(args: argparse.Namespace) -> Record:
    """Compare whole steps of small images with the conventional pipeline's."""
    return compare_small(args, "conventional", {})


def file_settings(args: argparse.Namespace, batch: int) -> Record:
    """Return the recipe for folders, with a network that a processor can train."""
    settings = {"recipe": "folder", "backbone": "resnet18", "engine.threads": args.threads} | (TINY if args.tiny else {})
    settings |= {"views.weak.size": 32, "views.strong.size": 32} if args.tiny else {}
    return settings | {"batch_size": batch, "loader.workers": args.workers}


def measure_files(args: argparse.Namespace) -> Record:
    """Compare loaders alone, and whole steps, on photographs."""
    results: Record = {}
    with tempfile.TemporaryDirectory() as folder:
        sets = {} if args.images is None else {args.images.name: (str(args.images), 32)}
        if not sets:
            for width, height, count, batch in ((100, 75, 16, 8),) if args.tiny else ((500, 375, 512, 32), (3000, 2000, 64, 8)):
                sets[f"{width} x {height}"] = (write_folder(Path(folder, f"{width}"), count, width, height), batch)
        for name, (source, batch) in sets.items():
            shared: Record = {"settings": file_settings(args, batch), "source": source}
            rows = [
                Contender(label, contenders.conventional_loading, shared | {"style": style, "workers": args.workers})
                for label, style in STYLES.items()
            ]
            caching = {"loader.cache": 256, "loader.cache_folder": str(Path(folder, "cache"))}
            for label, change in (("", {}), (", decoding at full size", {"loader.reduced_decode": False}), (", cache", caching)):
                own = shared | {"settings": shared["settings"] | change}
                rows.append(Contender(f"relssl{label}", loading, own))
            records = compare(rows, args.rounds, units=1 if args.tiny else 16 if batch > 8 else 8)
            show_records(f"Files, loader alone: {name}, {args.workers} workers", records, list(STYLES), "images_per_core_second")
            results[f"loader, {name}"] = records
        name, (source, batch) = next(iter(sets.items()))
        base, precision = file_settings(args, batch), "bf16" if fast_bf16("cpu") else "fp32"
        shared = {"settings": base, "source": source, "precision": precision, "workers": args.workers, "threads": args.threads}
        rows = [Contender(label, contenders.conventional_training, shared | {"style": style}) for label, style in STYLES.items()]
        own = {"settings": base | {"engine.precision": precision}, "source": source}
        records = compare([*rows, Contender("relssl", training, own)], args.rounds, units=1 if args.tiny else 4)
        show_records(f"Files, training steps: {name}, ResNet-18, {precision}", records, list(STYLES))
        results[f"steps, {name}"] = records
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
        forms = ["conventional", *OBJECTIVES]
        rows = [Contender(form, loss_work, {"form": form, "shape": shape, "threads": args.threads}) for form in forms]
        # About as many products as one call at the papers' small sizes takes, at least one.
        records = compare(rows, args.rounds, 1 if args.tiny else min(16, max(1, 2**31 // math.prod(shape))))
        show_records("Loss over the memory: K {}, D {}, B {}, V {}".format(*shape), records, ["conventional", "plain"])
        results["{}x{} B{} V{}".format(*shape)] = records
    return results


def write_folder(folder: Path, count: int, width: int, height: int, different: int = 32) -> str:
    """Write `count` JPEGs of quality 90, of which `different` differ, as drawing one takes longer than reading it."""
    folder.mkdir(parents=True)
    for number in range(min(count, different)):
        picture(width, height, number).save(folder / f"{number:05}.jpg", quality=90)
    for number in range(different, count):
        (folder / f"{number:05}.jpg").write_bytes((folder / f"{number % different:05}.jpg").read_bytes())
    return str(folder)


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Draw a cloudy picture with as much contrast at each scale as photographs tend to have: noise of all octaves, added up."""
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


def lightly_views(size: int, mean: Any, std: Any) -> tuple[Any, Any]:
    """Return lightly's weak and MoCo v2 view of a Pillow image."""
    from lightly.transforms.simclr_transform import SimCLRViewTransform

    start = {
        "input_size": size,
        "min_scale": 0.2,
        "normalize": {"mean": list(mean), "std": list(std)},
        "rr_prob": 0.0,
        "vf_prob": 0.0,
    }
    weak = SimCLRViewTransform(**start, cj_prob=0.0, random_gray_scale=0.0, gaussian_blur=0.0)
    colours = {"cj_prob": 0.8, "cj_strength": 1.0, "cj_bright": 0.4, "cj_contrast": 0.4, "cj_sat": 0.4, "cj_hue": 0.1}
    return weak, SimCLRViewTransform(**start, **colours, sigmas=(0.1, 2))


def lightly_step(config: Config, device: torch.device, precision: str) -> contenders.Step:
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
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=precision == "bf16")

    def step(weak: Tensor, strong: Tensor) -> None:
        update_momentum(student, teacher, m=method.teacher_momentum)
        with autocast():
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
    steps = compare_small(args, "lightly", {"style": lightly_views, "create_step": lightly_step})
    with tempfile.TemporaryDirectory() as folder:
        photos = write_folder(Path(folder, "photos"), *((16, 100, 75) if args.tiny else (512, 500, 375)))
        shared = {"settings": file_settings(args, 8 if args.tiny else 32), "source": photos}
        other = shared | {"style": lightly_views, "workers": args.workers}
        rows = [Contender("lightly", contenders.conventional_loading, other), Contender("relssl", loading, shared)]
        views = compare(rows, args.rounds, units=1 if args.tiny else 8)
    show_records("Files: both views of an image beside lightly", views, ["lightly"], "images_per_core_second")
    return {"steps": steps["records"], "views": views}


MEASURES = {"small": measure_small, "files": measure_files, "loss": measure_loss, "peers": measure_peers}


def main() -> None:
    """Measure the parts asked for; one that fails does not lose the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores, device = available_cores(), "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--only", default="small,files,loss", help="parts, separated by commas (default: all but peers)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (default: 3)")
    parser.add_argument("--threads", type=int, default=cores, help="threads of a training process (default: the cores)")
    parser.add_argument("--workers", type=int, default=cores, help="loader processes of each contender (default: the cores)")
    parser.add_argument("--memory", type=int, help="keys in the memory of the small setting (default: the recipe's)")
    parser.add_argument("--images", type=Path, help="a folder of JPEGs for the files part (default: some are made)")
    parser.add_argument("--tiny", action="store_true", help="try the code in seconds; the figures mean nothing")
    parser.add_argument("--out", type=Path, default=Path(f"results/bench-{device}-{cores}-cores.json"))
    args = parser.parse_args()
    options = {name: value for name, value in vars(args).items() if name in ("rounds", "threads", "workers", "memory", "tiny")}
    results: Record = {"machine": environment(), "options": options}
    contenders.measure_parts(args.only.split(","), lambda part: MEASURES[part](args), results, args.out)


if __name__ == "__main__":
    main()
