"""Every format holds the backbone it was made of, and what does not is never kept."""

import contextlib
import dataclasses
import importlib.util
import json
import math
import pickle
import subprocess
import sys
import typing
import warnings
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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import relssl
from bad_images import CONTENTS
from relssl.cli import main
from relssl.data.decode import FORMATS as DECODED
from relssl.data.decode import BadImage
from relssl.data.images import Files, Images
from relssl.data.named import load
from relssl.data.plain import PlainView, Reader
from relssl.errors import CheckpointError, ConfigError, StorageError
from relssl.settings.run import Config, resolve, to_yaml
from relssl.train.estimate import Estimate
from relssl.train.pretrain import Result
from relssl.weights import store
from relssl.weights.export import compare, export, import_weights, real_images
from relssl.weights.formats import FORMATS
from relssl.weights.opening import Opened, open_backbones
from relssl.weights.spec import BackboneSpec
from relssl.weights.writers import WRITERS, timm_view
from small_runs import differing, small_run

SIZE = 32
IMAGES = torch.rand(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
TINY = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
NETWORKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tiny": ("resnet18", "standard", TINY),
    "small": ("resnet18", "small", TINY),
    "whole": ("resnet18", "standard", {}),
    "mobile": ("mobilenetv3_small_100", "standard", {}),
}


def settings(which: str) -> Config:
    backbone, stem, args = NETWORKS[which]
    config = resolve({"data": "digits", "backbone": backbone, "encoder.stem": stem})
    views = dataclasses.replace(config.views, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), margin=1.0)
    return dataclasses.replace(config, views=views, backbone_args=args)


def write(file: Path, network: nn.Module, which: str) -> Path:
    """A file of ours, with its settings."""
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, file)
    file.with_suffix(".yaml").write_text(to_yaml(settings(which)))
    return file


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> "Sources":
    """Networks with lively batch norms as files with their settings, and the networks."""
    folder = tmp_path_factory.mktemp("sources")

    def source(which: str) -> tuple[Path, nn.Module]:
        torch.manual_seed(3)
        network, file = BackboneSpec.of(settings(which)).create(), folder / f"{which}.safetensors"
        for name, value in network.state_dict().items():
            if "running" in name:
                value.copy_(torch.rand_like(value) * 0.2 + (0.9 if "var" in name else -0.1))
        return file if file.exists() else write(file, network, which), network.eval()

    return source


Sources = Callable[[str], tuple[Path, nn.Module]]


def with_timm(file: Path, which: str) -> Tensor:
    name, stem, args = NETWORKS[which]
    network = timm.create_model(name, num_classes=0, **args)
    if stem == "small":
        network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    timm.models.load_checkpoint(network, str(file))
    return network.eval()(IMAGES)


def with_torchvision(file: Path, which: str) -> Tensor:
    network = torchvision.models.mobilenet_v3_small() if which == "mobile" else torchvision.models.resnet18()
    network.set_submodule("classifier.3" if which == "mobile" else "fc", nn.Identity())
    network.load_state_dict(torch.load(file, weights_only=True))
    return network.eval()(IMAGES)


def with_local_dir(folder: Path, which: str) -> Tensor:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()(IMAGES)


def with_onnx(file: Path, which: str) -> Tensor:
    session = pytest.importorskip("onnxruntime").InferenceSession(file, providers=["CPUExecutionProvider"])
    rows = [session.run(None, {"images": image[None].numpy()})[0] for image in IMAGES]
    assert np.allclose(np.concatenate(rows), session.run(None, {"images": IMAGES.numpy()})[0], atol=1e-5)
    return torch.from_numpy(np.concatenate(rows))


