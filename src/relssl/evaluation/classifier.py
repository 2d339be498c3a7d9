"""What the protocols that train on labelled images share: their batches, their classifier, and its figures.

Legend: B images of a step, M test images, F features, C classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from relssl.config import Config
from relssl.data.loaders import create_loader
from relssl.data.plan import Plan
from relssl.data.sources import Images
from relssl.engine import Engine
from relssl.errors import ConfigError, DataError, NumericError
from relssl.evaluation.features import extract
from relssl.evaluation.findings import Finding
from relssl.evaluation.metrics import Bootstrap, accuracies, accuracy_intervals, ranks
from relssl.evaluation.pairs import LabelledPair
from relssl.views import ViewConfig

Labels = npt.NDArray[np.int64]

_ROWS = 8192  # features that are classified at once


@dataclass(frozen=True)
class Trial:
    """What a protocol that trains is given, and the same for each of its classifiers.

    Attributes:
        test: images to be labelled, and `truth` int64 [M], what they are.
        classes: C, the highest label of bank and test, and one.
        config: the backbone's own settings.
        engine: device, and the precision of backbones; classifiers are fp32.
        bootstrap: of the intervals.
        seed: of weights, order and views.
        say: told of the progress.
    """

    test: Images
    truth: Labels
    classes: int
    config: Config
    engine: Engine
    bootstrap: Bootstrap
    seed: int
    say: Callable[[str], None]

    @torch.no_grad()
    def plain_features(self, backbone: nn.Module) -> PlainFeatures:
        """Of the test images' plain views, by a backbone that is on the device.

        Raises:
            NumericError: if features are NaN or infinite.
        """
        found = extract(backbone, self.test, self.config, self.engine.device, self.engine.autocast())
        if not bool(found.vectors.isfinite().all()):
            raise NumericError(f"{self.test.name}: the network's features of test images are NaN or infinite")
        note = (f"{len(found.bad)} test images could not be read and are left out",) if found.bad else ()
        return PlainFeatures(found.vectors, torch.from_numpy(self.truth[found.rows]), note)

    @torch.no_grad()
    def ranks(self, head: nn.Module, seen: PlainFeatures) -> Tensor:
        """[M] as of `metrics.ranks`, by a classifier on the device."""
        parts = zip(torch.split(seen.vectors, _ROWS), torch.split(seen.truth, _ROWS), strict=True)
        return torch.cat([ranks(head(part.to(self.engine.device)).cpu(), own) for part, own in parts])

    def finding(
        self, setting: dict[str, Any], rank: Tensor, seen: PlainFeatures, notes: tuple[str, ...], details: dict[str, Any]
    ) -> Finding:
        """Accuracies with their intervals, from `ranks`."""
        return Finding(
            setting=setting,
            main="top1",
            figures=accuracies(rank, seen.truth, self.classes),
            intervals=accuracy_intervals(rank, seen.truth, self.classes, self.bootstrap),
            notes=notes + seen.notes,
            details=details,
            correct=(rank == 0).numpy(),
        )


@dataclass(frozen=True)
class PlainFeatures:
    """Features fp32 [M, F] and labels [M] of the test images that could be read, on the CPU, with a note on the others."""

    vectors: Tensor
    truth: Tensor
    notes: tuple[str, ...]


def trial(
    protocol: str,
    pair: LabelledPair,
    config: Config,
    engine: Engine,
    bootstrap: Bootstrap,
    seed: int,
    say: Callable[[str], None],
) -> tuple[Trial, Labels]:
    """The trial of a pair, and the labels of its bank.

    Raises:
        ConfigError: for images with several labels each.
        DataError: if a side has no labels, or the bank a single class.
    """
    if pair.bank.targets is not None or pair.test.targets is not None:
        raise ConfigError(f"protocol: {protocol} takes one label an image, {pair.bank.name} has several; use probe or lowshot")
    if pair.bank.labels is None or pair.test.labels is None:
        raise DataError(f"{pair.bank.name}: has no labels, which {protocol} needs")
    if len(np.unique(pair.bank.labels)) < 2:
        raise DataError(f"{pair.bank.name}: its {len(pair.bank)} images are of a single class, {protocol} needs two or more")
    classes = int(max(pair.bank.labels.max(), pair.test.labels.max())) + 1
    return Trial(pair.test, pair.test.labels, classes, config, engine, bootstrap, seed, say), pair.bank.labels


def training_view(config: Config, scale: tuple[float, float]) -> ViewConfig:
    """A random crop and a flip, the view on which the papers train classifiers.

    Images that pretraining never mirrors, such as digits, are not mirrored here.
    """
    weak = config.views.weak
    return ViewConfig(size=weak.size, scale=scale, flip=0.5 if weak.flip > 0 else 0.0)


@dataclass
class Batches:
    """Views of labelled images, epoch after epoch in an order of its own each.

    An epoch has as many steps as batches of `at_most` images would take, or a few more; all batches are alike. The few images
    that cannot be shared out so sit out: since each epoch has another order, other ones each time, which favours none.

    Args:
        images: with labels.
        trial: whose settings, device and seed they follow.
        epochs: passes.
        at_most: images a step.
        least: images a step that a network needs.
        scale: share of the area that the random crop keeps.

    Attributes:
        batch_size: images a step.
        steps_per_epoch, steps: in an epoch, and in all.
        unreadable: files that could not be read, and were replaced by the image behind them.
    """

    images: Images
    trial: Trial
    epochs: int
    at_most: int
    least: int
    scale: tuple[float, float]
    unreadable: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        count = len(self.images)
        if count < self.least:
            raise DataError(f"{self.images.name}: {count} labelled images are too few to train on, needs {self.least} or more")
        self.batch_size = max(self.least, count // math.ceil(count / self.at_most))
        self.plan = Plan(count, self.batch_size, seed=self.trial.seed)
        self.steps_per_epoch = self.plan.steps_per_epoch
        self.steps = self.epochs * self.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(step, normalised views [B, 3, S, S], labels [B] int64), on the device, by one set of workers to the end."""
        # The run's settings of its own images need not fit these, which may lie in memory instead of in files.
        given, engine = self.trial.config, self.trial.engine
        loader = dataclasses.replace(given.loader, path="auto", cache=None)
        config = dataclasses.replace(given, loader=loader, seed=self.trial.seed)
        view = training_view(config, self.scale)
        labels = torch.from_numpy(self.images.labels).to(engine.device)
        stream = create_loader(self.images, config, self.plan, engine.device, [view]).stream(0, self.steps)
        for step, (batch,) in enumerate(stream):
            self.unreadable.update(file for file, _ in batch.bad)
            yield step, engine.place(batch.weak), labels[batch.ids]

    def ends_epoch(self, step: int) -> int | None:
        """The epochs done once this step is, if it is the last of one."""
        epoch, rest = divmod(step + 1, self.steps_per_epoch)
        return None if rest else epoch

    def told(self, epoch: int) -> bool:
        """Whether a reader is told of this epoch: of some ten in all, the last among them."""
        return epoch * 10 // self.epochs > (epoch - 1) * 10 // self.epochs

    def describe(self) -> dict[str, Any]:
        """How much was trained, for details."""
        return {
            "images": len(self.images),
            "batch_size": self.batch_size,
            "epochs": self.epochs,
            "steps": self.steps,
            "scale": list(self.scale),
        }

    def notes(self) -> tuple[str, ...]:
        """What a reader of a finding must know of the images."""
        if not self.unreadable:
            return ()
        return (f"{len(self.unreadable)} training images could not be read, the next ones took their places",)


def linear_classifier(features: int, classes: int, seed: int) -> nn.Linear:
    """fp32 weights from N(0, 0.01), biases 0: the start of the papers' classifiers (MoCo, official code)."""
    head: nn.Linear = nn.utils.skip_init(nn.Linear, features, classes)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        head.weight.copy_(torch.randn(classes, features, generator=torch.Generator().manual_seed(seed)) * 0.01)
        head.bias.zero_()
    return head
