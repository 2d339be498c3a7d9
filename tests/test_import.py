from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.data
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import relssl
from foreign_files import WRITERS, moco_v2, moco_v3, official, official_small, plain, resnet18, solo, trained, under
from relssl.cli import main
from relssl.errors import CheckpointError, ConfigError
from relssl.weights import foreign, twins
from relssl.weights.export import import_weights
from relssl.weights.foreign import load_foreign, load_timm
from relssl.weights.opening import Reading, open_backbones


def images(side: int = 64) -> Tensor:
    return torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1))


def write(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def plain_file(folder: Path) -> Path:
    return write(folder / "plain.pth", plain(resnet18(), resnet18()))


@torch.no_grad()
def same(one: nn.Module, other: nn.Module, side: int = 64) -> bool:
    return torch.equal(one(images(side)), other(images(side)))


@pytest.mark.parametrize("kind", WRITERS)
def test_every_layout_loads_whole_and_computes_what_its_source_does(tmp_path, kind):
    layout, stem, writer = WRITERS[kind]
    student, teacher = resnet18(stem), resnet18(stem, seed=1)
    path = write(tmp_path / "weights.pth", writer(student, teacher))
    backbone, report = load_foreign(path)
    assert (report.layout, report.detected, report.backbone, report.stem) == (layout, True, "resnet18", stem)
    assert report.matched == report.total == len(student.state_dict())
    assert report.missing == report.unexpected == []
    assert report.network == {"dino": "teacher", "torchvision": "backbone"}.get(kind, "student")
    assert same(backbone, teacher if kind == "dino" else student)
    assert backbone.num_features == 512 and not backbone.training
    if kind != "torchvision":
        other, told = load_foreign(path, layout=layout, network="student" if kind == "dino" else "teacher")
        assert same(other, student if kind == "dino" else teacher) and not told.detected


@pytest.mark.parametrize("kind", WRITERS)
def test_one_renamed_key_is_refused_by_both_its_names(tmp_path, kind):
    _, stem, writer = WRITERS[kind]
    content = writer(resnet18(stem), resnet18(stem, seed=1))
    holder = next((content[key] for key in ("model", "state_dict", "teacher") if key in content), content)
    name = next(key for key in holder if key.endswith("1.bn2.running_var"))  # of the student, which comes first
    renamed = name.replace("running_var", "running_bar")
    holder[renamed] = holder.pop(name)
    with pytest.raises(CheckpointError) as caught:
        load_foreign(write(tmp_path / "weights.pth", content))
    assert "unexpected (1): " + ("teacher." if kind == "dino" else "") + renamed in str(caught.value)
    assert "missing (1): " in str(caught.value) and "bn2.running_var" in str(caught.value) and "119 of 120" in str(caught.value)


def test_what_is_left_out_is_counted(tmp_path):
    path = write(tmp_path / "moco.pth.tar", moco_v2(resnet18(), resnet18(seed=1)))
    left = load_foreign(path)[1].left_out
    # Both heads' two tensors: the student's apart, the teacher's with the teacher.
    assert left == {"epoch": 0, "arch": 0, "optimizer": 1, "encoder_k.": 122, "queue": 1, "queue_ptr": 1, "encoder_q.fc.": 2}


def test_names_can_be_allowed(tmp_path):
    content = plain(resnet18(), resnet18())
    del content["layer4.1.bn2.bias"]
    content["extra.scale"], content["extra.shift"] = torch.zeros(1), torch.zeros(1)
    path = write(tmp_path / "weights.pth", content)
    for allow in ((), ("extra.*",), ("layer4.1.bn2.bias", "extra.scale"), ("extr",)):
        with pytest.raises(CheckpointError, match=r"missing|unexpected"):
            load_foreign(path, allow=allow, size=48)
    report = load_foreign(path, allow=("layer4.1.bn2.bias", "extra."), size=48)[1]
    assert (report.missing, report.unexpected, report.matched) == (["layer4.1.bn2.bias"], ["extra.scale", "extra.shift"], 119)
    opened = open_backbones(path, Reading(allow=("layer4.1.bn2.bias", "extra."), size=48))
    assert opened.notes == (
        "1 of 120 weights are not in weights.pth and fresh, layer4.1.bn2.bias the first",
        "2 names in weights.pth were left out, extra.scale the first",
    )
    assert open_backbones(plain_file(tmp_path), Reading(size=48)).notes == ()


def test_what_is_missing_is_the_same_fresh_weight_each_time(tmp_path):
    content = plain(resnet18(), resnet18())
    del content["layer4.1.conv2.weight"]
    path = write(tmp_path / "weights.pth", content)
    first, second = (load_foreign(path, allow=("layer4.1.conv2.weight",), size=48)[0] for _ in range(2))
    assert torch.equal(first.layer4[1].conv2.weight, second.layer4[1].conv2.weight)


def test_another_architecture_is_refused_with_shapes(tmp_path):
    with pytest.raises(CheckpointError, match=r"other shape \(\d+\): .*conv1.weight \[64, 64, 3, 3\] for \[64, 64, 1, 1\]"):
        load_foreign(plain_file(tmp_path), backbone="resnet50")
    with pytest.raises(CheckpointError, match=r"conv1.weight \[64, 3, 7, 7\] for \[64, 3, 3, 3\]"):
        load_foreign(plain_file(tmp_path), stem="small")


def test_unknown_names_tell_what_was_looked_for(tmp_path):
    path = write(tmp_path / "weights.pth", {"tower.a.weight": torch.zeros(2), "tower.b.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"encoder_q.net..*begin tower.a.weight"):
        load_foreign(path)
    with pytest.raises(CheckpointError, match=r"looked for backbone. or encoder."):
        load_foreign(path, layout="solo")
    with pytest.raises(ConfigError, match="nearest is solo"):
        load_foreign(path, layout="sola")
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_foreign(write(tmp_path / "weights.pth", {"epoch": 3}))
    with pytest.raises(ConfigError, match="holds one network"):
        load_foreign(plain_file(tmp_path), network="teacher")


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet101_2"]
)
def test_resnets_are_told_by_their_weights(name):
    with torch.device("meta"):
        assert foreign.infer_resnet(timm.create_model(name).state_dict()) == name


def test_stems_differ_in_what_they_compute(tmp_path):
    path = write(tmp_path / "solo.ckpt", solo(resnet18("small-wide"), resnet18("small-wide")))
    with torch.no_grad():
        maps = [load_foreign(path, stem=stem)[0].conv1(images(32)).shape[-1] for stem in (None, "small")]
    assert maps == [34, 32]
    backbone, _ = load_foreign(path, stem="small-pool", size=96)
    assert backbone.spec.view.size == 96 and isinstance(backbone.maxpool, nn.MaxPool2d)


def test_a_small_vit_of_moco_v3_has_twelve_heads(tmp_path):
    torch.manual_seed(0)
    source = trained(timm.create_model("vit_small_patch16_224", num_classes=0, num_heads=12))
    content = moco_v3(source, source)
    content["state_dict"]["module.base_encoder.head.0.weight"] = content["state_dict"].pop("module.base_encoder.fc.0.weight")
    path = write(tmp_path / "vit.pth", content)
    backbone, report = load_foreign(path, backbone="vit_small_patch16_224")
    assert same(backbone, source, side=224) and "12 attention heads" in " ".join(report.notes)
    with pytest.raises(ConfigError, match="give timm's name"):
        load_foreign(path)


def test_fresh_weights_are_refused(tmp_path):
    torch.manual_seed(3)
    fresh = timm.create_model("resnet18", num_classes=0)
    path = write(tmp_path / "fresh.pth", fresh.state_dict())
    with pytest.raises(CheckpointError, match="looks untrained: its batch-norm statistics"):
        load_foreign(path, size=48)
    assert same(load_foreign(path, size=48, allow=("untrained",))[0], fresh.eval())
    # Images have passed, nothing was learned.
    fresh.train()(images())
    with pytest.raises(CheckpointError, match="looks untrained: its norms and biases"):
        load_foreign(write(path, fresh.state_dict()), size=48)
    # Nor does noise on norms and biases make up for weights that never moved.
    for value in fresh.state_dict().values():
        if value.ndim == 1:
            value.add_(0.1 * torch.rand(value.shape))
    with pytest.raises(CheckpointError, match=r"spread as in a fresh network"):
        load_foreign(write(path, fresh.state_dict()), size=48)


def test_dead_and_broken_weights_are_refused(tmp_path):
    content = plain(resnet18(), resnet18())
    for part in ("weight", "bias"):
        content[f"bn1.{part}"].zero_()
    with pytest.raises(CheckpointError, match="the same for all images"):
        load_foreign(write(tmp_path / "dead.pth", content))
    content["layer1.0.conv1.weight"][0, 0, 0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"cannot be used: layer1.0.conv1.weight \(not finite\)"):
        load_foreign(write(tmp_path / "nan.pth", content))
    for value, fault in ((torch.zeros(64, dtype=torch.int64), "int64 for"), (torch.zeros(64).to_sparse(), "no plain tensor")):
        content["bn1.weight"] = value
        with pytest.raises(CheckpointError, match=rf"bn1.weight .*{fault}"):
            load_foreign(write(tmp_path / "kind.pth", content))
    content["module.bn1.weight"] = torch.ones(64)
    with pytest.raises(CheckpointError, match=r"both bn1.weight and module.bn1.weight"):
        load_foreign(write(tmp_path / "two.pth", content))


class Hostile:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_refused_by_name_and_never_run(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    for hidden in (Hostile(), {"deep": [Hostile()]}):
        path = write(
            tmp_path / "x.pth", {**plain(resnet18(), resnet18()), "args": hidden}, _use_new_zipfile_serialization=not legacy
        )
        with pytest.raises(CheckpointError, match=r"holds a (posix|nt).system, which is refused"):
            load_foreign(path)
    with pytest.raises(CheckpointError, match=r"torch.nn.modules.linear.Linear, which is refused"):
        load_foreign(write(tmp_path / "x.pth", {"model": nn.Linear(2, 2)}))
    assert not (tmp_path / "pwned").exists()


def test_damaged_files_are_one_line(tmp_path):
    path = tmp_path / "x.pth"
    whole = write(path, {"w": torch.randn(100)}).read_bytes()
    for content in (b"", b"hello", b"PK\x03\x04 nothing", pickle.dumps({"a": 1}), whole[:-200], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            foreign.read(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    with tarfile.open(path, "w") as old:
        old.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    with pytest.raises(CheckpointError, match="tar format"):
        foreign.read(path)
    with pytest.raises(CheckpointError, match="is no file"):
        foreign.read(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="holds a list"):
        foreign.read(write(path, [1, 2]))


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused_by_its_shape(tmp_path):
    content = plain(resnet18(), resnet18())
    content["conv1.weight"] = torch.zeros(1, 1, 1, 1).expand(10**6, 10**6, 7, 7)
    with pytest.raises(CheckpointError, match=r"conv1.weight \[1000000, 1000000, 7, 7\]"):
        load_foreign(write(tmp_path / "bomb.pth", content))


def test_old_files_without_counters_and_in_the_old_format_load(tmp_path):
    source = resnet18()
    content = {name: value for name, value in source.state_dict().items() if "num_batches" not in name}
    backbone, report = load_foreign(write(tmp_path / "old.pth", content, _use_new_zipfile_serialization=False))
    assert same(backbone, source) and "20 counters" in report.notes[0]


def test_safetensors_with_timms_names_load(tmp_path):
    torch.manual_seed(0)
    source = trained(timm.create_model("mobilenetv3_small_050", num_classes=0))
    save_file(under("", source) | {"classifier.weight": torch.randn(5, 1024)}, tmp_path / "m.safetensors")
    backbone, report = load_foreign(tmp_path / "m.safetensors", backbone="mobilenetv3_small_050")
    assert same(backbone, source) and report.layout == "timm" and report.left_out == {"classifier.": 1}


@pytest.mark.parametrize("name", ["mobilenetv2_100", "regnety_004", "mobilenetv3_small_100"])
def test_twins_are_proven_both_ways(tmp_path, name):
    torch.manual_seed(0)
    ours = trained(timm.create_model(name, num_classes=0))
    twin, state = twins.to_torchvision(ours, name)
    theirs, classifier = twins.bare(twin)
    theirs.load_state_dict(state)
    with torch.no_grad():
        expected, got = ours(images()), theirs(images())
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    path = write(tmp_path / "tv.pth", {**state, f"{classifier}.bias": torch.zeros(3)})
    backbone, report = load_foreign(path, backbone=name)
    assert report.layout == "torchvision" and report.left_out == {f"{classifier}.": 1} and report.matched == len(state)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images()), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_a_wrong_pairing_is_refused(monkeypatch):
    twins.pairs.cache_clear()
    right = twins._pair

    def swapped(ours, theirs):
        names = right(ours, theirs)
        one, other = "layer1.0.bn1.bias", "layer1.0.bn2.bias"
        return {**names, one: names[other], other: names[one]}

    monkeypatch.setattr(twins, "_pair", swapped)
    with pytest.raises(ConfigError, match="not proven"):
        twins.pairs("resnet18")
    twins.pairs.cache_clear()
    with pytest.raises(ConfigError, match="not known"):
        twins.pairs("resnet18d")
    with pytest.raises(CheckpointError, match="do not match"):
        twins.from_torchvision({"conv1.weight": torch.zeros(1)}, "resnet18")


def test_an_imported_file_is_a_backbone_file(tmp_path):
    source = resnet18()
    path = write(tmp_path / "ressl-200.pth", official(source, source))
    report = import_weights(path)
    assert report.out == str(tmp_path / "ressl-200.safetensors")
    backbone = relssl.load_backbone(report.out)
    assert same(backbone, source) and backbone.spec.view.size == 224
    text = (tmp_path / "ressl-200.md").read_text()
    assert "layout official" in text and "ImageNet's mean" in text and "trained is not known" in text
    assert "features differ from the backbone's by 0" in text and str(tmp_path) not in text
    import_weights(path, size=48)  # over its own file
    path.rename(tmp_path / "moco.pth.tar")
    assert import_weights(tmp_path / "moco.pth.tar", size=48).out == str(tmp_path / "moco.safetensors")
    (tmp_path / "moco.pth.tar").rename(path)
    (tmp_path / "mine.yaml").write_text("precious")
    for taken in ("mine.safetensors", "config.safetensors", "x.pth"):
        with pytest.raises(ConfigError, match="out"):
            import_weights(path, out=tmp_path / taken)
    assert (tmp_path / "mine.yaml").read_text() == "precious"
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for taken in ("other", "text"):
        with pytest.raises(ConfigError, match="not written by relssl import"):
            import_weights(path, out=tmp_path / f"{taken}.safetensors")


def test_a_file_of_ours_is_used_with_its_settings_or_not_at_all(tmp_path):
    """Read by its names alone it would come back with another stem, size and mean."""
    source = resnet18("small-wide")
    file = tmp_path / "a.safetensors"
    import_weights(write(tmp_path / "solo.ckpt", solo(source, source)), out=file)
    settings = file.with_suffix(".yaml")
    before = settings.read_bytes()
    with pytest.raises(ConfigError, match="nothing to import"):
        import_weights(file)
    assert settings.read_bytes() == before
    with pytest.raises(ConfigError, match="holds one network"):
        open_backbones(file, Reading(network="teacher"))
    with pytest.raises(ConfigError, match=r"--from: .*leave it out"):
        open_backbones(file, Reading(layout="solo"))
    settings.unlink()
    for use in (open_backbones, relssl.load_backbone, relssl.export):
        with pytest.raises(ConfigError, match=r"its settings a\.yaml, written with it, are needed"):
            use(file)


@pytest.mark.parametrize("kind", ["moco v2", "solo on CIFAR", "dino"])
def test_an_import_gives_what_opening_the_file_gives(tmp_path, kind):
    layout, stem, writer = WRITERS[kind]
    path = write(tmp_path / "weights.pth", writer(resnet18(stem), resnet18(stem, seed=1)))
    size = 48 if stem == "standard" else 20
    for network in (None, "student", "teacher"):
        opened = open_backbones(path, Reading(layout, network=network, size=size))
        report = import_weights(path, layout=layout, network=network, size=size)
        held = open_backbones(report.out)
        assert held.spec == opened.spec and same(held.one()[1], opened.one()[1])
        assert opened.origin == {**report.facts(), "out": None}
        assert held.origin == {"kind": "exported", "file": "weights.safetensors", "network": "backbone", "origin": "weights.pth"}


def test_settings_that_name_another_file_of_weights_are_refused(tmp_path):
    source = resnet18()
    out = Path(str(import_weights(write(tmp_path / "moco.pth", moco_v2(source, source))).out))
    settings = out.with_suffix(".yaml")
    settings.write_text(settings.read_text().replace("backbone_args: {}", "backbone_args: {checkpoint_path: other.pth}"))
    with pytest.raises(ConfigError, match=r"moco\.yaml: backbone_args: checkpoint_path is refused"):
        relssl.load_backbone(out)


def test_exports_are_made_of_files_with_settings(tmp_path, capsys):
    path = plain_file(tmp_path)
    assert main(["export", str(path), "--format", "timm"]) == 2
    assert f"`relssl import {path}`" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "gone.safetensors"), "--format", "timm"]) == 2
    assert "gone.safetensors: is no run folder and no file" in capsys.readouterr().err
    assert main(["import", str(path), "--size", "0"]) == 2
    assert "size: must be 4 pixels" in capsys.readouterr().err


def test_numbered_names_are_all_accounted_for(tmp_path):
    source = resnet18("small")
    content = {name: value for name, value in official_small(source, source)["model"].items() if name.startswith("net.")}
    content["net.net.bn1.weight"] = torch.ones(64)
    with pytest.raises(CheckpointError, match=r"1\.weight and bn1\.weight are both bn1\.weight"):
        load_foreign(write(tmp_path / "two.pth", {"model": content}))
    del content["net.net.bn1.weight"]
    content["net.net.\u00b2.weight"] = torch.ones(1)  # a digit, but no number
    with pytest.raises(CheckpointError, match="unexpected"):
        load_foreign(write(tmp_path / "odd.pth", {"model": content}))


@pytest.mark.parametrize("front", ["module._orig_mod.", "_orig_mod.module.", "_orig_mod."])
def test_what_wrappers_put_in_front_is_taken_off_in_any_order(tmp_path, front):
    source = resnet18()
    assert same(load_foreign(write(tmp_path / "w.pth", under(front, source)))[0], source)


def test_the_command_reports_counts(tmp_path, capsys):
    path = str(plain_file(tmp_path))
    assert main(["import", path, "--from", "torchvision", "--size", "48"]) == 0
    assert "matched 120 of 120, missing 0, unexpected 0; left out: fc. (2)" in capsys.readouterr().out
    assert (
        main(["import", path, "--from", "torchvision", "--size", "48", "--out", str(tmp_path / "b.safetensors"), "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["matched"], found["layout"], found["left_out"]) == (120, "torchvision", {"fc.": 2})
    assert main(["import", path, "--from", "solo"]) == 4
    assert main(["import", path, "--stem", "tiny"]) == 2


def test_timms_own_weights(monkeypatch):
    torch.manual_seed(0)
    source = trained(timm.create_model("resnet18", num_classes=0))
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **kw: source if pretrained else create(name, **kw))
    backbone = load_timm("timm:resnet18.a1_in1k")
    views, cfg = backbone.spec.view, timm.get_pretrained_cfg("resnet18.a1_in1k")
    assert same(backbone, source) and backbone.spec.name == "resnet18"
    assert (views.size, views.mean, views.interpolation) == (cfg.input_size[-1], cfg.mean, cfg.interpolation)
    assert round(views.size * views.margin) == int(views.size / cfg.crop_pct)

    # Its images are made as timm makes them.
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)).resize((450, 350))
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(cfg.to_dict()))
    torch.testing.assert_close(backbone.transform(photo), theirs(photo), rtol=0, atol=1e-5)

    def offline(name, pretrained=False, **kw):
        if pretrained:
            raise OSError("no route to host")
        return create(name, **kw)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(CheckpointError, match=r"cannot be fetched .*no route to host"):
        load_timm("resnet18")
    with pytest.raises(ConfigError, match="timm knows no"):
        load_timm("timm:resnet19")
    with pytest.raises(ConfigError, match="weights"):
        load_timm("resnet18.nowhere")