def with_torch(file: Path, which: str) -> Tensor:
    """In a process that never imports timm or relssl."""
    torch.save(IMAGES, file.with_name("images.pt"))
    code = (
        "import sys, torch; f = torch.export.load(sys.argv[1]).module(); x = torch.load(sys.argv[2]); "
        "assert not {'timm', 'relssl'} & set(sys.modules); torch.save(torch.cat([f(x[:1]), f(x[1:])]).detach(), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(file), str(file.with_name("images.pt"))], check=True)
    features: Tensor = torch.load(file.with_name("images.pt"))
    return features


def with_detectron2(file: Path, which: str) -> Tensor:
    """As detectron2 reads it, by names taken from its own ResNet: stem, res2..res5, shortcut, norm."""
    content = torch.load(file, weights_only=True)
    assert content["matching_heuristics"] is True and content["__author__"] != "Caffe2"
    weights = content["model"]

    def layer(x: Tensor, name: str, stride: int, padding: int) -> Tensor:
        parts = [weights[f"{name}.norm.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return nn.functional.batch_norm(torch.conv2d(x, weights[f"{name}.weight"], stride=stride, padding=padding), *parts)

    x = torch.max_pool2d(layer(IMAGES, "stem.conv1", 2, 3).relu(), 3, 2, 1)
    for stage in (2, 3, 4, 5):
        for block in (0, 1):
            path, stride = f"res{stage}.{block}", 2 if stage > 2 and block == 0 else 1
            y = layer(layer(x, f"{path}.conv1", stride, 1).relu(), f"{path}.conv2", 1, 1)
            x = ((layer(x, f"{path}.shortcut", stride, 0) if stride > 1 else x) + y).relu()
    return x.mean((2, 3))


READERS: dict[str, tuple[str, Callable[[Path, str], Tensor], float]] = {
    "safetensors": ("small", with_timm, 0),
    "timm": ("tiny", with_timm, 0),
    "torchvision": ("mobile", with_torchvision, 1e-4),
    "hf": ("tiny", with_local_dir, 0),
    "onnx": ("small", with_onnx, 1e-4),
    "torch-export": ("tiny", with_torch, 1e-4),
    "detectron2": ("whole", with_detectron2, 1e-5),
}
REFUSED = {("small", "hf"), ("small", "torchvision"), ("small", "detectron2"), ("mobile", "detectron2"), ("tiny", "detectron2")}
OTHERS = {(which, format) for which in ("small", "whole", "mobile") for format in FORMATS} - REFUSED


@pytest.mark.parametrize(
    ("which", "format"),
    [(reader[0], format) for format, reader in READERS.items()]
    + [pytest.param(*other, marks=pytest.mark.torture) for other in sorted(OTHERS)],
)
def test_a_format_holds_the_backbone_for_programs_that_know_nothing_of_us(
    which: str, format: str, sources: Sources, tmp_path: Path
) -> None:
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    _, reader, tolerance = READERS[format]
    file, network = sources(which)
    target = tmp_path / f"out{FORMATS[format].suffix}"
    exported = export(file, format=format, out=target)
    with torch.no_grad():
        expected, features = network(IMAGES), reader(target, which)
    assert features.shape == expected.shape and expected.std() > 1e-3
    assert (features - expected).abs().max() <= tolerance * expected.abs().max()
    assert exported.parity.relative <= (1e-5 if format == "hf" else tolerance)
    assert exported.parity.images == "16 images of digits"
    assert exported.path == target and all(path.exists() for path in exported.files)
    if any("transform" in line for line in exported.lines):
        scope: dict[str, Any] = {}
        exec("\n".join(exported.lines), scope)
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8))
        torch.testing.assert_close(scope["transform"](image), relssl.load_backbone(file).transform(image))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".relssl")]
    if format == "detectron2":
        text = (tmp_path / "out.md").read_text()
        configuration = yaml.safe_load(text[text.index("    MODEL:") :].split("\n\n")[0])
        model = configuration["MODEL"]
        assert model["WEIGHTS"] == "out.pth" and configuration["INPUT"] == {"FORMAT": "RGB"}
        assert model["PIXEL_MEAN"] == [25.5, 51.0, 76.5]
        resnets = {"DEPTH": 18, "STRIDE_IN_1X1": False, "NUM_GROUPS": 1, "WIDTH_PER_GROUP": 64, "RES2_OUT_CHANNELS": 64}
        assert model["RESNETS"] == resnets


