"""Features on the disk are those that were computed, until anything that decides about them changes; what makes a pair of
bank and test images, or their features, meaningless is refused by name."""

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from relssl.data.images import Images, Pixels
from relssl.data.named import load
from relssl.data.own import open_dataset
from relssl.data.plain import PlainView, Reader
from relssl.data.subsets import check_variety, identity, shared
from relssl.engine import Engine
from relssl.errors import DataError, NumericError
from relssl.evaluation.features import LabelledFeatures, cache_key, cached, evaluating, extract, state_hash
from relssl.evaluation.pairs import LabelledPair, labelled
from relssl.weights.spec import BackboneSpec

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
    views = (
        replace(READER.view, **change)
        for change in ({"mean": (0.4, 0.5, 0.5)}, {"size": 24}, {"margin": 1.5}, {"std": (0.3,) * 3})
    )
    keys += [cache_key(backbone, few, Reader(view), ENGINE) for view in views]
    keys.append(cache_key(backbone, few, READER, Engine.local("cpu", "bf16")))
    with torch.no_grad():
        backbone.norm.running_mean += 1e-3  # batch-norm statistics count as well
    keys.append(cache_key(backbone, few, READER, ENGINE))
    backbone.conv.stride = (1, 1)  # the same weights, another network
    keys.append(cache_key(backbone, few, READER, ENGINE))
    for heads in (1, 2):  # which neither weights nor their description show
        spec = BackboneSpec("vit_tiny_patch16_224", {"depth": 1, "embed_dim": 16, "num_heads": heads}, "standard", READER.view)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            keys.append(cache_key(spec.load(spec.create().state_dict(), Path("a")), few, READER, ENGINE))
    assert len(set(keys)) == len(keys)


def test_files_longest_unused_go_first(folder: Path, whole: Images, tiny_net: Any) -> None:
    backbone = tiny_net()
    sets = {count: whole.subset(range(count)) for count in (40, 41, 42, 43)}
    files = {count: folder / f"{cache_key(backbone, few, READER, ENGINE)}.npz" for count, few in sets.items()}
    for count, day in ((40, 3), (41, 1), (42, 2)):
        cached(backbone, sets[count], READER, ENGINE)
        os.utime(files[count], (day, day))
    limit = sum(file.stat().st_size for file in folder.iterdir()) + 500
    cached(backbone, sets[43], READER, ENGINE, most=limit)
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
    assert not list(folder.glob("*.npz"))  # what is kept would stay when the file is mended
    for shade in (10, 30):
        (tmp_path / f"{shade}.png").write_bytes(cut)
    with pytest.raises(DataError, match="none of its 3 images"):
        cached(backbone, images, READER, ENGINE)
    assert not list(folder.glob("*.npz"))


def test_eval_mode_lasts_as_long_as_the_work(tiny_net: Any) -> None:
    backbone = tiny_net().train()
    backbone.norm.eval()
    with evaluating(backbone):
        assert not any(module.training for module in backbone.modules())
    assert backbone.training and not backbone.norm.training


def test_the_hash_knows_names_types_shapes_and_values() -> None:
    zeros, nets = torch.zeros(2, 3), []
    for name, value in (("a", zeros), ("b", zeros), ("a", zeros.T), ("a", zeros.half()), ("a", zeros + 1), ("a", zeros[0, 0])):
        nets.append(torch.nn.Module())
        nets[-1].register_buffer(name, value)
    assert len({state_hash(each) for each in nets}) == len(nets)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"test": torch.tensor([[1.0, 5.0], [1.0, 5.001]])}, None),
        ({"test": torch.tensor([[1.0, 2.0]])}, None),  # one image cannot vary
        ({"test": torch.zeros(20, 4)}, "test features are constant over all 20 images"),
        ({"test": 1e6 * (1 + 1e-7 * torch.randn(20, 4))}, "test features are constant over all 20 images"),
        *(
            (
                {"bank": torch.randn(20, 4).index_fill_(0, torch.tensor([13, 17]), value)},
                "bank features hold NaN or Inf, .* row 13",
            )
            for value in (float("nan"), float("inf"), -float("inf"))
        ),
    ],
)
def test_features_that_no_protocol_can_use_are_refused(change: dict[str, torch.Tensor], fault: str | None) -> None:
    labels = torch.arange(20) % 10
    sides = replace(LabelledFeatures(torch.randn(20, 4), labels, torch.randn(20, 4), labels, 10), **change)
    with pytest.raises(NumericError, match=fault) if fault else nullcontext():
        sides.check()


