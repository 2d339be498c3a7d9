"""What a run takes beside its steps: disk, evaluations, checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from relssl.atomic import to_json
from relssl.config import Config
from relssl.data.plain import plain_view
from relssl.data.refusal import BadImage
from relssl.data.samples import read_image
from relssl.data.shrinking import root
from relssl.data.sources import Images
from relssl.data.workers import loader_workers
from relssl.evaluation.features import extract
from relssl.evaluation.knn import knn_accuracy
from relssl.evaluation.pairs import choose
from relssl.train.checkpoint import whole_state
from relssl.train.folder import default_folder
from relssl.train.trainer import Trainer
from relssl.weights import tensorfile, tree

# Bytes of a logged row: JSON in metrics.jsonl, and events of TensorBoard.
_ROW, _EVENTS = 500, 900
# Images whose features are timed, and images read on one core, to stand for all of an evaluation.
_FEATURES, _READ = 256, 16


@dataclass(frozen=True)
class Disk:
    """Bytes that the run folder comes to, and a cache of shrunk images.

    Attributes:
        checkpoint: of one of them.
        checkpoints: how many there are at most: those kept, the best by kNN, and a new one before the oldest goes.
        exports: both backbones.
        logs: metrics and events.
        free: where the folder would lie.
        cache: what is still to be written of shrunk images.
        cache_free: where these would lie, once the run folder is full grown if that is on the same disk.
    """

    checkpoint: int
    checkpoints: int
    exports: int
    logs: int
    free: int
    cache: int
    cache_free: int

    @property
    def total(self) -> int:
        """The run folder in the end."""
        return self.checkpoint * self.checkpoints + self.exports + self.logs


@dataclass(frozen=True)
class Extras:
    """What interrupts training: how many there are of each in the whole run, and the seconds of one.

    Saving is timed up to the disk, whose own time is not in it.
    """

    evaluations: int
    evaluation_seconds: float
    saves: int
    save_seconds: float


def measure_saving(trainer: Trainer, cache: int = 0) -> tuple[Disk, float]:
    """The disk a run needs, and the seconds it takes to make a checkpoint's bytes and their hash. Nothing is written.

    Args:
        cache: bytes of shrunk images still to be written.
    """
    config = trainer.config
    begun = time.perf_counter()
    tensors, rest = tree.flatten(whole_state(trainer.model, trainer.optimizer, trainer.engine))
    data = tensorfile.encode(tensors)
    hashlib.sha256(data).hexdigest()
    seconds = time.perf_counter() - begun
    exports = sum(tensor.nbytes for network in trainer.networks for tensor in network.backbone.state_dict().values())
    rows = trainer.total_steps // config.log.every + config.epochs
    held = min(config.checkpoint.keep, saves(config, trainer.steps_per_epoch)) + (trainer.online is not None) + 1
    logs = rows * (_ROW + _EVENTS * config.log.tensorboard)
    out, caches = _existing(Path(config.out or default_folder(config))), _existing(root(config))
    disk = Disk(len(data) + len(to_json(rest)), held, exports, logs, shutil.disk_usage(out).free, cache, 0)
    taken = disk.total if out.stat().st_dev == caches.stat().st_dev else 0
    return dataclasses.replace(disk, cache_free=max(0, shutil.disk_usage(caches).free - taken)), seconds


def _existing(place: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    place = place.absolute()
    while not place.exists():
        place = place.parent
    return place


def saves(config: Config, steps_per_epoch: int) -> int:
    """Checkpoints written over a whole run: at ends of epochs, with each evaluation, between, and at the end."""
    every, total = config.checkpoint.every_steps, config.epochs * steps_per_epoch
    ends = {epoch * steps_per_epoch for epoch in (*range(0, config.epochs, config.checkpoint.every), *_evaluated(config))}
    between = set(range(every, total, every)) if every else set()
    return len((ends | between | {total}) - {0})


def _evaluated(config: Config) -> list[int]:
    """The epochs with kNN at their end, if the data has labels."""
    every = config.log.knn_every
    return sorted({*range(every, config.epochs + 1, every), config.epochs}) if every else []


def measure_extras(trainer: Trainer, save_seconds: float) -> Extras:
    """Evaluations, timed on a few images, and checkpoints."""
    written = saves(trainer.config, trainer.steps_per_epoch)
    if trainer.online is None:
        return Extras(0, 0.0, written, save_seconds)
    count = len(_evaluated(trainer.config)) + 1  # and one before the first step
    return Extras(count, _evaluation(trainer), written, save_seconds)


def _evaluation(trainer: Trainer) -> float:
    """Seconds of one evaluation: features of both sides by both networks, and the search for neighbours."""
    assert trainer.online is not None
    pair, config, engine = trainer.online.pair, trainer.config, trainer.engine
    backbone, size = trainer.networks[-1].backbone, config.views.weak.size
    # For files, images of noise stand in: reading them is timed apart, as the loader's processes do it at the same time.
    sample = choose(pair.test, _FEATURES, 0)
    if sample.pixels is None:
        sample = Images("noise", pixels=torch.randint(256, (_FEATURES, 3, size, size), dtype=torch.uint8))
    seconds, width = [], 0
    for _ in range(2):  # the first chooses kernels
        begun = time.perf_counter()
        width = extract(backbone, sample, config, engine.device, engine.autocast()).vectors.shape[1]
        seconds.append(time.perf_counter() - begun)
    each = min(seconds) / len(sample)
    if pair.test.files is not None:
        workers = loader_workers(config)
        reading = _reading(pair.test, config)
        each = max(each, reading / workers) if workers else each + reading
    return len(trainer.networks) * (
        each * (len(pair.bank) + len(pair.test)) + _search(len(pair.bank), len(pair.test), width, config)
    )


def _reading(images: Images, config: Config) -> float:
    """Seconds to read one image and make its plain view, on one core."""
    read, begun = 0, time.perf_counter()
    for row in range(min(_READ, len(images))):
        try:
            plain_view(read_image(images, row, config.loader.max_pixels), config.views)
            read += 1
        except BadImage:
            continue
    return (time.perf_counter() - begun) / max(read, 1)


def _search(bank: int, queries: int, width: int, config: Config) -> float:
    """Seconds to find the neighbours of all queries, from a part of both sides."""
    some, few = min(bank, 1 << 14), min(queries, 1 << 8)
    features = torch.randn(some + few, width)
    labels = torch.arange(some + few) % 2
    begun = time.perf_counter()
    knn_accuracy(features[:some], labels[:some], features[some:], labels[some:], classes=2, settings=[config.log.knn], cap=True)
    return (time.perf_counter() - begun) * bank / some * queries / few
