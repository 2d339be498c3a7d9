"""What the protocols that train on labelled images share: their batches, their classifier, and its figures.

Legend: B images of a step, M test images, F features, C classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relssl.data.images import Images
from relssl.data.loader import Plan, create_loader
from relssl.data.plain import Reader
from relssl.data.subsets import fingerprint, from_index, stratified
from relssl.engine import Engine
from relssl.errors import ConfigError, DataError, NumericError
from relssl.evaluation.features import extract
from relssl.evaluation.metrics import Bootstrap, accuracies, accuracy_intervals, ranks
from relssl.evaluation.pairs import LabelledPair
from relssl.evaluation.result import Finding
from relssl.method.backbones import feature_width
from relssl.method.optim import parameter_groups
from relssl.method.schedules import learning_rate
from relssl.settings.evaluation import FinetuneConfig, LinearConfig, SemiConfig
from relssl.settings.run import LoaderConfig, ViewConfig

Labels = npt.NDArray[np.int64]

_ROWS = 8192  # features that are classified at once


@dataclass(frozen=True)
class Trial:
    """What a protocol that trains is given, and the same for each of its classifiers.

    Attributes:
        test: images to be labelled, and `truth` int64 [M], what they are.
        classes: C, the highest label of bank and test, and one.
        reader: how images are read, and what the backbone sees of them.
        engine: device, and the precision of backbones; classifiers are fp32.
        bootstrap: of the intervals.
        seed: of weights, order and views.
        say: told of the progress.
    """

    test: Images
    truth: Labels
    classes: int
    reader: Reader
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
        found = extract(backbone, self.test, self.reader, self.engine)
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
    reader: Reader,
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
    return Trial(pair.test, pair.test.labels, classes, reader, engine, bootstrap, seed, say), pair.bank.labels


def training_view(reader: Reader, scale: tuple[float, float]) -> ViewConfig:
    """A random crop and a flip, the view on which the papers train classifiers.

    Images that pretraining never mirrors, such as digits, are not mirrored here.
    """
    return ViewConfig(size=reader.view.size, scale=scale, flip=0.5 if reader.mirrored else 0.0)


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
        reader, engine = self.trial.reader, self.trial.engine
        statistics, settings = (
            (reader.view.mean, reader.view.std),
            LoaderConfig(workers=reader.workers, max_pixels=reader.max_pixels),
        )
        views = [training_view(reader, self.scale)]
        labels = torch.from_numpy(self.images.labels).to(engine.device)
        stream = create_loader(self.images, views, self.plan, engine.device, statistics, settings).stream(0, self.steps)
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


# The largest view, in pixels a side, of what the papers call small and medium sets.
_SMALL = 64


def linear(
    backbone: nn.Module,
    pair: LabelledPair,
    reader: Reader,
    engine: Engine,
    *,
    settings: LinearConfig,
    bootstrap: Bootstrap,
    seed: int,
    say: Callable[[str], None],
) -> list[Finding]:
    """Train one classifier a learning rate, all on the same features, and test each on the plain views.

    Args:
        backbone: [B, 3, S, S] -> [B, F]; put on the engine's device and into eval mode, and left there.
        pair: what is trained and tested on, one label an image.
        reader: how images are read, and what the backbone sees of them.
        engine: device, and the precision of the backbone; classifiers are fp32.
        settings: the protocol's.
        bootstrap: of the intervals.
        seed: of weights, order and views. The same call gives the same figures, on CPU bit for bit.
        say: told of the progress, some ten lines.

    Returns:
        A finding for each learning rate, in their order: of the last epoch, with the curve and the best epoch in its details. One
        whose loss stopped being finite has no image right, and a note.

    Raises:
        ConfigError, DataError: for images that cannot be used so.
        NumericError: if no classifier's loss, or no feature, stays finite.
    """
    on, _ = trial("linear", pair, reader, engine, bootstrap, seed, say)
    engine.place(backbone).eval()
    seen = on.plain_features(backbone)
    batches = Batches(pair.bank, on, settings.epochs, settings.batch_size, 1, settings.scale)
    rates, nesterov = papers_choice(settings, reader.view.size <= _SMALL)
    trained = [_Classifier(rate, seen, on, settings, nesterov) for rate in rates]
    for step, views, labels in batches:
        share = rate_share(step, batches.steps_per_epoch, settings)
        with torch.no_grad(), engine.autocast():
            features = backbone(views)
        for each in trained:
            each.step(features.float(), labels, share)
        if epoch := batches.ends_epoch(step):
            for each in trained:
                each.test(epoch)
            if all(each.lost is not None for each in trained):
                raise NumericError(_all_lost(trained))
            if batches.told(epoch):
                say(f"linear: epoch {epoch} of {settings.epochs}, top-1 {_shown(trained)}")
    return [each.finding(batches, nesterov, _choice_note(rates)) for each in trained]


def papers_choice(settings: LinearConfig, small: bool) -> tuple[tuple[float, ...], bool]:
    """Learning rates, and whether momentum is Nesterov's: the settings', or where they leave it open the papers', who have
    others for their small sets, of up to 64 pixels."""
    usual = 30.0 if settings.schedule == "step" else 1.0 if small else 0.3
    nesterov = small if settings.nesterov is None else settings.nesterov
    return settings.lr or (usual,), nesterov and settings.momentum > 0  # which without momentum is none


def rate_share(step: int, steps_per_epoch: int, settings: LinearConfig) -> float:
    """The learning rate of a step, counted from 0, as a share of its peak."""
    if settings.schedule == "cosine":
        return learning_rate(step, peak=1.0, warmup_steps=0, total_steps=settings.epochs * steps_per_epoch)
    epoch = step // steps_per_epoch
    falls = (5 * epoch >= 3 * settings.epochs) + (5 * epoch >= 4 * settings.epochs)
    return float(10.0**-falls)


class _Classifier:
    """A linear classifier at one learning rate.

    Attributes:
        curve: top-1 in percent after each epoch.
        lost: the epoch in which its loss stopped being finite; None: in none.
    """

    def __init__(self, rate: float, seen: PlainFeatures, on: Trial, settings: LinearConfig, nesterov: bool) -> None:
        self.rate, self.seen, self.on, self.settings = rate, seen, on, settings
        # Of one seed all start alike, so a rate's outcome does not depend on which others are tried.
        self.head = linear_classifier(seen.vectors.shape[1], on.classes, on.seed).to(on.engine.device)
        self.optimizer = torch.optim.SGD(
            self.head.parameters(), rate, settings.momentum, weight_decay=settings.weight_decay, nesterov=nesterov
        )
        self.finite = torch.ones((), dtype=torch.bool, device=on.engine.device)
        self.loss = torch.zeros((), device=on.engine.device)
        self.rank = torch.empty(0, dtype=torch.int64)
        self.curve: list[float] = []
        self.lost: int | None = None

    def step(self, features: Tensor, labels: Tensor, share: float) -> None:
        """Learn from features [B, F] and labels [B]."""
        if self.lost is not None:
            return
        self.loss = F.cross_entropy(self.head(features), labels)
        self.optimizer.zero_grad()
        self.loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.param_groups[0]["lr"] = self.rate * share
        self.optimizer.step()
        self.finite &= self.loss.detach().isfinite()

    def test(self, epoch: int) -> None:
        """Label the test images."""
        if self.lost is None and not bool(self.finite):
            self.lost = epoch
        if self.lost is None:
            self.rank = self.on.ranks(self.head, self.seen)
        else:
            # NaN compares with nothing, so ranks would have every image right.
            self.rank = torch.full_like(self.seen.truth, self.on.classes)
        self.curve.append(100 * float((self.rank == 0).double().mean()))

    def finding(self, batches: Batches, nesterov: bool, notes: tuple[str, ...]) -> Finding:
        """The figures of the last epoch."""
        if self.lost is not None:
            fault = f"the loss stopped being finite in epoch {self.lost}, so no image counts as right; lower linear.lr"
            notes = (fault, *notes)
        best = max(range(len(self.curve)), key=self.curve.__getitem__)
        details: dict[str, Any] = batches.describe() | {
            "momentum": self.settings.momentum,
            "nesterov": nesterov,
            "weight_decay": self.settings.weight_decay,
            "loss": None if self.lost is not None else round(float(self.loss.detach()), 6),
            "curve": [[epoch, round(top1, 4)] for epoch, top1 in enumerate(self.curve, 1) if batches.told(epoch)],
            "best_epoch": {"epoch": best + 1, "top1": round(self.curve[best], 4), "chosen_on": "these test images"},
        }
        setting = {"schedule": self.settings.schedule, "lr": self.rate}
        return self.on.finding(setting, self.rank, self.seen, notes + batches.notes(), details)


def _shown(trained: list[_Classifier]) -> str:
    if len(trained) == 1:
        return f"{trained[0].curve[-1]:.1f} %"
    return ", ".join(f"{each.curve[-1]:.1f} % at lr {each.rate:g}" for each in trained)


def _choice_note(rates: tuple[float, ...]) -> tuple[str, ...]:
    if len(rates) == 1:
        return ()
    return (f"one of {len(rates)} learning rates; to quote the best of them is to choose it on these test images",)


def _all_lost(trained: list[_Classifier]) -> str:
    rates = ", ".join(f"{each.rate:g} in epoch {each.lost}" for each in trained)
    return f"linear: the loss stopped being finite at every learning rate ({rates}); lower linear.lr, or look at the features"


Settings = FinetuneConfig | SemiConfig


def finetune(
    backbone: nn.Module,
    pair: LabelledPair,
    reader: Reader,
    engine: Engine,
    *,
    settings: FinetuneConfig,
    bootstrap: Bootstrap,
    seed: int,
    say: Callable[[str], None],
) -> list[Finding]:
    """Train a copy of the backbone, and a classifier on it, on all images of the bank.

    Args:
        backbone: [B, 3, S, S] -> [B, F]; a copy of it is trained.
        pair: what is trained and tested on, one label an image.
        reader: how images are read, and what the backbone sees of them.
        engine: device, and the precision of the backbone; classifier and loss are fp32.
        settings: the protocol's.
        bootstrap: of the intervals.
        seed: of weights, order, views and what is random within the network. The same call gives the same figures, on CPU bit for
            bit; the caller's random generators stay as they were.
        say: told of the progress, some ten lines.

    Returns:
        One finding, of the last epoch.

    Raises:
        ConfigError, DataError: for images that cannot be used so.
        NumericError: if the loss stops being finite.
    """
    on, _ = trial("finetune", pair, reader, engine, bootstrap, seed, say)
    return [_measured(_Task("finetune", "finetune", {}, pair.bank), on, backbone, settings)]


def semi(
    backbone: nn.Module,
    pair: LabelledPair,
    reader: Reader,
    engine: Engine,
    *,
    settings: SemiConfig,
    bootstrap: Bootstrap,
    seed: int,
    say: Callable[[str], None],
) -> list[Finding]:
    """`finetune` on few images of the bank: shares of each class drawn by the seed, or those that an index file names.

    Returns:
        A finding for each share, or one for the file; `split` in its details is a hash of which images were used.

    Raises:
        ConfigError, DataError, NumericError: as `finetune`, and for a file that names other images.
    """
    on, labels = trial("semi", pair, reader, engine, bootstrap, seed, say)
    if settings.index is not None:
        if pair.of is not None and len(pair.bank) < pair.of[0]:  # where the same positions are other images
            raise ConfigError(
                f"semi.index: names images of the whole bank, of which `images` leaves {len(pair.bank)}; drop one of them"
            )
        name: dict[str, Any] = {"index": Path(settings.index).name}
        chosen = [("semi", name, from_index(settings.index, pair.bank))]
    else:
        chosen = [
            (f"semi on {100 * share:g} %", {"fraction": share}, stratified(labels, fraction=share, seed=seed))
            for share in settings.fractions
        ]
    findings = []
    for title, setting, rows in chosen:
        count = np.bincount(labels[rows], minlength=on.classes)
        details = {"split": fingerprint(rows), "per_class": [int(count.min()), int(count.max())]}
        notes = _missing(count, pair.bank)
        if settings.index is None and len(rows) > 1.5 * setting["fraction"] * len(labels):
            notes = (*notes, f"{len(rows)} of {len(labels)} images, as each class gives one at least")
        task = _Task("semi", title, setting, pair.bank.subset(rows), notes, details)
        findings.append(_measured(task, on, backbone, settings))
    return findings


@dataclass(frozen=True)
class _Task:
    """What one network is trained on, and what is to be told of it."""

    protocol: str
    title: str
    setting: dict[str, Any]
    images: Images
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


def _missing(count: Labels, images: Images) -> tuple[str, ...]:
    """A note on classes of which `count` [C] has no image."""
    absent = np.flatnonzero(count == 0)
    if not len(absent):
        return ()
    first = images.classes[absent[0]] if images.classes is not None and absent[0] < len(images.classes) else str(absent[0])
    return (f"{len(absent)} of {len(count)} classes have no labelled image, the first is {first}",)


def _measured(task: _Task, on: Trial, backbone: nn.Module, settings: Settings) -> Finding:
    """Train, then label the plain views of the test images."""
    batches = Batches(task.images, on, settings.epochs, settings.batch_size, 2, settings.scale)
    network = copy.deepcopy(backbone).cpu()
    width = feature_width(network, on.reader.view.size)
    network = on.engine.place(network).train()
    if not any(parameter.requires_grad for parameter in network.parameters()):
        network.requires_grad_(True)  # of others, what is fixed is meant to be, such as position codes
    head = linear_classifier(width, on.classes, on.seed).to(on.engine.device)
    with _generators_of_its_own(on):
        loss = _train(task, on, network, head, batches, settings)
    seen = on.plain_features(network)
    details = task.details | batches.describe() | {"loss": round(loss, 6)}
    details |= {name: getattr(settings, name) for name in ("lr", "head_lr", "momentum", "weight_decay")}
    return on.finding(task.setting, on.ranks(head, seen), seen, task.notes + batches.notes(), details)


def _train(task: _Task, on: Trial, network: nn.Module, head: nn.Module, batches: Batches, settings: Settings) -> float:
    """SGD to the end of the cosine; returns the last loss."""
    optimizer = _optimizer(network, head, settings)
    finite, loss = torch.ones((), dtype=torch.bool, device=on.engine.device), torch.zeros(())
    for step, views, labels in batches:
        share = learning_rate(step, peak=1.0, warmup_steps=0, total_steps=batches.steps)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        with on.engine.autocast():
            features: Tensor = network(views)
        loss = F.cross_entropy(head(features.float()), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        finite &= loss.detach().isfinite()
        epoch = batches.ends_epoch(step)
        if epoch is not None and batches.told(epoch):
            if not bool(finite):
                raise NumericError(
                    f"{task.title}: the loss stopped being finite by epoch {epoch} of {settings.epochs}; lower "
                    f"{task.protocol}.lr ({settings.lr:g}) or {task.protocol}.head_lr ({settings.head_lr:g})"
                )
            on.say(f"{task.title}: epoch {epoch} of {settings.epochs}, loss {float(loss.detach()):.3f}")
    return float(loss.detach())


def _optimizer(network: nn.Module, head: nn.Module, settings: Settings) -> torch.optim.SGD:
    """Two learning rates; weights decay, norms and biases do not."""
    groups = [
        group | {"peak": peak}
        for module, peak in ((network, settings.lr), (head, settings.head_lr))
        for group in parameter_groups(module, decay="weights", weight_decay=settings.weight_decay)
    ]
    return torch.optim.SGD(groups, settings.lr, settings.momentum, nesterov=settings.momentum > 0)


@contextmanager
def _generators_of_its_own(on: Trial) -> Iterator[None]:
    """Dropout and the like draw by the seed; afterwards torch's generators are as they were."""
    with torch.random.fork_rng([on.engine.device] if on.engine.device.type == "cuda" else []):
        torch.manual_seed(on.seed)
        yield
