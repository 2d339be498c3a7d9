"""What joins the pieces: steps of a run against the paper's formulas by hand, with torch's own optimizer, and the way of settings to them."""

import copy
import dataclasses
import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relssl.data.draws import draw
from relssl.data.loader import Plan
from relssl.method import Encoder, info_nce, relation, relational_loss
from relssl.method.create import create_method, create_run_optimizer, step_settings
from relssl.settings.run import VIEWS, ViewConfig, from_mapping, resolve
from relssl.train import checkpoint
from relssl.train.loop import origin, train_step
from small_runs import ready_run


def test_steps_of_a_run_are_the_papers_by_hand(tmp_path: Path) -> None:
    method = {
        "warmup": "linear",
        "warmup_share": 0.5,
        "info_nce_temperature": 0.3,
        "teacher_momentum": 0.6,
        "teacher_momentum_end": 1.0,
    }
    method |= {"teacher_temperature_start": 0.02, "teacher_temperature_epochs": 2, "loss_form": "plain"}
    optimizer = {"warmup_epochs": 0, "lr": 0.5, "momentum": 0.5, "weight_decay": 0.01, "clip": 0.1}
    run = ready_run(tmp_path, images=96, method=method, optimizer=optimizer, **{"engine.precision": "fp32", "log.every": 1})
    assert run.state.model.memory is not None
    student, teacher = (copy.deepcopy(network) for network in run.networks)
    memory = run.state.model.memory.keys.clone()
    sgd = torch.optim.SGD(student.parameters(), lr=1, momentum=0.5, weight_decay=0.01)
    for step, (part,) in enumerate(run.loader.stream(0, 4)):  # of 6, three an epoch
        fall = 0.5 * (1 + math.cos(math.pi * step / 6))
        mix, temperature, momentum = max(0.0, 1 - step / 3), 0.02 + 0.02 * step / 6, 1 - 0.4 * fall
        taken = train_step(run, [part])
        assert taken is not None
        figures = taken.read()
        keys, queries = teacher([part.weak])[0], student(part.strong)
        relational = relational_loss(queries, keys, memory, student_temperature=0.1, teacher_temperature=temperature)
        loss = mix * info_nce(queries, keys, memory, temperature=0.3) + (1 - mix) * relational
        sgd.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 0.1)
        sgd.param_groups[0]["lr"] = 0.5 * fall
        sgd.step()
        assert float(figures["loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
        entropy = torch.special.entr(relation(keys, memory, temperature)).sum(1).mean()
        assert float(figures["teacher_entropy"]) == pytest.approx(
            float(entropy), rel=1e-3
        )  # of the memory before the keys are in it
        memory = memory.clone()
        memory[32 * step % 96 : 32 * step % 96 + 32] = keys
        with torch.no_grad():
            for own, followed in zip(teacher.parameters(), student.parameters(), strict=True):
                own.copy_(momentum * own + (1 - momentum) * followed)
    for ours, theirs in zip(run.networks, (student, teacher), strict=True):
        for (name, value), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(value, expected, rtol=2e-3, atol=2e-4, msg=name)
    torch.testing.assert_close(run.state.model.memory.keys, memory, rtol=1e-3, atol=1e-4)


def test_the_extensions_projector_and_predictor_by_hand() -> None:
    norms = {"projector_norm": "batch", "projector_output_norm": "plain"}
    net = Encoder(nn.Flatten(), 12, projector_hidden=8, dim=4, predictor="residual", predictor_hidden=6, **norms)  # type: ignore[arg-type]
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    assert sum(parameter.numel() for parameter in net.parameters()) == 12 * 8 + 16 + 8 * 4 + 4 * 6 + 12 + 6 * 4 + 4

    def normed(x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()

    x, w = torch.rand(7, 3, 2, 2), dict(net.named_parameters())
    hidden = normed(x.flatten(1) @ w["projector.0.weight"].T) * w["projector.1.weight"] + w["projector.1.bias"]
    z = normed(hidden.relu() @ w["projector.3.weight"].T)
    hidden = normed(z @ w["predictor.0.weight"].T) * w["predictor.1.weight"] + w["predictor.1.bias"]
    q = z + hidden.relu() @ w["predictor.3.weight"].T + w["predictor.3.bias"]
    torch.testing.assert_close(net.embed(x), F.normalize(q, dim=1), rtol=1e-4, atol=1e-5)


def test_what_a_checkpoint_says_beside_tensors_comes_back(tmp_path: Path) -> None:
    run, other = ready_run(tmp_path), ready_run(tmp_path)
    run.state.best, run.state.unreadable = {"knn_top1": 50.0, "checkpoint": "step-00000000"}, {"a.jpg"}
    run.state.unmeasured = {"step": 0, "loss": math.nan}  # which JSON has no number for
    run.state.guard.streak.fill_(3)
    path = checkpoint.save(tmp_path, run.state, run.engine, origin(run))
    assert path is not None and checkpoint.restore(path, other.state, other.engine, origin(other)) == []
    assert (other.state.best, other.state.unreadable, int(other.state.guard.streak)) == (run.state.best, {"a.jpg"}, 3)
    assert other.state.unmeasured is not None and math.isnan(other.state.unmeasured["loss"])


def test_draws_and_orders_of_earlier_runs_stay_as_they_were() -> None:
    over = {"solarize": 0.3, "affine": 0.7, "degrees": 20.0, "translate": 0.1, "zoom": (0.7, 1.3)}
    draws, plan = draw(ViewConfig(**{**VIEWS["strong"], **over}), 3, 5, np.array([7, 2**40]), 1, (40, 50)), Plan(100, 20, seed=3)
    values = [*(getattr(draws, field.name) for field in dataclasses.fields(draws)), plan.order(2), plan.shuffle(2, 0)]
    digest = hashlib.sha256(b"".join(np.round(np.asarray(each, np.float64), 9).tobytes() for each in values))
    assert digest.hexdigest()[:16] == "c287bc591c9ba05e"


def test_settings_arrive_where_they_are_used() -> None:
    config = resolve(
        {"recipe": "digits", "optimizer": {"name": "adamw", "betas": [0.8, 0.95]}, "method.info_nce_temperature": 0.31}
    )
    views = {"mean": [0.5] * 3, "std": [0.2] * 3, "margin": 1.0}
    config = from_mapping(dataclasses.asdict(config) | {"views": dataclasses.asdict(config.views) | views})
    assert create_run_optimizer(config, create_method(config).student).defaults["betas"] == (0.8, 0.95)
    sce = from_mapping(
        dataclasses.asdict(config) | {"method": dataclasses.asdict(config.method) | {"name": "sce", "positive_share": 0.37}}
    )
    for each, name, value in ((config, "info_nce_temperature", 0.31), (sce, "positive_share", 0.37)):
        model = create_method(each)
        assert step_settings(each, model, dict.fromkeys(model.scheduled))[name] == value


@pytest.mark.parametrize("name", ["affine", "flip", "jitter", "grey", "blur", "solarize", "randaugment"])
def test_a_view_that_draws_is_not_fixed(name: str) -> None:
    assert ViewConfig().fixed and not ViewConfig(**{name: 1}).fixed
