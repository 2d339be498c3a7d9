"""A frozen teacher: its relations are those that the formulas say, it never changes, and nothing of it is saved."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import relssl
from relssl.cli import main
from relssl.engine import Engine
from relssl.errors import CheckpointError, ConfigError
from relssl.evaluation.features import state_hash
from relssl.method import Encoder, ReSSL
from relssl.method.frozen import FrozenTeacher
from relssl.settings.reading import nest
from relssl.settings.run import resolve
from relssl.train.loop import train_step
from relssl.train.pretrain import Result, pretrain, resume
from relssl.train.run import build
from relssl.weights.opening import open_backbones
from small_runs import SMALL, cut, equal_runs, final_state, merge, training_state

NARROW = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 12], "zero_init_last": False}
OVER: dict[str, Any] = merge(SMALL, {"backbone_args": NARROW}) | {
    "recipe": "distil",
    "encoder": {"stem": "small-pool", "projector_hidden": 32},
}
FIXED = {"views.weak.affine": 0}


def taught(out: Path, source: Any, **more: Any) -> Result:
    return pretrain(settings=resolve(merge(OVER, nest({"out": str(out), "teacher": str(source)} | more))), quiet=True)


def ready(source: Any, **more: Any) -> Any:
    config = resolve(merge(OVER, nest({"out": "unused", "teacher": str(source)} | more)))
    return build(config, Engine(config.engine))


def softmax(s: np.ndarray) -> np.ndarray:
    e = np.exp(s - s.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("size", [8, 14])
def test_a_steps_loss_and_gradient_equal_a_float64_oracle(tiny_net: Any, size: int) -> None:
    views, own = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)), ((0.5, 0.5, 0.5), (0.3, 0.2, 0.1))
    network = tiny_net().eval()
    model = ReSSL(Encoder(tiny_net(), 16, dim=16), 24, 16, given=FrozenTeacher(network, size, "bicubic", own, views)).train()
    assert not network.training and model.teacher is None
    pixels, strong = torch.rand(6, 3, 8, 8), torch.randn(6, 3, 8, 8)
    weak = (pixels - torch.tensor(views[0]).view(-1, 1, 1)) / torch.tensor(views[1]).view(-1, 1, 1)
    step = model.step(weak, [strong], student_temperature=0.2, teacher_temperature=0.01, info_nce_temperature=0.1, warmup_mix=0.0)
    step.loss.backward()

    images = pixels.double()
    if size != 8:
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    images = (images - torch.tensor(own[0]).view(-1, 1, 1)) / torch.tensor(own[1]).view(-1, 1, 1)
    keys = copy.deepcopy(network).double()(images).detach().numpy()
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    exact = copy.deepcopy(model.student).double()
    exact.zero_grad()
    queries, memory = exact([strong.double()])[0], model.memory.keys.double().numpy()
    target, relation = softmax(keys @ memory.T / 0.01), softmax(queries.detach().numpy() @ memory.T / 0.2)
    assert float(step.loss.detach()) == pytest.approx(-(target * np.log(relation)).sum() / 6, rel=1e-4)
    queries.backward(torch.from_numpy((relation - target) @ memory / (0.2 * 6)))
    for ours, theirs in zip(model.student.parameters(), exact.parameters(), strict=True):
        assert torch.allclose(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(step.keys, keys, atol=1e-4)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_the_teacher_stays_bitwise_is_not_saved_and_the_student_matches_its_width(source: Path, tmp_path: Path) -> None:
    run = ready(source)
    teacher, before = run.state.model.given, state_hash(run.state.model.given)
    for parts in run.loader.stream(0, 4):
        train_step(run, parts)
    assert state_hash(teacher) == before == state_hash(FrozenTeacher(open_backbones(source).backbone, *frozen(run)))
    assert run.state.model.memory.keys.shape == (96, 16) and run.config.encoder.dim == 16

    result = taught(tmp_path / "taught", source)
    assert {name.partition(".")[0] for name in final_state(result.folder)} == {"student", "memory", "optimizer", "random"}
    assert [path.name for path in (result.folder / "export").glob("*.safetensors")] == ["backbone.safetensors"]
    fact = json.loads((result.folder / "environment.json").read_text())["teacher"]
    assert (fact["source"], fact["network"], fact["part"]) == ("source", "resnet18", "student") and len(fact["sha256"]) == 64
    assert "knn_teacher_top1" in result.rows[0] and "knn_teacher_top1" not in result.rows[-1]
    assert main(["evaluate", str(result.folder), "--network", "teacher"]) == 2


def frozen(run: Any) -> tuple[Any, ...]:
    view = run.given.teacher.transform
    return view.size, view.interpolation, (view.mean, view.std), run.config.views.statistics()


@pytest.mark.parametrize("more", [{}, FIXED], ids=["random view", "fixed view"])
def test_resume_is_exact_and_opens_the_same_teacher_again(source: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    weights = shutil.copytree(source / "export", tmp_path / "weights") / "backbone.safetensors"
    often = {"checkpoint.every_steps": 3, "checkpoint.keep": 9, "max_images": 128} | more
    whole = taught(tmp_path / "whole", weights, **often).folder
    folder = cut(whole, tmp_path / "cut", 3)
    resume(folder, quiet=True)
    assert equal_runs(whole, folder)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"^teacher: .*other weights"):
        resume(cut(whole, tmp_path / "other", 3), quiet=True)


def test_features_of_a_fixed_view_are_computed_once_and_equal_those_of_each_step(source: Path) -> None:
    once, each = (ready(source, **FIXED, **{"engine.precision": "fp32"}) for _ in range(2))
    assert once.known.shape == (320, 16)
    each.known = None
    for run in (once, each):
        for parts in run.loader.stream(0, 4):
            train_step(run, parts)
    a, b = training_state(once), training_state(each)
    assert all(torch.allclose(a[name].double(), b[name].double(), rtol=1e-4, atol=1e-5) for name in a)
    assert ready(source).known is None  # a random view


def test_a_taught_run_has_its_page_and_its_advice(source: Path, tmp_path: Path) -> None:
    folder = taught(tmp_path / "run", source, **{"log.knn_every": 0}).folder
    assert "no pictures" not in relssl.write_report(folder).read_text()
    assert relssl.advise(folder)["temperatures"]


def test_what_does_not_fit_a_frozen_teacher_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refusals: list[tuple[str, dict[str, Any]]] = [
        (r"^teacher: .*\(ressl", {"method.name": "byol", "recipe": "byol/digits"}),
        (r"^teacher: .*simclr", {"method.name": "simclr", "recipe": "simclr/digits"}),
        (r"^method.teacher_momentum: ", {"method.teacher_momentum": 0.9}),
        (r"^method.shuffle: ", {"method.shuffle": True}),
        (r"^encoder.dim: 32 is not the 16 features", {"encoder.dim": 32}),
        (r"^teacher: .*3 channels", {"views.channels": 1}),
        (r"^teacher: .*nowhere", {"teacher": str(tmp_path / "nowhere")}),
    ]
    for message, more in refusals:
        with pytest.raises(ConfigError, match=message):
            taught(out, source, **more)
        assert not (out / "config.yaml").exists()
    with pytest.raises(ConfigError, match=r"^teacher: recipe distil needs"):
        pretrain("digits", recipe="distil", out=out, quiet=True)


def test_methods_with_a_memory_and_crops_and_parts_take_a_frozen_teacher(source: Path, tmp_path: Path) -> None:
    short = {"max_steps": 2, "log.knn_every": 0}
    moco = {"recipe": "moco/digits", "method.symmetric": True} | short
    assert taught(tmp_path / "moco", source, **moco).rows[-1]["loss"] > 0
    crops = {"views.crops": [[32, 0.3, 1.0], [24, 0.1, 0.5]], "accumulate": 2} | short
    assert taught(tmp_path / "crops", source, **crops).rows[-1]["loss"] > 0
