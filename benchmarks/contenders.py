"""Contenders measured in turns (A B C, A B C, ...), each in a process of its own; ours, and the conventional pipeline.

Whatever disturbs the machine disturbs all of them alike, and no setting of one (threads, allocator, compiled code) reaches another.
Absolute speeds drift from minute to minute; a ratio is taken within each round and quoted as its median [least..most].

The conventional pipeline does what the field's code does, without its waste: views image by image in loader workers, by torchvision's
transforms on Pillow images (`pillow`) or on tensors (`tensors`); one forward pass a network and step, channels first; the loss is
softmax times log-softmax over a clone of the memory; the teacher is updated tensor by tensor. In bf16 the networks run under
autocast; the loss stays in fp32, as it has to.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import psutil
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
from relssl.engine import Engine, available_cores, prepare_process
from relssl.method.create import create_student
from relssl.settings.run import Config, resolve
from relssl.train.estimate import attainable, step_flops
from relssl.train.loop import train_step
from relssl.train.memory import memory_used
from relssl.train.pretrain import compile_networks
from relssl.train.run import complete_settings, create_run
from relssl.train.run_folder import environment

Record = dict[str, Any]
View = Callable[[Any], Any]
Style = Callable[[int, Any, Any], tuple[View, View]]  # (size, mean, std) -> the weak and the contrastive view
Step = Callable[[Tensor, Tensor], None]  # (weak, strong), each [B, 3, S, S] on the device
# A network of a few thousand weights, to try the code.
TINY: Record = {"encoder.projector_hidden": 32, "encoder.dim": 16, "batch_size": 16, "method.memory_size": 64}
TINY |= {"backbone_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "zero_init_last": False}}


class Work(NamedTuple):
    """A contender at work."""

    # Does so many units and returns when they are done, on the device as well: None, or the seconds that count in place of the clock's.
    run: Callable[[int], float | None]
    images: int  # in a unit
    facts: Mapping[str, Any] = MappingProxyType({})  # for the record, such as the precision it runs in


Source = tuple[int, int] | str  # random images in memory, so many of so many pixels a side; or a folder
Measures = Mapping[str, Callable[[argparse.Namespace], Any]]  # by part of a script: what measures it
Contenders = Mapping[str, Callable[[], Work]]  # by name: what returns its work, in a process of its own


def compare(contenders: Contenders, rounds: int, units: int) -> dict[str, Record]:
    """Measure so many units of work of each contender in each round, after one unit that does not count.

    Returns:
        By contender: images_per_second, images_per_core_second (processor time, workers included) and seconds_per_unit, each a list
        by rounds; memory_mib, [before the first unit, at the peak]; images in a unit; facts. One that fails has `failed`, the
        reason, and drops out.
    """
    # A server that has done nothing but import the package forks itself: as clean as a new interpreter, and at once there.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["relssl.train.pretrain", "torchvision.transforms.v2"])
    records: dict[str, Record] = {name: {} for name in contenders}
    with ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, context)) for _ in contenders]
        for turn in range(rounds + 1):
            for (name, create), pool in zip(contenders.items(), pools, strict=True):
                if "failed" in records[name]:
                    continue
                try:
                    figures, about = pool.submit(_lap, create, units if turn else 1).result()
                except Exception as error:  # whatever a contender raises, the others go on
                    records[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
                    print(f"{name}: {records[name]['failed']}", flush=True)
                    continue
                records[name] |= about
                for figure, value in figures.items() if turn else ():
                    records[name].setdefault(figure, []).append(round(value, 5))
    return records


_work: Work | None = None
_before = 0


def _lap(create: Callable[[], Work], units: int) -> tuple[dict[str, float], Record]:
    """Some units of work of this process's contender, which the first call makes: figures, and what does not change by rounds."""
    global _work, _before
    if _work is None:
        # Else what runs here, such as the workers of a loader, would be started as this process was.
        multiprocessing.set_start_method(None, force=True)  # type: ignore[arg-type]
        _work = create()
        with suppress(OSError):  # count the peak from here on
            Path("/proc/self/clear_refs").write_text("5")
        _before = _memory(peak=False)
    start, used = time.perf_counter(), _cpu_seconds()
    counted = _work.run(units)
    seconds, busy = time.perf_counter() - start if counted is None else counted, _cpu_seconds() - used
    count = units * _work.images
    # A clock that has not ticked would divide by zero; it ticks every hundredth.
    speeds = {"images_per_second": count / seconds, "images_per_core_second": count / max(busy, 0.01)}
    about = {"memory_mib": [_before >> 20, _memory(peak=True) >> 20], "images": _work.images, "facts": dict(_work.facts)}
    return speeds | {"seconds_per_unit": seconds / units}, about


def _cpu_seconds() -> float:
    """Processor seconds of this process and of all its children, ended or at work."""
    children = multiprocessing.active_children()  # first, as it also collects those that have ended, whose time is then ours
    return sum(os.times()[:4]) + sum(sum(psutil.Process(child.pid).cpu_times()[:2]) for child in children)


