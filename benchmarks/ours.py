"""relssl as a contender: its training steps, or its loader alone, as `relssl pretrain` would run them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pictures import Source, images_of
from relssl.data.cache import shrunken
from relssl.data.images import Images
from relssl.data.loader import Plan, create_loader
from relssl.engine import Engine
from relssl.settings.run import Config, derive, resolve
from relssl.train.estimate import attainable, step_flops
from relssl.train.loop import Trainer
from relssl.train.pretrain import complete_settings
from relssl.train.run_folder import Display
from rounds import Work

Settings = Mapping[str, Any]


def trainer(settings: Settings, source: Source) -> Trainer:
    """A run that writes nothing, with its networks on the device."""
    images = images_of(source)
    config = complete_settings(resolve(settings), images)
    made = Trainer(config, Engine(config.engine), images, None)
    made.compile()
    return made


def training(settings: Settings, source: Source) -> Work:
    """Whole steps."""
    made = trainer(settings, source)
    stream = made.loader.stream(0, made.total_steps)

    def run(count: int) -> None:
        for _ in range(count):
            made.train_step(next(stream))
        made.engine.synchronise()

    return Work(run, made.config.batch_size, {"precision": made.engine.precision, "compile": made.compiled})


def floor(settings: Settings, source: Source, seconds: float) -> Work:
    """The steps that this device would make at its best rate, measured anew in each turn, were there nothing but the products
    of networks and memory.

    Args:
        seconds: that a measurement of the rate takes.
    """
    images = images_of(source)
    config = complete_settings(resolve(settings), images)
    engine, needed = Engine(config.engine), sum(step_flops(config).values())

    def run(count: int) -> float:
        return count * config.batch_size * needed / attainable(engine, seconds=seconds)

    return Work(run, config.batch_size, {"precision": engine.precision, "flop_per_image": needed})


def loading(settings: Settings, source: Source) -> Work:
    """Views alone. Each turn starts and ends its loader, so that no worker runs ahead while others are measured."""
    images = images_of(source)
    config = complete_settings(resolve(settings), images)
    engine, images = Engine(config.engine), _shrunk(images, config)
    plan = Plan(len(images), config.batch_size, seed=config.seed)
    statistics = config.views.statistics()
    loader, at = create_loader(images, derive(config).views, plan, engine.device, statistics, config.loader), 0

    def run(count: int) -> None:
        nonlocal at
        for _ in loader.stream(at, at + count):
            pass
        at += count
        engine.synchronise()

    return Work(run, config.batch_size)


def _shrunk(images: Images, config: Config) -> Images:
    """The images as a run would read them: shrunk beforehand, if the settings say so, before anything is timed."""
    if config.loader.cache is None:
        return images
    with Display(1, 0, show=False) as display:
        return dataclasses.replace(images, source=shrunken(images, config.loader, display))
