"""List files: the images that the lines of a text name, as people and other programs write it."""

import csv
import os
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from operator import methodcaller
from typing import BinaryIO

from relssl.data.folder import judge, shown, unusable
from relssl.data.images import Fault, Files, Images, class_labels, table
from relssl.errors import DataError

LIST_SUFFIXES = (".txt", ".lst", ".csv", ".tsv")
LOOKED_AT = 1_000_000  # lines, at most, whose files are looked at before they are read
_TRIED = 100  # lines by which it is found out how a list is written
_LABELS = (b"label", b"labels", b"class", b"target", b"category")


def read_list(path: str) -> Images:
    """Read a list file: a path a line, of any bytes, then optionally a tab and a label, and a tab and the size of the file in bytes.

    A line with a size is believed, which spares a look at the file, and so is every line of a list of more than `LOOKED_AT`. Blank lines
    and lines that begin with # are passed over. A file may be named twice, have any extension and lie anywhere.

    What other programs write is read too: blanks around a path, CSV with commas or semicolons, with or without a head, `path label`
    with a blank, backslashes, UTF-16. Paths are absolute, or relative to the list's folder or to the working folder. Whatever makes
    most of the first lines name files holds for the whole list. DataError if the list cannot be read.
    """
    words, bad = dict[bytes, int](), list[Fault]()
    try:
        with open(path, "rb") as opened:
            believed = sum(block.count(b"\n") for block in iter(partial(opened.read, 1 << 24), b"")) > LOOKED_AT
            opened.seek(0)
            lines = _lines(opened)
            first = list(islice(lines, _TRIED))
            here, turns = os.path.dirname(path) or ".", (False, True)
            ways = [_Way(os.fsencode(folder), cells, turn) for turn in turns for folder in (here, ".") for cells in _CELLS]
            way = max(ways, key=lambda way: sum(way.entry(line, look=True)[-1] is None for _, line in first))
            if first and way.cells in _CSV:
                # The head says which column holds the labels; without one, a second column must be the last.
                head = [cell.lower() for cell in way.cells(first[0][1])]
                column = next((place for place, cell in enumerate(head) if cell in _LABELS), 1 if len(head) < 3 else len(head))
                way = replace(way, column=column)
                _, name, *_, fault = way.entry(first[0][1])
                if fault and b"." not in name:
                    del first[0]

            def rows() -> Iterator[tuple[bytes, int, int, int]]:
                for number, line in chain(first, lines):
                    word, name, size, time, fault = way.entry(line, believed)
                    if fault is None:
                        yield name, size, time, words.setdefault(word, len(words))
                    else:
                        bad.append((os.fsdecode(name), f"{fault} (line {number})"))

            names, (sizes, times, numbers) = table(rows(), 3)
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {error.strerror}") from error
    notes = [f"a list of more than {LOOKED_AT} lines: files that cannot be used show when they are read"] if believed else []
    labels, classes = class_labels(words, numbers)
    files = Files(names, sizes, times, way.folder)
    return Images(shown(path), files, labels, classes, bad=bad, notes=(*notes, *unusable(bad)))


def _lines(opened: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that may name an image, with their numbers."""
    mark = opened.read(3)
    opened.seek(3 if mark == BOM_UTF8 else 0)
    source: Iterator[bytes] = iter(opened)
    if mark.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        source = iter(opened.read().decode("utf-16", "replace").encode().splitlines(keepends=True))
    for number, line in enumerate(source, 1):
        if not line.isspace() and line[0] != 35:  # a #
            yield number, line.rstrip(b"\r\n")


def _csv(line: bytes, delimiter: str) -> list[bytes]:
    try:
        cells = next(csv.reader([line.decode("utf-8", "surrogateescape")], delimiter=delimiter))
    except csv.Error:
        return [line]
    return [cell.strip().encode("utf-8", "surrogateescape") for cell in cells]


_TABS, _BLANK = methodcaller("split", b"\t"), methodcaller("rsplit", None, 1)
_CSV = (partial(_csv, delimiter=","), partial(_csv, delimiter=";"))
_CELLS = (_TABS, *_CSV, _BLANK)  # a line without a comma is a single cell, without the blanks around it


@dataclass(frozen=True)
class _Way:
    """A way in which a list may be written: the folder from which paths count, the cells of lines, and backslashes in place of slashes."""

    folder: bytes
    cells: Callable[[bytes], list[bytes]]
    backslashes: bool
    column: int = 1  # the one of labels

    def entry(self, line: bytes, believed: bool = False, look: bool = False) -> tuple[bytes, bytes, int, int, str | None]:
        """Return the label and the file that a line names, its bytes, time of change, and why it is no image, if so; to `look` is to
        believe no size."""
        row = self.cells(line)
        name = row[0].replace(b"\\", b"/") if self.backslashes else row[0]
        word = row[self.column] if self.column < len(row) else b""
        if self.cells is _TABS and len(row) > 2 and row[2].isdigit() and not look:
            return word, name, int(row[2]), 0, None
        return (word, name, 0, 0, None) if believed else (word, name, *judge(os.path.join(self.folder, name)))
