"""The whole network trained on labels from its pretrained weights: on all images (`finetune`), or on few (`semi`).

What the papers of this method did of either is not known; this is a reconstruction after its peers. SimCLR (Chen et al. 2020,
appendix B.5) fine-tunes by SGD with Nesterov's momentum, without weight decay, on crops and flips alone, for 60 epochs on 1 % of
the labels and 30 on 10 %; SwAV's code gives the backbone 0.02 and the classifier 5 on 1 %, 0.01 and 0.2 on 10 %, for 20 epochs of
batches of 256; Barlow Twins' code 0.002 and 0.5 on 1 %, on a cosine. The defaults, one pair of rates for every share, are ours:
0.02 and 0.5.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relssl.config import Config
from relssl.data.sources import Images
from relssl.data.subsets import fingerprint, from_index, stratified
from relssl.engine import Engine
from relssl.errors import ConfigError, NumericError
from relssl.evaluation.classifier import Batches, Labels, Trial, linear_classifier, trial
from relssl.evaluation.findings import Finding
from relssl.evaluation.metrics import Bootstrap
from relssl.evaluation.pairs import LabelledPair
from relssl.method.backbones import feature_width
from relssl.method.schedules import learning_rate
from relssl.optim import parameter_groups
from relssl.protocols import FinetuneConfig, SemiConfig
from relssl.sections import OptimizerConfig

Settings = FinetuneConfig | SemiConfig


def finetune(
    backbone: nn.Module,
    pair: LabelledPair,
    config: Config,
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
        config: the backbone's own, for the size and the statistics of the views, and the loader.
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
    on, _ = trial("finetune", pair, config, engine, bootstrap, seed, say)
    return [_measured(_Task("finetune", "finetune", {}, pair.bank), on, backbone, settings)]


def semi(
    backbone: nn.Module,
    pair: LabelledPair,
    config: Config,
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
    on, labels = trial("semi", pair, config, engine, bootstrap, seed, say)
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
    width = feature_width(network, on.config.views.weak.size)
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
    decay = OptimizerConfig(weight_decay=settings.weight_decay, decay="weights")
    groups = [
        group | {"peak": peak}
        for module, peak in ((network, settings.lr), (head, settings.head_lr))
        for group in parameter_groups(module, decay)
    ]
    return torch.optim.SGD(groups, settings.lr, settings.momentum, nesterov=settings.momentum > 0)


@contextmanager
def _generators_of_its_own(on: Trial) -> Iterator[None]:
    """Dropout and the like draw by the seed; afterwards torch's generators are as they were."""
    with torch.random.fork_rng([on.engine.device] if on.engine.device.type == "cuda" else []):
        torch.manual_seed(on.seed)
        yield
