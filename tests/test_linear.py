"""The papers' linear protocol against a plain loop in torch, its schedules against closed form, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from relssl.data.batched import apply
from relssl.data.draws import draw
from relssl.data.images import Pixels
from relssl.data.loader import Plan
from relssl.data.plain import Reader, plain_batch
from relssl.engine import Engine
from relssl.errors import ConfigError, DataError, NumericError
from relssl.evaluation.evaluate import LabelledPair
from relssl.evaluation.heads import linear, linear_classifier, papers_choice, rate_share
from relssl.evaluation.metrics import accuracies, ranks
from relssl.evaluation.result import Finding
from relssl.settings.evaluation import LinearConfig
from relssl.settings.run import EngineConfig, ViewConfig
from small_pairs import FAST, as_files, coloured, engine, network, pair, reader


def run(
    settings: LinearConfig,
    data: LabelledPair | None = None,
    backbone: nn.Module | None = None,
    given: Reader | None = None,
    seed: int = 3,
) -> tuple[list[Finding], list[str]]:
    said: list[str] = []
    found = linear(
        backbone or network(),
        data or pair(),
        given or reader(),
        engine(),
        settings=settings,
        bootstrap=FAST,
        seed=seed,
        say=said.append,
    )
    return found, said


def by_hand(settings: LinearConfig, rate: float, seed: int, data: LabelledPair, seen: Reader, nesterov: bool) -> nn.Linear:
    """The same views in the same order, with momentum written out (Sutskever et al. as torch has it) and float64 weights."""
    backbone, bank = network(), data.bank
    assert isinstance(bank.source, Pixels) and bank.labels is not None
    view = ViewConfig(size=16, scale=settings.scale, flip=0.5)
    plan = Plan(len(bank), len(bank) // math.ceil(len(bank) / settings.batch_size), seed=seed)
    head = linear_classifier(8, 3, seed).double()
    speed = {name: torch.zeros_like(value) for name, value in head.named_parameters()}
    total = settings.epochs * plan.steps_per_epoch
    for step, (epoch, (rows,)) in enumerate(plan.steps(0, total)):
        views = apply(bank.source.tensor[rows], view, draw(view, seed, epoch, rows, 0, (16, 16)))
        with torch.no_grad():
            features = backbone(seen.view.normalise(views)).double()
        loss = F.cross_entropy(head(features), torch.from_numpy(bank.labels[rows]))
        gradients = torch.autograd.grad(loss, list(head.parameters()))
        lr = rate * 0.5 * (1 + math.cos(math.pi * step / total))
        with torch.no_grad():
            for (name, value), gradient in zip(head.named_parameters(), gradients, strict=True):
                gradient = gradient + settings.weight_decay * value
                speed[name] = settings.momentum * speed[name] + gradient
                value -= lr * (gradient + settings.momentum * speed[name] if nesterov else speed[name])
    return head


@pytest.mark.parametrize("nesterov", [True, False])
def test_training_equals_a_plain_loop(nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[nn.Linear] = []

    def kept(*args: int) -> nn.Linear:
        heads.append(linear_classifier(*args))
        return heads[-1]

    monkeypatch.setattr("relssl.evaluation.heads.linear_classifier", kept)
    settings = LinearConfig(lr=(0.7, 0.1), epochs=4, batch_size=16, nesterov=nesterov, weight_decay=1e-3)
    data = pair()
    found, _ = run(settings, data)
    view, truth = reader().view, torch.from_numpy(data.test.labels)
    seen = view.normalise(plain_batch(data.test.source.tensor, view))
    for finding, head, rate in zip(found, heads, settings.lr, strict=True):
        expected = by_hand(settings, rate, 3, data, reader(), nesterov)
        for one, two in zip(head.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            scores = expected(network()(seen).double())
        assert finding.figures == accuracies(ranks(scores, truth), truth, 3)
        assert finding.correct is not None and (finding.correct == (scores.argmax(1) == truth).numpy()).all()
        assert finding.setting == {"schedule": "cosine", "lr": rate} and finding.details["nesterov"] is nesterov
        assert finding.details["steps"] == 16 and finding.details["batch_size"] == 12  # 50 images in 4 steps of at most 16


def test_classes_that_can_be_told_apart_are() -> None:
    (found,), said = run(LinearConfig(epochs=20, batch_size=25))
    assert found.main == "top1" and found.figures["top1"] == found.figures["mean_per_class"] == 100
    assert found.intervals["top1"] == (100, 100) and found.notes == ()
    assert [line.split(",")[0] for line in said] == [f"linear: epoch {epoch} of 20" for epoch in range(2, 21, 2)]
    assert said[-1] == "linear: epoch 20 of 20, top-1 100.0 %"
    assert found.setting["lr"] == 1.0 and found.details["nesterov"] is True


def test_the_same_call_gives_the_same_bits_and_disturbs_nothing() -> None:
    settings, backbone = LinearConfig(lr=(0.5,), epochs=3, batch_size=20), network()
    before, state = torch.get_rng_state(), {name: value.clone() for name, value in backbone.state_dict().items()}
    runs = [run(settings, backbone=backbone, seed=seed)[0][0] for seed in (3, 3, 4)]
    assert runs[0].plain() == runs[1].plain() and runs[0].details["loss"] != runs[2].details["loss"]
    assert torch.equal(before, torch.get_rng_state())
    assert run(settings, backbone=backbone.train())[0][0].plain() == runs[0].plain()  # batch norm rests all the same
    assert all(torch.equal(value, state[name]) for name, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_a_rate_fares_the_same_alone_and_among_others() -> None:
    alone = run(LinearConfig(lr=(0.5,), epochs=3, batch_size=20))[0][0]
    among, said = run(LinearConfig(lr=(2.0, 0.5), epochs=3, batch_size=20))
    assert alone.details == among[1].details and alone.figures == among[1].figures
    assert "one of 2 learning rates" in among[1].notes[0] and not alone.notes
    assert " at lr 2, " in said[0] and said[0].endswith(" at lr 0.5")


def test_details_hold_the_curve_and_the_best_epoch_but_figures_are_the_last() -> None:
    noisy = pair(60, 30)
    assert noisy.bank.labels is not None
    shuffled = dataclasses.replace(noisy.bank, labels=np.random.default_rng(0).permutation(noisy.bank.labels))
    (found,), _ = run(LinearConfig(lr=(3.0,), epochs=5, batch_size=20), LabelledPair(shuffled, noisy.test))
    curve = found.details["curve"]
    assert [epoch for epoch, _ in curve] == [1, 2, 3, 4, 5] and curve[-1][1] == round(found.figures["top1"], 4)
    best = found.details["best_epoch"]
    assert best["top1"] == max(top1 for _, top1 in curve) > found.figures["top1"]
    assert curve[best["epoch"] - 1][1] == best["top1"] and best["chosen_on"] == "these test images"


def test_files_train_as_pixels_do(tmp_path: Path) -> None:
    data, settings = pair(24, 12), LinearConfig(lr=(0.5,), epochs=2, batch_size=12, nesterov=True)
    held = run(settings, data)[0][0]
    files = LabelledPair(as_files(data.bank, tmp_path / "bank"), as_files(data.test, tmp_path / "test"))
    read = run(settings, files)[0][0]
    assert read.figures == held.figures and read.details["loss"] == pytest.approx(held.details["loss"], abs=0.01)
    Path(files.bank.source.name(3)).write_bytes(b"no image")
    Path(files.test.source.name(0)).write_bytes(b"no image")
    (broken,) = run(settings, files)[0]
    assert broken.notes == (
        "1 training images could not be read, the next ones took their places",
        "1 test images could not be read and are left out",
    )
    assert broken.correct is not None and len(broken.correct) == 11


def test_schedules_are_the_papers() -> None:
    step = LinearConfig(schedule="step")
    assert [rate_share(epoch * 7 + 6, 7, step) for epoch in (0, 59)] == [1, 1]
    assert [rate_share(epoch * 7, 7, step) for epoch in (60, 79, 80, 99)] == pytest.approx([0.1, 0.1, 0.01, 0.01])
    short = [rate_share(epoch, 1, dataclasses.replace(step, epochs=7)) for epoch in range(7)]
    assert short == pytest.approx([1, 1, 1, 1, 1, 0.1, 0.01])  # 60 % are 4.2 epochs, 80 % 5.6
    cosine = LinearConfig(epochs=10)
    for at in (0, 1, 35, 69):
        assert rate_share(at, 7, cosine) == pytest.approx(math.cos(math.pi * at / 140) ** 2)


def test_what_is_left_open_is_the_papers_choice() -> None:
    assert papers_choice(LinearConfig(), small=True) == ((1.0,), True)
    assert papers_choice(LinearConfig(), small=False) == ((0.3,), False)
    assert papers_choice(LinearConfig(schedule="step"), small=True) == ((30.0,), True)
    assert papers_choice(LinearConfig(lr=(2.0, 1.0), nesterov=True), small=False) == ((2.0, 1.0), True)
    assert papers_choice(LinearConfig(momentum=0), small=True) == ((1.0,), False)


class Huge(nn.Module):
    """Features so large that only the smallest of rates keeps them finite."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3)) * 1e15


