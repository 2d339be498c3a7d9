"""The papers' linear protocol: a linear classifier trained by SGD on augmented images, the backbone frozen.

Sources: the official code's `linear_eval.py` for ImageNet (cosine per step from 0.3, no Nesterov); for the small sets the
authors' second code, known through those who adapted it (Nesterov; cosine from 1.0, the rate that the authors recommend there,
or 30 and a tenth of it from 60 % and again from 80 % of the epochs). Both report the epoch that did best on the test images; here
the figures are those of the last epoch, and the best one stands in the details.

Legend: B images of a step, M test images, F features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relssl.config import Config
from relssl.engine import Engine
from relssl.errors import NumericError
from relssl.evaluation.classifier import Batches, PlainFeatures, Trial, linear_classifier, trial
from relssl.evaluation.findings import Finding
from relssl.evaluation.metrics import Bootstrap
from relssl.evaluation.pairs import LabelledPair
from relssl.method.schedules import learning_rate
from relssl.protocols import LinearConfig

# The largest view, in pixels a side, of what the papers call small and medium sets.
_SMALL = 64


def linear(
    backbone: nn.Module,
    pair: LabelledPair,
    config: Config,
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
        config: the backbone's own, for the size and the statistics of the views, and the loader.
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
    on, _ = trial("linear", pair, config, engine, bootstrap, seed, say)
    engine.place(backbone).eval()
    seen = on.plain_features(backbone)
    batches = Batches(pair.bank, on, settings.epochs, settings.batch_size, 1, settings.scale)
    rates, nesterov = papers_choice(settings, config.views.weak.size <= _SMALL)
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