def _memory(peak: bool) -> int:
    """Bytes now or at the peak: on the GPU if one is in use, else of this process, without its workers'."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return int(torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated())
    return memory_used() if peak else int(psutil.Process().memory_info().rss)


def times(records: Mapping[str, Record], name: str, base: str, figure: str = "images_per_second") -> list[float] | None:
    """Return how many times `base` a contender reaches, by rounds; None if either failed."""
    pairs = zip(records[name].get(figure, ()), records[base].get(figure, ()), strict=False)
    return [mine / other for mine, other in pairs] or None


def any_failed(records: Any) -> bool:
    """Return true if a contender failed anywhere in a tree of records."""
    return isinstance(records, dict) and ("failed" in records or any(any_failed(part) for part in records.values()))


def spread(values: Sequence[float] | None, digits: int = 2) -> str:
    """Return median [least..most], or a dash for nothing."""
    figures = (statistics.median(values), min(values), max(values)) if values else ()
    return "{:.{d}f} [{:.{d}f}..{:.{d}f}]".format(*figures, d=digits) if figures else "-"


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table, its columns aligned."""
    cells = [[str(cell) for cell in row] for row in (columns, ["---"] * len(columns), *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(columns))]
    print(f"\n{title}\n")
    for row in cells:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |", flush=True)


def show_records(title: str, records: dict[str, Record], bases: Sequence[str], per_core: bool = False) -> None:
    """Print images/s, the ratios to each of `bases`, which are also kept in the records, and the peak of memory."""
    rows, (figure, unit) = [], ("images_per_core_second", "a core, times") if per_core else ("images_per_second", "times")
    for name, record in records.items():
        record["times"] = {base: times(records, name, base, figure) for base in bases}
        before, most = record.get("memory_mib", (0, 0))
        speeds = [spread(record.get(each), 1) for each in ("images_per_second", "images_per_core_second")]
        facts = ", ".join(f"{what} {value}" for what, value in record.get("facts", {}).items())
        ratios = (spread(record["times"][base]) for base in bases)
        rows.append([name, *speeds, *ratios, record.get("failed", f"{most} ({most - before} on top)"), facts])
    show(title, ["pipeline", "images/s", "images/s a core", *(f"{unit} {base}" for base in bases), "peak MiB", ""], rows)


def measure(
    args: argparse.Namespace, title: str, contenders: Contenders, bases: Sequence[str], units: int = 1, per_core: bool = False
) -> dict[str, Record]:
    """Return what `compare` does, of one unit where the code is only tried, and print it."""
    records = compare(contenders, args.rounds, 1 if args.tiny else units)
    show_records(title, records, bases, per_core)
    return records


def settings_of(args: argparse.Namespace, **more: Any) -> Record:
    """Return the settings that all contenders share, with a tiny network where the code is only tried."""
    return {"engine.threads": args.threads, "loader.workers": args.workers} | more | (TINY if args.tiny else {})


