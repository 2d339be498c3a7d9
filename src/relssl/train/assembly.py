"""A run put together from its settings: data, networks and what the data alone can say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from relssl.config import Config
from relssl.data.shrinking import shrunken
from relssl.data.sources import Images, load
from relssl.engine import Engine
from relssl.errors import ConfigError, DataError, Interrupted, RelsslError
from relssl.evaluation.pairs import LabelledPair, choose
from relssl.methods import METHODS
from relssl.train.journal import Display
from relssl.train.online import OnlineKnn
from relssl.train.signals import REASONS, StopRequest
from relssl.train.trainer import Trainer

Made = TypeVar("Made")


def complete_settings(config: Config, images: Images) -> Config:
    """The configuration with what only the data can say.

    Raises:
        ConfigError: if a view is larger than the images of a set in memory.
    """
    views = config.views
    if images.pixels is not None and not views.enlarge:
        _refuse_enlarging(config, min(images.pixels.shape[-2:]), images)
    views = dataclasses.replace(
        views,
        mean=views.mean or images.mean,
        std=views.std or images.std,
        margin=views.margin or (1.0 if images.pixels is not None else 256 / 224),
    )
    return dataclasses.replace(config, views=views)


def _refuse_enlarging(config: Config, side: int, images: Images) -> None:
    views = config.views
    sizes = [("views.weak.size", views.weak.size)]
    sizes += [("views.crops", size) for size, _, _ in views.crops] or [
        ("views.strong.size", view.size) for view in config.strong_views
    ]
    faults = [
        f"{name}: {size} is larger than the images of {images.name} ({side} x {side} pixels), which would only be blown up; "
        "views.enlarge true does so all the same"
        for name, size in sizes
        if size > side
    ]
    if faults:
        raise ConfigError(*faults)


def build(config: Config, engine: Engine) -> Trainer:
    """A run that is ready for its first step and has no folder.

    Raises:
        ConfigError, DataError: if settings and data do not make a run.
    """
    labelled = METHODS[config.method.name].labels
    images = load(config.data, config.data_root, "bank" if labelled else "train", index=config.loader.index)
    if config.max_images is not None:
        images = choose(images, config.max_images, config.seed)
    config = complete_settings(config, images)
    if labelled and images.class_count < 2:
        raise DataError(
            f"{images.name}: {config.method.name} needs a label for each image, of two classes or more; take a labelled set, lay the "
            "images out as train/CLASS/ and val/CLASS/, or take a method without labels"
        )
    return Trainer(config, engine, images, _online(config) if engine.is_first else None)


def shrink(trainer: Trainer, display: Display, stop: StopRequest) -> None:
    """Let the trainer read shrunk images, if they are asked for; the first rank finds or makes them while the others wait.

    Raises:
        Interrupted: on a signal or at the time limit; what is shrunk by then stays.
    """
    config, images, engine = trainer.config, trainer.images, trainer.engine
    if config.loader.cache is None:
        return
    teller = _Stoppable(display, stop, config)
    made = on_first(engine, lambda: shrunken(images, config, teller))
    if made is None:
        made = shrunken(images, config, teller)  # made once more by machines that have a disk of their own
    engine.wait()
    trainer.read(dataclasses.replace(images, shrunk=made))


class _Stoppable:
    """A display whose chores end when the run is asked to stop."""

    def __init__(self, display: Display, stop: StopRequest, config: Config) -> None:
        self.say, self.display, self.stop, self.config = display.say, display, stop, config

    @contextmanager
    def chore(self, what: str, done: int, total: int) -> Iterator[Callable[[int], None]]:
        """As the display's."""
        with self.display.chore(what, done, total) as advance:

            def step(count: int) -> None:
                advance(count)
                if asked := self.stop.asked():
                    where = f"stopped {REASONS[asked]} while images were shrunk"
                    raise Interrupted(f"{where}; go on with `relssl resume {self.config.out}`", asked)

            yield step


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
    if pair.bank.labels is None or pair.bank.labels.min() == pair.bank.labels.max():
        return None  # several labels an image, or a single one for all: nothing to vote about
    return OnlineKnn(pair, config)