def test_a_rate_that_diverges_is_told_and_the_others_go_on() -> None:
    settings = LinearConfig(lr=(1e10, 1e-32), epochs=3, batch_size=25, momentum=0)
    (lost, kept), _ = run(settings, backbone=Huge())
    assert lost.figures == {"top1": 0, "top5": 0, "mean_per_class": 0} and lost.details["loss"] is None
    assert lost.notes[0].startswith("the loss stopped being finite in epoch 1,")
    assert math.isfinite(kept.details["loss"]) and kept.figures["top5"] == 100
    with pytest.raises(NumericError, match=r"at every learning rate \(1e\+10 in epoch 1\)"):
        run(LinearConfig(lr=(1e10,), epochs=3, batch_size=25), backbone=Huge())


def test_the_classifier_is_fp32_whatever_the_backbones_precision() -> None:
    half = Engine(EngineConfig(device="cpu", precision="bf16", threads=1))
    data, settings = pair(), LinearConfig(epochs=4, batch_size=25)
    arguments = {"settings": settings, "bootstrap": FAST, "seed": 3, "say": lambda line: None}
    (found,) = linear(network(), data, reader(), half, **arguments)  # type: ignore[arg-type]
    (full,), _ = run(settings, data)
    assert 0 < abs(found.details["loss"] - full.details["loss"]) < 0.02  # features are rounded, weights are not


