"""A look at every image of a data set before a run: unreadable ones, copies, test images among the training images, sizes."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from relssl.data.decode import BadImage
from relssl.data.folder import shown
from relssl.data.images import Images
from relssl.data.named import load
from relssl.errors import DataError
from relssl.settings.run import LoaderConfig

_FEW = 20  # that are named
_BLOCK = 512  # images that are given out at once


def survey(data: str, root: str | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Decode every image of DATA, and return counts with the first few names; copies have equal pixels, however they are stored.

    Raises:
        DataError: if DATA cannot be read, or none of the images of a part can.
    """
    facts, marks = dict[str, Any](), dict[str, dict[bytes, list[str]]]()
    for part in ("train", "test"):
        try:
            images = load(data, root, part)
        except DataError as error:
            if part == "train":
                raise
            return facts | {"test": f"none to compare with ({error})"}
        say(f"decoding the {len(images)} images of {part}")
        facts[part], marks[part] = _part(images)
    train, test = marks["train"], marks["test"]
    leaks = [f"{name} = {train[mark][0]}" for mark in test if mark in train for name in test[mark]]
    return facts | {"leaks": len(leaks), "first_leaks": leaks[:_FEW]}


def _part(images: Images) -> tuple[dict[str, Any], dict[bytes, list[str]]]:
    """Return facts on one part of a data set, and the names of its images by a hash of their pixels."""
    marks, sides = defaultdict[bytes, list[str]](list), list[int]()
    bad = [f"{shown(name)}: {fault}" for name, fault in images.bad]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding and hashing hold no lock
        for start in range(0, len(images), _BLOCK):
            for name, look in pool.map(partial(_look, images), range(start, min(start + _BLOCK, len(images)))):
                if isinstance(look, str):
                    bad.append(f"{name}: {look}")
                else:
                    marks[look[0]].append(name)
                    sides.append(look[1])
    if not sides:
        raise DataError(f"{images.name}: none of its {len(images)} images can be read, the first: {bad[0]}")
    copies = [" = ".join(names) for names in marks.values() if len(names) > 1]
    least, median, most = np.quantile(sides, (0, 0.5, 1)).astype(int).tolist()
    facts = {"images": len(sides), "notes": [*images.notes], "shorter_side": {"least": least, "median": median, "most": most}}
    facts |= {"unreadable": len(bad), "first_unreadable": bad[:_FEW]}
    return facts | {"copies": len(sides) - len(marks), "first_copies": copies[:_FEW]}, marks


def _look(images: Images, row: int) -> tuple[str, str | tuple[bytes, int]]:
    """Return an image's name, and a hash of its pixels and its shorter side, or why it cannot be read."""
    name = shown(images.source.name(row))
    try:
        with images.source.open(row, LoaderConfig().max_pixels) as opened:
            pixels = np.asarray(opened.whole())
            return name, (
                hashlib.blake2b(str(pixels.shape).encode() + pixels.tobytes(), digest_size=16).digest(),
                min(opened.size),
            )
    except BadImage as error:
        return name, str(error)
