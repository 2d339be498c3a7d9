"""Where the time of a step goes: each stage alone, for small images in memory and for photographs in files."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import files
import ours
import small
from options import Options
from pictures import Noise, Source, images_of, write_folder
from processes import alone
from relssl.data import batched
from relssl.data.draws import draw
from relssl.data.images import Pixels
from relssl.data.loader import Crops
from relssl.settings.run import derive, resolve
from relssl.train.estimate import stages, time_steps
from rounds import show

MEMORIES = (4096, 16384, 65536, 131072)
# Of a loader of files these are the work of its processes, on one core, while the step goes on.
AT_THE_LOADER = ("load",)


def measure(options: Options) -> dict[str, Any]:
    """Measure, print and return the figures."""
    tiny, repeats = options.tiny, options.pick(3, 1)
    base, noise = small.settings(options), Noise(options.pick(1024, 32), 32)
    found: dict[str, Any] = {"small": alone(in_turn, base, noise, repeats)}
    _table("Stages of a step: small images", found["small"], at_the_loader=())
    with tempfile.TemporaryDirectory() as folder:
        size = (100, 75) if tiny else (500, 375)
        photos = write_folder(Path(folder, "photos"), options.pick(128, 16), *size)
        settings = files.settings(options, options.pick(32, 8))
        found["files"] = alone(in_turn, settings, photos, repeats)
        _table("Stages of a step: photographs in files, ResNet-18", found["files"], AT_THE_LOADER)
        found["views"] = alone(views, settings, photos, options.pick(32, 8), repeats)
    show("Both views of an image, one core", ["from", "how", "ms an image"], found["views"])
    found["memory"] = {
        memory: alone(in_turn, base | {"method.memory_size": memory}, noise, options.pick(2, 1))
        for memory in ((64, 128) if tiny else MEMORIES)
    }
    rows = [
        [memory, f"{1000 * found['loss']:.1f}", f"{100 * found['loss'] / found['step']:.1f}"]
        for memory, found in found["memory"].items()
    ]
    show("The loss within a step of small images", ["keys in the memory", "ms", "% of the step"], rows)
    return found


def in_turn(settings: dict[str, Any], source: Source, repeats: int) -> dict[str, float]:
    """Seconds of each stage of a step, and of the `step` as a whole."""
    trainer = ours.trainer(settings, source)
    found = stages(trainer, repeats)
    return found | {"step": statistics.median(time_steps(trainer, repeats).steps)}


def views(settings: dict[str, Any], folder: str, count: int, repeats: int) -> list[list[str]]:
    """Rows of (source, way, milliseconds an image) for both views of images of 32 pixels in memory, and of files."""
    torch.set_num_threads(1)
    config, rows = resolve(settings), np.arange(count)
    sides = [config.views.weak, *derive(config).strong]
    in_memory = [dataclasses.replace(view, size=32) for view in sides]
    held, files = images_of(Noise(count, 32)).source, images_of(folder)
    assert isinstance(held, Pixels)
    noise = held.tensor
    crops = Crops(files, sides, 0, config.loader.max_pixels, config.loader.reduced_decode)

    def at_once() -> None:
        for slot, view in enumerate(in_memory):
            batched.apply(noise, view, draw(view, 0, 0, rows, slot, (32, 32)))

    ways: list[tuple[str, str, Callable[[], object]]] = [
        ("32 pixels", "all at once", at_once),
        ("file", "decode", lambda: [files.read(row, config.loader.max_pixels) for row in range(count)]),
        ("file", "decode and crop", lambda: [crops[0, row] for row in range(count)]),
    ]
    return [[source, way, f"{1000 * _median(work, repeats) / count:.3f}"] for source, way, work in ways]


def _median(work: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


def _table(title: str, found: dict[str, float], at_the_loader: tuple[str, ...]) -> None:
    within = {name: seconds for name, seconds in found.items() if name not in ("step", *at_the_loader)}
    rows: list[list[object]] = [
        [name, f"{1000 * seconds:.1f}", f"{100 * seconds / found['step']:.1f}"] for name, seconds in within.items()
    ]
    rows.append(["whole step", f"{1000 * found['step']:.1f}", "100"])
    rows += [[f"{name}, of the loader's processes", f"{1000 * found[name]:.1f}", "beside it"] for name in at_the_loader]
    show(title, ["stage", "ms", "% of the step"], rows)
