"""List files: the images that the lines of a text name, as people and other programs write it."""

from __future__ import annotations

import csv
import os
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from typing import BinaryIO

from relssl.data.folder import judge, shown, unusable
from relssl.data.images import Fault, Files, Images
from relssl.data.names import Words, table
from relssl.errors import DataError

LIST_SUFFIXES = (".txt", ".lst", ".csv", ".tsv")
LOOKED_AT = 1_000_000  # lines, at most, whose files are looked at before they are read
_TRIED = 100  # lines by which it is found out how a list is written
_LABELS = (b"label", b"labels", b"class", b"target", b"category")

Cells = Callable[[bytes], list[bytes]]
Entry = tuple[bytes, bytes, int, int, str | None]


def read_list(path: str) -> Images:
    """Read a list file: a path a line, then optionally a tab and a label.

    A third column is the size of the file in bytes; such a line is believed, which spares a look at the file, and so is every line
    of a list of more than `LOOKED_AT`. Blank lines and lines that begin with # are passed over. Lines may hold any bytes; a file may
    be named more than once, have any extension and lie anywhere: what is written down is meant.

    What other programs write is read too: blanks around a path, CSV with commas or semicolons, with or without a head, `path label`
    with a blank, backslashes, UTF-16. Paths are absolute, or relative to the list's folder or to the working folder. Whatever makes
    most of the first lines name files holds for the whole list.

    Raises:
        DataError: if the list cannot be read.
    """
    words, bad = Words(), list[Fault]()
    try:
        with open(path, "rb") as opened:
            believed = (
                sum(opened.read(1 << 24).count(b"\n") for _ in range(0, os.fstat(opened.fileno()).st_size, 1 << 24)) > LOOKED_AT
            )
            opened.seek(0)
            lines = _lines(opened)
            first = list(islice(lines, _TRIED))
            folder, cells, turned = _way(first, os.path.dirname(path) or ".")
            # The head of a CSV says which column holds the labels; without one, a second column must be the last.
            head = [cell.strip().lower() for cell in cells(first[0][1])] if first and cells in _CSV else []
            column = next((place for place, cell in enumerate(head) if cell in _LABELS), 1 if len(head) < 3 else len(head))

            plain = cells is _tabs and not turned

            def usable() -> Iterator[tuple[bytes, int, int, int]]:
                for number, line in chain(first, lines):
                    if plain and len(row := line.split(b"\t")) > 2 and row[2].isdigit():  # at once, for lists of millions
                        yield row[0], int(row[2]), 0, words.number(row[1])
                        continue
                    name, word, size, time, fault = _entry(
                        line, folder, cells, turned, column, believed and number != first[0][0]
                    )
                    if fault is None:
                        yield name, size, time, words.number(word)
                    elif not head or number != first[0][0] or b"." in name:  # else it is the head
                        bad.append((os.fsdecode(name), f"{fault} (line {number})"))

            names, (sizes, times, numbers) = table(usable(), 3)
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {error.strerror}") from error
    notes = [f"a list of more than {LOOKED_AT} lines: files that cannot be used show when they are read"] if believed else []
    labels, classes = words.labels(numbers)
    files = Files(names, sizes, times, os.fsencode(folder))
    return Images(shown(path), files, labels, classes, bad=bad, notes=(*notes, *unusable(bad)))


def _lines(opened: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that may name an image, with their numbers."""
    mark = opened.read(3)
    opened.seek(3 if mark == b"\xef\xbb\xbf" else 0)
    source: Iterator[bytes] = iter(opened)
    if mark.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        source = iter(opened.read().decode("utf-16", "replace").encode().split(b"\n"))
    for number, line in enumerate(source, 1):
        if not line.isspace() and line and line[0] != 35:  # a #
            yield number, line.rstrip(b"\r\n")


def _way(lines: list[tuple[int, bytes]], here: str) -> tuple[str, Cells, bool]:
    """Return the folder from which paths count, the manner of writing and whether slashes are turned, by which most lines name files."""
    ways = [(folder, cells, turned) for turned in (False, True) for folder in (here, ".") for cells in _CELLS]
    return max(ways, key=lambda way: sum(_entry(line, *way)[-1] is None for _, line in lines))


def _entry(line: bytes, folder: str, cells: Cells, turned: bool, column: int = 1, believed: bool = False) -> Entry:
    """Return path, label, bytes, time of change, and why the file cannot be used, else None, of a line."""
    row = cells(line)
    name, word = row[0] if row else b"", row[column] if column < len(row) else b""
    name = name.replace(b"\\", b"/") if turned else name
    if cells is _tabs and len(row) > 2 and row[2].isdigit():
        return name, word, int(row[2]), 0, None
    return (name, word, 0, 0, None) if believed else (name, word, *judge(os.path.join(os.fsencode(folder), name)))


def _tabs(line: bytes) -> list[bytes]:
    return line.split(b"\t")


def _csv(line: bytes, delimiter: str) -> list[bytes]:
    try:
        cells = next(csv.reader([line.decode("utf-8", "surrogateescape")], delimiter=delimiter), [])
    except csv.Error:
        return [line]
    return [cell.strip().encode("utf-8", "surrogateescape") for cell in cells]


def _blank(line: bytes) -> list[bytes]:
    return line.rsplit(None, 1)


_CSV = (partial(_csv, delimiter=","), partial(_csv, delimiter=";"))
_CELLS: tuple[Cells, ...] = (_tabs, *_CSV, _blank)  # a line without a comma is a single cell, without the blanks around it
