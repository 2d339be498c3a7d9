"""Classifiers trained on labelled images: linear probing by SGD, fine-tuning, and fine-tuning on few labels.

One loop trains all three, from views through the network to each classifier's loss. They differ by what trains and on which images.
The same call gives the same figures, on CPU bit for bit, and leaves the caller's random generators as they were.

Legend: B images of a step, S side of a view, M test images, F features, C classes, H classifiers.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relssl.data.loader import Loader, Plan
from relssl.data.subsets import fingerprint, from_index, stratified
from relssl.errors import ConfigError, NumericError
from relssl.evaluation.features import Features, extract
from relssl.evaluation.metrics import ranks
from relssl.evaluation.pairs import LabelledPair, named
from relssl.evaluation.result import Finding, Task
from relssl.method.backbones import feature_width
from relssl.method.optim import parameter_groups
from relssl.method.schedules import learning_rate
from relssl.settings.evaluation import FinetuneConfig, LinearConfig, SemiConfig
from relssl.settings.run import LoaderConfig, ViewConfig

_ROWS = 8192  # features that are classified at once
_SMALL = 96  # the largest view, in pixels a side, on the papers' small and medium sets: STL-10, as its tests see it


@dataclass
class Classifier:
    """A linear classifier [B, F] -> [B, C] in fp32, on the device, and how it fares."""

    head: nn.Linear
    loss: float = 0.0  # of an epoch's last step
    lost: int = 0  # the epoch in which the loss stopped being finite; 0: none
    curve: list[float] = field(default_factory=list)  # top-1 in percent, each time the test images were labelled
    rank: Tensor = field(default_factory=lambda: torch.empty(0))  # int64 [M], the classes that came before the true one


class Training:
    """Passes over views of a bank's images, each in an order of its own, for H classifiers that learn from the same features.

    An epoch has as many steps as batches of at most `batch_size` images would take, or a few more; all batches are alike, and of
    two images at least, which batch norm needs. The few images that cannot be shared out so sit out: since each epoch has another
    order, other ones each time, which favours none. `title` is the protocol, and what tells one training of it from the others.
    """

    def __init__(
        self, title: str, pair: LabelledPair, settings: LinearConfig | FinetuneConfig, task: Task, network: nn.Module, heads: int
    ) -> None:
        self.title, self.pair, self.settings, self.task = title, pair, settings, task
        self.labels, seed, images = one_label(pair, title.split()[0]), task.bootstrap.seed, len(pair.bank)
        width = feature_width(network, task.reader.view.size)
        # Of one seed all start alike, so a rate's outcome does not depend on which others are tried.
        starts = [linear_classifier(width, pair.classes, seed) for _ in range(heads)]
        self.classifiers = [Classifier(head.to(task.engine.device)) for head in starts]
        size = max(min(2, settings.batch_size), images // math.ceil(images / settings.batch_size))
        self.plan = Plan(images, size, seed=seed)
        self.steps = settings.epochs * self.plan.steps_per_epoch
        self.unreadable: set[str] = set()  # files that were replaced by the image behind them

    def epochs(self, network: nn.Module, groups: list[dict[str, Any]], *, nesterov: bool, schedule: str) -> Iterator[int]:
        """Train to the end by SGD, yielding the number of epochs done after each; NumericError once no classifier's loss is finite.

        Args:
            network: [B, 3, S, S] -> [B, F], on the device; gradients pass into it if it is in training mode.
            groups: what is trained, with its peak learning rate `lr` and `weight_decay`.
            schedule: of the learning rates, as of `rate_share`.
        """
        reader, engine, settings, length = self.task.reader, self.task.engine, self.settings, self.plan.steps_per_epoch
        labels = self.labels.to(engine.device)
        # The papers train classifiers on a random crop and a flip; what pretraining never mirrors, such as digits, is not here.
        view = ViewConfig(size=reader.view.size, scale=settings.scale, flip=0.5 if reader.mirrored else 0.0)
        loading = LoaderConfig(workers=reader.workers, max_pixels=reader.max_pixels)
        loader = Loader(self.pair.bank, [view], self.plan, engine.device, (reader.view.mean, reader.view.std), loading)
        optimizer = torch.optim.SGD(groups, momentum=settings.momentum, nesterov=nesterov)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, length, settings.epochs, schedule))
        finite = torch.ones(len(self.classifiers), dtype=torch.bool, device=engine.device)
        for step, (batch,) in enumerate(loader.stream(0, self.steps), 1):
            self.unreadable.update(file for file, _ in batch.bad)
            with torch.set_grad_enabled(network.training), engine.autocast():
                features = network(engine.place(batch.weak))
            losses = torch.stack([F.cross_entropy(each.head(features.float()), labels[batch.ids]) for each in self.classifiers])
            optimizer.zero_grad()
            losses.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            rates.step()
            finite &= losses.detach().isfinite()
            if not step % length:
                epoch = step // length
                for each, loss, fine in zip(self.classifiers, losses.tolist(), finite.tolist(), strict=True):
                    each.loss, each.lost = loss, each.lost or (0 if fine else epoch)
                if not finite.any():
                    protocol = self.title.split()[0]
                    rates_of = f"{protocol}.lr" + (f" or {protocol}.head_lr" if hasattr(settings, "head_lr") else "")
                    raise NumericError(
                        f"{self.title}: the loss stopped being finite in epoch {epoch} or before; lower {rates_of}"
                    )
                yield epoch

    def reports(self, epoch: int) -> bool:
        """Return true for some ten epochs in all, the last among them."""
        return epoch * 10 // self.settings.epochs > (epoch - 1) * 10 // self.settings.epochs

    def test(self, network: nn.Module) -> Features:
        """Compute the features of the test images' plain views; NumericError if they are not finite."""
        features = extract(network, self.pair.test, self.task.reader, self.task.engine)
        if not bool(features.vectors.isfinite().all()):
            raise NumericError(f"{self.pair.test.name}: the network's features of test images are NaN or infinite")
        return features

    @torch.no_grad()
    def label(self, test: Features) -> None:
        """Label the test images; none is right once the loss was not finite, as NaN compares with nothing."""
        truth, device = torch.from_numpy(self.pair.test.labels)[test.rows], self.task.engine.device
        for each in self.classifiers:
            each.rank = torch.full_like(truth, each.head.out_features)
            if not each.lost:
                parts = zip(torch.split(test.vectors, _ROWS), torch.split(truth, _ROWS), strict=True)
                each.rank = torch.cat([ranks(each.head(part.to(device)).cpu(), own) for part, own in parts])
            each.curve.append(100 * float((each.rank == 0).double().mean()))

    def finding(self, setting: dict[str, Any], each: Classifier, test: Features, notes: list[str], **details: Any) -> Finding:
        """Return the figures of a classifier that has labelled the test images."""
        trained: dict[str, Any] = {name: getattr(self.settings, name) for name in ("epochs", "momentum", "weight_decay")}
        trained |= {"images": self.plan.count, "batch_size": self.plan.batch_size, "steps": self.steps}
        trained |= {"scale": list(self.settings.scale), "loss": None if each.lost else round(each.loss, 6)}
        if self.unreadable:
            notes = [*notes, f"{len(self.unreadable)} training images could not be read, the next ones took their places"]
        if test.bad:
            notes = [*notes, f"{len(test.bad)} test images could not be read and are left out"]
        truth, more = torch.from_numpy(self.pair.test.labels)[test.rows], {"notes": tuple(notes), "details": trained | details}
        return Finding.of_ranks(setting, each.rank, truth, each.head.out_features, self.task.bootstrap, **more)


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


