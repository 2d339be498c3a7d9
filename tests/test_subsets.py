"""Which images are labelled: the same share of every class, by the seed alone, or those that a file names."""

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from relssl.data.images import Files, Images
from relssl.data.named import load
from relssl.data.subsets import from_index, stratified
from relssl.errors import DataError

LABELS = st.lists(st.integers(-1, 5), max_size=300).map(lambda labels: np.array(labels, np.int64))


@given(labels=LABELS, share=st.floats(0, 0.5, exclude_min=True), seed=st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_each_class_gives_its_share_and_a_smaller_subset_lies_in_a_larger(labels: np.ndarray, share: float, seed: int) -> None:
    rows = stratified(labels, share, seed)
    assert (np.diff(rows) > 0).all() and not (labels[rows] < 0).any()
    for word in set(labels[labels >= 0].tolist()):
        assert (labels[rows] == word).sum() == max(1, round(share * int((labels == word).sum())))
    assert set(rows.tolist()) <= set(stratified(labels, 2 * share, seed).tolist())
    assert np.array_equal(rows, stratified(labels, share, seed))


NAMES = [b"train/dog/n1_10.JPEG", b"train/dog/n1_11.JPEG", b"train/cat/n2_10.JPEG", b"train/cat/same.png", b"train/dog/same.png"]
PETS = Images("pets", Files("/data", [(name, 1) for name in NAMES]), np.array([0, 0, 1, 1, 0]))


def write(folder: Path, *lines: str) -> str:
    (folder / "index.txt").write_text("\n".join(lines))
    return str(folder / "index.txt")


def test_an_index_names_images_by_base_name_path_or_position(tmp_path: Path) -> None:
    assert from_index(write(tmp_path, "n2_10.JPEG", "", "dog/same.png\r", "0"), PETS).tolist() == [0, 2, 4]
    assert from_index(write(tmp_path, "/data/train/cat/same.png"), PETS).tolist() == [3]
    assert from_index(write(tmp_path, "7", "3", "0"), load("digits", None, "test")).tolist() == [0, 3, 7]


@pytest.mark.parametrize(
    ("lines", "first"),
    [
        (["n1_10.JPEG", "n9.JPEG", "10.JPEG"], "n9.JPEG names none of the 5 images of pets"),
        (["5", "99999999999999999999"], "5 names none of"),
        (["same.png"], "same.png names several of"),
        (["n1_10.JPEG", "n1_11.JPEG", "dog/n1_10.JPEG", "1"], "dog/n1_10.JPEG names again one of"),
        (["", " "], "names no image"),
    ],
)
def test_a_wrong_index_is_refused_by_its_first_wrong_line(lines: list[str], first: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"index.txt: {first}"):
        from_index(write(tmp_path, *lines), PETS)


def test_an_index_that_is_no_file_or_names_images_in_memory_is_refused(tmp_path: Path) -> None:
    digits = load("digits", None, "test")
    for path in (str(tmp_path / "none.txt"), str(tmp_path), write(tmp_path, "n1.JPEG")):
        with pytest.raises(DataError):
            from_index(path, digits)