@pytest.mark.parametrize(("which", "format"), sorted(REFUSED))
def test_networks_that_a_format_cannot_hold_are_refused(which: str, format: str, sources: Sources, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"format: {format} "):
        export(sources(which)[0], format=format, out=tmp_path / f"out{FORMATS[format].suffix}")
    assert not list(tmp_path.iterdir())


def test_transformers_reads_the_folder(sources: Sources, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    file, network = sources("tiny")
    assert export(file, format="hf", out=tmp_path / "folder").parity.checked == ("timm", "transformers")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "folder").eval()
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values=IMAGES).pooler_output, network(IMAGES))


@pytest.mark.parametrize("format", ["safetensors", "hf", "torch-export"])
def test_one_wrong_weight_does_not_pass_the_comparison(format: str, sources: Sources, tmp_path: Path) -> None:
    """But for graphs one that no feature shows, as the branch starts at zero."""
    _, network = sources("tiny")
    _, wrong = sources("tiny")
    wrong.state_dict()["conv1.weight" if format == "torch-export" else "layer1.0.conv1.weight"].mul_(1.01)
    wrong.num_features = 16  # type: ignore[assignment]
    header = {"network": "student", "origin": "test"}
    spec = BackboneSpec.of(settings("tiny"))
    written = WRITERS[format](Opened("test", {"student": wrong}, spec, header, {}), format)  # type: ignore[dict-item]
    target = tmp_path / f"out{FORMATS[format].suffix}"
    (tmp_path / "out.yaml").write_text(to_yaml(settings("tiny")))
    for name, data in written.data.items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(data)
    with pytest.raises(CheckpointError, match="differ"):
        compare(network, written, target, IMAGES, "noise")


def test_an_upload_has_what_was_checked_and_a_dry_run_touches_nothing(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub: dict[str, Any] = {}

    class Hub:
        def create_repo(self, name: str, private: bool, exist_ok: bool) -> str:
            assert private and exist_ok
            return f"https://huggingface.co/{name}"

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
            if repo_id == "me/offline":
                raise ConnectionError("no network")
            hub[repo_id] = {path.name: path.read_bytes() for path in folder_path.iterdir()}

    monkeypatch.setattr("relssl.weights.export.HfApi", Hub)
    source, folder = sources("tiny")[0], tmp_path / "folder"
    before = sorted(source.parent.iterdir())
    would = export(source, push="me/photos", dry_run=True)
    assert not hub and sorted(source.parent.iterdir()) == before and would.address is None
    monkeypatch.setattr("relssl.weights.export.get_token", lambda: "token")
    assert export(source, push="me/photos", out=folder).address == "https://huggingface.co/me/photos"
    with pytest.raises(StorageError, match=str(folder)):
        export(source, push="me/offline", out=folder)
    sizes = {path.name: size for path, size in zip(would.files, would.sizes, strict=True)}
    assert {name: len(data) for name, data in hub["me/photos"].items()} == sizes
    assert b"hf-hub:me/photos" in hub["me/photos"]["README.md"]
    monkeypatch.setattr("relssl.weights.export.get_token", lambda: None)
    for refused in ({"push": "me/photos"}, {"push": "photos"}, {"push": "me/photos", "format": "onnx"}, {"dry_run": True}):
        with pytest.raises(ConfigError, match=r"push|dry_run"):
            export(source, out=folder, **refused)


def test_a_failed_export_leaves_the_earlier_one(sources: Sources, tmp_path: Path) -> None:
    file, network = sources("tiny")
    target = tmp_path / "out.safetensors"
    export(file, format="timm", out=target)
    network.state_dict()["bn1.running_mean"].fill_(math.nan)
    write(tmp_path / "nan.safetensors", network, "tiny")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="not finite"):
        export(tmp_path / "nan.safetensors", format="timm", out=target)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_timm_enlarges_as_we_do_whatever_the_size() -> None:
    spec = BackboneSpec.of(settings("tiny"))
    for margin in (1.0, 256 / 224, 1.1, 4 / 3):
        for size in range(4, 500):
            view = dataclasses.replace(spec.view, margin=margin, size=size)
            assert math.floor(size / timm_view(dataclasses.replace(spec, view=view))["crop_pct"]) == view.shorter_side


