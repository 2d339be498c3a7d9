"""Backbones leave a run unchanged: timm loads the exported file bit for bit, and evaluations are those of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from sklearn.neighbors import KNeighborsClassifier

import relssl
from relssl.data.named import load
from relssl.data.plain import Reader
from relssl.engine import Engine
from relssl.errors import CheckpointError, ConfigError
from relssl.evaluation.features import extract
from relssl.evaluation.pairs import LabelledPair
from relssl.weights import store
from relssl.weights.export import export
from small_runs import small_run

NAME, NARROW = "resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("runs") / "whole", epochs=1, optimizer={"warmup_epochs": 0}).folder


@pytest.mark.parametrize(
    ("name", "args"), [(NAME, NARROW), pytest.param("efficientnet_b0", {}, marks=pytest.mark.torture)], ids=["narrow", "b0"]
)
def test_an_export_loads_with_timm_alone_bit_for_bit(name: str, args: dict[str, Any], tmp_path: Path) -> None:
    """A larger network in `make torture`."""
    run = small_run(
        tmp_path / "run", epochs=1, max_images=64, backbone=name, backbone_args=args, encoder={"stem": "standard"},
        method={"memory_size": 64, "warmup": "none"}, optimizer={"warmup_epochs": 0}, log={"knn_every": 0},
    )  # fmt: skip
    theirs = timm.create_model(name, num_classes=0, checkpoint_path=str(run.backbone), **args).eval()
    images = torch.rand(4, 3, 32, 32)
    state = store.load(store.checkpoints(run.folder / "checkpoints")[-1])[0]
    for network in ("student", "teacher"):
        ours = relssl.load_backbone(run.folder, network)
        assert all(torch.equal(value, state[f"{network}.backbone.{key}"]) for key, value in ours.state_dict().items())
    assert torch.equal(theirs(images), relssl.load_backbone(run.folder)(images))


def test_a_small_stem_loads_with_the_lines_the_card_gives(finished: Path) -> None:
    lines = export(finished).lines
    assert all(line.split("(")[0] in (finished / "export/backbone.md").read_text() for line in lines)
    scope: dict[str, Any] = {}
    exec("\n".join(lines), scope)
    images = torch.rand(4, 3, 32, 32)
    for backbone in (scope["backbone"], relssl.load_backbone(finished / "export/backbone.safetensors")):
        assert torch.equal(backbone(images), relssl.load_backbone(finished)(images))


def test_a_loaded_backbone_knows_its_width_and_its_view(finished: Path) -> None:
    backbone = relssl.load_backbone(finished)
    images = load("digits", None, "test").subset(range(4))
    _, batch, _ = next(Reader(backbone.spec.view).batches(images))
    torch.testing.assert_close(backbone.transform(images.read(0, 10**6)), batch[0])
    assert backbone(batch).shape == (4, backbone.num_features)


def test_weights_that_do_not_match_are_refused_with_counts(finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "backbone.safetensors"
    file.with_suffix(".yaml").write_bytes((finished / "export/backbone.yaml").read_bytes())
    weights = load_file(finished / "export/backbone.safetensors")
    weights["stem.weight"] = weights.pop("conv1.weight")
    save_file(weights, file)
    counts = rf"{len(weights) - 1} of {len(weights)} weights.*missing .1.: conv1.weight; unexpected .1.: stem.weight"
    with pytest.raises(CheckpointError, match=counts):
        relssl.load_backbone(file)
    file.write_bytes(b"\x80\x04\x95not a tensor")
    with pytest.raises(CheckpointError):
        relssl.load_backbone(file)
    with pytest.raises(ConfigError, match="network: "):
        relssl.load_backbone(finished, "pupil")


def test_settings_of_other_versions(finished: Path, tmp_path: Path) -> None:
    """A setting that an older run did not have is the default; one that is not known is refused by file and name."""
    stored = (finished / "config.yaml").read_text()
    assert "compile:" in stored
    (tmp_path / "config.yaml").write_text("\n".join(line for line in stored.splitlines() if not line.startswith("compile:")))
    assert relssl.load_run(tmp_path).config == relssl.load_run(finished).config
    (tmp_path / "config.yaml").write_text(stored + "warmth: 3\n")
    (tmp_path / "backbone.yaml").write_text((finished / "export/backbone.yaml").read_text() + "warmth: 3\n")
    (tmp_path / "backbone.safetensors").write_bytes((finished / "export/backbone.safetensors").read_bytes())
    for source, file in ((tmp_path, "config.yaml"), (tmp_path / "backbone.safetensors", "backbone.yaml")):
        with pytest.raises(ConfigError, match=f"{file}: warmth"):
            relssl.load_backbone(source)


def test_evaluate_equals_scikit_learn_on_the_same_features(finished: Path) -> None:
    results = relssl.evaluate(finished, images=(300, 300), network="teacher", device="cpu", precision="fp32")["results"]
    pair, backbone = LabelledPair.load("digits", None, (300, 300)), relssl.load_backbone(finished, "teacher").train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    reader, engine = Reader(backbone.spec.view), Engine.local("cpu", "fp32")
    bank, test = (extract(backbone, side, reader, engine).vectors.numpy() for side in (pair.bank, pair.test))
    # Measuring changes nothing.
    assert backbone.training and all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert len(results) == 8
    for result in results:
        k, temperature = result["setting"]["k"], result["setting"]["temperature"]
        oracle = KNeighborsClassifier(k, algorithm="brute", metric="cosine", weights=lambda d, t=temperature: np.exp((1 - d) / t))
        share = 100 * oracle.fit(bank, pair.bank.labels).score(test, pair.test.labels)
        assert result["figures"]["top1"] == pytest.approx(share, abs=0.34)  # one tie of 300
