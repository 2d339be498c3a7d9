"""Tables of many rows, each a name and some numbers, in a few blocks of memory.

Objects of Python would take ten times the room, and loader processes that count references to them would copy them.
"""

from __future__ import annotations

import unicodedata
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, islice

import numpy as np

_ROWS = 1 << 14  # of a table that are Python objects at a time


@dataclass(frozen=True, eq=False)
class Names:
    """N strings of bytes.

    Attributes:
        block: all of them without anything between, uint8.
        ends: where each one ends, int64 [N+1]; the first is 0.
    """

    block: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, row: int) -> bytes:
        return self.block[self.ends[row] : self.ends[row + 1]].tobytes()

    def take(self, rows: np.ndarray) -> Names:
        """Return those at positions int64 [M], in this order."""
        return table(((self[row],) for row in rows.tolist()), 0)[0]


def table(rows: Iterable[tuple[bytes, *tuple[int, ...]]], columns: int) -> tuple[Names, list[np.ndarray]]:
    """Read rows of a name and so many numbers each, as they come: the names, and each column, int64 [N]."""
    block, ends, numbers, source = bytearray(), array("q", [0]), [array("q") for _ in range(columns)], iter(rows)
    while some := list(islice(source, _ROWS)):
        names, *others = zip(*some, strict=True)
        ends.extend(islice(accumulate(map(len, names), initial=len(block)), 1, None))
        block += b"".join(names)
        for column, values in zip(numbers, others, strict=True):
            column.extend(values)
    arrays = [np.frombuffer(each, np.int64) for each in numbers]
    return Names(np.frombuffer(block, np.uint8), np.frombuffer(ends, np.int64)), arrays


def class_labels(words: dict[bytes, int], numbers: np.ndarray) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Return labels int64 [N], -1 for none, of the numbers [N] that words have, and the classes; None and None if no word labels anything.

    Classes are sorted, by value where all are whole numbers. Words that differ in blanks around them or in their Unicode form
    alone are one; an empty one labels nothing.
    """
    titles = [unicodedata.normalize("NFC", word.strip().decode("utf-8", "backslashreplace")) for word in words]
    if not (distinct := {*titles} - {""}):
        return None, None
    numeric = all(word.isascii() and word.isdigit() and len(word) < 19 for word in distinct)
    classes = tuple(sorted(distinct, key=lambda word: (int(word), word) if numeric else (0, word)))
    rank = {word: position for position, word in enumerate(classes)} | {"": -1}
    return np.array([rank[title] for title in titles], np.int64)[numbers], classes
