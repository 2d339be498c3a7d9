"""Backbones leave a run unchanged: timm loads the exported file bit for bit, evaluations and features are those of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

import relssl
from relssl.cli import main
from relssl.data.named import load
from relssl.data.plain import Reader
from relssl.engine import Engine
from relssl.errors import CheckpointError, ConfigError, DataError
from relssl.weights import store
from relssl.weights.export import export
from small_runs import small_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("runs") / "whole", epochs=1, optimizer={"warmup_epochs": 0}).folder


STANDARD: dict[str, dict[str, Any]] = {
    "resnet18": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
    "mobilenetv3_small_050": {},
    "efficientnet_b0": {},
}


@pytest.mark.parametrize("name", STANDARD)
def test_an_export_loads_with_timm_alone_bit_for_bit(name: str, tmp_path: Path) -> None:
    run = small_run(
        tmp_path / "run", epochs=1, max_images=64, backbone=name, backbone_args=STANDARD[name], encoder={"stem": "standard"},
        method={"memory_size": 64, "warmup": "none"}, optimizer={"warmup_epochs": 0}, log={"knn_every": 0},
    )  # fmt: skip
    theirs = timm.create_model(name, num_classes=0, checkpoint_path=str(run.backbone), **STANDARD[name]).eval()
    images = torch.rand(4, 3, 32, 32)
    for network in ("student", "teacher"):
        ours = relssl.load_backbone(run.folder, network)
        tensors = {
            k.removeprefix(f"{network}.backbone."): v
            for k, v in final(run.folder).items()
            if k.startswith(f"{network}.backbone.")
        }
        assert all(torch.equal(value, tensors[key]) for key, value in ours.state_dict().items())
        if network == "student":
            assert torch.equal(theirs(images), ours(images))
            assert theirs.state_dict().keys() == tensors.keys()


def final(folder: Path) -> dict[str, torch.Tensor]:
    return store.load(store.checkpoints(folder / "checkpoints")[-1])[0]


def test_a_small_stem_loads_with_the_lines_the_card_gives(finished: Path) -> None:
    file = finished / "export/backbone.safetensors"
    lines = export(finished).lines
    assert len(lines) == 5 and all(line.split("(")[0] in (finished / "export/backbone.md").read_text() for line in lines)
    scope: dict[str, Any] = {}
    exec("\n".join(lines), scope)
    images = torch.rand(4, 3, 32, 32)
    assert torch.equal(scope["backbone"].eval()(images), relssl.load_backbone(finished)(images))
    assert torch.equal(relssl.load_backbone(file)(images), relssl.load_backbone(finished)(images))


def test_a_loaded_backbone_knows_its_width_and_its_view(finished: Path) -> None:
    backbone = relssl.load_backbone(finished)
    images = load("digits", None, "test").subset(range(4))
    transformed = backbone.transform(images.read(0, 10**6))
    _, batch, _ = next(Reader(backbone.spec.view).batches(images))
    torch.testing.assert_close(transformed, batch[0])
    assert backbone(batch).shape == (4, backbone.num_features)


def test_weights_that_do_not_match_are_refused_with_counts(finished: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = tmp_path / "backbone.safetensors"
    file.with_suffix(".yaml").write_bytes((finished / "export/backbone.yaml").read_bytes())
    weights = load_file(finished / "export/backbone.safetensors")
    weights["stem.weight"] = weights.pop("conv1.weight")
    save_file(weights, file)
    with pytest.raises(
        CheckpointError, match=rf"{len(weights) - 1} of {len(weights)} weights.*missing: conv1.weight; unexpected: stem.weight"
    ):
        relssl.load_backbone(file)
    file.write_bytes(b"\x80\x04\x95not a tensor")
    with pytest.raises(CheckpointError, match="claims a header"):
        relssl.load_backbone(file)
    with pytest.raises(ConfigError, match="holds student and teacher, not pupil"):
        relssl.load_backbone(finished, "pupil")


def test_settings_of_another_version_are_refused_by_file_and_name(finished: Path, tmp_path: Path) -> None:
    for name in ("config.yaml", "backbone.yaml"):
        stored = finished / ("config.yaml" if name == "config.yaml" else "export/backbone.yaml")
        (tmp_path / name).write_text(stored.read_text() + "warmth: 3\n")
    (tmp_path / "backbone.safetensors").write_bytes((finished / "export/backbone.safetensors").read_bytes())
    for source, file in ((tmp_path, "config.yaml"), (tmp_path / "backbone.safetensors", "backbone.yaml")):
        with pytest.raises(ConfigError, match=rf"{file}: warmth: unknown key"):
            relssl.load_backbone(source)


def test_settings_that_an_older_run_did_not_have_are_the_defaults(finished: Path, tmp_path: Path) -> None:
    stored = (finished / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text("\n".join(line for line in stored.splitlines() if not line.startswith("compile:")))
    assert "compile:" in stored and relssl.load_run(tmp_path).config == relssl.load_run(finished).config


def test_evaluate_equals_scikit_learn_on_the_same_features(finished: Path) -> None:
    from relssl.evaluation.features import extract
    from relssl.evaluation.pairs import LabelledPair

    found = relssl.evaluate(finished, images=(300, 300), network="teacher", device="cpu", precision="fp32")["results"]
    pair = LabelledPair.load("digits", None, (300, 300))
    backbone = relssl.load_backbone(finished, "teacher")
    bank, test = (
        extract(backbone, side, Reader(backbone.spec.view), Engine.local("cpu", "fp32")).vectors.numpy()
        for side in (pair.bank, pair.test)
    )
    assert len(found) == 8
    for result in found:
        k, temperature = result["setting"]["k"], result["setting"]["temperature"]
        oracle = KNeighborsClassifier(k, algorithm="brute", metric="cosine", weights=lambda d, t=temperature: np.exp((1 - d) / t))
        share = 100 * oracle.fit(bank, pair.bank.labels).score(test, pair.test.labels)
        assert result["figures"]["top1"] == pytest.approx(share, abs=0.34)  # one tie of 300


def test_measuring_changes_nothing(finished: Path) -> None:
    backbone = relssl.load_backbone(finished).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    from relssl.evaluation.features import extract

    extract(backbone, load("digits", None, "test").subset(range(40)), Reader(backbone.spec.view), Engine.local("cpu", "fp32"))
    assert backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_embed_writes_every_image_with_its_name(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(5):
        Image.fromarray(np.full((40, 40, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
    (folder / "bad.png").write_bytes(b"no")
    out = tmp_path / "features.npz"
    assert main(["embed", str(finished), str(folder), "--out", str(out), "--device", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["images"], told["dim"], len(told["bad"])) == (5, 16, 1)
    with np.load(out) as made:
        assert made["features"].shape == (5, 16) and made["features"].dtype == np.float32
        assert [Path(str(name)).name for name in made["names"]] == ["0.png", "1.png", "2.png", "3.png", "4.png"]


def test_impossible_evaluations_are_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nearest is knn"):
        relssl.evaluate(finished, protocol="kn")
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    with pytest.raises(DataError):
        relssl.evaluate(finished, str(tmp_path))
    assert main(["export", str(finished), "--format", "onnxx"]) == 2
