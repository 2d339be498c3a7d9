"""Features on the disk are those that were made, are made once, and are made anew when anything that decides about them changes."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from relssl.data.images import Images
from relssl.data.named import load
from relssl.data.plain import PlainView, Reader
from relssl.engine import Engine
from relssl.errors import DataError
from relssl.evaluation import features
from relssl.evaluation.features import evaluating, extract, frozen, state_hash
from relssl.settings.run import EngineConfig


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RELSSL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/features"


@pytest.fixture
def engine() -> Engine:
    return Engine(EngineConfig(device="cpu", precision="fp32", threads=1))


@pytest.fixture
def reader() -> Reader:
    return Reader(PlainView(32, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3))


def digits(count: int = 50) -> Images:
    return load("digits", None, "test").subset(range(count))


def entries(root: Path) -> list[Path]:
    return sorted(root.iterdir()) if root.exists() else []


def test_kept_features_are_those_made_in_memory(root: Path, engine: Engine, reader: Reader, tiny_net: Any) -> None:
    backbone, images = tiny_net(), digits(300)
    plain = extract(backbone, images, reader, engine.device)
    first = features.features(backbone, images, reader, engine)
    (entry,) = entries(root)
    written = (entry / "vectors.f32").stat().st_mtime_ns
    second = features.features(backbone, images, reader, engine)
    for found in (first, second):
        assert torch.equal(found.vectors, plain.vectors) and (found.rows == plain.rows).all() and found.bad == []
    assert entries(root) == [entry] and (entry / "vectors.f32").stat().st_mtime_ns == written
    # A map that may be written in memory, and never reaches the file.
    first.vectors.zero_()
    assert torch.equal(features.features(backbone, images, reader, engine).vectors, plain.vectors)


def test_whatever_decides_about_the_numbers_makes_a_new_entry(root: Path, engine: Engine, reader: Reader, tiny_net: Any) -> None:
    backbone = tiny_net()
    keys = [features.key(backbone, digits(), reader, engine)]
    keys.append(features.key(backbone, digits(49), reader, engine))
    other = Reader(dataclasses.replace(reader.view, mean=(0.4, 0.5, 0.5)))
    keys.append(features.key(backbone, digits(), other, engine))
    keys.append(features.key(backbone, digits(), reader, Engine(EngineConfig(device="cpu", precision="bf16", threads=1))))
    with torch.no_grad():
        backbone.norm.running_mean += 1e-3  # batch-norm statistics count as well
    keys.append(features.key(backbone, digits(), reader, engine))
    backbone.conv.stride = (1, 1)  # the same weights, another network
    keys.append(features.key(backbone, digits(), reader, engine))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("damage", ["cut", "about", "rows"])
def test_a_damaged_entry_is_made_anew(damage: str, root: Path, engine: Engine, reader: Reader, tiny_net: Any) -> None:
    backbone = tiny_net()
    plain = features.features(backbone, digits(), reader, engine).vectors.clone()
    (entry,) = entries(root)
    if damage == "cut":
        os.truncate(entry / "vectors.f32", 100)
    elif damage == "about":
        (entry / "about.json").write_text("{")
    else:
        (entry / "rows.npy").write_bytes(b"\x93NUMPY")
    assert torch.equal(features.features(backbone, digits(), reader, engine).vectors, plain)


def test_an_entry_that_another_process_removes_at_once_is_made_in_memory(
    engine: Engine, reader: Reader, tiny_net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, images = tiny_net(), digits()
    plain = extract(backbone, images, reader, engine.device)
    monkeypatch.setattr(features, "_evict", lambda root, keep: shutil.rmtree(keep))
    found = features.features(backbone, images, reader, engine)
    assert torch.equal(found.vectors, plain.vectors) and (found.rows == plain.rows).all()


def test_entries_longest_unused_go_first(
    root: Path, engine: Engine, reader: Reader, tiny_net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny_net()
    for count, day in ((40, 3), (41, 1), (42, 2)):
        features.features(backbone, digits(count), reader, engine)
        os.utime(root / features.key(backbone, digits(count), reader, engine), (day, day))
    size = sum(file.stat().st_size for entry in entries(root) for file in entry.iterdir())
    monkeypatch.setattr(features, "LIMIT", size + 500)
    features.features(backbone, digits(43), reader, engine)
    left = {entry.name for entry in entries(root)}
    assert left == {features.key(backbone, digits(count), reader, engine) for count in (40, 42, 43)}


def test_unreadable_files_are_kept_with_their_reason(
    tmp_path: Path, root: Path, engine: Engine, reader: Reader, tiny_net: Any
) -> None:
    for shade in (10, 20, 30):
        Image.fromarray(np.full((40, 40, 3), shade, np.uint8)).save(tmp_path / f"{shade}.png")
    cut = (tmp_path / "20.png").read_bytes()[:-20]
    (tmp_path / "20.png").write_bytes(cut)
    images = load(str(tmp_path), None, "train")
    backbone = tiny_net()
    made, again = (features.features(backbone, images, reader, engine) for _ in range(2))
    for found in (made, again):
        assert found.rows.tolist() == [0, 2] and len(found.vectors) == 2
        assert [file for file, _ in found.bad] == [str(tmp_path / "20.png")]
    for shade in (10, 30):
        (tmp_path / f"{shade}.png").write_bytes(cut)
    with pytest.raises(DataError, match="none of its 3 images"):
        features.features(backbone, images, reader, engine)
    assert len(entries(root)) == 1


def test_a_frozen_backbone_that_changed_is_noticed(tiny_net: Any) -> None:
    backbone = tiny_net().train()
    before = state_hash(backbone)
    with frozen(backbone) as weights:
        assert not backbone.training and weights == before
        backbone(torch.rand(4, 3, 8, 8))
    assert backbone.training and state_hash(backbone) == before
    with pytest.raises(AssertionError, match="batch-norm statistics"), frozen(backbone):
        backbone.norm.train()
        backbone(torch.rand(4, 3, 8, 8))
    with evaluating(backbone):
        assert not backbone.norm.training


def test_the_hash_knows_names_types_shapes_and_values() -> None:
    def net(**tensors: torch.Tensor) -> torch.nn.Module:
        made = torch.nn.Module()
        for name, value in tensors.items():
            made.register_buffer(name, value)
        return made

    zeros = torch.zeros(2, 3)
    made = [net(a=zeros), net(b=zeros), net(a=zeros.T), net(a=zeros.half()), net(a=zeros + 1), net(a=torch.tensor(0.0))]
    assert len({state_hash(one) for one in made}) == len(made)
    assert state_hash(net(a=torch.rand(3, 2).T.contiguous())) != state_hash(net(a=zeros))
