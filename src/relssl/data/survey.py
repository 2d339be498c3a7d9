"""A look at every image of a data set before a run: unreadable ones, copies, test images among the training images, sizes."""

from __future__ import annotations

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
from relssl.data.images import Fault, Images
from relssl.data.named import load
from relssl.errors import DataError
from relssl.settings.run import LoaderConfig

_FEW = 20  # that are named


def survey(data: str, root: str | None, say: Callable[[str], None]) -> tuple[dict[str, Any], list[str]]:
    """Decode every image of DATA; images are copies of each other if all their pixels are equal, however they are stored.

    Args:
        data, root: as of `named.load`.
        say: gets a line for what takes a while.

    Returns:
        Counts, with the first few of each kind by name, and lines for people.

    Raises:
        DataError: if DATA cannot be read, or none of its images can.
    """
    facts, lines, seen = dict[str, Any](), list[str](), dict[str, dict[bytes, list[str]]]()
    for part in ("train", "test"):
        try:
            images = load(data, root, part)
        except DataError as error:
            if part == "train":
                raise
            lines.append(f"test: none to compare with ({error})")
            continue
        say(f"decoding the {len(images)} images of {part}")
        facts[part], seen[part], more = _part(images)
        lines += [f"{part}: {line}" for line in more]
    if "test" in seen:
        both = sorted(seen["train"].keys() & seen["test"].keys())
        pairs = [[seen["test"][mark][0], seen["train"][mark][0]] for mark in both]
        facts["leaks"] = {"count": sum(len(seen["test"][mark]) for mark in both), "first": pairs[:_FEW]}
        first = f", the first {shown(pairs[0][0])} = {shown(pairs[0][1])}" if pairs else ""
        lines.append(f"test images that are training images, too: {facts['leaks']['count']}{first}")
    return facts, lines


def _part(images: Images) -> tuple[dict[str, Any], dict[bytes, list[str]], list[str]]:
    """Return facts, the names of the images by what identifies their pixels, and lines on one part of a data set."""
    names, sides, bad = defaultdict[bytes, list[str]](list), list[tuple[int, int]](), list[Fault](images.bad)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding and hashing hold no lock
        for row, (fault, mark, size) in enumerate(pool.map(partial(_look, images), range(len(images)))):
            name = images.source.name(row)
            if fault:
                bad.append((name, fault))
            else:
                names[mark].append(name)
                sides.append(size)
    if not sides:
        raise DataError(f"{images.name}: none of its {len(images)} images can be read, the first: {bad[0][1]}")
    copies = [group for group in names.values() if len(group) > 1]
    least, median, most = np.quantile(np.array(sides).min(1), (0, 0.5, 1)).astype(int).tolist()
    doubled = sum(map(len, copies)) - len(copies)
    facts = {
        "images": len(sides),
        "unreadable": {"count": len(bad), "first": bad[:_FEW]},
        "duplicates": {"count": doubled, "first": copies[:_FEW]},
        "shorter_side": {"least": least, "median": median, "most": most},
    }
    lines = [f"{len(sides)} images, shorter sides of {least} to {most} pixels, half of them below {median}", *images.notes]
    lines += [f"unreadable: {len(bad)}" + (f", the first {shown(bad[0][0])}: {bad[0][1]}" if bad else "")]
    first = f", the first {' = '.join(map(shown, copies[0][:3]))}" if copies else ""
    return facts, names, [*lines, f"copies of others: {doubled}{first}"]


def _look(images: Images, row: int) -> tuple[str, bytes, tuple[int, int]]:
    """Return (why an image cannot be read, a hash of its pixels, its height and width)."""
    try:
        with images.source.open(row, LoaderConfig().max_pixels) as opened:
            pixels = np.asarray(opened.whole())
            return "", hashlib.blake2b(str(pixels.shape).encode() + pixels.tobytes(), digest_size=16).digest(), opened.size
    except BadImage as error:
        return str(error), b"", (0, 0)
