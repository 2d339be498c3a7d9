"""Runs that begin with given weights: which network, which weights, what stays still, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from timm.optim import param_groups_layer_decay

from relssl.cli import main
from relssl.engine import Engine
from relssl.errors import CheckpointError, ConfigError
from relssl.files import read_rows
from relssl.method.backbones import create_backbone
from relssl.method.base import unwrapped
from relssl.method.optim import parameter_groups
from relssl.method.stages import depths, freeze_stages
from relssl.settings.reading import nest
from relssl.settings.run import resolve
from relssl.train.loop import train_step
from relssl.train.pretrain import Result, pretrain, resume
from relssl.train.run import build
from relssl.weights import store
from relssl.weights.opening import load_run, open_backbones
from small_runs import SMALL, cut, differing, equal_runs, final_state, merge, repeatable_rows

# As a user would type it: the weights say which network it is.
OVER: dict[str, Any] = {name: value for name, value in SMALL.items() if name != "backbone_args"} | {
    "encoder": {"projector_hidden": 32, "dim": 16}
}


def going_on(out: Path, source: Any, **more: Any) -> Result:
    return pretrain(settings=resolve(merge(OVER, nest({"out": str(out), "start": str(source)} | more))), quiet=True)


def ready(source: Any, **more: Any) -> Any:
    config = resolve(merge(OVER, nest({"start": str(source), "out": "unused"} | more)))
    return build(config, Engine(config.engine))


def backbones(run: Any) -> list[dict[str, torch.Tensor]]:
    return [network.backbone.state_dict() for network in run.networks]


def test_student_and_teacher_begin_with_the_weights_bit_for_bit_and_fresh_heads(source: Path) -> None:
    weights, run = open_backbones(source).backbone.state_dict(), ready(source)
    assert run.config.backbone_args == SMALL["backbone_args"] and run.config.encoder.stem == "small-pool"
    for network in backbones(run):
        assert differing(weights, network) == []
    trained = final_state(source)
    assert not torch.equal(unwrapped(run.state.model.student).projector[0].weight, trained["student.projector.0.weight"])
    exported = ready(source / "export" / "backbone.safetensors")
    assert all(differing(weights, network) == [] for network in backbones(exported))


def test_a_run_says_where_it_began_and_measures_the_weights_before_it_trains(source: Path, tmp_path: Path) -> None:
    result = going_on(tmp_path / "on", source, recipe="continue", max_steps=2)
    facts = json.loads((result.folder / "environment.json").read_text())["start"]
    weights = len(open_backbones(source).backbone.state_dict())
    assert (facts["source"], facts["network"], facts["weights"]) == ("source", "resnet18", weights)
    sums = (source / "checkpoints" / facts["origin"] / "SHA256SUMS").read_text()
    assert f"{facts['sha256']}  state.safetensors" in sums
    assert result.rows[0]["knn_top1"] == read_rows(source / "metrics.jsonl")[-1]["knn_top1"]
    config = load_run(result.folder).config
    assert config.backbone_args == SMALL["backbone_args"] and Path(config.start or "") == source
    assert (result.folder / "export" / "backbone.safetensors").exists()


def test_resume_is_exact_and_needs_the_source_no_more(source: Path, tmp_path: Path) -> None:
    weights = shutil.copytree(source / "export", tmp_path / "weights") / "backbone.safetensors"
    more = {"recipe": "continue", "optimizer.heads_first": 1.0, "optimizer.layer_decay": 0.7, "encoder.frozen_stages": 1}
    more |= {
        "optimizer.name": "adamw",
        "optimizer.lr": 1e-3,
        "checkpoint.every_steps": 2,
        "checkpoint.keep": 9,
        "max_images": 128,
    }
    whole = going_on(tmp_path / "whole", weights, **more).folder
    weights.unlink()
    folder = cut(whole, tmp_path / "cut", 2)  # while the heads train alone
    resume(folder, quiet=True)
    assert equal_runs(whole, folder)


def test_what_was_typed_beside_the_weights_stays_when_there_is_no_checkpoint_yet(source: Path, tmp_path: Path) -> None:
    typed = {"max_steps": 2, "views": {"mean": (0.1, 0.2, 0.3)}, "backbone_args": {"drop_rate": 0.1}}
    folder = going_on(tmp_path / "run", source, **typed).folder
    settings, rows = (folder / "config.yaml").read_text(), repeatable_rows(folder)
    for path in ("checkpoints", "export", "metrics.jsonl", "status.json", "report.html"):
        shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink(missing_ok=True)
    resume(folder, quiet=True)
    assert (folder / "config.yaml").read_text() == settings and repeatable_rows(folder) == rows
    assert load_run(folder).config.backbone_args["drop_rate"] == 0.1


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
def test_the_backbone_stays_bitwise_while_heads_go_first(source: Path, optimizer: str) -> None:
    run = ready(source, **{"optimizer.heads_first": 0.3, "optimizer.warmup_epochs": 0, "optimizer.name": optimizer})
    student, teacher = run.networks
    before, moved = {name: value.clone() for name, value in student.named_parameters()}, []
    for parts in run.loader.stream(0, 5):
        train_step(run, parts)
        now = student.named_parameters()
        moved.append({name.partition(".")[0] for name, value in now if not torch.equal(value, before[name])})
    assert moved[2] == {"projector"}  # 0.3 of 10 steps
    assert moved[-1] == {"projector", "backbone"}
    assert any(not torch.equal(value, before[name]) for name, value in teacher.named_parameters() if name.startswith("backbone"))


def test_frozen_stages_stay_with_their_statistics(source: Path) -> None:
    run = ready(source, **{"encoder.frozen_stages": 2, "log.knn_every": 0})
    before = [{name: value.clone() for name, value in state.items()} for state in backbones(run)]
    for parts in run.loader.stream(0, 3):
        train_step(run, parts)
    for state, old in zip(backbones(run), before, strict=True):
        still = {name for name, value in state.items() if torch.equal(value, old[name])}
        assert still == {name for name in state if name.startswith(("conv1", "bn1", "layer1"))}
    with pytest.raises(ConfigError, match=r"encoder\.frozen_stages.* 5 stages"):
        freeze_stages(timm.create_model("resnet18", num_classes=0), 5)


def test_stages_of_torchvisions_networks_are_timms() -> None:
    ours, theirs = (create_backbone(name) for name in ("resnet18", "torchvision/resnet18"))
    for count in range(1, 5):
        for network in (ours, theirs):
            freeze_stages(network, count)
        trained = [
            [name for name, parameter in network.named_parameters() if parameter.requires_grad] for network in (ours, theirs)
        ]
        assert trained[0] == trained[1] and not any(name.startswith(("conv1", "bn1", f"layer{count - 1}")) for name in trained[0])
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 4, 3))
    freeze_stages(plain, 1)
    assert [parameter.requires_grad for parameter in plain.parameters()] == [False, False, True, True, True, True]


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_050", "convnext_atto", "regnety_002"])
def test_rates_fall_with_depth_as_timms_do(name: str) -> None:
    backbone = timm.create_model(name, num_classes=0)
    theirs = {id(p): group["lr_scale"] for group in param_groups_layer_decay(backbone, layer_decay=0.6) for p in group["params"]}
    student = torch.nn.Module()
    student.backbone, student.projector = backbone, torch.nn.Linear(2, 2)
    groups = parameter_groups(student, decay="weights", weight_decay=1e-4, layer_decay=0.6)
    ours = {id(p): group["times"] for group in groups for p in group["params"]}
    assert {key: ours[key] for key in theirs} == pytest.approx(theirs)
    assert {ours[id(p)] for p in student.projector.parameters()} == {1.0} and min(theirs.values()) < 0.2


def test_other_networks_are_as_deep_as_their_children_and_one_block_has_no_depth() -> None:
    groups = depths(torchvision.models.mobilenet_v2(weights=None))
    assert groups["features.0.0.weight"] == 0 and groups["features.18.0.weight"] == 18
    assert groups["classifier.1.weight"] > 18
    student = torch.nn.Module()
    student.backbone = torch.nn.Conv2d(3, 4, 3)
    with pytest.raises(ConfigError, match=r"optimizer\.layer_decay"):
        parameter_groups(student, decay="all", weight_decay=0.0, layer_decay=0.5)


def test_a_timm_network_starts_from_a_file_of_another_program_at_another_image_size(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=12, img_size=224)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises((ConfigError, CheckpointError), match=r"^start: .*--backbone"):  # names do not say which ViT it is
        ready(tmp_path / "vit.safetensors")
    run = ready(tmp_path / "vit.safetensors", backbone="vit_tiny_patch16_224")
    flexible = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    flexible.load_state_dict(network.state_dict())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(run.networks[0].backbone.eval()(images), flexible(images))
    assert run.config.views.mean == (0.485, 0.456, 0.406)  # what the weights have seen


def test_what_does_not_fit_is_refused_by_name_before_there_is_a_folder(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    untrained = shutil.copytree(source / "export", tmp_path / "fresh") / "backbone.safetensors"
    network = open_backbones(untrained).spec.create()
    untrained.write_bytes(store.encode(network.state_dict(), {"network": "student", "origin": "step-00000001"}))
    torch.save({"encoder.blocks.0.weight": torch.rand(3, 3)}, other := tmp_path / "foreign.pth")
    wider = {"backbone_args": SMALL["backbone_args"] | {"channels": [8, 8, 16, 32]}}
    refusals: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
        (ConfigError, r"^start: source has backbone resnet18, not resnet50", source, {"backbone": "resnet50"}),
        (ConfigError, r"^start: source has encoder.stem", source, {"encoder.stem": "small"}),
        (ConfigError, r"^start: .*nowhere", tmp_path / "nowhere.safetensors", {}),
        (ConfigError, r"^start: .*pretrained weights", "resnet18.none_such", {}),
        (ConfigError, r"^start: --from", source, {"start_from": "solo"}),
        (CheckpointError, r"^start: .*looks untrained", untrained, {}),
        (CheckpointError, r"^start: .*other shape", source, wider),
        (
            ConfigError,
            r"^start: .*read in layout solo, are those of no ResNet; `relssl import .*foreign.pth --backbone NAME`",
            other,
            {},
        ),
    ]
    for kind, message, given, more in refusals:
        with pytest.raises(kind, match=message):
            going_on(out, given, **more)
        assert not (out / "config.yaml").exists()
    with pytest.raises(ConfigError, match=r"^start: recipe continue needs"):
        pretrain("digits", recipe="continue", out=out, quiet=True)
    for name, value, message in (
        ("optimizer.heads_first", 1, ".*needs start"),
        ("encoder.frozen_stages", 1, ".*needs start"),
        ("start_from", "moco", ""),
    ):
        with pytest.raises(ConfigError, match=f"^{name}: {message}"):
            resolve({name: value})
    assert main(["resume", str(source), "--start", "resnet18"]) == 2  # it was started with what it was started with


def test_without_labels_the_rank_of_the_features_is_measured_before_and_after(source: Path, tmp_path: Path) -> None:
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (32, 40, 48, 3), np.uint8)):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    more = {"views.weak.size": 32, "views.strong.size": 32, "batch_size": 16, "method.memory_size": 32, "loader.workers": 0}
    rows = going_on(tmp_path / "on", source, data=str(tmp_path), recipe="continue", epochs=1, **more).rows
    assert rows[0]["step"] == 0 and 1 <= rows[0]["feature_rank"] <= 16 and "feature_rank" in rows[-1]