def test_what_is_missing_or_misspelt_is_reported_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if "onnx" in name else find_spec(name, *rest))
    for format, text in (("onnx", "pip install 'relssl[onnx]'"), ("torchvison", "nearest is torchvision"), ("hf", "nothing")):
        assert main(["export", str(tmp_path / "nothing"), "--format", format]) == 2
        assert text in capsys.readouterr().err


def test_targets_that_do_not_suit_are_refused(sources: Sources, tmp_path: Path) -> None:
    file, _ = sources("tiny")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("all of it")
    save_file({"a": torch.zeros(1)}, tmp_path / "theirs.safetensors")
    (tmp_path / "card.md").write_text("a card of another file")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    unsuited = [("torchvision", "a.onnx"), ("timm", "config.safetensors"), ("safetensors", file), ("hf", "mine")]
    unsuited += [("timm", "theirs.safetensors"), ("torch-export", "card.pt2"), ("onnx", "card.onnx"), ("safetensors", None)]
    for format, out in unsuited:
        with pytest.raises(ConfigError, match=rf"out: {'.*card.md' if 'card' in str(out) else ''}"):
            export(file, format=format, out=None if out is None else tmp_path / out)
    with pytest.raises(ConfigError, match="network: "):
        export(file, format="timm", network="teacher", out=tmp_path / "a.safetensors")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_weights_of_a_folder_are_imported_where_their_settings_are_not(tmp_path: Path) -> None:
    network = timm.create_model("resnet18", num_classes=0)
    for value in network.state_dict().values():  # fresh norms are refused
        value.add_(0.1 * torch.rand_like(value)) if value.is_floating_point() and value.ndim == 1 else None
    save_file(network.state_dict(), tmp_path / "source.safetensors")
    import_weights(tmp_path / "source.safetensors", out=tmp_path / "own.safetensors")
    export(tmp_path / "own.safetensors", format="hf", out=tmp_path / "folder")
    with pytest.raises(ConfigError, match=r"of a Hugging Face folder.* `relssl import` it"):
        open_backbones(tmp_path / "folder/model.safetensors")
    import_weights(tmp_path / "folder/model.safetensors", out=tmp_path / "again.safetensors")
    one, other = (open_backbones(tmp_path / f"{name}.safetensors").backbone.state_dict() for name in ("own", "again"))
    assert differing(one, other) == []


