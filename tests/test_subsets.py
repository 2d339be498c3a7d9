"""Which images are labelled: the same share of every class, by the seed alone, or those that a file names."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from relssl.data.images import Files, Images
from relssl.data.named import load
from relssl.data.subsets import fingerprint, from_index, stratified
from relssl.errors import DataError

LABELS = st.lists(st.integers(-1, 5), max_size=300).map(lambda found: np.array(found, np.int64))


@given(labels=LABELS, fraction=st.floats(0, 1, exclude_min=True), seed=st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_each_class_gives_its_share_and_at_least_one(labels: np.ndarray, fraction: float, seed: int) -> None:
    rows = stratified(labels, fraction=fraction, seed=seed)
    assert (np.diff(rows) > 0).all() and not (labels[rows] < 0).any()
    for word in set(labels[labels >= 0].tolist()):
        there = int((labels == word).sum())
        assert (labels[rows] == word).sum() == max(1, round(fraction * there))
    assert np.array_equal(rows, stratified(labels, fraction=fraction, seed=seed))


@given(labels=LABELS, few=st.integers(1, 9), more=st.integers(0, 9), share=st.floats(0.01, 0.5), seed=st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_a_smaller_subset_lies_in_a_larger_one(labels: np.ndarray, few: int, more: int, share: float, seed: int) -> None:
    small, large = (stratified(labels, per_class=count, seed=seed) for count in (few, few + more))
    assert set(small.tolist()) <= set(large.tolist())
    for word in set(labels[labels >= 0].tolist()):
        assert (labels[small] == word).sum() == min(few, (labels == word).sum())
    one, two = (set(stratified(labels, fraction=part, seed=seed).tolist()) for part in (share, 2 * share))
    assert one <= two


def test_seeds_draw_independently_and_every_image_alike() -> None:
    labels = np.repeat(np.arange(4), 50)
    times = np.zeros(200)
    for seed in range(400):
        times[stratified(labels, fraction=0.2, seed=seed)] += 1
    assert times.sum() == 400 * 40
    # Binomial, 400 draws of 0.2: mean 80, deviation 8; the extremes of 200 such counts lie within 4.5 deviations.
    assert abs(times - 80).max() < 36 and 6 < times.std() < 10


def test_what_cannot_be_drawn_is_refused() -> None:
    labels = np.zeros(4, np.int64)
    for wrong in ({}, {"fraction": 0.5, "per_class": 1}, {"fraction": 0.0}, {"fraction": 1.5}, {"per_class": 0}):
        with pytest.raises(ValueError, match="fraction"):
            stratified(labels, **wrong)  # type: ignore[arg-type]


NAMES = [b"train/dog/n1_10.JPEG", b"train/dog/n1_11.JPEG", b"train/cat/n2_10.JPEG", b"train/cat/same.png", b"train/dog/same.png"]


@pytest.fixture
def files() -> Images:
    return Images("pets", Files("/data", NAMES, [1] * len(NAMES)), np.array([0, 0, 1, 1, 0]))


def write(folder: Path, *lines: str) -> str:
    (folder / "index.txt").write_text("\n".join(lines))
    return str(folder / "index.txt")


def test_an_index_names_images_by_base_name_path_or_position(files: Images, tmp_path: Path) -> None:
    assert from_index(write(tmp_path, "n2_10.JPEG", "", "dog/same.png\r", "0"), files).tolist() == [0, 2, 4]
    assert from_index(write(tmp_path, "/data/train/cat/same.png"), files).tolist() == [3]
    held = load("digits", None, "test")
    assert from_index(write(tmp_path, "7", "3", "0"), held).tolist() == [0, 3, 7]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["n1_10.JPEG", "n9.JPEG", "10.JPEG"], r"n9.JPEG names none of the 5 images of pets; 2 such lines"),
        (["5", "99999999999999999999"], r"5 names none of the 5 images of pets; 2 such lines"),
        (["same.png"], "same.png names several of the 5 images of pets; 1 such line;"),
        (["n1_10.JPEG", "n1_11.JPEG", "dog/n1_10.JPEG", "1"], "dog/n1_10.JPEG names once more one of the 5 images of pets; 2"),
        (["", " "], "names no image"),
    ],
)
def test_a_wrong_index_is_refused_by_its_first_wrong_line(lines: list[str], message: str, files: Images, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        from_index(write(tmp_path, *lines), files)


def test_an_index_that_is_no_file_or_names_images_in_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        from_index(str(tmp_path / "none.txt"), load("digits", None, "test"))
    with pytest.raises(DataError, match="cannot be read"):
        from_index(str(tmp_path), load("digits", None, "test"))
    with pytest.raises(DataError, match="positions alone"):
        from_index(write(tmp_path, "n1.JPEG"), load("digits", None, "test"))


def test_a_fingerprint_tells_subsets_apart() -> None:
    assert len({fingerprint(np.array(rows, np.int64)) for rows in ([], [1], [1, 2], [1, 3])}) == 4
