"""Fine-tuning on all and on few labels: against a plain loop in torch, from the seed alone, the caller's network untouched."""

from __future__ import annotations

import copy
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
from relssl.data.plain import plain_batch
from relssl.data.subsets import fingerprint, stratified
from relssl.errors import ConfigError, DataError, NumericError
from relssl.evaluation.evaluate import LabelledPair
from relssl.evaluation.heads import finetune, linear_classifier, semi
from relssl.evaluation.metrics import accuracies, ranks
from relssl.evaluation.result import Finding
from relssl.settings.evaluation import FinetuneConfig, SemiConfig
from relssl.settings.run import ViewConfig
from small_pairs import FAST, as_files, coloured, engine, network, pair, reader

TUNE = FinetuneConfig(epochs=3, batch_size=16, lr=0.05, head_lr=0.5, weight_decay=0.01)


def run(
    settings: FinetuneConfig | SemiConfig, data: LabelledPair | None = None, backbone: nn.Module | None = None, seed: int = 3
) -> tuple[list[Finding], list[str]]:
    said: list[str] = []
    arguments = (backbone or network(), data or pair(), reader(), engine())
    others = {"bootstrap": FAST, "seed": seed, "say": said.append}
    if isinstance(settings, SemiConfig):
        return semi(*arguments, settings=settings, **others), said  # type: ignore[arg-type]
    return finetune(*arguments, settings=settings, **others), said  # type: ignore[arg-type]