def one_label(pair: LabelledPair, protocol: str) -> Tensor:
    """Return the labels of the bank; ConfigError for images with several labels each."""
    if pair.bank.labels is None:
        raise ConfigError(f"protocol: {protocol} takes one label an image, {pair.bank.name} has several; use probe or lowshot")
    return torch.from_numpy(pair.bank.labels)


def linear(backbone: nn.Module, pair: LabelledPair, settings: LinearConfig, task: Task) -> list[Finding]:
    """Train one classifier a learning rate on the features of [B, 3, S, S] -> [B, F], and test each on the plain views.

    Returns a finding for each learning rate, in their order: of the last epoch, with the curve and the best epoch in its details. One
    whose loss stopped being finite has no image right, and a note. ConfigError for images with several labels, NumericError if no
    classifier's loss, or no feature, stays finite.
    """
    backbone = task.engine.place(backbone).eval()
    rates, nesterov = papers_choice(settings, small=task.reader.view.size <= _SMALL)
    training = Training("linear", pair, settings, task, backbone, len(rates))
    test, decay, findings = training.test(backbone), settings.weight_decay, list[Finding]()
    tried = dict(zip(rates, training.classifiers, strict=True))
    groups = [{"params": [*each.head.parameters()], "lr": rate, "weight_decay": decay} for rate, each in tried.items()]
    for epoch in training.epochs(backbone, groups, nesterov=nesterov, schedule=settings.schedule):
        training.label(test)
        if training.reports(epoch):
            shown = ", ".join(f"{each.curve[-1]:.1f} % at lr {rate:g}" for rate, each in tried.items())
            task.say(f"linear: epoch {epoch} of {settings.epochs}, top-1 {shown}")
    for rate, each in tried.items():
        notes, curve = list[str](), [round(top1, 4) for top1 in each.curve]
        if each.lost:
            notes.append(f"the loss stopped being finite in epoch {each.lost}, so no image counts as right; lower linear.lr")
        if len(rates) > 1:
            notes.append(f"one of {len(rates)} learning rates; to quote the best of them is to choose it on these test images")
        best = {"epoch": curve.index(max(curve)) + 1, "top1": max(curve), "chosen_on": "these test images"}
        points = [[epoch, top1] for epoch, top1 in enumerate(curve, 1) if training.reports(epoch)]
        setting = {"schedule": settings.schedule, "lr": rate}
        findings.append(training.finding(setting, each, test, notes, nesterov=nesterov, curve=points, best_epoch=best))
    return findings


