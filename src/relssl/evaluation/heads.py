"""Classifiers trained on labelled images: linear probing by SGD, fine-tuning, and fine-tuning on few labels.

One loop trains all three, from views through the network to each classifier's loss. They differ by what trains and on which images.
The same call gives the same figures, on CPU bit for bit, and leaves the caller's random generators as they were.

Legend: B images of a step, S side of a view, M test images, F features, C classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relssl.data.images import Images
from relssl.data.loader import Loader, Plan
from relssl.data.plain import Reader
from relssl.data.subsets import fingerprint, from_index, stratified
from relssl.engine import Engine
from relssl.errors import ConfigError, DataError, NumericError
from relssl.evaluation.features import extract
from relssl.evaluation.metrics import Bootstrap, ranks
from relssl.evaluation.pairs import LabelledPair
from relssl.evaluation.result import Finding
from relssl.method.backbones import feature_width
from relssl.method.optim import parameter_groups
from relssl.method.schedules import learning_rate
from relssl.settings.evaluation import FinetuneConfig, LinearConfig, SemiConfig
from relssl.settings.run import LoaderConfig, ViewConfig

_ROWS = 8192  # features that are classified at once
_SMALL = 64  # the largest view, in pixels a side, of what the papers call small and medium sets


class PlainFeatures(NamedTuple):
    """Features fp32 [M, F] and labels int64 [M] of the test images that could be read, on the CPU, and a note on the others."""

    vectors: Tensor
    truth: Tensor
    notes: list[str]


@dataclass(frozen=True)
class Task:
    """The arguments that protocols which train on images share.

    Attributes:
        pair: images to train on and to test on, one label an image.
        reader: how images are read, and what the backbone sees of them.
        engine: device, and the precision of the backbone; classifiers and losses are fp32.
        bootstrap: of the intervals.
        seed: of weights, order, views and what is random within the network.
        say: takes lines of progress, some ten a training.
    """

    pair: LabelledPair
    reader: Reader
    engine: Engine
    bootstrap: Bootstrap
    seed: int
    say: Callable[[str], None]

    def check(self, protocol: str) -> tuple[np.ndarray, int]:
        """Return the labels of the bank, and C, the highest label of bank and test, and one.

        Raises:
            ConfigError: for images with several labels each.
            DataError: if a side has no labels, or the bank a single class.
        """
        bank, test = self.pair.bank, self.pair.test
        if bank.targets is not None or test.targets is not None:
            raise ConfigError(f"protocol: {protocol} takes one label an image, {bank.name} has several; use probe or lowshot")
        if bank.labels is None or test.labels is None or len(np.unique(bank.labels)) < 2:
            raise DataError(f"{bank.name}: {protocol} needs labels of two classes or more, on both sides")
        return bank.labels, int(max(bank.labels.max(), test.labels.max())) + 1

    @torch.no_grad()
    def test_features(self, network: nn.Module) -> PlainFeatures:
        """Compute the features of the test images' plain views, by a network on the device; NumericError if they are not finite."""
        test = self.pair.test
        features = extract(network, test, self.reader, self.engine)
        if not bool(features.vectors.isfinite().all()):
            raise NumericError(f"{test.name}: the network's features of test images are NaN or infinite")
        notes = [f"{len(features.bad)} test images could not be read and are left out"] if features.bad else []
        assert test.labels is not None
        return PlainFeatures(features.vectors, torch.from_numpy(test.labels[features.rows]), notes)