def by_hand(data: LabelledPair, seed: int) -> tuple[nn.Module, nn.Module, float]:
    """The same views in the same order; what decays and which rate is whose written out by name."""
    bank, view = data.bank, ViewConfig(size=16, scale=TUNE.scale, flip=0.5)
    assert isinstance(bank.source, Pixels) and bank.labels is not None
    tuned, head = network().train(), linear_classifier(8, 3, seed)
    optimizer = torch.optim.SGD(
        [
            {"params": [tuned[0].weight], "weight_decay": TUNE.weight_decay, "lr": TUNE.lr},  # type: ignore[index]
            {"params": [tuned[1].weight, tuned[1].bias], "lr": TUNE.lr},  # type: ignore[index]
            {"params": [head.weight], "weight_decay": TUNE.weight_decay, "lr": TUNE.head_lr},
            {"params": [head.bias], "lr": TUNE.head_lr},
        ],
        momentum=TUNE.momentum,
        nesterov=True,
    )
    plan = Plan(len(bank), 12, seed=seed)  # 50 images in 4 steps of at most 16
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / 12)))
    for epoch, (rows,) in plan.steps(0, 12):
        views = apply(bank.source.tensor[rows], view, draw(view, seed, epoch, rows, 0, (16, 16)))
        loss = F.cross_entropy(head(tuned(reader().view.normalise(views))), torch.from_numpy(bank.labels[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return tuned.eval(), head, float(loss.detach())


def test_training_equals_a_plain_loop() -> None:
    data = pair()
    (found,), said = run(TUNE, data)
    tuned, head, loss = by_hand(data, 3)
    assert found.details["loss"] == pytest.approx(loss, rel=1e-4)
    assert isinstance(data.test.source, Pixels) and data.test.labels is not None
    truth = torch.from_numpy(data.test.labels)
    view = reader().view
    with torch.no_grad():
        scores = head(tuned(view.normalise(plain_batch(data.test.source.tensor, view))))
    assert found.figures == accuracies(ranks(scores, truth), truth, 3) and found.setting == {}
    assert said == [f"finetune: epoch {epoch} of 3, loss {said[epoch - 1].split()[-1]}" for epoch in (1, 2, 3)]
    assert said[-1].endswith(f"{loss:.3f}") and found.details["steps"] == 12


def test_the_network_learns_and_the_callers_stays_as_it_was() -> None:
    backbone, data = network(), pair()
    before = copy.deepcopy(backbone.state_dict())
    (found,), _ = run(dataclasses.replace(TUNE, epochs=15), data, backbone)
    assert found.figures["top1"] == 100 and found.intervals["top1"] == (100, 100)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert not backbone.training and all(parameter.grad is None for parameter in backbone.parameters())


def test_a_frozen_backbone_is_trained_all_the_same() -> None:
    frozen = network().requires_grad_(False)
    assert run(TUNE, backbone=frozen)[0][0].details["loss"] == run(TUNE)[0][0].details["loss"]
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    partly = network()
    next(partly.parameters()).requires_grad_(False)
    assert run(TUNE, backbone=partly)[0][0].details["loss"] != run(TUNE)[0][0].details["loss"]


def test_the_same_call_gives_the_same_bits_and_disturbs_no_generator() -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = run(TUNE, backbone=network(dropout=0.5))[0][0]
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(12)
    assert run(TUNE, backbone=network(dropout=0.5))[0][0].plain() == first.plain()
    assert run(TUNE, backbone=network(dropout=0.5), seed=4)[0][0].details["loss"] != first.details["loss"]


def test_shares_are_drawn_by_the_seed_and_named_by_a_hash() -> None:
    data = pair(60)
    assert data.bank.labels is not None
    settings = SemiConfig(fractions=(0.1, 0.5), epochs=2, batch_size=4)
    found, said = run(settings, data)
    assert [each.setting for each in found] == [{"fraction": 0.1}, {"fraction": 0.5}]
    for each, count, steps in zip(found, (2, 10), (2 * 2, 2 * 10), strict=True):
        rows = stratified(data.bank.labels, fraction=each.setting["fraction"], seed=3)
        assert each.details["split"] == fingerprint(rows) and each.details["per_class"] == [count, count]
        assert (each.details["images"], each.details["steps"], each.notes) == (3 * count, steps, ())
    assert said[0].startswith("semi on 10 %: epoch 1 of 2, loss ") and said[-1].startswith("semi on 50 %: epoch 2 of 2")
    other = run(settings, data, seed=4)[0]
    assert other[0].details["split"] != found[0].details["split"]


def test_all_labels_are_fine_tuning() -> None:
    (few,), _ = run(SemiConfig(fractions=(1.0,), **vars(TUNE)))
    (whole,), _ = run(TUNE)
    assert few.figures == whole.figures and few.details["loss"] == whole.details["loss"]


def test_an_index_file_chooses_the_images(tmp_path: Path) -> None:
    data = pair(24, 9)
    files = dataclasses.replace(data, bank=as_files(data.bank, tmp_path / "bank"))
    chosen = tmp_path / "few.txt"
    chosen.write_text("n0_0.png\nn1_1.png\nn0_3.png\n")
    settings = SemiConfig(index=str(chosen), epochs=1, batch_size=2)
    (found,), _ = run(settings, files)
    assert found.setting == {"index": "few.txt"} and found.details["split"] == fingerprint(np.array([0, 1, 3]))
    assert found.details["per_class"] == [0, 2] and found.details["images"] == 3
    assert found.notes == ("1 of 3 classes have no labelled image, the first is blue",)
    chosen.write_text("0\n1\n3\n")
    assert run(settings, data)[0][0].details["split"] == found.details["split"]
    chosen.write_text("n0_0.png\nn7.png\n")
    with pytest.raises(DataError, match=r"n7.png names none of the 24 images of tints; 1 such line"):
        run(settings, files)


def test_an_index_file_is_of_the_whole_bank(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("0\n1\n3\n")
    cut = dataclasses.replace(pair(24, 9), of=(48, 9))
    with pytest.raises(ConfigError, match=r"semi.index: names images of the whole bank, of which `images` leaves 24"):
        run(SemiConfig(index=str(tmp_path / "few.txt")), cut)


def test_batches_hold_two_images_at_least() -> None:
    data = pair(6)
    (found,), _ = run(SemiConfig(fractions=(0.01,), epochs=1, batch_size=2), data)  # three images: one step of two
    assert (found.details["images"], found.details["batch_size"], found.details["steps"]) == (3, 2, 1)
    single = LabelledPair(coloured(1, 0), data.test)
    with pytest.raises(DataError, match="single class"):
        run(TUNE, single)


def test_one_labelled_image_is_too_few(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("4\n")
    with pytest.raises(DataError, match="tints: 1 labelled images are too few to train on, needs 2 or more"):
        run(SemiConfig(index=str(tmp_path / "one.txt")))


def test_a_loss_that_is_not_finite_ends_it_by_name() -> None:
    with pytest.raises(
        NumericError, match=r"finetune: the loss stopped being finite by epoch \d of 3; lower finetune.lr \(1e\+20\)"
    ):
        run(dataclasses.replace(TUNE, lr=1e20, head_lr=1e20))
    with pytest.raises(NumericError, match=r"semi on 50 %: .* semi.lr \(1e\+20\) or semi.head_lr \(1e\+20\)"):
        run(SemiConfig(fractions=(0.5,), epochs=3, batch_size=16, lr=1e20, head_lr=1e20))


def test_several_labels_an_image_are_refused() -> None:
    data = pair()
    several = dataclasses.replace(data.bank, labels=None, targets=np.ones((50, 3), np.int8))
    for settings, name in ((TUNE, "finetune"), (SemiConfig(), "semi")):
        with pytest.raises(ConfigError, match=f"{name} takes one label an image"):
            run(settings, LabelledPair(several, data.test))
