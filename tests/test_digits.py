"""The built-in digits: fixed for ever, fairly split. As they never change, what is true of them need not be measured again."""

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from relssl.data import digits

# A change of these numbers is a change of every run on the digits: raise a version, do not adjust them.
PINNED = {"train": "8cf0ca09d37184d1", "test": "3153215e007136d8"}


@pytest.fixture(scope="module")
def sides():
    return {split: digits.load(split) for split in ("train", "test")}


def test_shapes_and_counts(sides):
    for split, count in (("train", 5748), ("test", 1440)):
        pixels, labels = sides[split]
        assert pixels.shape == (count, 3, 32, 32) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
        assert labels.shape == (count,) and labels.dtype == np.int64
        assert (pixels == pixels[:, :1]).all()
        shares = np.bincount(labels, minlength=10) / count
        assert shares.min() > 0.09 and shares.max() < 0.11


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_drawings_never_change(split, sides):
    pixels, labels = sides[split]
    assert hashlib.sha256(pixels.tobytes() + labels.astype("<i8").tobytes()).hexdigest()[:16] == PINNED[split]


def test_no_original_is_on_both_sides():
    labels = load_digits().target
    train, test = digits.split_originals(labels)
    assert (len(train), len(test)) == (1437, 360)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(1797))
    assert np.abs(np.bincount(labels[test]) - np.bincount(labels) / 5).max() <= 1


def test_the_statistics_are_those_of_the_training_drawings(sides):
    scaled = sides["train"][0][:, 0] / 255
    assert abs(scaled.mean() - digits.MEAN[0]) < 1e-4 and abs(scaled.std() - digits.STD[0]) < 1e-4
    assert len(set(digits.MEAN)) == len(set(digits.STD)) == 1


def test_an_upright_drawing_of_twice_the_size_equals_torch_bilinear_interpolation():
    original = load_digits().images[:1]
    size, angle, centre = np.array([16.0]), np.array([0.0]), np.array([[16.0], [16.0]])
    drawing = digits.sample(original.astype(np.int32), *digits.positions(size, angle, centre))
    wanted = F.interpolate(F.pad(torch.from_numpy(original * 255 / 16), (4, 4, 4, 4))[None], scale_factor=2, mode="bilinear")
    np.testing.assert_allclose(drawing, wanted[0].numpy(), atol=1)
