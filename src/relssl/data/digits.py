"""scikit-learn's 1,797 handwritten digits, each drawn anew on a larger canvas: the built-in data set that needs no network.

The plain 8x8 digits are too easy to show anything (raw pixels alone reach 97 % by nearest neighbours). Here each is drawn
COPIES times at a random place, size and tilt with faint noise, so that pixels alone no longer tell what is alike.

The drawings are fixed, bit for bit: the randomness is PCG64's raw stream, which numpy keeps stable, and the sampling is
integer arithmetic, so versions of numpy, scikit-learn or Pillow do not change a run's data.
"""

import functools

import numpy as np

SIDE = 32  # pixels of the canvas
COPIES = 4  # drawings of each original
SIZES = (14.0, 28.0)  # side of the drawn digit in pixels
DEGREES = 20.0  # largest tilt either way
NOISE = 24  # largest noise either way, of 255; triangular, so mostly far less
SEED = 2020

_SOURCE = 8  # side of the originals, whose values are 0..16
_FRACTION = 8  # bits of a source position's fraction: bilinear weights are whole numbers of 1/256


@functools.cache  # a run asks for the same side more than once: to train on, and as the bank of its evaluations
def load(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw the "train" side (5,748 drawings of 1,437 originals) or the "test" side (1,440 drawings of the other 360).

    Returns:
        Pixels uint8 [N, 3, 32, 32], grey in three equal channels, and labels int64 [N]; copies of an original are adjacent.
    """
    from sklearn.datasets import load_digits

    originals, labels = load_digits(return_X_y=True)
    rows = split_originals(labels)[split != "train"]
    images = originals.reshape(-1, _SOURCE, _SOURCE).astype(np.int32)[rows]
    drawings = draw(images, np.random.PCG64([SEED, split == "train"]))
    return np.repeat(drawings[:, None], 3, axis=1), np.repeat(labels[rows].astype(np.int64), COPIES)


def split_originals(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the training and of the test originals: every fifth of each class in random order is for testing."""
    keys = np.random.PCG64(SEED).random_raw(len(labels))
    order = np.lexsort((keys, labels))
    testing = np.arange(len(labels)) % 5 == 0
    return np.sort(order[~testing]), np.sort(order[testing])


def draw(originals: np.ndarray, bits: np.random.PCG64) -> np.ndarray:
    """Draw each original [N, 8, 8] (int32, 0..16) COPIES times: uint8 [COPIES * N, 32, 32]."""
    count = len(originals) * COPIES
    size, angle, across, down = (bits.random_raw((4, count)) >> np.uint64(11)) * 2.0**-53  # in [0, 1)
    size = SIZES[0] + (SIZES[1] - SIZES[0]) * size
    centre = size / 2 + (SIDE - size) * np.stack([down, across])
    angle, sources = np.radians(DEGREES * (2 * angle - 1)), np.repeat(originals, COPIES, axis=0)
    parts = [slice(start, start + 256) for start in range(0, count, 256)]  # small enough to stay in the processor's cache
    ink = np.concatenate([sample(sources[part], *positions(size[part], angle[part], centre[:, part])) for part in parts])
    raw = bits.random_raw(ink.size // 4).astype("<u8").view(np.uint8).reshape(2, *ink.shape).astype(np.int32)
    noise = (raw[0] - raw[1]) * NOISE >> 8  # the difference of two bytes is triangular
    drawings: np.ndarray = np.clip(ink + noise, 0, 255).astype(np.uint8)
    return drawings


def positions(size: np.ndarray, angle: np.ndarray, centre: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where each canvas pixel lies in the original, in 1/256 of its pixels: rows and columns int32 [N, 32, 32].

    The digit's side in canvas pixels is [N], its tilt in radians [N], row and column of its middle [2, N].
    """
    grid = np.arange(SIDE) + 0.5
    y, x = grid[None, :, None] - centre[0][:, None, None], grid[None, None, :] - centre[1][:, None, None]
    cos, sin = ((wave(angle) * _SOURCE / size)[:, None, None] for wave in (np.cos, np.sin))
    middle, unit = (_SOURCE - 1) / 2, 1 << _FRACTION
    # Rounding hides the last bits of sine and cosine, which differ between processors.
    rows, columns = (np.rint((turned + middle) * unit).astype(np.int32) for turned in (cos * y - sin * x, sin * y + cos * x))
    return rows, columns


def sample(originals: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return bilinear values 0..255 of originals [N, 8, 8] at positions int32 [N, 32, 32], zero outside; int32 [N, 32, 32]."""
    # One empty pixel around the original, and positions clipped to that frame, make the outside black without branches.
    framed = np.pad(originals, ((0, 0), (1, 1), (1, 1)))
    unit, limit = 1 << _FRACTION, (_SOURCE + 1 << _FRACTION) - 1
    rows, columns = (np.clip(position + unit, 0, limit) for position in (rows, columns))
    row, column, down, across = rows >> _FRACTION, columns >> _FRACTION, rows & unit - 1, columns & unit - 1
    which = np.arange(len(originals))[:, None, None]
    above = framed[which, row, column] * (unit - across) + framed[which, row, column + 1] * across
    below = framed[which, row + 1, column] * (unit - across) + framed[which, row + 1, column + 1] * across
    ink: np.ndarray = (above * (unit - down) + below * down) * 255 >> 4 + 2 * _FRACTION  # 16 * 2^16 * 255 < 2^31: no overflow
    return ink
