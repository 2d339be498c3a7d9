"""Every format holds the backbone it was made of, and what does not is never kept."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import relssl
from relssl.cli import main
from relssl.data.named import at_hand
from relssl.data.plain import PlainView
from relssl.errors import CheckpointError, ConfigError
from relssl.method.backbones import create_backbone
from relssl.settings.run import Config, resolve, to_yaml
from relssl.weights import export as exporting
from relssl.weights.export import export
from relssl.weights.formats import FORMATS
from relssl.weights.parity import real_images
from relssl.weights.spec import BackboneSpec
from relssl.weights.writers import Source, Written, _view, read, timm_lines, to_detectron
from small_runs import small_run

SIZE = 32
IMAGES = torch.rand(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
NETWORKS = {
    "standard": ("resnet18", "standard"),
    "small": ("resnet18", "small"),
    "mobile": ("mobilenetv3_small_100", "standard"),
}


def settings(backbone: str, stem: str, **views: Any) -> Config:
    config = resolve({"data": "digits", "backbone": backbone, "encoder.stem": stem})
    shown = dataclasses.replace(config.views, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), margin=1.0, **views)
    return dataclasses.replace(config, views=shown, backbone_args={})


def weights_file(folder: Path, backbone: str, stem: str) -> tuple[Path, nn.Module]:
    """A network with lively batch norms as a file with its card, and the network."""
    torch.manual_seed(3)
    network = create_backbone(backbone, stem)
    for name, value in network.state_dict().items():
        if "running" in name:
            value.copy_(torch.rand_like(value) * 0.2 + (0.9 if "var" in name else -0.1))
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, folder / "source.safetensors")
    (folder / "source.yaml").write_text(to_yaml(settings(backbone, stem)))
    return folder / "source.safetensors", network.eval()


@pytest.fixture(scope="module", params=NETWORKS)
def given(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, nn.Module]:
    return request.param, *weights_file(tmp_path_factory.mktemp(request.param), *NETWORKS[request.param])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    return weights_file(tmp_path_factory.mktemp("plain"), "resnet18", "standard")


def with_timm(file: Path, which: str) -> Tensor:
    name, stem = NETWORKS[which]
    network = timm.create_model(name, num_classes=0)
    if stem == "small":
        network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    timm.models.load_checkpoint(network, str(file))
    return network.eval()(IMAGES)


def with_torchvision(file: Path, which: str) -> Tensor:
    if which == "mobile":
        network = torchvision.models.mobilenet_v3_small()
        network.classifier[3] = nn.Identity()
    else:
        network = torchvision.models.resnet18()
        network.fc = nn.Identity()
    if which == "small":
        network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    network.load_state_dict(torch.load(file, weights_only=True))
    return network.eval()(IMAGES)


def with_local_dir(folder: Path, which: str) -> Tensor:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()(IMAGES)


def with_onnx(file: Path, which: str) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    rows = [session.run(None, {"images": image[None].numpy()})[0] for image in IMAGES]
    assert np.allclose(np.concatenate(rows), session.run(None, {"images": IMAGES.numpy()})[0], atol=1e-5)
    return torch.from_numpy(np.concatenate(rows))


def with_torch(file: Path, which: str) -> Tensor:
    if which != "small":
        loaded: nn.Module = torch.export.load(file).module()
        return torch.cat([loaded(IMAGES[:1]), loaded(IMAGES[1:])])
    # In a process that never imports timm or relssl.
    torch.save(IMAGES, file.with_name("images.pt"))
    code = (
        "import sys, torch; f = torch.export.load(sys.argv[1]).module(); x = torch.load(sys.argv[2]); "
        "assert not {'timm', 'relssl'} & set(sys.modules); torch.save(torch.cat([f(x[:1]), f(x[1:])]).detach(), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(file), str(file.with_name("images.pt"))], check=True)
    features: Tensor = torch.load(file.with_name("images.pt"))
    return features


def with_pickle(file: Path, which: str) -> Tensor:
    """As detectron2 reads it, by names taken from its own ResNet: stem, res2..res5, shortcut, norm."""
    held = pickle.loads(file.read_bytes())
    assert held["matching_heuristics"] is True and held["__author__"] != "Caffe2"
    weights = held["model"]
    assert all(type(value) is np.ndarray and value.flags.writeable for value in weights.values())
    x = torch.conv2d(IMAGES, torch.from_numpy(weights["stem.conv1.weight"]), stride=2, padding=3)
    x = norm(x, weights, "stem.conv1.norm").relu()
    x = torch.max_pool2d(x, 3, 2, 1)
    for stage in (2, 3, 4, 5):
        for block in (0, 1):
            path, stride = f"res{stage}.{block}", 2 if stage > 2 and block == 0 else 1
            y = norm(convolved(x, weights, f"{path}.conv1", stride, 1), weights, f"{path}.conv1.norm").relu()
            y = norm(convolved(y, weights, f"{path}.conv2", 1, 1), weights, f"{path}.conv2.norm")
            if stride > 1:
                x = norm(convolved(x, weights, f"{path}.shortcut", stride, 0), weights, f"{path}.shortcut.norm")
            x = (x + y).relu()
    return x.mean((2, 3))


def convolved(x: Tensor, weights: dict[str, Any], name: str, stride: int, padding: int) -> Tensor:
    return torch.conv2d(x, torch.from_numpy(weights[f"{name}.weight"]), stride=stride, padding=padding)


def norm(x: Tensor, weights: dict[str, Any], name: str) -> Tensor:
    parts = [torch.from_numpy(weights[f"{name}.{part}"]) for part in ("running_mean", "running_var", "weight", "bias")]
    return nn.functional.batch_norm(x, *parts)


READERS: dict[str, tuple[Callable[[Path, str], Tensor], float]] = {
    "safetensors": (with_timm, 0),
    "timm": (with_timm, 0),
    "torchvision": (with_torchvision, 1e-4),
    "hf": (with_local_dir, 0),
    "onnx": (with_onnx, 1e-4),
    "torch-export": (with_torch, 1e-4),
    "detectron2": (with_pickle, 1e-5),
}
REFUSED = {("small", "hf"), ("small", "detectron2"), ("mobile", "detectron2")}


def test_every_format_has_a_reader_here() -> None:
    assert READERS.keys() == FORMATS.keys()


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_holds_the_backbone_for_programs_that_know_nothing_of_us(
    given: tuple[str, Path, nn.Module], format: str, tmp_path: Path
) -> None:
    which, file, network = given
    if (which, format) in {("standard", "onnx"), ("standard", "torch-export"), ("mobile", "torch-export")}:
        pytest.skip("tracing is slow: one ResNet goes through both tracers, another network through one")
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    target = tmp_path / f"out{FORMATS[format].suffix}"
    if (which, format) in REFUSED:
        with pytest.raises(ConfigError, match=f"format: {format} .*; safetensors, onnx and torch-export take every network"):
            export(file, format=format, out=target)
        assert not list(tmp_path.iterdir())
        return
    made = export(file, format=format, out=target)
    reader, tolerance = READERS[format]
    with torch.no_grad():
        wanted, found = network(IMAGES), reader(target, which)
    assert found.shape == wanted.shape and wanted.std() > 1e-3
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert made.parity.relative <= (1e-5 if format == "hf" else tolerance) and made.parity.images == "16 images of digits"
    if "resnet" in NETWORKS[which][0] and format == "torchvision":
        assert made.parity.difference == 0
    assert made.path == target and all(path.exists() for path in made.files)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".relssl")]


def test_transformers_reads_the_folder(plain: tuple[Path, nn.Module], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    file, network = plain
    made = export(file, format="hf", out=tmp_path / "folder")
    assert made.parity.checked == ("timm", "transformers")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "folder").eval()
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values=IMAGES).pooler_output, network(IMAGES))


def changed(writer: Callable[[Source], Written], name: str) -> Callable[[Source], Written]:
    """A writer that gets one layer wrong; but for graphs one that no feature shows, as the branch starts at zero."""

    def wrong(source: Source) -> Written:
        other = create_backbone(source.spec.name, source.spec.stem)
        other.load_state_dict(source.backbone.state_dict())
        other.state_dict()[name].mul_(1.01)
        return writer(dataclasses.replace(source, backbone=other.eval()))

    return wrong


@pytest.mark.parametrize("format", ["safetensors", "torchvision", "hf", "torch-export", "detectron2"])
def test_one_wrong_weight_is_found_and_the_earlier_export_stays(
    plain: tuple[Path, nn.Module], format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / f"out{FORMATS[format].suffix}"
    export(plain[0], format=format, out=target)
    name = "conv1.weight" if format == "torch-export" else "layer1.0.conv1.weight"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setitem(exporting._WRITERS, format, changed(exporting._WRITERS[format], name))
    with pytest.raises(CheckpointError, match=r"(features|weights) differ .* nothing is kept"):
        export(plain[0], format=format, out=target)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_graph_for_one_batch_size_and_a_cut_file_do_not_pass(
    plain: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = exporting._WRITERS["torch-export"]

    def fixed(source: Source) -> Written:
        buffer = io.BytesIO()
        torch.export.save(torch.export.export(source.backbone, (torch.zeros(16, 3, SIZE, SIZE),)), buffer)
        return dataclasses.replace(whole(source), data=buffer.getvalue())

    def cut(source: Source) -> Written:
        written = whole(source)
        assert isinstance(written.data, bytes)
        return dataclasses.replace(written, data=written.data[:-1000])

    for writer in (fixed, cut):
        monkeypatch.setitem(exporting._WRITERS, "torch-export", writer)
        with pytest.raises(CheckpointError, match=r"out\.pt2: does not load with torch alone: "):
            export(plain[0], format="torch-export", out=tmp_path / "out.pt2")
        assert not list(tmp_path.iterdir())


def test_features_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    file, network = weights_file(tmp_path, "resnet18", "standard")
    network.state_dict()["bn1.running_mean"].fill_(math.nan)
    save_file(network.state_dict(), file)
    with pytest.raises(CheckpointError, match="own features are not finite"):
        export(file, format="timm", out=tmp_path / "out.safetensors")


def test_the_transforms_of_the_lines_are_the_plain_view(plain: tuple[Path, nn.Module], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8)
    image, wanted = Image.fromarray(noise), relssl.load_backbone(plain[0]).transform(Image.fromarray(noise))
    for format in ("timm", "torchvision", "hf"):
        made = export(plain[0], format=format, out=tmp_path / f"out{FORMATS[format].suffix}")
        scope: dict[str, Any] = {}
        exec("\n".join(made.lines), scope)
        torch.testing.assert_close(scope["transform"](image), wanted, msg=format)


def test_timm_enlarges_as_we_do_whatever_the_size() -> None:
    spec = BackboneSpec.of(settings("resnet18", "standard"))
    for margin in (1.0, 256 / 224, 1.1, 4 / 3):
        for size in range(4, 500):
            view = dataclasses.replace(spec.view, margin=margin, size=size)
            assert math.floor(size / _view(dataclasses.replace(spec, view=view))["crop_pct"]) == view.shorter_side


def test_detectron_names_are_those_of_mocos_converter() -> None:
    assert {name: to_detectron(name) for name in (
        "conv1.weight", "bn1.running_mean", "layer1.0.conv3.weight", "layer1.0.bn3.bias", "layer4.2.bn1.weight",
        "layer2.0.downsample.0.weight", "layer2.0.downsample.1.running_var",
    )} == {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_mean": "stem.conv1.norm.running_mean",
        "layer1.0.conv3.weight": "res2.0.conv3.weight",
        "layer1.0.bn3.bias": "res2.0.conv3.norm.bias",
        "layer4.2.bn1.weight": "res5.2.conv1.norm.weight",
        "layer2.0.downsample.0.weight": "res3.0.shortcut.weight",
        "layer2.0.downsample.1.running_var": "res3.0.shortcut.norm.running_var",
    }  # fmt: skip


def test_the_detectron2_card_has_its_configuration(tmp_path: Path) -> None:
    file, _ = weights_file(tmp_path, "resnet50", "standard")
    export(file, format="detectron2")
    text = (tmp_path / "source-detectron2.md").read_text()
    block = text[text.index("    MODEL:") :].split("\n\n")[0]
    assert yaml.safe_load(block) == {
        "MODEL": {
            "WEIGHTS": "source-detectron2.pkl",
            "PIXEL_MEAN": [25.5, 51.0, 76.5],
            "PIXEL_STD": [102.0, 127.5, 153.0],
            "RESNETS": {
                "DEPTH": 50, "STRIDE_IN_1X1": False, "NUM_GROUPS": 1, "WIDTH_PER_GROUP": 64, "RES2_OUT_CHANNELS": 256,
            },
        },
        "INPUT": {"FORMAT": "RGB"},
    }  # fmt: skip


class Caller:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("called",)


@pytest.mark.parametrize("held", [{"model": {"a": Caller()}}, {"weights": 1}, {"model": {"a": 3}}, [1]])
def test_a_pickle_of_anything_but_arrays_is_not_loaded(held: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(held))
    with pytest.raises(CheckpointError, match="no file of detectron2 weights"):
        read(tmp_path / "a.pkl")
    assert not capsys.readouterr().out


def test_what_is_missing_or_misspelt_is_told_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if "onnx" in name else found(name, *rest))
    assert main(["export", str(tmp_path / "nothing"), "--format", "onnx"]) == 2
    told = capsys.readouterr().err
    assert told == "relssl: format: onnx needs onnx, onnxruntime, onnxscript; pip install 'relssl[onnx]'\n"
    assert main(["export", str(tmp_path / "nothing"), "--format", "torchvison"]) == 2
    assert "nearest is torchvision" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nothing"), "--format", "hf"]) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_targets_that_do_not_suit_are_refused(plain: tuple[Path, nn.Module], tmp_path: Path) -> None:
    file = plain[0]
    for format, out, why in (
        ("onnx", "a.pth", r"must end in \.onnx"),
        ("timm", "config.safetensors", r"config\.yaml"),
        ("safetensors", str(file), "is the source itself"),
    ):
        if format != "onnx" or importlib.util.find_spec("onnxruntime"):
            with pytest.raises(ConfigError, match=why):
                export(file, format=format, out=tmp_path / out)
    with pytest.raises(ConfigError, match="is the source itself"):
        export(file)
    with pytest.raises(ConfigError, match="holds one network"):
        export(file, format="timm", network="teacher", out=tmp_path / "a.safetensors")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("all of it")
    with pytest.raises(ConfigError, match="no earlier export"):
        export(file, format="hf", out=tmp_path / "mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]
    save_file({"a": torch.zeros(1)}, tmp_path / "theirs.safetensors")
    before = (tmp_path / "theirs.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="no earlier export"):
        export(file, format="timm", out=tmp_path / "theirs.safetensors")
    assert (tmp_path / "theirs.safetensors").read_bytes() == before


def test_a_folder_replaces_its_like_and_has_a_card_for_the_hub(plain: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    export(plain[0], format="hf", out=folder)
    (folder / "stale.txt").write_text("old")
    made = export(plain[0], format="hf", out=folder)
    names = ["README.md", "config.json", "model.safetensors"]
    assert [path.name for path in made.files] == sorted(path.name for path in folder.iterdir()) == names
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    described = yaml.safe_load(front)
    assert described["library_name"] == "timm" and described["license"] == "other" and "ressl" in described["tags"]
    assert "local-dir:folder" in text and str(tmp_path) not in text
    config = json.loads((folder / "config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == [0.1, 0.2, 0.3] and config["pretrained_cfg"]["input_size"] == [3, SIZE, SIZE]
    assert "a1_in1k" not in json.dumps(config)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("secret") / "run", epochs=1, optimizer={"warmup_epochs": 0}).folder


def test_a_run_exports_each_network_by_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--format", "torch-export", "--network", "teacher", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    target = run / "export/backbone-teacher-torch-export.pt2"
    assert told["out"] == str(target) and told["network"] == "teacher" and told["images"] == "16 images of digits"
    with torch.no_grad():
        wanted = relssl.load_backbone(run, "teacher")(IMAGES)
        torch.testing.assert_close(torch.export.load(target).module()(IMAGES), wanted)
    assert main(["export", str(run / "export/backbone-teacher.safetensors"), "--format", "torch-export"]) == 0
    assert "differ by 0 at most" in capsys.readouterr().out
    assert "Teacher backbone of step-00000010" in (run / "export/backbone-teacher-torch-export.md").read_text()


def test_the_card_tells_results_and_nothing_of_the_machine(run: Path) -> None:
    found = {
        "protocol": "probe", "network": "student", "setting": {"penalty": 0.1}, "main": "top1",
        "figures": {"top1": 71.234, "top5": 99.0}, "intervals": {"top1": [70.0, 72.5]},
    }  # fmt: skip
    older = {"figures": {"top1": 12.345}, "card": {"source": {"checkpoint": "step-00000005"}}}
    of_these = {"figures": {"top1": 56.789}, "card": {"source": {"checkpoint": "step-00000010"}}, "notes": ["a subset"]}
    listed = [found, found | {"network": "teacher"}, found | {"figures": None}, "?", found | older, found | of_these]
    (run / "evaluations").mkdir(exist_ok=True)
    (run / "evaluations/probe-digits.json").write_text(json.dumps({"data": "/home/me/digits", "results": listed}))
    (run / "evaluations/old.json").write_text(json.dumps({"results": {"student": {"k20-t0.07": {"top1": 1.0}}}}))
    (run / "evaluations/torn.json").write_text("{")
    export(run)
    text = (run / "export/backbone.md").read_text()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert f"at the end | {rows[-1]['knn_top1']:.2f} % |" in text and f"untrained | {rows[0]['knn_top1']:.2f} % |" in text
    assert text.count("| probe top1 on digits, penalty 0.1 | 71.23 [70.00, 72.50] |") == 1
    assert "12.35" not in text and "12.34" not in text
    assert "| probe top1 on digits, penalty 0.1 (a subset) | 56.79 [70.00, 72.50] |" in text
    assert "320 images of `digits`" in text and "seed 0" in text and "recipe `digits`" in text
    stored = (run / "export/backbone.yaml").read_text()
    for private in ("secret", "/home", str(Path.home())):
        assert private not in text and private not in stored


def test_lines_survive_odd_file_names(plain: tuple[Path, nn.Module], tmp_path: Path) -> None:
    target = tmp_path / 'a "quoted" \\ ümlaut.safetensors'
    made = export(plain[0], format="timm", out=target)
    scope: dict[str, Any] = {}
    exec("\n".join(made.lines), scope)
    with torch.no_grad():
        assert torch.equal(scope["backbone"](IMAGES), plain[1](IMAGES))
    assert timm_lines(BackboneSpec.of(settings("resnet18", "standard")), "a.safetensors")[1].endswith(
        'checkpoint_path="a.safetensors").eval()'
    )


def test_images_are_the_runs_own_if_they_are_at_hand(tmp_path: Path) -> None:
    for number in range(18):
        Image.fromarray(np.full((40, 60, 3), 10 * number, np.uint8)).save(tmp_path / f"{number:02}.png")
    (tmp_path / "03.png").write_bytes(b"no image")
    config = dataclasses.replace(settings("resnet18", "standard"), data=str(tmp_path))
    view = PlainView.of(config.views)
    images, what = real_images(view, config)
    assert images.shape == (16, 3, SIZE, SIZE) and what == f"16 images of {tmp_path.name}"
    assert images[0, 0, 0, 0] == pytest.approx(-0.25)
    _, what = real_images(view, dataclasses.replace(config, data=str(tmp_path / "gone")))
    assert what == "16 images of the built-in digits"
    assert not at_hand("cifar10", str(tmp_path)) and at_hand("digits", None)
    _, what = real_images(view, dataclasses.replace(config, data="cifar10", data_root=str(tmp_path)))
    assert what == "16 images of the built-in digits"
