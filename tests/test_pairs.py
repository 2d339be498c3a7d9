"""The two sides of an evaluation: what makes a figure meaningless is refused by name, what a reader must know is noted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from relssl.data.images import Images, Pixels
from relssl.data.named import load
from relssl.data.subsets import identity, shared
from relssl.errors import ConfigError, DataError
from relssl.evaluation.pairs import LabelledPair, labelled, labels_hash


def images(labels: list[int], seed: int = 0, classes: tuple[str, ...] | None = ("cat", "dog", "owl")) -> Images:
    pixels = torch.randint(256, (len(labels), 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Images("pets", Pixels(pixels), np.array(labels, np.int64), classes)


def folder(path: Path, splits: dict[str, dict[str, list[int]]]) -> Path:
    for split, classes in splits.items():
        for word, shades in classes.items():
            (path / split / word).mkdir(parents=True)
            for shade in shades:
                Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(path / split / word / f"{shade}.bmp")
    return path


def test_a_whole_pair_needs_no_note() -> None:
    pair = LabelledPair(images([0, 1, 2, 0]), images([2, 1, 0], seed=1))
    assert pair.notes() == [] and pair.classes == 3 and not pair.several


def test_one_class_and_unknown_classes_are_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"of one class \(cat\)"):
        LabelledPair(images([0, 0]), images([0, 1], seed=1)).notes()
    with pytest.raises(DataError, match="no bank image: owl"):
        LabelledPair(images([0, 1]), images([0, 2], seed=1)).notes()
    with pytest.raises(DataError, match="name their classes differently"):
        LabelledPair(images([0, 1]), images([0, 1], seed=1, classes=("cat", "Dog", "owl"))).notes()
    # Of several labels too: column by column, another class would be measured.
    bank, test = (dataclasses.replace(images([0, 0], seed), labels=None, targets=np.eye(2, 3, dtype=np.int8)) for seed in (0, 1))
    assert LabelledPair(bank, test).notes() == []
    for classes in (("cat", "dog", "pig"), ("dog", "cat", "owl")):
        with pytest.raises(DataError, match="name their classes differently"):
            LabelledPair(bank, dataclasses.replace(test, classes=classes)).notes()


def test_a_cut_says_so_and_its_missing_classes_are_noted() -> None:
    pair = LabelledPair(images([0, 1]), images([0, 2], seed=1), of=(30, 20))
    bank, test, missing, unused = pair.notes()
    assert "2 of 30 bank images" in bank and "2 of 20 test images" in test and "owl" in missing and "dog" in unused
    pair = LabelledPair.load("digits", None, (40, 10))
    assert (len(pair.bank), len(pair.test)) == (40, 10)
    assert pair.of == (len(load("digits", None, "bank")), len(load("digits", None, "test")))
    assert pair.uncut == load("digits", None, "test").fingerprint()
    with pytest.raises(ConfigError, match="images"):
        LabelledPair.load("digits", None, (0, 10))


def test_test_images_that_are_bank_images_are_refused_or_counted() -> None:
    bank = images([0, 1, 2, 0, 1])
    with pytest.raises(DataError, match="all 3 test images are in the bank too"):
        LabelledPair(bank, bank.subset([4, 0, 2])).notes()
    mixed = torch.cat([side.source.tensor for side in (images([0, 1], seed=2), bank.subset([3]))])  # type: ignore[attr-defined]
    pair = LabelledPair(bank, Images("pets", Pixels(mixed), np.array([0, 1, 2]), bank.classes))
    assert pair.notes() == ["1 of 3 test images are in the bank too"]


def test_files_are_the_same_by_name_size_and_content(tmp_path: Path) -> None:
    both = {"cat": [10, 20], "dog": [30]}
    pair = LabelledPair.load(str(folder(tmp_path / "a", {"train": both, "val": both})), None)
    with pytest.raises(DataError, match="all 3 test images"):
        pair.notes()
    other = folder(tmp_path / "b", {"train": both, "val": {"cat": [11], "dog": [30]}})
    assert LabelledPair.load(str(other), None).notes() == ["1 of 2 test images are in the bank too"]
    # Bitmaps of one size and name, but of other pixels, are other images.
    Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(other / "val/dog/30.bmp")
    assert shared(*(load(str(other), None, split) for split in ("bank", "test"))) == 0


def test_identity_sees_content_that_names_and_sizes_do_not_show(tmp_path: Path) -> None:
    place = folder(tmp_path / "a", {"train": {"cat": [1], "dog": [2]}, "val": {"cat": [3], "dog": [4]}})
    images = load(str(place), None, "bank")
    before, named = identity(images), images.fingerprint()
    Image.fromarray(np.full((8, 8, 3), 78, np.uint8)).save(place / "train/cat/1.bmp")
    after = load(str(place), None, "bank")
    assert after.fingerprint() == named and identity(after) != before


def test_images_without_a_label_are_left_out() -> None:
    rest = labelled("pets", images([0, -1, 2, -1]))
    assert rest.labels is not None and rest.labels.tolist() == [0, 2]
    with pytest.raises(DataError, match="pets: has no labels"):
        labelled("pets", images([-1, -1]))


def test_the_labels_hash_knows_images_and_labels() -> None:
    one = images([0, 1, 2])
    assert labels_hash(one) == labels_hash(images([0, 1, 2]))
    assert len({labels_hash(one), labels_hash(images([0, 2, 1])), labels_hash(images([0, 1, 2], seed=1))}) == 3
