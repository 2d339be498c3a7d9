"""A run put together from its settings: data, networks and what the data alone can say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

from relssl.config import Config
from relssl.data.shrinking import shrunken
from relssl.data.sources import Images, load
from relssl.engine import Engine
from relssl.errors import DataError, RelsslError
from relssl.evaluation.protocol import LabelledPair, choose
from relssl.train.journal import Display
from relssl.train.online import OnlineKnn
from relssl.train.trainer import Trainer

Made = TypeVar("Made")


def complete_settings(config: Config, images: Images) -> Config:
    """The configuration with what only the data can say."""
    views = config.views
    views = dataclasses.replace(
        views,
        mean=views.mean or images.mean,
        std=views.std or images.std,
        margin=views.margin or (1.0 if images.pixels is not None else 256 / 224),
    )
    return dataclasses.replace(config, views=views)


def build(config: Config, engine: Engine) -> Trainer:
    """A run that is ready for its first step and has no folder.

    Raises:
        ConfigError, DataError: if settings and data do not make a run.
    """
    images = load(config.data, config.data_root, "train", index=config.loader.index)
    if config.max_images is not None:
        images = choose(images, config.max_images, config.seed)
    config = complete_settings(config, images)
    return Trainer(config, engine, images, _online(config) if engine.is_first else None)


def shrink(trainer: Trainer, display: Display) -> None:
    """Let the trainer read shrunk images, if they are asked for; the first rank finds or makes them while the others wait."""
    config, images, engine = trainer.config, trainer.images, trainer.engine
    if config.loader.cache is None:
        return
    made = on_first(engine, lambda: shrunken(images, config, display))
    if made is None:
        made = shrunken(images, config, display)  # made once more by machines that have a disk of their own
    engine.wait()
    trainer.read(dataclasses.replace(images, shrunk=made))


def on_first(engine: Engine, make: Callable[[], Made]) -> Made | None:
    """What `make` gives on the first rank, None on the others; its failure is raised on all, so that none waits in vain."""
    made, fault = None, None
    if engine.is_first:
        try:
            made = make()
        except RelsslError as error:
            fault = error
    engine.wait()  # patiently: to shrink a million images takes hours
    fault = engine.first_says(fault)
    if fault is not None:
        raise fault
    return made


def _online(config: Config) -> OnlineKnn | None:
    """The kNN evaluation, if it is wanted and the data has labels and a test part."""
    if config.log.knn_every == 0:
        return None
    try:
        pair = LabelledPair.load(config.data, config.data_root, config.log.knn_images, config.seed, index=config.loader.index)
    except DataError:
        return None
    return OnlineKnn(pair, config)
