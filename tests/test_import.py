"""Other programs' files load whole, compute what their network does, and are refused where a single name does not match."""

import argparse
import dataclasses
import functools
import io
import json
import os
import pickle
import resource
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import relssl
from relssl.cli import main
from relssl.errors import CheckpointError, ConfigError
from relssl.weights import layouts, twins
from relssl.weights.export import import_weights
from relssl.weights.foreign import LoadReport, Reading, load_foreign, load_timm
from relssl.weights.layouts import find_layout
from relssl.weights.opening import open_backbones


@functools.lru_cache
def resnet18(stem: str = "standard", seed: int = 0) -> nn.Module:
    """torchvision's ResNet-18 without its last layer, as each of the programs builds it, in eval mode; not to be changed."""
    torch.manual_seed(seed)
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    if stem != "standard":
        network.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=2 if stem == "small-wide" else 1, bias=False)
        if stem != "small-pool":
            network.maxpool = nn.Identity()
    return trained(network)


@torch.no_grad()
def trained(network: nn.Module) -> nn.Module:
    """Moved away from where it started, in eval mode."""
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            noise = torch.rand(value.shape)
            value.mul_(0.8 + 0.5 * noise) if value.ndim > 1 or "var" in name else value.add_(0.2 * noise)
    return network.eval()


def under(prefix: str, network: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: value.clone() for name, value in network.state_dict().items()}


def heads(*prefixes: str) -> dict[str, Tensor]:
    return {f"{prefix}{part}": torch.randn(4, 4) for prefix in prefixes for part in ("linear1.weight", "linear2.weight")}