def papers_choice(settings: LinearConfig, *, small: bool) -> tuple[tuple[float, ...], bool]:
    """Return the learning rates, and true for Nesterov's momentum: the settings', or where they leave it open the papers', who
    have others for their small sets, of up to 96 pixels."""
    usual = 30.0 if settings.schedule == "step" else 1.0 if small else 0.3
    nesterov = small if settings.nesterov is None else settings.nesterov
    return settings.lr or (usual,), nesterov and settings.momentum > 0  # which without momentum is none


def finetune(
    backbone: nn.Module, pair: LabelledPair, settings: FinetuneConfig, task: Task, title: str = "finetune"
) -> list[Finding]:
    """Train and test as `train_whole` does; return its one finding."""
    return [train_whole(backbone, pair, settings, task, title)[2]]


def train_whole(
    backbone: nn.Module, pair: LabelledPair, settings: FinetuneConfig, task: Task, title: str
) -> tuple[nn.Module, nn.Linear, Finding]:
    """Train a copy of the backbone, and a classifier on it, on all images of the bank; return both and the finding of the last epoch.

    Each has a learning rate of its own; weights decay, norms and biases do not. Raises as `linear`.
    """
    network = copy.deepcopy(backbone).cpu()
    training = Training(title, pair, settings, task, network, 1)
    (classifier,), network, device = training.classifiers, task.engine.place(network).train(), task.engine.device
    if not any(parameter.requires_grad for parameter in network.parameters()):
        network.requires_grad_(True)  # of others, what is fixed is meant to be, such as position codes
    rates = {"lr": settings.lr, "head_lr": settings.head_lr}
    groups = [
        group | {"lr": rate}
        for module, rate in zip((network, classifier.head), rates.values(), strict=True)
        for group in parameter_groups(module, decay="weights", weight_decay=settings.weight_decay)
    ]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout and the like draw by the seed
        torch.manual_seed(task.bootstrap.seed)
        for epoch in training.epochs(network, groups, nesterov=settings.momentum > 0, schedule="cosine"):
            if training.reports(epoch):
                task.say(f"{title}: epoch {epoch} of {settings.epochs}, loss {classifier.loss:.3f}")
    training.label(test := training.test(network))
    return network, classifier.head, training.finding({}, classifier, test, [], **rates)


def semi(backbone: nn.Module, pair: LabelledPair, settings: SemiConfig, task: Task) -> list[Finding]:
    """`finetune` on few images of the bank: shares of each class drawn by the seed, or those that an index file names.

    Returns a finding for each share, or one for the file; `split` in its details is a hash of which images were used. Raises as
    `finetune`, and DataError for a file that names other images.
    """
    labels, bank, findings = one_label(pair, "semi").numpy(), pair.bank, list[Finding]()
    if settings.index and pair.of is not None and len(bank) < pair.of[0]:  # where the same positions are other images
        raise ConfigError(f"semi.index: names images of the whole bank, of which `images` leaves {len(bank)}; drop one of them")
    for share in (1.0,) if settings.index else settings.fractions:
        title, notes = "semi" if settings.index else f"semi on {100 * share:g} %", list[str]()
        rows = from_index(settings.index, bank) if settings.index else stratified(labels, share, task.bootstrap.seed)
        count = np.bincount(labels[rows], minlength=pair.classes)
        if absent := named(count == 0, bank.classes):
            notes.append(f"no labelled image is of {absent}")
        if len(rows) > 1.5 * share * len(labels):
            notes.append(f"{len(rows)} of {len(labels)} images, as each class gives one at least")
        (finding,) = finetune(backbone, replace(pair, bank=bank.subset(rows)), settings, task, title)
        details = finding.details | {"split": fingerprint(rows), "per_class": [int(count.min()), int(count.max())]}
        setting = {"index": Path(settings.index).name} if settings.index else {"fraction": share}
        findings.append(replace(finding, setting=setting, notes=(*notes, *finding.notes), details=details))
    return findings
