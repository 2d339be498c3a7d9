"""A run from start to end, where its time goes, and what the backbone has learned."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from relssl.data.loader import worker_count
from relssl.data.plain import PlainView, Reader
from relssl.engine import Engine
from relssl.evaluation.features import extract
from relssl.evaluation.pairs import LabelledPair
from relssl.settings.run import resolve
from relssl.train.loop import Trainer
from relssl.train.online import OnlineKnn
from relssl.train.pretrain import pretrain
from relssl.weights.opening import NETWORKS, load_backbone, load_run

# What a run's time is split by: the functions that spend it. What is left of `fit` is the training itself.
PARTS = {(Trainer, "fit"): "fit", (Trainer, "save"): "saving", (OnlineKnn, "baselines"): "evaluation"} | {
    (OnlineKnn, "measure"): "evaluation"
}


class Split:
    """Adds up the seconds of functions while they are watched."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.first: dict[str, float] = {}
        self._open: set[str] = set()

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Count what happens within, once where it is nested."""
        if name in self._open:
            yield
            return
        self._open.add(name)
        begun = _now()
        self.first.setdefault(name, begun)
        try:
            yield
        finally:
            self.seconds[name] += _now() - begun
            self._open.remove(name)

    def watch(self, owner: type, method: str, name: str) -> Any:
        """Within this context, count each call of a method."""
        original = getattr(owner, method)

        def timed(*args: Any, **named: Any) -> Any:
            with self.time(name):
                return original(*args, **named)

        return patch.object(owner, method, timed)


def _now() -> float:
    """The time, once the device has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def whole_run(settings: Mapping[str, Any], sides: tuple[int, int] | None = None) -> dict[str, Any]:
    """Pretrain, and evaluate student and teacher.

    Args:
        settings: of the run; its folder is a temporary one.
        sides: at most this many labelled images to train and to test the linear classifier on.

    Returns:
        seconds, by start, training, evaluation, saving, finish and total; images_per_second while training; knn and linear, top-1
        in percent of each network; compile, what the run says about it; last_row, of its metrics.
    """
    split = Split()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as watched:
        for (owner, method), name in PARTS.items():
            watched.enter_context(split.watch(owner, method, name))
        told = list[str | None]()
        watched.enter_context(note_compiling(told))
        begun = time.perf_counter()
        config = resolve({**settings, "out": str(Path(folder, "run"))})
        result = pretrain(settings=config, quiet=True)
        total = _now() - begun
        assert result is not None
        last = result.rows[-1]
        seconds = {
            "start": split.first["fit"] - begun,
            "training": split.seconds["fit"] - split.seconds["evaluation"] - split.seconds["saving"],
            "evaluation": split.seconds["evaluation"],
            "saving": split.seconds["saving"],
            "finish": total - (split.first["fit"] - begun) - split.seconds["fit"],
            "total": total,
        }
        return {
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
            "images_per_second": round(last["samples"] / seconds["training"], 1),
            "knn": {"student": last.get("knn_top1"), "teacher": last.get("knn_teacher_top1")},
            "linear": linear(result.folder, sides),
            "compile": told[-1],
            "last_row": last,
        }


def note_compiling(told: list[str | None]) -> Any:
    """Within this context, keep what each run that is set up has to tell of compiling its networks."""
    original = Trainer.compile

    def noted(trainer: Trainer) -> None:
        original(trainer)
        told.append(trainer.compiled)

    return patch.object(Trainer, "compile", noted)


def linear(run: Path, sides: tuple[int, int] | None) -> dict[str, float]:
    """Top-1 in percent, by network, of a linear classifier on a run's frozen features."""
    config = load_run(run).config
    engine, pair = Engine(config.engine), LabelledPair.load(config.data, config.data_root, sides)
    found = {}
    reader = Reader(
        PlainView.of(config.views), worker_count(config.loader.workers, config.engine.devices), config.loader.max_pixels
    )
    for network in NETWORKS:
        backbone = engine.place(load_backbone(run, network))
        features, labels = [], []
        for images in (pair.bank, pair.test):
            made = extract(backbone, images, reader, engine)
            assert images.labels is not None
            features.append(made.vectors.to(engine.device))
            labels.append(torch.from_numpy(images.labels[made.rows]).to(engine.device))
        found[network] = round(100 * classify(features[0], labels[0], features[1], labels[1]), 2)
    return found


def classify(bank: Tensor, bank_labels: Tensor, test: Tensor, test_labels: Tensor, decay: float = 1e-3) -> float:
    """Share of the test features [M, F] that multinomial logistic regression on the bank [N, F] labels rightly.

    Features are brought to zero mean and unit deviation; L-BFGS to convergence or 200 steps. The decay is one for all, not chosen
    by what it gives.
    """
    mean, std = bank.mean(dim=0), bank.std(dim=0).clamp_min(1e-6)
    bank, test = (bank - mean) / std, (test - mean) / std
    classes = int(max(bank_labels.max(), test_labels.max())) + 1
    weight = torch.zeros(classes, bank.shape[1], device=bank.device, requires_grad=True)
    bias = torch.zeros(classes, device=bank.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value: Tensor = F.cross_entropy(F.linear(bank, weight, bias), bank_labels) + decay * weight.square().sum() / 2
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    return float((F.linear(test, weight, bias).argmax(dim=1) == test_labels).float().mean())