def test_a_folder_replaces_its_like_and_has_a_card_for_the_hub(sources: Sources, tmp_path: Path) -> None:
    folder, (file, _) = tmp_path / "folder", sources("tiny")
    export(file, format="hf", out=folder)
    (folder / "mine.txt").write_text("all of it")
    with pytest.raises(ConfigError, match=r"out: .* holds mine\.txt"):
        export(file, format="hf", out=folder)
    (folder / "mine.txt").unlink()
    exported = export(file, format="hf", out=folder)
    names = ["README.md", "config.json", "model.safetensors"]
    assert [path.name for path in exported.files] == sorted(path.name for path in folder.iterdir()) == names
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "timm" and "local-dir:folder" in text and str(tmp_path) not in text
    config = json.loads((folder / "config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == [0.1, 0.2, 0.3] and config["pretrained_cfg"]["input_size"] == [3, SIZE, SIZE]
    assert "a1_in1k" not in json.dumps(config)


def test_lines_survive_odd_file_names(sources: Sources, tmp_path: Path) -> None:
    file, network = sources("tiny")
    exported = export(file, format="timm", out=tmp_path / 'a "quoted" \\ ümlaut.safetensors')
    scope: dict[str, Any] = {}
    exec("\n".join(exported.lines), scope)
    with torch.no_grad():
        assert torch.equal(scope["model"](IMAGES), network(IMAGES))


def test_images_are_the_runs_own_if_they_are_at_hand(tmp_path: Path) -> None:
    for number in range(18):
        Image.fromarray(np.full((40, 60, 3), 10 * number, np.uint8)).save(tmp_path / f"{number:02}.png")
    (tmp_path / "03.png").write_bytes(b"no image")
    config = dataclasses.replace(settings("tiny"), data=str(tmp_path))
    view = PlainView.of(config.views)
    images, what = real_images(view, config)
    assert images.shape == (16, 3, SIZE, SIZE) and what == f"16 images of {tmp_path.name}"
    assert images[0, 0, 0, 0] == pytest.approx(-0.25)
    for absent in ({"data": str(tmp_path / "gone")}, {"data": "cifar10", "data_root": str(tmp_path)}):
        assert real_images(view, dataclasses.replace(config, **absent))[1] == "16 images of the built-in digits"


# A run's own files


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("secret") / "run", epochs=1, optimizer={"warmup_epochs": 0}).folder


def test_a_run_exports_each_network_by_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--format", "torch-export", "--network", "teacher", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    target = run / "export/backbone-teacher-torch-export.pt2"
    assert answer["out"] == str(target) and answer["network"] == "teacher" and answer["images"] == "16 images of digits"
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(target).module()(IMAGES), relssl.load_backbone(run, "teacher")(IMAGES))
    again = str(run / "export/again.safetensors")
    assert main(["export", str(run / "export/backbone-teacher.safetensors"), "--format", "timm", "--out", again]) == 0
    assert "Teacher backbone of step-00000010" in (run / "export/again.md").read_text()
    state = store.load(store.checkpoints(run / "checkpoints")[-1])[0]
    for network, file in (("student", "backbone"), ("teacher", "again")):
        ours, weights = relssl.load_backbone(run, network).state_dict(), load_file(run / f"export/{file}.safetensors")
        for key, value in ours.items():
            assert torch.equal(value, weights[key]) and torch.equal(value, state[f"{network}.backbone.{key}"])


def test_the_card_has_results_and_nothing_of_the_machine(run: Path) -> None:
    record: dict[str, Any] = {
        "protocol": "probe", "network": "student", "setting": {"penalty": 0.1}, "main": "top1", "notes": [],
        "figures": {"top1": 71.234, "top5": 99.0}, "intervals": {"top1": [70.0, 72.5]},
        "card": {"source": {"checkpoint": "step-00000010"}},
    }  # fmt: skip
    older = {"figures": {"top1": 12.345}, "card": {"source": {"checkpoint": "step-00000005"}}}
    note = "a subset; files that cannot be used: 1, the first /home/me/a.jpg is empty"
    of_these = {"figures": {"top1": 56.789}, "notes": [note]}
    listed = [record, record | {"network": "teacher"}, record | older, record | of_these]
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
    assert "| probe top1 on digits, penalty 0.1 (a subset; files that cannot be used: 1) | 56.79 [70.00, 72.50] |" in text
    assert "320 images of `digits`" in text and "seed 0" in text and "recipe `digits`" in text
    stored = (run / "export/backbone.yaml").read_text()
    for private in ("secret", "/home", str(Path.home())):
        assert private not in text and private not in stored


def test_a_loaded_backbone_knows_its_width_and_its_view(run: Path) -> None:
    backbone = relssl.load_backbone(run)
    images = load("digits", None, "test").subset(range(4))
    _, batch, _ = next(Reader(backbone.spec.view).batches(images))
    torch.testing.assert_close(backbone.transform(images.read(0, 10**6)), batch[0])
    assert backbone(batch).shape == (4, backbone.num_features)


