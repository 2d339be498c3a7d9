"""The optimizers: their groups, the predictor's learning rate, and that each leaves no trace of a non-finite step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from relssl.method import Encoder
from relssl.method.optim import create_optimizer, parameter_groups
from relssl.settings.reading import merge
from relssl.settings.run import resolve
from relssl.train.loop import Run, scheduled, train_step
from relssl.train.pretrain import build
from small_runs import SMALL, differing, final_state, small_run


def encoder(predictor: str = "mlp") -> Encoder:
    return Encoder(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 6)), 6, projector_hidden=8, dim=4, predictor=predictor
    )


def test_the_predictor_has_groups_of_its_own() -> None:
    student = encoder()
    groups = parameter_groups(student, decay="weights", weight_decay=5e-4, predictor_lr=10, predictor_constant=True)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    found = {
        (group["times"], group["constant"], group["weight_decay"] > 0): {names[id(parameter)] for parameter in group["params"]}
        for group in groups
    }
    assert found == {
        (1.0, False, True): {"backbone.1.weight", "projector.0.weight", "projector.2.weight"},
        (1.0, False, False): {"backbone.1.bias", "projector.0.bias", "projector.2.bias"},
        (10, True, True): {"predictor.0.weight", "predictor.3.weight"},
        (10, True, False): {"predictor.1.weight", "predictor.1.bias", "predictor.3.bias"},
    }


def test_without_a_predictor_nothing_has_another_rate() -> None:
    groups = parameter_groups(encoder("none"), decay="all", weight_decay=5e-4, predictor_lr=10, predictor_constant=True)
    assert [(group["times"], group["constant"]) for group in groups] == [(1.0, False)]


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_torchs_optimizers_are_fused_on_a_cpu(name: str, kind: type) -> None:
    groups = parameter_groups(encoder(), decay="all", weight_decay=5e-4)
    optimizer = create_optimizer(groups, name, lr=0.1, betas=(0.8, 0.9))
    assert type(optimizer) is kind and optimizer.defaults["fused"]
    assert name == "sgd" or optimizer.defaults["betas"] == (0.8, 0.9)


def test_lars_adapts_what_decays_and_nothing_else() -> None:
    """One step against You et al.'s formula, in float64."""
    student = encoder("none").double()
    optimizer = create_optimizer(parameter_groups(student, decay="weights", weight_decay=1e-2), "lars", lr=0.5, momentum=0.0)
    student([torch.randn(5, 3, 2, 2, dtype=torch.float64)]).square().mul(torch.arange(4)).sum().backward()
    expected = {}
    for name, parameter in student.named_parameters():
        gradient, decays = parameter.grad, parameter.ndim > 1
        assert gradient is not None
        if decays:
            trust = 0.001 * parameter.norm() / (gradient.norm() + 1e-2 * parameter.norm())
            gradient = trust * (gradient + 1e-2 * parameter)
        expected[name] = parameter.detach() - 0.5 * gradient
    optimizer.step()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name].detach(), rtol=1e-6, atol=1e-9)


def trainer(out: Path, **overrides: Any) -> Run:
    from relssl.engine import Engine

    config = resolve(merge(merge(SMALL, overrides), {"out": str(out), "log": {"knn_every": 0}}))
    return build(config, Engine(config.engine))


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_rates_follow_the_schedule_but_the_predictors(tmp_path: Path, name: str) -> None:
    made = trainer(
        tmp_path,
        encoder={"predictor": "mlp"},
        optimizer={"name": name, "lr": 0.2, "lr_start": 0.1, "predictor_lr": 3, "predictor_schedule": "constant"},
    )
    train_step(made, next(made.loader.stream(0, 1)))
    rates = {group["times"]: group["lr"] for group in made.state.optimizer.param_groups}
    assert rates == pytest.approx({1.0: 0.1, 3: 0.6})
    assert scheduled(made, made.plan.steps_per_epoch)["lr"] == pytest.approx(0.2)


@pytest.mark.parametrize("name", ["lars", "adamw"])
def test_a_non_finite_step_leaves_no_trace(tmp_path: Path, name: str) -> None:
    made = trainer(tmp_path, optimizer={"name": name})
    stream = made.loader.stream(0, 3)
    train_step(made, next(stream))
    before = {key: value.clone() for key, value in made.state.model.state_dict().items()}
    moments = [value.clone() for state in made.state.optimizer.state.values() for value in state.values()]
    (part,) = next(stream)
    part.strong[0][0, 0, 0, 0] = torch.nan
    train_step(made, [part])
    assert differing(before, made.state.model.state_dict()) == []
    after = [value for state in made.state.optimizer.state.values() for value in state.values()]
    assert len(moments) == len(after) and all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))


@pytest.mark.parametrize("name", ["lars", "adamw"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, name: str) -> None:
    from relssl.train.pretrain import resume

    settings = {"optimizer.name": name, "optimizer.lr": 0.01, "checkpoint.every": 1, "log.knn_every": 0}
    whole = small_run(tmp_path / "whole", **settings)
    cut = small_run(tmp_path / "cut", **settings)
    first = min((cut.folder / "checkpoints").iterdir()).name
    (cut.folder / "status.json").unlink()
    resume(cut.folder, checkpoint=first, quiet=True)
    assert differing(final_state(whole.folder), final_state(cut.folder)) == []
