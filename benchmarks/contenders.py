"""Contenders measured in turns (A B C, A B C, ...), each in a process of its own; ours, and the conventional pipeline.

Whatever disturbs the machine disturbs all of them alike, and no setting of one (threads, allocator, compiled code) reaches another.
Absolute speeds drift from minute to minute; a ratio is taken within each round and quoted as its median [least..most].

The conventional pipeline does what the field's code does, without its waste: views image by image in loader workers, by torchvision's
transforms on Pillow images (`pillow`) or on tensors (`tensors`); one forward pass a network and step, channels first; the loss is
softmax times log-softmax over a clone of the memory; the teacher is updated tensor by tensor. In bf16 the networks run under
autocast; the loss stays in fp32, as it has to.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
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
from relssl.engine import Engine, prepare_process
from relssl.method.create import create_student
from relssl.settings.run import Config, resolve
from relssl.train.estimate import attainable, step_flops
from relssl.train.pretrain import complete_settings

Record = dict[str, Any]
# (size, mean, std) -> the transforms of the weak and of the contrastive view
Style = Callable[[int, Any, Any], tuple[Callable[[Any], Any], Callable[[Any], Any]]]
# (weak, strong), each [B, 3, S, S] on the device
Step = Callable[[Tensor, Tensor], None]
# A network of a few thousand weights, to try the code.
TINY: Record = {
    "backbone_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "zero_init_last": False},
    "encoder.projector_hidden": 32,
    "encoder.dim": 16,
    "batch_size": 16,
    "method.memory_size": 64,
}


@dataclass(frozen=True)
class Work:
    """A contender at work.

    Attributes:
        run: does so many units of work and returns when they are done, on the device as well; None, or the seconds that count in
            place of the clock's.
        images: images in a unit.
        facts: for the record, such as the precision it runs in.
    """

    run: Callable[[int], float | None]
    images: int
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """One row of a comparison: `make(**arguments)` returns its Work, in a process of its own."""

    name: str
    make: Callable[..., Work]
    arguments: Mapping[str, Any]


def compare(contenders: Sequence[Contender], rounds: int, units: int) -> dict[str, Record]:
    """Measure the contenders in turns.

    Args:
        rounds: turns of each.
        units: units of work in a turn, after one that is not measured.

    Returns:
        By contender: images_per_second, images_per_core_second (processor time, workers included) and seconds_per_unit, each a list
        by rounds; memory_mib, [before the first unit, at the peak]; images in a unit; facts. One that fails has `failed`, the
        reason, and drops out.
    """
    # A server that has done nothing but import the package forks itself: as clean as a new interpreter, and at once there.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["relssl.train.pretrain", "torchvision.transforms.v2"])
    records: dict[str, Record] = {contender.name: {"laps": []} for contender in contenders}
    with ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, context)) for _ in contenders]
        for turn in range(rounds + 1):
            for contender, pool in zip(contenders, pools, strict=True):
                record = records[contender.name]
                if "failed" in record:
                    continue
                try:
                    lap = pool.submit(_lap, contender, units if turn else 1).result()
                    record["laps"] += [lap] if turn else []
                except Exception as error:  # whatever a contender raises, the others go on
                    died = isinstance(error, BrokenProcessPool)
                    reason = "its process died" if died else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                    record["failed"] = reason
                    print(f"{contender.name}: {reason}", flush=True)
    return {name: _summed(record) for name, record in records.items()}


_work: Work | None = None
_before = 0


def _lap(contender: Contender, units: int) -> Record:
    """Some units of work of this process's contender, which the first call makes."""
    global _work, _before
    if _work is None:
        # Else what runs here, such as the workers of a loader, would be started as this process was.
        multiprocessing.set_start_method(None, force=True)  # type: ignore[arg-type]
        _work = contender.make(**contender.arguments)
        with suppress(OSError):  # count the peak from here on
            Path("/proc/self/clear_refs").write_text("5")
        _before = _memory("VmRSS")
    start, used = time.perf_counter(), _cpu_seconds()
    seconds = _work.run(units)
    passed = time.perf_counter() - start
    return {
        "units": units,
        "seconds": passed if seconds is None else seconds,
        "cpu_seconds": _cpu_seconds() - used,
        "memory_mib": [_before >> 20, _memory("VmHWM") >> 20],
        "images": _work.images,
        "facts": dict(_work.facts),
    }