class Classifier:
    """A linear classifier [B, F] -> [B, C] in fp32, and what SGD trains with it.

    Args:
        head: on the device.
        groups: parameters with their peak learning rate `lr` and `weight_decay`.

    Attributes:
        loss: of the last step.
        finite: bool on the device, true as long as all losses are finite.
        rank: int64 [M], how many classes come before the true one, of each test image.
        curve: top-1 in percent, each time the test images were labelled.
        lost: the epoch in which its loss stopped being finite; 0: in none.
    """

    def __init__(self, head: nn.Linear, groups: list[dict[str, Any]], momentum: float, nesterov: bool) -> None:
        self.head, self.optimizer = head, torch.optim.SGD(groups, momentum=momentum, nesterov=nesterov)
        self.peaks = [group["lr"] for group in groups]
        self.finite = torch.ones((), dtype=torch.bool, device=head.weight.device)
        self.loss, self.rank = torch.zeros(()), torch.empty(0, dtype=torch.int64)
        self.curve: list[float] = []
        self.lost = 0

    def step(self, features: Tensor, labels: Tensor, share: float) -> None:
        """Learn from fp32 features [B, F] and labels [B], at this share of the peak learning rates."""
        if self.lost:
            return
        loss = F.cross_entropy(self.head(features), labels)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * share
        self.optimizer.step()
        self.loss = loss.detach()
        self.finite &= self.loss.isfinite()

    @torch.no_grad()
    def label(self, test: PlainFeatures, epoch: int) -> None:
        """Label the test images after an epoch; none is right once the loss was not finite, as NaN compares with nothing."""
        if not self.lost and not bool(self.finite):
            self.lost = epoch
        if self.lost:
            self.rank = torch.full_like(test.truth, self.head.out_features)
        else:
            parts = zip(torch.split(test.vectors, _ROWS), torch.split(test.truth, _ROWS), strict=True)
            self.rank = torch.cat([ranks(self.head(part.to(self.finite.device)).cpu(), truth) for part, truth in parts])
        self.curve.append(100 * float((self.rank == 0).double().mean()))