@pytest.mark.parametrize("kind", CONTENTS)
def test_the_transform_sees_every_kind_of_image_as_evaluations_do(kind: str, tmp_path: Path) -> None:
    _, extension, contents = CONTENTS[kind]
    path, view = tmp_path / f"image.{extension}", PlainView(16, 1.2, "bilinear", (0.4, 0.5, 0.6), (0.2, 0.3, 0.2))
    path.write_bytes(contents())
    images = Images("one", Files.of(str(tmp_path), [(path.name.encode(), path.stat().st_size)]))
    ((_, views, bad),) = Reader(view).batches(images)
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            image = stack.enter_context(Image.open(path))
        except Exception:  # what PIL itself does not open never comes to a transform
            return
        if image.format not in DECODED or math.prod(image.size) > Config().loader.max_pixels:
            return
        for _ in range(1 if bad else 2):  # the image itself is as before
            with pytest.raises(BadImage) if bad else contextlib.nullcontext():
                torch.testing.assert_close(view(image), views[0], rtol=0, atol=1e-5)


def test_a_loaded_backbone_goes_to_files_and_other_processes(run: Path, tmp_path: Path) -> None:
    backbone, image = relssl.load_backbone(run), Image.fromarray(np.full((40, 50), 40_000, np.uint16))
    torch.save(nn.Sequential(backbone, nn.Linear(backbone.num_features, 3)), tmp_path / "model.pt")
    copied = torch.load(tmp_path / "model.pt", weights_only=False)[0]
    batch = backbone.transform(image)[None]
    assert torch.equal(copied(batch), backbone(batch)) and copied.num_features == backbone.num_features
    assert torch.equal(pickle.loads(pickle.dumps(backbone.transform))(image), batch[0])


def test_the_interface_has_types_that_need_no_asking() -> None:
    assert typing.get_type_hints(relssl.pretrain)["return"] is typing.get_type_hints(relssl.resume)["return"] is Result
    assert typing.get_type_hints(relssl.estimate)["return"] is Estimate
    loaded = typing.get_type_hints(typing.get_type_hints(relssl.load_backbone)["return"])
    assert loaded["num_features"] is int and loaded["transform"] is PlainView


def test_weights_that_do_not_match_are_refused_with_counts(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "backbone.safetensors"
    file.with_suffix(".yaml").write_bytes((run / "export/backbone.yaml").read_bytes())
    weights = load_file(run / "export/backbone.safetensors")
    weights["stem.weight"] = weights.pop("conv1.weight")
    save_file(weights, file)
    counts = rf"{len(weights) - 1} of {len(weights)} weights.*missing .1.: conv1.weight; unexpected .1.: stem.weight"
    with pytest.raises(CheckpointError, match=counts):
        relssl.load_backbone(file)
    file.write_bytes(b"\x80\x04\x95not a tensor")
    with pytest.raises(CheckpointError):
        relssl.load_backbone(file)
    with pytest.raises(ConfigError, match="network: "):
        relssl.load_backbone(run, "pupil")


def test_settings_of_other_versions(run: Path, tmp_path: Path) -> None:
    """A setting that an older run did not have is the default; one that is not known is refused by file and name."""
    stored = (run / "config.yaml").read_text()
    assert "compile:" in stored
    (tmp_path / "config.yaml").write_text("\n".join(line for line in stored.splitlines() if not line.startswith("compile:")))
    assert relssl.load_run(tmp_path).config == relssl.load_run(run).config
    (tmp_path / "config.yaml").write_text(stored + "warmth: 3\n")
    (tmp_path / "backbone.yaml").write_text((run / "export/backbone.yaml").read_text() + "warmth: 3\n")
    (tmp_path / "backbone.safetensors").write_bytes((run / "export/backbone.safetensors").read_bytes())
    for source, file in ((tmp_path, "config.yaml"), (tmp_path / "backbone.safetensors", "backbone.yaml")):
        with pytest.raises(ConfigError, match=f"{file}: warmth"):
            relssl.load_backbone(source)