def _cpu_seconds() -> float:
    """Processor seconds of this process and of all its children, ended or at work."""
    # Listed first, as this also collects the children that have ended, whose time then counts in os.times.
    children = multiprocessing.active_children()
    total = sum(os.times()[:4])
    for child in children:
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _memory(field: str) -> int:
    """Bytes now (VmRSS) or at the peak (VmHWM): on the GPU if one is in use, else of this process, without its workers'."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return int(torch.cuda.memory_allocated() if field == "VmRSS" else torch.cuda.max_memory_allocated())
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def _summed(record: Record) -> Record:
    if "failed" in record:
        return {"failed": record["failed"]}
    laps, last = record["laps"], record["laps"][-1]
    images = last["images"]
    return {
        "memory_mib": last["memory_mib"],
        "images": images,
        "facts": last["facts"],
        "images_per_second": [round(images * lap["units"] / lap["seconds"], 2) for lap in laps],
        # A clock that has not ticked would divide by zero; it ticks every hundredth.
        "images_per_core_second": [round(images * lap["units"] / max(lap["cpu_seconds"], 0.01), 2) for lap in laps],
        "seconds_per_unit": [round(lap["seconds"] / lap["units"], 5) for lap in laps],
    }


def times(records: Mapping[str, Record], name: str, base: str, figure: str = "images_per_second") -> list[float] | None:
    """Return how many times `base` a contender reaches, by rounds; None if either failed."""
    if figure not in records[name] or figure not in records[base]:
        return None
    return [mine / other for mine, other in zip(records[name][figure], records[base][figure], strict=True)]


def any_failed(records: Any) -> bool:
    """Return true if a contender failed anywhere in a tree of records."""
    return isinstance(records, dict) and ("failed" in records or any(any_failed(part) for part in records.values()))


def spread(values: Sequence[float] | None, digits: int = 2) -> str:
    """Return median [least..most], or a dash for nothing."""
    if not values:
        return "-"
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} [{low:.{digits}f}..{high:.{digits}f}]"


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table, its columns aligned."""
    cells = [[str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(columns))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    print(f"\n{title}\n\n" + "\n".join([lines[0], rule, *lines[1:]]), flush=True)


def show_records(title: str, records: dict[str, Record], bases: Sequence[str], figure: str = "images_per_second") -> None:
    """Print images/s, the ratios to each of `bases`, which are also kept in the records, and the peak of memory."""
    rows = []
    for name, record in records.items():
        record["times"] = {base: times(records, name, base, figure) for base in bases}
        before, most = record.get("memory_mib", (0, 0))
        peak = record["failed"] if "failed" in record else f"{most} ({most - before} on top)"
        speeds = [spread(record.get(each), 1) for each in ("images_per_second", "images_per_core_second")]
        rows.append([name, *speeds, *(spread(record["times"][base]) for base in bases), peak])
    unit = "a core, times" if figure == "images_per_core_second" else "times"
    show(title, ["pipeline", "images/s", "images/s a core", *(f"{unit} {base}" for base in bases), "peak MiB"], rows)


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


def conventional_loading(settings: Mapping[str, Any], source: Noise | str, style: Style, workers: int) -> Work:
    """Return views alone as work. Each turn starts and ends its loader, so that no worker runs ahead while others are measured."""
    images = images_of(source)
    config = complete_settings(resolve(settings), images)
    data, batch = TwoViews(images, style, config), config.batch_size

    def run(count: int) -> None:
        rows = np.random.permutation(count * batch) % len(images)
        for _ in DataLoader(Subset(data, rows.tolist()), batch, num_workers=workers):
            pass

    return Work(run, batch)


def conventional_training(
    settings: Mapping[str, Any],
    source: Noise | str,
    precision: str,
    workers: int,
    threads: int,
    style: Style = pillow,
    create_step: Callable[[Config, torch.device, str], Step] | None = None,  # default: the conventional step
) -> Work:
    """Return whole steps as work, of the network, memory and temperatures that `settings` have."""
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


def start(settings: Mapping[str, Any], source: Noise | str) -> tuple[Config, Images, Engine]:
    """Return a run's complete settings, its images and its engine, with this process set up as the command line does."""
    images = images_of(source)
    config = complete_settings(resolve(settings), images)
    prepare_process()
    engine = Engine(config.engine)
    torch.set_num_threads(engine.threads)
    return config, images, engine


def training(settings: Mapping[str, Any], source: Noise | str) -> Work:
    """Return our whole steps as work, as `relssl pretrain` would make them."""
    from relssl.train.loop import create_run, train_step
    from relssl.train.pretrain import compile_networks

    config, images, engine = start(settings, source)
    training = create_run(config, engine, images)
    compiled = compile_networks(training)
    stream = training.loader.stream(0, training.total_steps)

    def run(count: int) -> None:
        for _ in range(count):
            train_step(training, next(stream))
        engine.synchronise()

    return Work(run, config.batch_size, {"precision": engine.precision, "compile": compiled})


def floor(settings: Mapping[str, Any], source: Noise | str, seconds: float) -> Work:
    """Return the products of a step alone as work, at the device's best rate, measured anew in each turn for so many seconds."""
    config, _, engine = start(settings, source)
    flops = sum(step_flops(config).values())

    def run(count: int) -> float:
        return count * config.batch_size * flops / attainable(engine, seconds=seconds)

    return Work(run, config.batch_size, {"precision": engine.precision, "flop_per_image": flops})


def write(out: Path, results: Any) -> None:
    """Write results as JSON, into a folder that is made if it is missing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")


def measure_parts(names: Sequence[str], measure: Callable[[str], Any], results: Record, out: Path) -> None:
    """Measure part by part into `results` and the file, then exit; one that fails does not lose the others, but sets the code."""
    for name in names:
        begun = time.perf_counter()
        try:
            results[name] = measure(name)
        except Exception as error:
            results[name] = {"failed": f"{type(error).__name__}: {error}"}
            print(f"{name}: failed: {error}", file=sys.stderr)
        print(f"\n{name}: {time.perf_counter() - begun:.0f} s", flush=True)
        write(out, results)
    print(f"written to {out}")
    sys.exit(int(any_failed(results)))