def sgd(lr: Any = 0.1) -> dict[str, Any]:
    return {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": lr, "params": [0]}]}


def queue(prefix: str = "module.") -> dict[str, Tensor]:
    return {prefix + "queue": torch.randn(8, 16), prefix + "queue_ptr": torch.zeros(1, dtype=torch.long)}


def official(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    """ReSSL's own ressl.py, from within DistributedDataParallel."""
    q, k = "module.encoder_q.", "module.encoder_k."
    model = under(q + "net.", student) | under(k + "net.", teacher) | heads(q + "head.", k + "head.") | queue()
    return {"model": model, "optimizer": sgd(), "epoch": 200}


def official_small(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    """The small-set code: the ResNet's children by number, those without weights counted, the max-pool only if it is kept."""
    q, k = (nn.Sequential(*(part for part in net.children() if not isinstance(part, nn.Identity))) for net in (student, teacher))
    return {"model": under("net.net.", q) | under("encoder_k.net.", k) | heads("head_q.", "head_k.") | queue("")}


def solo(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    """A Lightning checkpoint of solo-learn."""
    state = under("backbone.", student) | under("momentum_backbone.", teacher) | queue("")
    state |= heads("classifier.", "projector.0.", "momentum_projector.0.")
    return {"epoch": 3, "state_dict": state, "optimizer_states": [sgd()], "hyper_parameters": argparse.Namespace(lr=0.1)}


def moco_v2(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    q, k = "module.encoder_q.", "module.encoder_k."
    state = under(q, student) | under(k, teacher) | queue() | heads(q + "fc.", k + "fc.")
    return {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": sgd()}


def moco_v3(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    q, k = "module.base_encoder.", "module.momentum_encoder."
    state = under(q, student) | under(k, teacher) | heads(q + "fc.", k + "fc.", "module.predictor.")
    return {"epoch": 300, "arch": "resnet18", "state_dict": state, "optimizer": sgd(), "scaler": {"scale": 1.0}}


def dino(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    """DINO's checkpoint.pth: the student within DistributedDataParallel, learning rates as numpy scalars, arguments parsed."""
    sides = {"student": under("module.backbone.", student) | heads("module.head.")}
    sides["teacher"] = under("backbone.", teacher) | heads("head.")
    args = argparse.Namespace(arch="resnet18", patch_size=16)
    return {**sides, "optimizer": sgd(np.float64(1e-4)), "args": args, "dino_loss": {"center": torch.zeros(1, 16)}}


def plain(student: nn.Module, _: nn.Module | None = None) -> dict[str, Any]:
    """torchvision's own files: names and weights, with the classifier."""
    return {**under("", student), "fc.weight": torch.randn(1000, 512), "fc.bias": torch.randn(1000)}


WRITERS: dict[str, tuple[str, str, Callable[[nn.Module, nn.Module], dict[str, Any]]]] = {
    "official": ("official", "standard", official),
    "official small": ("official", "small", official_small),
    "official small with max-pool": ("official", "small-pool", official_small),
    "solo": ("solo", "standard", solo),
    "solo on CIFAR": ("solo", "small-wide", solo),
    "moco v2": ("moco", "standard", moco_v2),
    "moco v3": ("moco", "standard", moco_v3),
    "dino": ("dino", "standard", dino),
    "torchvision": ("timm", "standard", plain),
}


def images(side: int = 64) -> Tensor:
    return torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1))


def write(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def load(path: Path, **options: Any) -> tuple[nn.Module, LoadReport]:
    return load_foreign(path, Reading(**{"size": 32, **options}))


def refused(match: str, path: Path, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=match):
        load(path, **options)


@torch.no_grad()
def same(one: nn.Module, other: nn.Module, side: int = 64) -> bool:
    return torch.equal(one(images(side)), other(images(side)))


@pytest.mark.parametrize("kind", WRITERS)
def test_every_layout_loads_whole_and_computes_what_its_source_does(tmp_path, kind):
    layout, stem, writer = WRITERS[kind]
    student, teacher = resnet18(stem), resnet18(stem, seed=1)
    path = write(tmp_path / "weights.pth", writer(student, teacher))
    backbone, report = load(path)
    assert (report.layout, report.detected, report.backbone, report.stem) == (layout, True, "resnet18", stem)
    assert report.matched == report.total == len(student.state_dict()) and report.missing == report.unexpected == []
    assert report.network == {"dino": "teacher", "torchvision": "backbone"}.get(kind, "student")
    assert same(backbone, teacher if kind == "dino" else student)
    assert backbone.num_features == 512 and not backbone.training
    if kind in ("official small", "solo", "moco v3", "dino"):
        other, report = load(path, layout=layout, network="student" if kind == "dino" else "teacher")
        assert same(other, student if kind == "dino" else teacher) and not report.detected
    if kind == "moco v2":  # both heads' two tensors: the student's apart, the teacher's with the teacher
        beside = {"epoch": 0, "arch": 0, "optimizer": 1, "encoder_k.": 122, "queue": 1, "queue_ptr": 1, "encoder_q.fc.": 2}
        assert report.left_out == beside


@pytest.mark.parametrize("kind", ["official small", "dino", "torchvision"])
def test_one_renamed_key_is_refused_by_both_its_names(tmp_path, kind):
    _, stem, writer = WRITERS[kind]
    content = writer(resnet18(stem), resnet18(stem, seed=1))
    holder = next((content[key] for key in ("model", "state_dict", "teacher") if key in content), content)
    name = next(key for key in holder if key.endswith("1.bn2.running_var"))  # of the student, which comes first
    holder[name.replace("running_var", "running_bar")] = holder.pop(name)
    counts = r"119 of 120 .*missing \(1\): \S*2.running_var; unexpected \(1\): \S*running_bar"
    refused(counts, write(tmp_path / "weights.pth", content))


def test_names_can_be_allowed(tmp_path):
    content = whole(extra__scale=torch.zeros(1), extra__shift=torch.zeros(1))
    del content["layer4.1.conv2.weight"]
    path = write(tmp_path / "weights.pth", content)
    for allow in ((), ("extra.*",), ("layer4.1.conv2.weight", "extra.scale"), ("extr",)):
        refused(r"missing|unexpected", path, allow=allow)
    allow = ("layer4.1.conv2.weight", "extra.")
    first, report = load(path, allow=allow)
    assert (report.missing, report.unexpected, report.matched) == ([allow[0]], ["extra.scale", "extra.shift"], 119)
    opened = open_backbones(path, Reading(allow=allow, size=48))
    assert torch.equal(opened.backbone.layer4[1].conv2.weight, first.layer4[1].conv2.weight)  # fresh, and the same each time
    assert len(opened.notes) == 2 and open_backbones(write(path, whole()), Reading(size=48)).notes == ()


@pytest.mark.parametrize("name", ["resnet34", "resnet152", "resnext50_32x4d", "wide_resnet101_2"])
def test_resnets_are_recognised_by_their_weights(name):
    with torch.device("meta"):
        assert layouts.infer_resnet(timm.create_model(name).state_dict()) == name


def test_stems_differ_in_what_they_compute(tmp_path):
    path = write(tmp_path / "solo.ckpt", solo(resnet18("small-wide"), resnet18("small-wide")))
    with torch.no_grad():
        assert [load(path, stem=stem)[0].conv1(images(32)).shape[-1] for stem in (None, "small")] == [34, 32]
    backbone, _ = load(path, stem="small-pool", size=96)
    assert backbone.spec.view.size == 96 and isinstance(backbone.maxpool, nn.MaxPool2d)


def test_a_network_whose_own_first_layer_is_small_keeps_its_stride(tmp_path):
    source = timm.create_model("legacy_xception", num_classes=0).eval()
    for name, value in source.state_dict().items():  # fresh norms are refused
        value.add_(0.1 * torch.rand_like(value)) if "bn" in name and value.is_floating_point() else None
    write(tmp_path / "weights.pth", source.state_dict())
    backbone, report = load(tmp_path / "weights.pth", backbone="legacy_xception")
    images = torch.randn(2, 3, 96, 96)
    assert report.stem == "standard" and torch.equal(backbone.eval()(images), source(images))


def test_a_small_vit_of_moco_v3_has_twelve_heads(tmp_path):
    torch.manual_seed(0)
    source = trained(timm.create_model("vit_small_patch32_224", num_classes=0, num_heads=12))
    content = moco_v3(source, source)
    state = content["state_dict"]
    state["module.base_encoder.head.0.weight"] = state.pop("module.base_encoder.fc.linear1.weight")
    path = write(tmp_path / "vit.pth", content)
    backbone, report = load(path, backbone="vit_small_patch32_224", size=None)
    assert same(backbone, source, side=224) and "12 attention heads" in " ".join(report.notes)
    with pytest.raises(ConfigError, match="backbone: "):
        load(path)


def test_fresh_weights_are_refused(tmp_path):
    torch.manual_seed(3)
    fresh = timm.create_model("resnet18", num_classes=0)
    path = write(tmp_path / "fresh.pth", fresh.state_dict())
    refused("untrained: its batch-norm statistics", path)
    assert same(load(path, allow=("untrained",))[0], fresh.eval())
    fresh.train()(images())  # nothing is learned by that
    refused("untrained: its norms and biases", write(path, fresh.state_dict()))


def whole(**changes: Any) -> dict[str, Any]:
    return plain(resnet18()) | {name.replace("__", "."): value for name, value in changes.items()}


def numbered(name: str) -> dict[str, Any]:
    content = official_small(resnet18("small"), resnet18("small"))["model"]
    return {"model": {key: value for key, value in content.items() if key.startswith("net.")} | {name: torch.ones(64)}}


def script() -> bytes:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), file := io.BytesIO())
    return file.getvalue()


def archive() -> bytes:
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as old:
        old.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    return file.getvalue()


def saved(content: Any) -> bytes:
    torch.save(content, file := io.BytesIO())
    return file.getvalue()


TOWERS = {"tower.a.weight": torch.zeros(2), "tower.b.weight": torch.zeros(2)}
CLAIM = torch.zeros(1, 1, 1, 1).expand(10**6, 10**6, 7, 7)  # which claims more than the file holds
# What lies in a file, options, and what the refusal names: of options that cannot be meant a setting, else what is wrong with the file.
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    *((whole, options, f"{name}: ") for name, options in (
        ("from", {"layout": "sola"}), ("network", {"network": "teacher"}), ("network", {"network": "pupil"}),
        ("stem", {"stem": "tiny"}), ("size", {"size": 0}),
    )),
    (whole, {"backbone": "resnet50"}, r"conv1.weight \[64, 64, 3, 3\]"), (whole, {"stem": "small"}, r"conv1.weight \[64, 3, 7, 7\]"),
    (lambda: TOWERS, {}, "tower"), (lambda: TOWERS, {"layout": "solo"}, "tower"),
    (lambda: whole(bn1__weight=torch.zeros(64), bn1__bias=torch.zeros(64)), {}, "the same for all images"),
    (lambda: whole(bn1__weight=torch.full((64,), torch.nan)), {}, "bn1.weight"),
    (lambda: whole(bn1__weight=torch.zeros(64, dtype=torch.int64)), {}, "bn1.weight"),
    (lambda: whole(bn1__bias=torch.zeros(64).to_sparse()), {}, "bn1.bias"), (lambda: whole(layer1__0__conv2__weight=CLAIM), {}, "conv2"),
    (lambda: whole(module__bn1__weight=torch.ones(64)), {}, "bn1.weight"), (lambda: whole(conv1__weight=torch.ones(64, 13, 7, 7)), {}, "13"),
    (lambda: whole(model__conv1__weight=torch.ones(2)), {}, "model.conv1.weight"), (lambda: numbered("net.net.bn1.weight"), {}, "bn1"),
    (lambda: numbered("net.net.\u00b2.weight"), {}, "\u00b2"),  # a digit, but no number
    *((content, {}, "weights.pth: ") for content in (
        b"", b"hello", pickle.dumps({"a": 1}), archive, script, lambda: saved(whole())[:-200], lambda: saved(whole())[:400], lambda: [1, 2],
        lambda: {"epoch": 3}, b"PK\x03\x04 nothing", b"\x1f\x8b\x08", b"\n<!DOCTYPE html>", (9 << 20).to_bytes(8, "little") + b"{",
        b"version https://git-lfs.github.com/spec/v1\n",
    )),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(("content", "options", "named"), REFUSED)
def test_what_is_no_backbone_is_refused_in_one_line(tmp_path, content, options, named):
    content, path = content() if callable(content) else content, tmp_path / "weights.pth"
    path.write_bytes(content) if isinstance(content, bytes) else write(path, content)
    setting = named.removesuffix(": ") in ("from", "network", "stem", "size")
    with pytest.raises(ConfigError if setting else CheckpointError, match=named) as refusal:
        load(path, **options)
    assert "\n" not in str(refusal.value) and (setting or str(path) in str(refusal.value))


class Hostile:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_refused_by_name_and_never_run(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pth"
    for hidden in (Hostile(), {"deep": [Hostile()]}):
        write(path, whole(args=hidden), _use_new_zipfile_serialization=not legacy)
        refused(r"holds a (posix|nt).system, which is refused", path)
        assert main(["import", str(path)]) == 4
    refused(r"torch.nn.modules.linear.Linear, which is refused", write(path, {"model": nn.Linear(2, 2)}))
    assert not (tmp_path / "pwned").exists()


def test_old_files_without_counters_and_in_the_old_format_load(tmp_path):
    content = {name: value for name, value in resnet18().state_dict().items() if "num_batches" not in name}
    backbone, report = load(write(tmp_path / "old.pth", content, _use_new_zipfile_serialization=False))
    assert same(backbone, resnet18()) and "20 counters" in report.notes[0]


def test_safetensors_with_timms_names_load(tmp_path):
    torch.manual_seed(0)
    source = trained(timm.create_model("mobilenetv3_small_050", num_classes=0))
    save_file(under("", source) | {"classifier.weight": torch.randn(5, 1024)}, tmp_path / "m.safetensors")
    backbone, report = load(tmp_path / "m.safetensors", backbone="mobilenetv3_small_050")
    assert same(backbone, source) and report.layout == "timm" and report.left_out == {"classifier.": 1}


@pytest.mark.parametrize("name", ["regnety_004", "mobilenetv3_small_100"])
def test_twins_are_proven_both_ways(tmp_path, name):
    torch.manual_seed(0)
    ours = trained(timm.create_model(name, num_classes=0))
    state = twins.convert(ours.state_dict(), name)
    theirs, classifier = twins.bare(twins.TWINS[name])
    theirs.load_state_dict(state)
    path = write(tmp_path / "tv.pth", {**state, f"{classifier}.bias": torch.zeros(3)})
    backbone, report = load(path, backbone=name)
    assert report.layout == "torchvision" and report.matched == len(state)
    assert report.left_out == {f"{classifier.partition('.')[0]}.": 1}
    with torch.no_grad():
        expected, others = ours(images()), (theirs(images()), backbone(images()))
    for features in others:
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    with pytest.raises(ConfigError, match="resnet18d"):
        twins.convert({}, "resnet18d")


def test_torchvisions_networks_are_read_from_its_own_files(tmp_path):
    torch.manual_seed(2)
    theirs = trained(torchvision.models.shufflenet_v2_x0_5())
    path = write(tmp_path / "shuffle.pth", theirs.state_dict())
    backbone, report = load(path, backbone="torchvision/shufflenet_v2_x0_5")
    theirs.fc = nn.Identity()
    assert same(backbone, theirs) and report.layout == "torchvision" and report.left_out == {"fc.": 2}
    refused("match", path, backbone="torchvision/shufflenet_v2_x1_0")


def test_an_imported_file_is_the_backbone_that_opening_the_file_gives(tmp_path):
    path = write(tmp_path / "solo-200.pth.tar", solo(resnet18("small-wide"), resnet18("small-wide", seed=1)))
    opened = open_backbones(path, Reading("solo", network="teacher", size=20))
    report = import_weights(path, layout="solo", network="teacher", size=20)
    assert report.out == str(tmp_path / "solo-200.safetensors")
    assert opened.origin == {**dataclasses.asdict(report), "out": None}
    again = open_backbones(report.out)
    assert again.spec == opened.spec and same(again.backbone, opened.backbone)
    header = {"network": "backbone", "origin": "solo-200.pth.tar"}
    assert again.origin == {"kind": "exported", "file": "solo-200.safetensors", **header}
    text = (tmp_path / "solo-200.md").read_text()
    assert "layout solo" in text and "CIFAR-10's mean" in text and str(tmp_path) not in text


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of ours with its settings; tests put these back."""
    folder = tmp_path_factory.mktemp("imported")
    source = resnet18("small-wide")
    import_weights(write(folder / "solo.ckpt", solo(source, source)), out=folder / "a.safetensors")
    return folder / "a.safetensors"


HUGE = {
    "resnet18": {"layers": [10**9, 1, 1, 1]}, "resnet50": {"channels": [2000] * 4}, "vit_giant_patch14_224": {},
    "mobilenetv3_small_100": {"depth_multiplier": 1e6}, "torchvision/regnet_y_128gf": {"stem_width": 2000},
}  # fmt: skip


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_settings_beside_a_file_build_nothing_larger_than_the_file(imported, tmp_path):
    file, spec = tmp_path / "a.safetensors", open_backbones(imported).spec
    file.write_bytes(imported.read_bytes())
    limits, pages = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), limits[1]))
    try:
        for name, arguments in HUGE.items():
            large = dataclasses.replace(spec, name=name, arguments=arguments, stem="standard")
            file.with_suffix(".yaml").write_text(large.to_yaml())
            with pytest.raises(CheckpointError, match=name):
                relssl.load_backbone(file)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_an_import_replaces_nothing_but_an_import(tmp_path):
    path = write(tmp_path / "plain.pth", whole())
    for _ in range(2):
        import_weights(path, size=20)
    (tmp_path / "mine.yaml").write_text("precious")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for taken in ("mine.safetensors", "config.safetensors", "x.pth", "other.safetensors", "text.safetensors"):
        with pytest.raises(ConfigError, match="out: "):
            import_weights(path, out=tmp_path / taken)
    assert (tmp_path / "mine.yaml").read_text() == "precious"


def test_a_file_of_ours_is_used_with_its_settings_or_not_at_all(imported):
    """Read by its names alone it would come back with another stem, size and mean."""
    settings = imported.with_suffix(".yaml")
    before = settings.read_text()
    with pytest.raises(ConfigError, match="nothing to import"):
        import_weights(imported)
    for reading, option in ((Reading(network="teacher"), "network"), (Reading(layout="solo"), "--from")):
        with pytest.raises(ConfigError, match=f"{option}: .*leave .*out"):
            open_backbones(imported, reading)
    assert settings.read_text() == before
    try:
        settings.write_text(before.replace("backbone_args: {}", "backbone_args: {checkpoint_path: other.pth}"))
        with pytest.raises(ConfigError, match=r"a\.yaml: backbone_args: checkpoint_path"):
            relssl.load_backbone(imported)
        settings.unlink()
        for use in (open_backbones, relssl.load_backbone, relssl.export):
            with pytest.raises(ConfigError, match=r"a\.yaml"):
                use(imported)
    finally:
        settings.write_text(before)


BESIDE = {"projection_head.0.weight": torch.ones(2), "prototypes.weight": torch.ones(2)}
NAMES = [
    *(("", "", "timm"), ("module.", "", "timm"), ("model.module.", "", "timm")),
    *(("backbone._orig_mod.", "momentum_backbone.", "solo"), ("backbone.", "backbone_momentum.", "solo")),
    *(("student_backbone.", "teacher_backbone.", "dino"), ("online_encoder.net.", "target_encoder.net.", "moco")),
]


@pytest.mark.parametrize(("theirs", "beside", "layout"), NAMES)
def test_wrappers_heads_and_other_programs_names_are_known(tmp_path, theirs, beside, layout):
    other = under(beside, resnet18(seed=1)) if beside else {}
    path = write(tmp_path / "w.ckpt", {"state_dict": under(theirs, resnet18()) | other | BESIDE, "epoch": 1})
    backbone, report = load(path, network="student" if layout == "dino" else None)
    assert same(backbone, resnet18()) and (report.layout, report.matched, report.unexpected) == (layout, 120, [])
    if beside:
        assert same(load(path, network="teacher")[0], resnet18(seed=1))


def test_a_network_deep_in_a_file_is_found_or_named_by_its_prefix(tmp_path):
    model = {"trunk": under("_feature_blocks.", resnet18()), "heads": {"0": {"weight": torch.ones(2)}}}
    content: dict[str, Any] = {"phase": 1, "classy_state_dict": {"base_model": model}, "optimizer": {"state": [torch.ones(2)]}}
    content["optimizer"]["self"] = content  # a file may hold itself
    path = write(tmp_path / "vissl.torch", content)
    backbone, report = load(path)
    assert same(backbone, resnet18())
    assert report.left_out == {"phase": 0, "classy_state_dict.": 1, "optimizer.": 1, "optimizer": 0}
    write(path, {"state_dict": under("one.", resnet18()), "ema": under("", resnet18(seed=1))})
    for prefix, seed in (("one", 0), ("one.", 0), ("ema", 1), ("state_dict.one", 0)):
        assert same(load(path, prefix=prefix)[0], resnet18(seed=seed))
    write(path, under("one.", resnet18()) | under("two.", resnet18(seed=1)))
    refused(r"several networks, one\., two\.; name one with --prefix", path)
    refused(r"looked for three\.", path, prefix="three")
    refused("--allow NAME", path, prefix="one", backbone="resnet34")
    # The average is read where a training program keeps both.
    write(
        path, {"epoch": 3, "state_dict": under("", resnet18()), "state_dict_ema": under("", resnet18(seed=1)), "optimizer": sgd()}
    )
    backbone, report = load(path)
    assert same(backbone, resnet18(seed=1)) and report.left_out["state_dict"] == 120
    assert any("state_dict_ema" in note for note in report.notes)
    assert same(load(path, prefix="state_dict")[0], resnet18())


def transformers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state of timm's as Hugging Face's ViTForImageClassification names it."""
    parts = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense"}
    parts |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    theirs = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    theirs |= {f"patch_embed.proj.{end}": f"embeddings.patch_embeddings.projection.{end}" for end in ("weight", "bias")}
    theirs |= {f"norm.{end}": f"layernorm.{end}" for end in ("weight", "bias")}
    named = {f"vit.{theirs[name]}": value for name, value in state.items() if name in theirs}
    for name, value in state.items():
        if name.startswith("blocks."):
            _, number, *middle, end = name.split(".")
            block, part = f"vit.encoder.layer.{number}.", ".".join(middle)
            if part == "attn.qkv":
                for key, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    named[f"{block}attention.attention.{key}.{end}"] = third.clone()
            else:
                named[f"{block}{parts[part]}.{end}"] = value
    return named | {"vit.pooler.dense.weight": torch.ones(2), "classifier.weight": torch.ones(2)}


def test_vision_transformers_load_under_the_names_and_sizes_that_programs_use(tmp_path):
    torch.manual_seed(0)
    name = "vit_tiny_patch16_224"
    source = trained(timm.create_model(name, num_classes=0, img_size=96, dynamic_img_size=True))
    state = source.state_dict()
    chunks = {f"backbone.{key.replace('blocks.', 'blocks.0.')}": value for key, value in state.items()}
    files: dict[str, Any] = {
        "mae": {"model": state | {"mask_token": torch.ones(2), "decoder_embed.weight": torch.ones(2)}},
        "dinov2": {"teacher": chunks | {"ibot_head.weight": torch.ones(2)}},
        "transformers": transformers_names(state),
    }
    for kind, content in files.items():
        backbone, report = load(write(tmp_path / f"{kind}.pth", content), backbone=name, size=None)
        assert backbone.spec.view.size == 96 and report.unexpected == report.missing == []
        torch.testing.assert_close(backbone(images(96)), source(images(96)), rtol=0, atol=1e-5)
    again = open_backbones(import_weights(tmp_path / "mae.pth", backbone=name, size=64).out)  # the embeddings stay
    assert again.spec.view.size == 64 and torch.equal(again.backbone(images(64)), source(images(64)))
    refused(f"perhaps of {name}", tmp_path / "mae.pth")
    bomb = torch.zeros(1, 1, 192).expand(1, 10**8 + 1, 192)
    refused("pos_embed", write(tmp_path / "bomb.pth", state | {"pos_embed": bomb}), backbone=name)


def test_a_grey_network_sees_grey_images(tmp_path):
    torch.manual_seed(0)
    source = trained(timm.create_model("resnet18", num_classes=0, in_chans=1))
    backbone = relssl.load_backbone(import_weights(write(tmp_path / "grey.pth", source.state_dict()), size=48).out)
    pixels = backbone.transform(Image.fromarray(np.full((60, 60), 115, np.uint8)))
    assert pixels.shape == (1, 48, 48) and abs(float(pixels.mean())) < 0.05  # about ImageNet's mean
    assert torch.equal(backbone(pixels[None]), source(pixels[None]))


def test_the_command_reports_counts(tmp_path, capsys):
    path = str(write(tmp_path / "plain.pth", whole()))
    assert main(["export", path, "--format", "timm"]) == 2  # is to be imported first
    assert main(["import", path, "--from", "torchvision", "--size", "48", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (answer["matched"], answer["layout"], answer["left_out"]) == (120, "torchvision", {"fc.": 2})
    assert main(["import", path, "--from", "solo"]) == 4


def test_timms_own_weights_come_with_timms_view(monkeypatch):
    torch.manual_seed(0)
    source, create, offline = trained(timm.create_model("resnet18", num_classes=0)), timm.create_model, False

    def fetched(name, pretrained=False, **options):
        if pretrained and offline:
            raise OSError("no route to host")
        return source if pretrained else create(name, **options)

    monkeypatch.setattr(timm, "create_model", fetched)
    backbone, _ = load_timm("timm:resnet18.a1_in1k")
    view, cfg = backbone.spec.view, timm.get_pretrained_cfg("resnet18.a1_in1k")
    assert same(backbone, source) and backbone.spec.name == "resnet18"
    assert (view.size, view.mean, view.interpolation) == (cfg.input_size[-1], cfg.mean, cfg.interpolation)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)).resize((450, 350))
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(cfg.to_dict()))
    torch.testing.assert_close(backbone.transform(photo), theirs(photo), rtol=0, atol=1e-5)
    (_, remarks), squashed = load_timm("timm:resnet18.a1_in1k"), dataclasses.replace(cfg, crop_mode="squash")
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: squashed)
    assert remarks == () and "squashes" in load_timm("timm:resnet18.a1_in1k")[1][0]
    offline = True
    with pytest.raises(CheckpointError, match="no route to host"):
        load_timm("resnet18")
    for unknown in ("timm:resnet19", "resnet18.nowhere"):
        with pytest.raises(ConfigError):
            load_timm(unknown)


def test_torchvisions_own_vision_transformers_are_known_by_their_names():
    network = torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8
    )
    assert find_layout(network.state_dict()) == "torchvision"