def test_features_that_are_nan_are_refused() -> None:
    spoilt = network()
    with torch.no_grad():
        next(spoilt.parameters()).fill_(float("nan"))
    with pytest.raises(NumericError, match="tints: the network's features of test images are NaN"):
        run(LinearConfig(epochs=1), backbone=spoilt)


def test_images_that_cannot_be_used_are_refused_by_name() -> None:
    data = pair()
    several = dataclasses.replace(data.bank, labels=None, targets=np.ones((50, 3), np.int8))
    with pytest.raises(ConfigError, match="linear takes one label an image, tints has several; use probe"):
        run(LinearConfig(), LabelledPair(several, data.test))
    with pytest.raises(DataError, match="tints: has no labels"):
        run(LinearConfig(), LabelledPair(dataclasses.replace(data.bank, labels=None), data.test))
    with pytest.raises(DataError, match="50 images are of a single class"):
        run(LinearConfig(), LabelledPair(coloured(50, 0, classes=1), data.test))


def test_digits_are_not_mirrored() -> None:
    upright = reader(**{"views.weak.flip": 0.0})
    (one,), (two,) = (run(LinearConfig(lr=(0.5,), epochs=1), given=each)[0] for each in (upright, reader()))
    assert one.details["loss"] != two.details["loss"]
