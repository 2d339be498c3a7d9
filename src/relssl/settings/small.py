"""Small data and short runs: what the user did not type gives way to them."""

import dataclasses
import math

from relssl.errors import DataError
from relssl.settings.reading import changes, nest
from relssl.settings.run import Config, check, derive

# What gives way, unless it is 0; the learning rate and the parts of batch norms go with the batch.
GIVING_WAY = (
    "batch_size",
    "method.memory_size",
    "optimizer.heads_first",
    "optimizer.warmup_epochs",
    "method.teacher_temperature_epochs",
)


def give_way(config: Config, images: int) -> Config:
    """Return the settings of a run on so many images: what the user did not type gives way to small data and short runs.

    Raises:
        ConfigError: if what was typed does not fit what the rest became.
        DataError: if there are fewer than four images.
    """
    if images < 4:
        raise DataError(f"{config.data}: too few images to pretrain on; {images} can be used, and four is the least")
    if config.typed is None:
        return config
    derived, before, method, optimizer = derive(config), config.batch_size, config.method, config.optimizer
    batch = derived.passes << int(math.log2(max(2, images / 4 / derived.passes)))  # a power of two in each part
    batch = before if "batch_size" in config.typed else min(batch, before)
    memory = max(batch, 1 << int(math.log2(max(2, images / 2)))) if derived.traits.memory else method.memory_size
    quarter = round(dataclasses.replace(config, batch_size=batch).steps(images) / max(1, images // batch) / 4, 6)
    smaller = {
        "batch_size": batch,
        "optimizer.lr": optimizer.lr * batch / before,
        "encoder.batch_norm_splits": max(1, config.encoder.batch_norm_splits * batch // before),
        "method.memory_size": min(method.memory_size, memory),
        "optimizer.heads_first": min(optimizer.heads_first, quarter),
        "optimizer.warmup_epochs": min(optimizer.warmup_epochs, quarter),
        "method.teacher_temperature_epochs": min(method.teacher_temperature_epochs, quarter),
    }
    fitting = nest({name: value for name, value in smaller.items() if name not in config.typed})
    sections = {name: dataclasses.replace(getattr(config, name), **value) for name, value in fitting.items() if "_" not in name}
    return check(dataclasses.replace(config, **fitting | sections))


def adjustments(before: Config, after: Config, images: int) -> list[str]:
    """Return a line for each setting that gave way."""
    why, changed = (
        f"for {after.steps(images)} steps on {images} images",
        changes(before, dataclasses.replace(after, views=before.views)),
    )
    return [f"note: {name} is {now:g} instead of {was:g}, {why}" for name, (was, now) in changed.items()]
