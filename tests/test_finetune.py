"""A classifier is trained, kept as a file that timm reads, and applied, and nothing differs between the three."""

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import relssl
from relssl.cli import main
from relssl.data.plain import PlainView
from relssl.errors import ConfigError, StorageError
from relssl.weights.spec import BackboneSpec

SIZE = 32
TINY: dict[str, dict[str, Any]] = {
    "resnet18": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]},
    "vit_tiny_patch16_224": {"depth": 1, "embed_dim": 24, "num_heads": 2},
    "mobilenetv3_small_050": {},
    "torchvision/shufflenet_v2_x0_5": {},
    "torchvision/squeezenet1_1": {},
    "levit_128s": {},
}
QUICK: dict[str, Any] = {"epochs": 3, "batch_size": 16, "device": "cpu", "workers": 0}


VIEW = PlainView(SIZE, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3)


def backbone_file(folder: Path, name: str) -> Path:
    spec, file = BackboneSpec(name, TINY[name], "standard", VIEW), folder / "b.safetensors"
    file.with_suffix(".yaml").write_text(spec.to_yaml())
    save_file({key: value.contiguous() for key, value in spec.create().state_dict().items()}, file)
    return file


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Red, green and blue as folders of train and val; one file of val cannot be read."""
    folder = tmp_path_factory.mktemp("labelled")
    for part, count in (("train", 33), ("val", 15)):
        pixels = np.random.default_rng(count).integers(60, 120, (count, 16, 16, 3), np.uint8)
        for row, image in enumerate(pixels):
            place = folder / part / ("red", "green", "blue")[row % 3]
            place.mkdir(parents=True, exist_ok=True)
            image[..., row % 3] += 100
            Image.fromarray(image).save(place / f"{row:02}.png")
    (folder / "val/blue/broken.png").write_bytes(b"not an image")
    return folder


@pytest.fixture(scope="module")
def model(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    file, lines = tmp_path_factory.mktemp("model") / "model.safetensors", list[str]()
    facts = relssl.finetune(backbone_file(file.parent, "resnet18"), labelled, file, say=lines.append, **QUICK | {"epochs": 12})
    assert len(lines) == 10  # some ten in all
    return file, facts


def timms(file: Path) -> nn.Module:
    return timm.create_model("resnet18", num_classes=3, checkpoint_path=str(file), **TINY["resnet18"]).eval()


def views(folder: Path) -> tuple[list[str], Tensor]:
    files = sorted(path for path in folder.rglob("*.png") if path.stem != "broken")
    return [str(file) for file in files], torch.stack([VIEW(Image.open(file).convert("RGB")) for file in files])


def test_the_file_is_timms_and_scores_and_accuracy_are_those_of_it(
    model: tuple[Path, dict[str, Any]], labelled: Path, tmp_path: Path
) -> None:
    (file, facts), network = model, timms(model[0])
    names, images = views(labelled / "val")
    with torch.no_grad():
        expected = network(images).softmax(dim=1)
        alone = nn.functional.linear(relssl.load_backbone(file)(images), network.fc.weight, network.fc.bias).softmax(dim=1)
    torch.testing.assert_close(alone, expected)
    answer = relssl.predict(file, labelled, tmp_path / "p.npz", split="test", device="cpu")
    assert answer["classes"] == facts["classes"] == ["blue", "green", "red"]
    assert answer["images"] == len(names) and "broken.png" in answer["bad"][0][0]
    with np.load(tmp_path / "p.npz", allow_pickle=False) as arrays:
        assert arrays["names"].tolist() == names and arrays["classes"].tolist() == facts["classes"]
        np.testing.assert_allclose(arrays["scores"], expected.numpy(), atol=1e-5)
        assert arrays["predicted"].tolist() == expected.argmax(dim=1).tolist()
        right = [Path(name).parent.name == arrays["classes"][best] for name, best in zip(names, arrays["predicted"], strict=True)]
    assert facts["top1"] == pytest.approx(100 * np.mean(right), abs=1e-3) and facts["top1"] > 60
    assert "`blue`, `green`, `red`" in (card := file.with_suffix(".md").read_text()) and f"{facts['top1']:.2f} %" in card


def test_tables_say_the_same(
    model: tuple[Path, dict[str, Any]], labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in ("npz", "csv", "parquet"):
        out = tmp_path / f"p.{suffix}"
        assert main(["predict", str(model[0]), str(labelled / "val"), "--out", str(out), "--device", "cpu"]) == 0
        assert "1 could not be read" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    columns = parquet.read_table(tmp_path / "p.parquet").to_pydict()
    with np.load(tmp_path / "p.npz") as arrays:
        scores, best = arrays["scores"], arrays["scores"].max(axis=1)
        classes = arrays["classes"][arrays["predicted"]].tolist()
        assert [row["name"] for row in rows] == columns["name"] == arrays["names"].tolist()
    assert [row["class"] for row in rows] == columns["class"] == classes
    assert [np.float32(row["score"]) for row in rows] == columns["score"] == best.tolist()
    assert set(rows[0]) == {"name", "class", "score"}
    np.testing.assert_array_equal(columns["scores"], scores)


@pytest.mark.parametrize("format", ["hf", "torch-export"])
def test_an_export_has_the_classifier_too(
    format: str, model: tuple[Path, dict[str, Any]], labelled: Path, tmp_path: Path
) -> None:
    result = relssl.export(model[0], format=format, out=tmp_path / f"out{'' if format == 'hf' else '.pt2'}")
    card, scope = next(file for file in result.files if file.suffix == ".md").read_text(), dict[str, Any]()
    exec("\n".join(result.lines), scope)
    images, network = views(labelled / "val")[1], timms(model[0])
    with torch.no_grad():
        torch.testing.assert_close(scope["model"](images), network(images), rtol=1e-4, atol=1e-4)
    assert "`blue`, `green`, `red`" in card and "outputs = model(images)" in card
    with pytest.raises(ConfigError, match="without a classifier"):
        relssl.export(model[0], format="torchvision")


@pytest.mark.parametrize("name", [name for name in TINY if name != "resnet18"])
def test_other_networks_are_written_whole_or_refused_before_the_work(name: str, labelled: Path, tmp_path: Path) -> None:
    source, file = backbone_file(tmp_path, name), tmp_path / "m.safetensors"
    if name in ("torchvision/squeezenet1_1", "levit_128s"):
        with pytest.raises(ConfigError, match="not one linear layer"):
            relssl.finetune(source, labelled, file, **QUICK, say=pytest.fail)
        assert not file.exists()
        return
    answer = relssl.finetune(source, labelled, file, **QUICK | {"epochs": 1, "size": 48})  # not the size it was pretrained at
    assert relssl.load_backbone(file).transform.size == 48 and relssl.load_backbone(file).num_features > 3
    relssl.predict(file, labelled, tmp_path / "p.csv", split="test", device="cpu")
    classes = {Path(row["name"]): row["class"] for row in csv.DictReader((tmp_path / "p.csv").read_text().splitlines())}
    assert answer["top1"] == pytest.approx(100 * np.mean([path.parent.name == each for path, each in classes.items()]), abs=1e-3)


def test_what_cannot_be_is_refused(
    model: tuple[Path, dict[str, Any]], labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = backbone_file(tmp_path, "resnet18")
    with pytest.raises(ConfigError, match="no classifier"):
        relssl.predict(source, labelled, tmp_path / "p.csv")
    with pytest.raises(ConfigError, match=r"\.csv"):
        relssl.predict(model[0], labelled, tmp_path / "p.txt")
    with pytest.raises(ConfigError, match="out"):
        relssl.finetune(source, labelled, source, **QUICK)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):  # before the work
        relssl.finetune(source, labelled, tmp_path / "file/m.safetensors", say=lambda line: pytest.fail(line), **QUICK)
    assert main(["finetune", str(source), str(labelled), "--out", str(tmp_path / "m.safetensors"), "--epoch", "3"]) == 2
    assert "epochs" in capsys.readouterr().err
    settings = model[0].with_suffix(".yaml")
    before = settings.read_text()
    settings.write_text(re.sub(r"  layer: .*\n", "", before))
    with pytest.raises(ConfigError, match="layer"):
        relssl.load_backbone(model[0])
    settings.write_text(before)
    assert load_file(model[0]).keys() - load_file(source).keys() == {"fc.weight", "fc.bias"}