def pets(labels: Any, seed: int = 0, classes: tuple[str, ...] | None = ("cat", "dog", "owl")) -> Images:
    """Noise with one label each, or with several."""
    pixels = torch.randint(256, (len(labels), 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    known = np.array(labels)
    several = {"targets": known.astype(np.int8)} if known.ndim == 2 else {"labels": known.astype(np.int64)}
    return Images("pets", Pixels(pixels), classes=classes, **several)


BOTH = [[1, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize(
    ("bank", "test", "classes", "fault"),
    [
        ([0, 0], [0, 1], ("cat", "dog", "owl"), r"of class cat alone"),
        ([0, 1], [0, 2], ("cat", "dog", "owl"), "no bank image is of class owl, so 1 test labels"),
        ([0, 1], [0, 1], ("cat", "Dog", "owl"), "name their classes differently"),
        # Of several labels too: column by column, another class would be measured.
        (BOTH, BOTH, ("cat", "dog", "pig"), "name their classes differently"),
        (BOTH, BOTH, ("dog", "cat", "owl"), "name their classes differently"),
        (BOTH, [[0, 0, -1]], ("cat", "dog", "owl"), "none of its 1 images is of any class"),
    ],
)
def test_labels_that_leave_nothing_to_measure_are_refused(bank: Any, test: Any, classes: Any, fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        LabelledPair(pets(bank), pets(test, 1, classes)).notes()


def test_classes_without_images_are_noted() -> None:
    (note,) = LabelledPair(pets(BOTH), pets([[1, 0, 0], [1, 0, 1]], 1)).notes()[:1]
    assert note == "no bank image is of class owl, so 1 test labels cannot be predicted"
    cut = LabelledPair(pets([0, 1] * 4, classes=None), pets([0, 2, 3, 4, 5, 6, 7, 7], 1, None), of=(20, 8))
    assert cut.notes()[1:] == [
        "no bank image is of classes 2, 3, 4, 5, 6 and 1 more, so 7 test labels cannot be predicted",
        "no test image is of class 1",
    ]
    assert LabelledPair(pets(BOTH), pets(BOTH, 1)).notes() == ["no image at all is of class owl, left out of map"]


def test_test_images_that_are_bank_images_are_refused_or_counted() -> None:
    bank = pets([0, 1, 2, 0, 1])
    with pytest.raises(DataError, match="all 3 test images are in the bank too"):
        LabelledPair(bank, bank.subset([4, 0, 2])).notes()
    mixed = torch.cat([side.source.tensor for side in (pets([0, 1], seed=2), bank.subset([3]))])  # type: ignore[attr-defined]
    pair = LabelledPair(bank, Images("pets", Pixels(mixed), np.array([0, 1, 2]), bank.classes))
    assert pair.notes() == ["1 of 3 test images are in the bank too"]


def save_shades(path: Path, splits: dict[str, dict[str, list[int]]]) -> Path:
    for split, classes in splits.items():
        for word, shades in classes.items():
            (path / split / word).mkdir(parents=True)
            for shade in shades:
                Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(path / split / word / f"{shade}.bmp")
    return path


def test_files_are_the_same_by_name_size_and_content(tmp_path: Path) -> None:
    both = {"cat": [10, 20], "dog": [30]}
    pair = LabelledPair.load(str(save_shades(tmp_path / "a", {"train": both, "val": both})), None)
    with pytest.raises(DataError, match="all 3 test images"):
        pair.notes()
    other = save_shades(tmp_path / "b", {"train": both, "val": {"cat": [11], "dog": [30]}})
    assert LabelledPair.load(str(other), None).notes() == ["1 of 2 test images are in the bank too"]
    # Bitmaps of one size and name, but of other pixels, are other images.
    before = load(str(other), None, "test")
    marks = before.fingerprint(), identity(before)
    Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(other / "val/dog/30.bmp")
    bank, after = (load(str(other), None, split) for split in ("bank", "test"))
    assert shared(bank, after) == 0 and after.fingerprint() == marks[0] and identity(after) != marks[1]
    os.utime(other / "val/dog/30.bmp", (7, 7))  # as one of a million images that is edited without a change of size
    assert identity(load(str(other), None, "test")) != identity(after)


def test_edges_of_a_folder_are_noted_or_refused_by_what_to_do(tmp_path: Path) -> None:
    def pair(name: str, **splits: dict[str, list[int]]) -> LabelledPair:
        return LabelledPair.load(str(save_shades(tmp_path / name, splits)), None)

    train, val = {"cat": [1, 2], "dog": [3]}, {"cat": [4], "dog": [5]}
    (note,) = pair("empty class", train=train | {"owl": []}, val=val).notes()
    assert note == "no image at all is of class owl"
    (tmp_path / "empty class/train/owl").rmdir()
    (tmp_path / "empty class/val/dog/5.bmp").rename(tmp_path / "empty class/val/5.bmp")
    notes = LabelledPair.load(str(tmp_path / "empty class"), None).notes()
    assert any("class folder of val/" in note and "1 images" in note for note in notes) and len(notes) == 2
    (note,) = pair("two levels", train={"pet/cat": [1], "pet/dog": [2], "owl": [3]}, val={"pet/cat": [4], "owl": [5]}).notes()
    assert "pet (of cat, dog)" in note
    for name, splits, side in (
        ("flat val", {"train": train, "val": {"": [7]}}, "1 test"),
        ("one", {"train": {"a": [1]}, "val": {"a": [2]}}, "training"),
    ):
        with pytest.raises(DataError, match=f"no labels .* {side} images; lay them out as train/CLASS/ and val/CLASS/"):
            pair(name, **splits)


def test_a_set_that_shows_one_picture_is_refused(tmp_path: Path) -> None:
    shades = save_shades(tmp_path, {"one": {"a": [9], "b": [9], "c": [9]}, "two": {"a": [9], "b": [8]}, "single": {"": [9]}})
    (shades / "one/a/8.bmp").write_bytes(b"no image")
    for name in ("two", "single"):
        check_variety(load(str(shades / name), None, "train"), 10**6)
    with pytest.raises(DataError, match="3 images looked at all show the same"):
        check_variety(load(str(shades / "one"), None, "train"), 10**6)


def test_without_a_place_for_a_cache_features_are_computed_and_it_is_said(
    whole: Images, tiny_net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, few = tiny_net(), whole.subset(range(20))
    plain = extract(backbone, few, READER, ENGINE)
    for home in ("/dev/null", "/proc/nobody"):
        monkeypatch.setenv("RELSSL_CACHE", home)
        lines: list[str] = []
        assert torch.equal(cached(backbone, few, READER, ENGINE, say=lines.append).vectors, plain.vectors)
        assert len(lines) == 1 and home in lines[0]
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without an entry, and without $HOME
    monkeypatch.delenv("RELSSL_CACHE")
    assert torch.equal(cached(backbone, few, READER, ENGINE, say=lines.append).vectors, plain.vectors)
    assert "RELSSL_CACHE" in lines[-1] and not Path("~").exists()


def test_images_without_a_label_are_left_out() -> None:
    rest = labelled("pets", pets([0, -1, 2, -1]), "test")
    assert rest.labels is not None and rest.labels.tolist() == [0, 2]
    with pytest.raises(DataError, match="pets: has no labels"):
        labelled("pets", pets([-1, -1]), "test")


def test_images_that_code_makes_are_compared_as_long_as_they_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    class Made(torch.utils.data.Dataset[Any]):
        targets: ClassVar[list[int]] = [0, 1] * 10

        def __len__(self) -> int:
            return 20

        def __getitem__(self, row: int) -> Any:
            return np.full((8, 8, 3), row, np.uint8)

    made, other = (
        open_dataset(Made(), "made"),
        open_dataset(([np.full((8, 8, 3), n, np.uint8) for n in (3, 99)], [0, 1]), "other"),
    )
    assert LabelledPair(made, other).notes()[-1] == "1 of 2 test images are in the bank too"
    monkeypatch.setattr("relssl.data.subsets._MOST", 21)
    assert "not looked at" in LabelledPair(made, other).notes()[-1]