def start(settings: Record, source: Source) -> tuple[Config, Images]:
    """Return a run's complete settings, and its images, the same in every process."""
    if isinstance(source, str):
        images = load(source, None, "train")
    else:
        count, size = source  # what images show does not change the time of a step
        pixels = np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
        images = Images("random images", Pixels(torch.from_numpy(pixels)), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return complete_settings(resolve(settings), images), images


def _blur(image: Image.Image) -> Image.Image:
    """Blur a Pillow image, as MoCo v2 does."""
    return image.filter(ImageFilter.GaussianBlur(radius=float(torch.empty(1).uniform_(0.1, 2.0))))


def _views(library: Any, ending: View, blurring: View, size: int, mean: Any, std: Any) -> tuple[View, View]:
    """The weak and the contrastive view by one of torchvision's two libraries of transforms."""
    crop = [library.RandomResizedCrop(size, (0.2, 1.0)), library.RandomHorizontalFlip()]
    jitter = library.RandomApply([library.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)
    colours = [jitter, library.RandomGrayscale(0.2), library.RandomApply([blurring], 0.5)]
    end = [ending, library.Normalize(mean, std)]
    return library.Compose([*crop, *end]), library.Compose([*crop, *colours, *end])


def pillow(size: int, mean: Any, std: Any) -> tuple[View, View]:
    """Return the weak and the contrastive view of a Pillow image."""
    return _views(v1, v1.ToTensor(), _blur, size, mean, std)


def tensors(size: int, mean: Any, std: Any) -> tuple[View, View]:
    """Return the weak and the contrastive view of a uint8 tensor [3, H, W]."""
    # A kernel of a tenth of the side, as SimCLR and those after it have it.
    blurring = v2.GaussianBlur(size // 10 // 2 * 2 + 1, (0.1, 2.0))
    return _views(v2, v2.ToDtype(torch.float32, scale=True), blurring, size, mean, std)


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


def conventional_loading(settings: Record, source: Source, style: Style) -> Work:
    """Return views alone as work. Each turn starts and ends its loader, so that no worker runs ahead while others are measured."""
    config, images = start(settings, source)
    data, batch = TwoViews(images, style, config), config.batch_size

    def run(count: int) -> None:
        rows = np.random.permutation(count * batch) % len(images)
        for _ in DataLoader(Subset(data, rows.tolist()), batch, num_workers=config.loader.workers or 0):
            pass

    return Work(run, batch)


def conventional_training(
    settings: Record, source: Source, style: Style = pillow, create_step: Callable[[Config, torch.device], Step] | None = None
) -> Work:
    """Return whole steps as work, of the network, memory and temperatures that `settings` have; by default the conventional step."""
    config, images = start(settings, source)
    torch.set_num_threads(config.engine.threads or available_cores())
    device = torch.device("cuda" if torch.cuda.is_available() and config.engine.device != "cpu" else "cpu")
    data, workers = TwoViews(images, style, config), config.loader.workers or 0
    options: Record = {"persistent_workers": workers > 0, "pin_memory": device.type == "cuda"}
    loader = DataLoader(data, config.batch_size, shuffle=True, num_workers=workers, drop_last=True, **options)
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    step = (create_step or conventional_step)(config, device)

    def run(count: int) -> None:
        for weak, strong in itertools.islice(endless, count):
            step(weak.to(device, non_blocking=True), strong.to(device, non_blocking=True))
        if device.type == "cuda":
            torch.cuda.synchronize()

    return Work(run, config.batch_size, {"precision": config.engine.precision})


def conventional_step(config: Config, device: torch.device) -> Step:
    """Return a function that makes one conventional step."""
    method, optimizer, pointer = config.method, config.optimizer, 0
    student, teacher = create_student(config).to(device), create_student(config).to(device)
    teacher.load_state_dict(student.state_dict())
    sgd = torch.optim.SGD(student.parameters(), lr=optimizer.lr, momentum=optimizer.momentum, weight_decay=optimizer.weight_decay)
    memory = F.normalize(torch.randn(method.memory_size, config.encoder.dim), dim=1).to(device)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=config.engine.precision == "bf16")

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


def engine_of(config: Config) -> Engine:
    """Return a run's engine, with this process set up as the command line does."""
    prepare_process()
    engine = Engine(config.engine)
    torch.set_num_threads(engine.threads)
    return engine


def training(settings: Record, source: Source) -> Work:
    """Return our whole steps as work, as `relssl pretrain` would make them."""
    config, images = start(settings, source)
    training = create_run(config, engine_of(config), images)
    compiled = compile_networks(training)
    stream: Any = training.loader.stream(0, training.total_steps)
    Finalize(None, stream.close, exitpriority=1)  # else this process, as it ends, waits for a worker that does not hear it

    def run(count: int) -> None:
        for _ in range(count):
            train_step(training, next(stream))
        training.engine.synchronise()

    return Work(run, config.batch_size, {"precision": training.engine.precision, "compile": compiled})


def floor(settings: Record, source: Source) -> Work:
    """Return the products of a step alone as work, at the device's best rate, measured anew in each turn for a second."""
    config, _ = start(settings, source)
    engine, flops = engine_of(config), sum(step_flops(config).values())

    def run(count: int) -> float:
        return count * config.batch_size * flops / attainable(engine, seconds=1)

    return Work(run, config.batch_size, {"precision": engine.precision, "flop_per_image": flops})


def options(about: str | None, parts: Iterable[str], out: str) -> argparse.ArgumentParser:
    """Return the options that all scripts take, for a script that measures these parts by default."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(parts), help="parts, separated by commas (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (default: 3)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="threads of a contender (default: the cores)")
    parser.add_argument("--tiny", action="store_true", help="try the code in seconds; the figures mean nothing")
    parser.add_argument("--out", type=Path, default=Path(out), help="JSON file (default: %(default)s)")
    return parser


def measure_parts(args: argparse.Namespace, measures: Measures) -> None:
    """Measure part by part into a file, then exit; one that fails does not lose the others, but sets the exit code.

    Parts that an earlier call has left there, on this machine with these options, stay.
    """
    used = {name: value for name, value in vars(args).items() if name not in ("only", "out", "limit", "start")}
    results: Record = {
        "machine": environment() | {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None},
        "options": json.loads(json.dumps(used, default=str)),
    }
    if args.out.exists() and (earlier := json.loads(args.out.read_text())).items() >= results.items():
        results = earlier
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in args.only.split(","):
        begun = time.perf_counter()
        try:
            results[name] = measures[name](args)
        except Exception as error:
            results[name] = {"failed": f"{type(error).__name__}: {error}"}
            print(f"{name}: failed: {error}", file=sys.stderr)
        print(f"\n{name}: {time.perf_counter() - begun:.0f} s", flush=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {args.out}")
    sys.exit(int(any_failed(results)))
