"""Classifiers trained on images: each protocol against a plain loop in torch, schedules against closed form, and what is refused."""

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relssl.data.batched import apply
from relssl.data.draws import draw
from relssl.data.images import Files, Images, Pixels
from relssl.data.loader import Plan
from relssl.data.plain import PlainView, Reader, plain_batch
from relssl.data.subsets import fingerprint, stratified
from relssl.engine import Engine
from relssl.errors import ConfigError, DataError, NumericError
from relssl.evaluation.heads import finetune, linear, linear_classifier, papers_choice, rate_share, semi
from relssl.evaluation.metrics import Bootstrap, accuracies, ranks
from relssl.evaluation.pairs import LabelledPair
from relssl.evaluation.result import Finding, Task
from relssl.settings.evaluation import FinetuneConfig, LinearConfig, SemiConfig
from relssl.settings.run import ViewConfig
from relssl.weights.spec import BackboneSpec

VIEW = PlainView(16, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3)  # mirrored in training
TASK = Task(BackboneSpec("tiny", {}, "small", VIEW), Reader(VIEW), Engine.local("cpu", "fp32"), Bootstrap(100, 3))
SEED4 = dataclasses.replace(TASK, bootstrap=Bootstrap(100, 4))


def coloured(count: int, seed: int, classes: int = 3) -> Images:
    """Noise with a tint for each class, which a crop keeps: easily told apart."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    pixels = generator.integers(60, 120, (count, 3, 16, 16))
    for channel in range(3):
        pixels[labels == channel, channel] += 100
    return Images("tints", Pixels(torch.from_numpy(pixels.astype(np.uint8))), labels.astype(np.int64), ("red", "green", "blue"))


def pair(bank: int = 50, test: int = 33) -> LabelledPair:
    return LabelledPair(coloured(bank, 0), coloured(test, 1))


def as_files(images: Images, folder: Path) -> Images:
    """The same images as PNG files, named as ImageNet names them."""
    assert isinstance(images.source, Pixels) and images.labels is not None
    folder.mkdir()
    names = [f"n{label}_{row}.png" for row, label in enumerate(images.labels)]
    for row, name in enumerate(names):
        images.read(row, 10**6).save(folder / name)
    sizes = [(folder / name).stat().st_size for name in names]
    return dataclasses.replace(
        images, source=Files.of(str(folder), [(name.encode(), size) for name, size in zip(names, sizes, strict=True)])
    )


def network(width: int = 8, dropout: float = 0.0) -> nn.Module:
    """[B, 3, 16, 16] -> [B, width], with batch norm, from the same weights each time."""
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        backbone = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        for images in torch.randn(4, 8, 3, 16, 16):  # running statistics of their own
            backbone(images)
    return backbone.eval()


TUNE = FinetuneConfig(epochs=3, batch_size=16, lr=0.05, head_lr=0.5, weight_decay=0.01)
Settings = LinearConfig | FinetuneConfig | SemiConfig


def run(
    settings: Settings, data: LabelledPair | None = None, backbone: nn.Module | None = None, task: Task = TASK
) -> list[Finding]:
    protocol: Any = {LinearConfig: linear, FinetuneConfig: finetune, SemiConfig: semi}[type(settings)]
    return list(protocol(backbone or network(), data or pair(), settings, task))


def pixels(images: Images) -> Tensor:
    assert isinstance(images.source, Pixels)
    return images.source.tensor


def by_hand(data: LabelledPair, settings: LinearConfig | FinetuneConfig, groups: list[dict[str, Any]], forward: Any) -> float:
    """The same views in the same order through torch's own SGD and cosine; returns the last loss."""
    view = ViewConfig(size=16, scale=settings.scale, flip=0.5)
    plan = Plan(len(data.bank), 12, seed=3)  # 50 images in 4 steps of at most 16
    total = 4 * settings.epochs
    nesterov = getattr(settings, "nesterov", True)
    optimizer = torch.optim.SGD(groups, momentum=settings.momentum, nesterov=nesterov)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / total)))
    for epoch, (rows,) in plan.steps(0, total):
        views = apply(pixels(data.bank)[rows], view, draw(view, 3, epoch, rows, 0, (16, 16)))
        assert data.bank.labels is not None
        loss = F.cross_entropy(forward(VIEW.normalise(views)), torch.from_numpy(data.bank.labels[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return float(loss.detach())


def scored(data: LabelledPair, forward: Callable[[Tensor], Tensor]) -> tuple[dict[str, float], Tensor]:
    """The figures of a classifier on the plain views, and which of them are right."""
    assert data.test.labels is not None
    truth = torch.from_numpy(data.test.labels)
    with torch.no_grad():
        rank = ranks(forward(VIEW.normalise(plain_batch(pixels(data.test), VIEW))), truth)
    return accuracies(rank, truth, 3), rank == 0


@pytest.mark.parametrize("nesterov", [True, False])
def test_linear_equals_a_plain_loop_in_float64(nesterov: bool) -> None:
    settings = LinearConfig(lr=(0.7, 0.1), epochs=4, batch_size=16, nesterov=nesterov, weight_decay=1e-3)
    data, backbone = pair(), network().requires_grad_(False)
    for finding, rate in zip(run(settings, data), settings.lr, strict=True):
        head = linear_classifier(8, 3, 3).double()
        group = {"params": head.parameters(), "lr": rate, "weight_decay": settings.weight_decay}
        loss = by_hand(data, settings, [group], lambda views, head=head: head(backbone(views).double()))
        assert finding.details["loss"] == pytest.approx(loss, rel=1e-4)
        figures, right = scored(data, lambda views, head=head: head(backbone(views).double()))
        assert finding.figures == figures and finding.correct is not None and (finding.correct == right.numpy()).all()
        assert finding.setting == {"schedule": "cosine", "lr": rate} and finding.details["nesterov"] is nesterov
        assert finding.details["steps"] == 16 and finding.details["batch_size"] == 12


def test_finetune_equals_a_plain_loop() -> None:
    data, tuned, head = pair(), network().train(), linear_classifier(8, 3, 3)
    groups = [
        {"params": [tuned[0].weight], "weight_decay": TUNE.weight_decay, "lr": TUNE.lr},  # type: ignore[index]
        {"params": [tuned[1].weight, tuned[1].bias], "lr": TUNE.lr},  # type: ignore[index]
        {"params": [head.weight], "weight_decay": TUNE.weight_decay, "lr": TUNE.head_lr},
        {"params": [head.bias], "lr": TUNE.head_lr},
    ]
    loss = by_hand(data, TUNE, groups, lambda views: head(tuned(views)))
    (finding,) = run(TUNE, data)
    tuned.eval()
    assert finding.details["loss"] == pytest.approx(loss, rel=1e-4) and finding.details["steps"] == 12
    assert finding.figures == scored(data, lambda views: head(tuned(views)))[0] and finding.setting == {}


@pytest.mark.parametrize("settings", [LinearConfig(lr=(0.5,), epochs=3, batch_size=20), TUNE], ids=["linear", "finetune"])
def test_the_same_call_gives_the_same_bits_and_disturbs_nothing(settings: Settings) -> None:
    backbone = network(dropout=0.5)
    state, weights = torch.get_rng_state(), copy.deepcopy(backbone.state_dict())
    first = run(settings, backbone=backbone)[0]
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(12)
    assert run(settings, backbone=backbone.train())[0].plain() == first.plain()
    assert run(settings, backbone=backbone, task=SEED4)[0].details["loss"] != first.details["loss"]
    assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_details_hold_the_curve_and_the_best_epoch_but_figures_are_the_last() -> None:
    noisy = pair(60, 30)
    shuffled = dataclasses.replace(noisy.bank, labels=np.random.default_rng(0).permutation(noisy.bank.labels))
    (finding,) = run(LinearConfig(lr=(3.0,), epochs=5, batch_size=20), LabelledPair(shuffled, noisy.test))
    curve, best = finding.details["curve"], finding.details["best_epoch"]
    assert [epoch for epoch, _ in curve] == [1, 2, 3, 4, 5] and curve[-1][1] == round(finding.figures["top1"], 4)
    assert best["top1"] == max(top1 for _, top1 in curve) > finding.figures["top1"]
    assert curve[best["epoch"] - 1][1] == best["top1"] and best["chosen_on"] == "these test images"


def test_files_train_as_pixels_do(tmp_path: Path) -> None:
    data, settings = pair(24, 12), LinearConfig(lr=(0.5,), epochs=2, batch_size=12, nesterov=True)
    (in_memory,) = run(settings, data)
    files = LabelledPair(as_files(data.bank, tmp_path / "bank"), as_files(data.test, tmp_path / "test"))
    (from_files,) = run(settings, files)
    assert from_files.details["loss"] == pytest.approx(in_memory.details["loss"], abs=0.02)
    Path(files.bank.source.name(3)).write_bytes(b"no image")
    Path(files.test.source.name(0)).write_bytes(b"no image")
    (broken,) = run(settings, files)
    assert len(broken.notes) == 2 and all(note.startswith("1 t") for note in broken.notes)
    assert broken.correct is not None and len(broken.correct) == 11


def test_schedules_and_what_is_left_open_are_the_papers() -> None:
    assert [rate_share(epoch * 7 + 6, 7, 100, "step") for epoch in (0, 59)] == [1, 1]
    assert [rate_share(epoch * 7, 7, 100, "step") for epoch in (60, 79, 80, 99)] == pytest.approx([0.1, 0.1, 0.01, 0.01])
    short = [rate_share(epoch, 1, 7, "step") for epoch in range(7)]
    assert short == pytest.approx([1, 1, 1, 1, 1, 0.1, 0.01])  # 60 % are 4.2 epochs, 80 % 5.6
    for at in (0, 1, 35, 69):
        assert rate_share(at, 7, 10, "cosine") == pytest.approx(math.cos(math.pi * at / 140) ** 2)
    assert papers_choice(LinearConfig(), small=True) == ((1.0,), True)
    assert papers_choice(LinearConfig(), small=False) == ((0.3,), False)
    assert papers_choice(LinearConfig(schedule="step"), small=True) == ((30.0,), True)
    assert papers_choice(LinearConfig(lr=(2.0, 1.0), nesterov=True), small=False) == ((2.0, 1.0), True)
    assert papers_choice(LinearConfig(momentum=0), small=True) == ((1.0,), False)


class Huge(nn.Module):
    """Features so large that only the smallest of rates keeps them finite."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3)) * 1e15


def test_a_loss_that_is_not_finite_is_noted_or_ends_it_with_the_setting_named() -> None:
    lost, finite = run(LinearConfig(lr=(1e10, 1e-32), epochs=3, batch_size=25, momentum=0), backbone=Huge())
    assert lost.figures == {"top1": 0, "top5": 0, "mean_per_class": 0} and lost.details["loss"] is None and lost.notes
    assert math.isfinite(finite.details["loss"]) and finite.figures["top5"] == 100
    wild: dict[str, Any] = {"epochs": 3, "batch_size": 16, "lr": 1e20, "head_lr": 1e20}
    spoilt = network()
    torch.nn.init.constant_(next(spoilt.parameters()), torch.nan)
    for settings, backbone, fault in (
        (LinearConfig(lr=(1e10,), epochs=3, batch_size=25), Huge(), r"linear\.lr"),
        (FinetuneConfig(**wild), None, r"finetune\.lr"),
        (SemiConfig(fractions=(0.5,), **wild), None, r"semi\.lr"),
        (LinearConfig(epochs=1), spoilt, "tints"),
    ):
        with pytest.raises(NumericError, match=fault):
            run(settings, backbone=backbone)


def test_the_classifier_is_fp32_whatever_the_backbones_precision() -> None:
    half = dataclasses.replace(TASK, engine=Engine.local("cpu", "bf16"))
    (rough,), (exact,) = (run(LinearConfig(epochs=4, batch_size=25), task=each) for each in (half, TASK))
    assert 0 < abs(rough.details["loss"] - exact.details["loss"]) < 0.02  # features are rounded, weights are not


def test_a_frozen_backbone_is_finetuned_all_the_same_but_not_one_frozen_in_part() -> None:
    frozen, partly = network().requires_grad_(False), network()
    next(partly.parameters()).requires_grad_(False)
    plain = run(TUNE)[0].details["loss"]
    assert run(TUNE, backbone=frozen)[0].details["loss"] == plain != run(TUNE, backbone=partly)[0].details["loss"]
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_shares_are_drawn_by_the_seed_and_named_by_a_hash() -> None:
    data, settings = pair(60), SemiConfig(fractions=(0.1, 0.5), epochs=2, batch_size=4)
    assert data.bank.labels is not None
    findings = run(settings, data)
    assert [each.setting for each in findings] == [{"fraction": 0.1}, {"fraction": 0.5}]
    for each, count, steps in zip(findings, (2, 10), (2 * 2, 2 * 10), strict=True):
        rows = stratified(data.bank.labels, each.setting["fraction"], 3)
        assert each.details["split"] == fingerprint(rows) and each.details["per_class"] == [count, count]
        assert (each.details["images"], each.details["steps"], each.notes) == (3 * count, steps, ())
    assert run(settings, data, task=SEED4)[0].details["split"] != findings[0].details["split"]
    (whole,), (few,) = run(TUNE), run(SemiConfig(fractions=(1.0,), **vars(TUNE)))
    assert few.figures == whole.figures and few.details["loss"] == whole.details["loss"]  # all labels are fine-tuning


def test_an_index_file_chooses_the_images_of_the_whole_bank(tmp_path: Path) -> None:
    data, chosen = pair(24, 9), tmp_path / "few.txt"
    files = dataclasses.replace(data, bank=as_files(data.bank, tmp_path / "bank"))
    chosen.write_text("n0_0.png\nn1_1.png\nn0_3.png\n")
    settings = SemiConfig(index=str(chosen), epochs=1, batch_size=2)
    (finding,) = run(settings, files)
    assert finding.setting == {"index": "few.txt"} and finding.details["split"] == fingerprint(np.array([0, 1, 3]))
    assert finding.details["per_class"] == [0, 2] and finding.details["images"] == 3
    assert len(finding.notes) == 1 and "blue" in finding.notes[0]  # of which there is none
    chosen.write_text("0\n1\n3\n")
    assert run(settings, data)[0].details["split"] == finding.details["split"]
    with pytest.raises(ConfigError, match=r"semi\.index"):
        run(settings, dataclasses.replace(data, of=(48, 9)))
    chosen.write_text("n0_0.png\nn7.png\n")
    with pytest.raises(DataError, match=r"n7\.png"):
        run(settings, files)


def test_images_that_cannot_be_used_are_refused_by_name() -> None:
    data = pair()
    several = dataclasses.replace(data.bank, labels=None, targets=np.ones((50, 3), np.int8))
    for settings in (LinearConfig(), TUNE, SemiConfig()):
        with pytest.raises(ConfigError, match="tints"):
            run(settings, LabelledPair(several, data.test))