class Training:
    """Passes over views of labelled images, each in an order of its own.

    An epoch has as many steps as batches of at most `batch_size` images would take, or a few more; all batches are alike. The few
    images that cannot be shared out so sit out: since each epoch has another order, other ones each time, which favours none.

    Args:
        task: data, device, seed.
        images: with labels.
        settings: epochs, batch size, and the share of the area that the random crop keeps.
        least: images a step that a network needs.
    """

    def __init__(self, task: Task, images: Images, settings: LinearConfig | FinetuneConfig, least: int) -> None:
        if (count := len(images)) < least:
            raise DataError(f"{images.name}: {count} labelled images are too few to train on, needs {least} or more")
        self.task, self.images, self.settings = task, images, settings
        self.plan = Plan(count, max(least, count // math.ceil(count / settings.batch_size)), seed=task.seed)
        self.steps = settings.epochs * self.plan.steps_per_epoch
        self.unreadable: set[str] = set()  # files that were replaced by the image behind them

    def epochs(
        self, network: nn.Module, classifiers: Sequence[Classifier], *, schedule: str = "cosine", trains: bool = False
    ) -> Iterator[int]:
        """Train to the end, yielding the number of epochs done after each.

        Args:
            network: [B, 3, S, S] -> [B, F], on the device.
            classifiers: each learns from the same features.
            schedule: of their learning rates, as of `rate_share`.
            trains: let gradients pass into the network, which a classifier's optimizer then moves.
        """
        reader, engine, length = self.task.reader, self.task.engine, self.plan.steps_per_epoch
        labels = torch.from_numpy(self.images.labels).to(engine.device)
        # The papers train classifiers on a random crop and a flip; what pretraining never mirrors, such as digits, is not here.
        view = ViewConfig(size=reader.view.size, scale=self.settings.scale, flip=0.5 if reader.mirrored else 0.0)
        loading = LoaderConfig(workers=reader.workers, max_pixels=reader.max_pixels)
        statistics = (reader.view.mean, reader.view.std)
        loader = Loader(self.images, [view], self.plan, engine.device, statistics, loading)
        for step, (batch,) in enumerate(loader.stream(0, self.steps)):
            self.unreadable.update(file for file, _ in batch.bad)
            with torch.set_grad_enabled(trains), engine.autocast():
                features = network(engine.place(batch.weak))
            share = rate_share(step, length, self.settings.epochs, schedule)
            for classifier in classifiers:
                classifier.step(features.float(), labels[batch.ids], share)
            if (step + 1) % length == 0:
                yield (step + 1) // length

    def reports(self, epoch: int) -> bool:
        """Return true for some ten epochs in all, the last among them."""
        return epoch * 10 // self.settings.epochs > (epoch - 1) * 10 // self.settings.epochs

    def finding(
        self, setting: dict[str, Any], classifier: Classifier, test: PlainFeatures, notes: list[str], details: dict[str, Any]
    ) -> Finding:
        """Return the figures of a classifier that has labelled the test images."""
        trained = {"images": len(self.images), "batch_size": self.plan.batch_size, "epochs": self.settings.epochs}
        details = {**trained, "steps": self.steps, "scale": list(self.settings.scale), **details}
        if self.unreadable:
            notes = [*notes, f"{len(self.unreadable)} training images could not be read, the next ones took their places"]
        classes, bootstrap = classifier.head.out_features, self.task.bootstrap
        more = {"notes": (*notes, *test.notes), "details": details}
        return Finding.of_ranks(setting, classifier.rank, test.truth, classes, bootstrap, **more)


def rate_share(step: int, steps_per_epoch: int, epochs: int, schedule: str) -> float:
    """Return the learning rate of a step, counted from 0, as a share of its peak: half a cosine to 0, or tenths at 60 and 80 %."""
    if schedule == "cosine":
        return learning_rate(step, peak=1.0, warmup_steps=0, total_steps=epochs * steps_per_epoch)
    epoch = step // steps_per_epoch
    return float(10.0 ** -((5 * epoch >= 3 * epochs) + (5 * epoch >= 4 * epochs)))


def linear_classifier(features: int, classes: int, seed: int) -> nn.Linear:
    """Return a classifier with fp32 weights from N(0, 0.01) and biases 0: the papers' start (MoCo, official code)."""
    head: nn.Linear = nn.utils.skip_init(nn.Linear, features, classes)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        head.weight.copy_(torch.randn(classes, features, generator=torch.Generator().manual_seed(seed)) * 0.01)
        head.bias.zero_()
    return head


def linear(backbone: nn.Module, task: Task, settings: LinearConfig) -> list[Finding]:
    """Train one classifier a learning rate, all on the same features, and test each on the plain views.

    Args:
        backbone: [B, 3, S, S] -> [B, F]; put on the engine's device and into eval mode, and left there.

    Returns:
        A finding for each learning rate, in their order: of the last epoch, with the curve and the best epoch in its details. One
        whose loss stopped being finite has no image right, and a note.

    Raises:
        ConfigError, DataError: for images that cannot be used so.
        NumericError: if no classifier's loss, or no feature, stays finite.
    """
    _, classes = task.check("linear")
    test = task.test_features(task.engine.place(backbone).eval())
    training = Training(task, task.pair.bank, settings, least=1)
    rates, nesterov = papers_choice(settings, small=task.reader.view.size <= _SMALL)
    classifiers = {}
    for rate in rates:  # of one seed all start alike, so a rate's outcome does not depend on which others are tried
        head = linear_classifier(test.vectors.shape[1], classes, task.seed).to(task.engine.device)
        group = {"params": list(head.parameters()), "lr": rate, "weight_decay": settings.weight_decay}
        classifiers[rate] = Classifier(head, [group], settings.momentum, nesterov)
    for epoch in training.epochs(backbone, list(classifiers.values()), schedule=settings.schedule):
        for classifier in classifiers.values():
            classifier.label(test, epoch)
        if all(classifier.lost for classifier in classifiers.values()):
            lost = ", ".join(f"{rate:g} in epoch {classifier.lost}" for rate, classifier in classifiers.items())
            raise NumericError(f"linear: the loss stopped being finite at every learning rate ({lost}); lower linear.lr")
        if training.reports(epoch):
            shown = ", ".join(f"{classifier.curve[-1]:.1f} % at lr {rate:g}" for rate, classifier in classifiers.items())
            task.say(f"linear: epoch {epoch} of {settings.epochs}, top-1 {shown}")
    findings = []
    for rate, classifier in classifiers.items():
        notes = []
        if classifier.lost:
            fault = f"the loss stopped being finite in epoch {classifier.lost}"
            notes.append(f"{fault}, so no image counts as right; lower linear.lr")
        if len(rates) > 1:
            notes.append(f"one of {len(rates)} learning rates; to quote the best of them is to choose it on these test images")
        curve = [round(top1, 4) for top1 in classifier.curve]
        details: dict[str, Any] = {
            "momentum": settings.momentum,
            "nesterov": nesterov,
            "weight_decay": settings.weight_decay,
            "loss": None if classifier.lost else round(float(classifier.loss), 6),
            "curve": [[epoch, top1] for epoch, top1 in enumerate(curve, 1) if training.reports(epoch)],
            "best_epoch": {"epoch": curve.index(max(curve)) + 1, "top1": max(curve), "chosen_on": "these test images"},
        }
        findings.append(training.finding({"schedule": settings.schedule, "lr": rate}, classifier, test, notes, details))
    return findings


def papers_choice(settings: LinearConfig, *, small: bool) -> tuple[tuple[float, ...], bool]:
    """Return the learning rates, and true for Nesterov's momentum: the settings', or where they leave it open the papers', who
    have others for their small sets, of up to 64 pixels."""
    usual = 30.0 if settings.schedule == "step" else 1.0 if small else 0.3
    nesterov = small if settings.nesterov is None else settings.nesterov
    return settings.lr or (usual,), nesterov and settings.momentum > 0  # which without momentum is none


def finetune(backbone: nn.Module, task: Task, settings: FinetuneConfig) -> list[Finding]:
    """Train a copy of the backbone, and a classifier on it, on all images of the bank; return one finding, of the last epoch.

    Raises:
        ConfigError, DataError: for images that cannot be used so.
        NumericError: if the loss stops being finite.
    """
    return [_tuned(backbone, task, task.pair.bank, task.check("finetune")[1], settings, "finetune")]


def semi(backbone: nn.Module, task: Task, settings: SemiConfig) -> list[Finding]:
    """`finetune` on few images of the bank: shares of each class drawn by the seed, or those that an index file names.

    Returns:
        A finding for each share, or one for the file; `split` in its details is a hash of which images were used.

    Raises:
        ConfigError, DataError, NumericError: as `finetune`, and for a file that names other images.
    """
    (labels, classes), bank = task.check("semi"), task.pair.bank
    if settings.index is None:
        shares = [({"fraction": share}, stratified(labels, share, task.seed)) for share in settings.fractions]
        choices: list[tuple[dict[str, Any], np.ndarray]] = list(shares)
    elif task.pair.of is not None and len(bank) < task.pair.of[0]:  # where the same positions are other images
        raise ConfigError(f"semi.index: names images of the whole bank, of which `images` leaves {len(bank)}; drop one of them")
    else:
        choices = [({"index": Path(settings.index).name}, from_index(settings.index, bank))]
    findings = []
    for setting, rows in choices:
        share, count, notes = setting.get("fraction", 1), np.bincount(labels[rows], minlength=classes), []
        if len(absent := np.flatnonzero(count == 0)):
            first = dict(enumerate(bank.classes or ())).get(absent[0], absent[0])
            notes.append(f"{len(absent)} of {classes} classes have no labelled image, the first is {first}")
        if len(rows) > 1.5 * share * len(labels):
            notes.append(f"{len(rows)} of {len(labels)} images, as each class gives one at least")
        details = {"split": fingerprint(rows), "per_class": [int(count.min()), int(count.max())]}
        title = f"semi on {100 * share:g} %" if settings.index is None else "semi"
        finding = _tuned(backbone, task, bank.subset(rows), classes, settings, title)
        findings.append(replace(finding, setting=setting, notes=(*notes, *finding.notes), details={**finding.details, **details}))
    return findings


def _tuned(backbone: nn.Module, task: Task, images: Images, classes: int, settings: FinetuneConfig, title: str) -> Finding:
    """Train a copy of the backbone with two learning rates; weights decay, norms and biases do not."""
    training, engine = Training(task, images, settings, least=2), task.engine
    network = copy.deepcopy(backbone).cpu()
    head = linear_classifier(feature_width(network, task.reader.view.size), classes, task.seed).to(engine.device)
    network = engine.place(network).train()
    if not any(parameter.requires_grad for parameter in network.parameters()):
        network.requires_grad_(True)  # of others, what is fixed is meant to be, such as position codes
    groups = [
        group | {"lr": rate}
        for module, rate in ((network, settings.lr), (head, settings.head_lr))
        for group in parameter_groups(module, decay="weights", weight_decay=settings.weight_decay)
    ]
    classifier, section = Classifier(head, groups, settings.momentum, nesterov=settings.momentum > 0), title.split()[0]
    with torch.random.fork_rng([engine.device] if engine.device.type == "cuda" else []):  # dropout and the like draw by the seed
        torch.manual_seed(task.seed)
        for epoch in training.epochs(network, [classifier], trains=True):
            if training.reports(epoch):
                if not bool(classifier.finite):
                    raise NumericError(
                        f"{title}: the loss stopped being finite by epoch {epoch} of {settings.epochs}; lower "
                        f"{section}.lr ({settings.lr:g}) or {section}.head_lr ({settings.head_lr:g})"
                    )
                task.say(f"{title}: epoch {epoch} of {settings.epochs}, loss {float(classifier.loss):.3f}")
    test = task.test_features(network)
    classifier.label(test, settings.epochs)
    details: dict[str, Any] = {name: getattr(settings, name) for name in ("lr", "head_lr", "momentum", "weight_decay")}
    return training.finding({}, classifier, test, [], {"loss": round(float(classifier.loss), 6), **details})
