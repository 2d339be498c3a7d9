"""Features on the disk are those that were computed, once, and again as soon as anything that decides about them changes."""

from __future__ import annotations

import os
from dataclasses import replace
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
from relssl.errors import DataError, NumericError
from relssl.evaluation.features import (
    LabelledFeatures,
    cache_key,
    cached,
    evaluating,
    extract,
    frozen,
    require_varied,
    state_hash,
)

READER = Reader(PlainView(32, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3))
ENGINE = Engine.local("cpu", "fp32")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RELSSL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/features"


@pytest.fixture(scope="module")
def whole() -> Images:
    return load("digits", None, "test").subset(range(300))


def test_cached_features_are_those_computed(folder: Path, whole: Images, tiny_net: Any) -> None:
    backbone = tiny_net()
    plain = extract(backbone, whole, READER, ENGINE)
    with torch.no_grad():
        views = torch.cat([views for _, views, _ in READER.batches(whole)])
        torch.testing.assert_close(plain.vectors, backbone.eval()(views), atol=1e-5, rtol=1e-4)
    first = cached(backbone, whole, READER, ENGINE)
    (file,) = folder.iterdir()
    written = file.read_bytes()
    first.vectors.zero_()  # never reaches the file
    second = cached(backbone, whole, READER, ENGINE)
    assert torch.equal(second.vectors, plain.vectors) and (second.rows == np.arange(300)).all() and second.bad == []
    assert file.read_bytes() == written
    file.write_bytes(written[: len(written) // 2] + b"damaged")
    assert torch.equal(cached(backbone, whole, READER, ENGINE).vectors, plain.vectors)
    assert file.read_bytes() == written


def test_whatever_decides_about_the_numbers_has_another_key(whole: Images, tiny_net: Any) -> None:
    backbone, few = tiny_net(), whole.subset(range(50))
    keys = [cache_key(backbone, few, READER, ENGINE), cache_key(backbone, whole.subset(range(49)), READER, ENGINE)]
    view = READER.view
    views = (
        replace(view, mean=(0.4, 0.5, 0.5)),
        replace(view, size=24),
        replace(view, margin=1.5),
        replace(view, std=(0.3,) * 3),
    )
    keys += [cache_key(backbone, few, Reader(other), ENGINE) for other in views]
    keys.append(cache_key(backbone, few, READER, Engine.local("cpu", "bf16")))
    with torch.no_grad():
        backbone.norm.running_mean += 1e-3  # batch-norm statistics count as well
    keys.append(cache_key(backbone, few, READER, ENGINE))
    backbone.conv.stride = (1, 1)  # the same weights, another network
    keys.append(cache_key(backbone, few, READER, ENGINE))
    assert len(set(keys)) == len(keys)


def test_files_longest_unused_go_first(folder: Path, whole: Images, tiny_net: Any) -> None:
    backbone = tiny_net()
    sets = {count: whole.subset(range(count)) for count in (40, 41, 42, 43)}
    files = {count: folder / f"{cache_key(backbone, few, READER, ENGINE)}.npz" for count, few in sets.items()}
    for count, day in ((40, 3), (41, 1), (42, 2)):
        cached(backbone, sets[count], READER, ENGINE)
        os.utime(files[count], (day, day))
    limit = sum(file.stat().st_size for file in folder.iterdir()) + 500
    (folder / "of-an-older-version").mkdir()
    cached(backbone, sets[43], READER, ENGINE, limit=limit)
    assert set(folder.iterdir()) == {files[count] for count in (40, 42, 43)}


def test_unreadable_files_are_named_with_their_reason(tmp_path: Path, folder: Path, tiny_net: Any) -> None:
    for shade in (10, 20, 30):
        Image.fromarray(np.full((40, 40, 3), shade, np.uint8)).save(tmp_path / f"{shade}.png")
    cut = (tmp_path / "20.png").read_bytes()[:-20]
    (tmp_path / "20.png").write_bytes(cut)
    images, backbone = load(str(tmp_path), None, "train"), tiny_net()
    for features in (cached(backbone, images, READER, ENGINE) for _ in range(2)):
        assert features.rows.tolist() == [0, 2] and len(features.vectors) == 2
        assert [file for file, _ in features.bad] == [str(tmp_path / "20.png")]
    for shade in (10, 30):
        (tmp_path / f"{shade}.png").write_bytes(cut)
    with pytest.raises(DataError, match="none of its 3 images"):
        cached(backbone, images, READER, ENGINE)
    assert len(list(folder.iterdir())) == 1


def test_a_frozen_backbone_that_changed_is_noticed(tiny_net: Any) -> None:
    backbone = tiny_net().train()
    before = state_hash(backbone)
    with frozen(backbone):
        assert not backbone.training
        backbone(torch.rand(4, 3, 8, 8))
    assert backbone.training and state_hash(backbone) == before
    with pytest.raises(AssertionError, match="batch-norm statistics"), frozen(backbone):
        backbone.norm.train()
        backbone(torch.rand(4, 3, 8, 8))
    with evaluating(backbone):
        assert not backbone.norm.training


def test_the_hash_knows_names_types_shapes_and_values() -> None:
    def net(**tensors: torch.Tensor) -> torch.nn.Module:
        module = torch.nn.Module()
        for name, value in tensors.items():
            module.register_buffer(name, value)
        return module

    zeros = torch.zeros(2, 3)
    nets = [net(a=zeros), net(b=zeros), net(a=zeros.T), net(a=zeros.half()), net(a=zeros + 1), net(a=torch.tensor(0.0))]
    assert len({state_hash(one) for one in nets}) == len(nets)


def sides(bank_labels: torch.Tensor, test_labels: torch.Tensor, classes: int = 10) -> LabelledFeatures:
    return LabelledFeatures(torch.randn(len(bank_labels), 4), bank_labels, torch.randn(len(test_labels), 4), test_labels, classes)


def test_features_that_no_protocol_can_use_are_refused() -> None:
    require_varied(torch.tensor([[1.0, 5.0], [1.0, 5.001]]), "bank")
    require_varied(torch.tensor([[1.0, 2.0]]), "bank")  # one image cannot vary
    labels = torch.arange(20) % 10
    for features in (torch.zeros(20, 4), 1e6 * (1 + 1e-7 * torch.randn(20, 4))):
        with pytest.raises(NumericError, match="test features are constant over all 20 images"):
            replace(sides(labels, labels), test=features).check()
    features = torch.randn(20, 4)
    for value in (float("nan"), float("inf"), -float("inf")):
        features[13, 2] = features[17, 0] = value
        with pytest.raises(NumericError, match="bank features hold NaN or Inf, first in row 13"):
            replace(sides(labels, labels), bank=features).check()


def test_labels_that_leave_nothing_to_tell_apart_are_refused_and_gaps_noted() -> None:
    labels = torch.arange(20) % 10
    assert sides(labels, labels).check() == []
    with pytest.raises(DataError, match="single class 4"):
        sides(torch.full((20,), 4), labels).check()
    with pytest.raises(DataError, match="test images are of no class"):
        sides(labels, labels[:0]).check()
    (note,) = sides(labels[labels < 3], labels).check()
    assert "classes 3, 4, 5, 6, 7 and 2 more, so 14 test labels" in note
    known = torch.eye(3, dtype=torch.int8).repeat(4, 1)
    (note,) = sides(known, known * torch.tensor([1, 1, -1], dtype=torch.int8), 3).check()
    assert "class 2, left out of map" in note
