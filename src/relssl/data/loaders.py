"""The loader of a run: images in memory or as files."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from relssl.config import Config
from relssl.data.from_files import FromFiles
from relssl.data.plan import Plan
from relssl.data.resident import Resident
from relssl.data.sources import Images
from relssl.errors import ConfigError, DataError
from relssl.views import ViewConfig


def create_loader(
    images: Images, config: Config, plan: Plan, device: torch.device, views: Sequence[ViewConfig] | None = None
) -> Resident | FromFiles:
    """The loader that `loader.path` asks for.

    Args:
        images: what to read.
        config: the settings.
        plan: which samples each step sees.
        device: where batches are wanted.
        views: what to make of each image, the first as `Batch.weak`, the others as `Batch.strong`; None: the views of `config`.

    Raises:
        DataError: if there are fewer images than one batch.
        ConfigError: if files are asked to be resident, or images in memory to be cached.
    """
    if plan.steps_per_epoch == 0:
        raise DataError(
            f"{images.name}: {plan.count} usable images, batch is {plan.batch_size}; "
            f"lower batch_size to {max(2, plan.count)} or less, or add images"
        )
    path = config.loader.path
    if path == "resident" and images.pixels is None:
        raise ConfigError("loader.path: resident is for data sets held in memory; use files for folders and lists")
    if config.loader.cache is not None and images.pixels is not None:
        raise ConfigError(f"loader.cache: is for folders and lists of files, {images.name} is held in memory; use null")
    if path == "resident" or (path == "auto" and images.pixels is not None):
        return Resident(images, config, plan, device, views)
    return FromFiles(images, config, plan, device, views)
