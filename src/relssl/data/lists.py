"""List files: the images that the lines of a text name, as people and other programs write it."""

from __future__ import annotations

import codecs
import csv
import os
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from relssl.data.folder import judge, shown, unusable
from relssl.data.images import Fault, Files, Images
from relssl.errors import DataError

LIST_SUFFIXES = (".txt", ".lst", ".csv", ".tsv")
_TRIED = 100  # lines by which it is found out how a list is written
_LABELS = (b"label", b"labels", b"class", b"target", b"category")

Cells = Callable[[bytes], list[bytes]]


def read_list(path: str) -> Images:
    """Read a list file: a path a line, then optionally a tab and a label.

    A third column is the size of the file in bytes; such a line is believed, which spares a look at the file. Blank lines and
    lines that begin with # are passed over. Lines may hold any bytes; a file may be named more than once, have any extension
    and lie anywhere: what is written down is meant.

    What other programs write is read too: blanks around a path, CSV with commas or semicolons, with or without a head, `path label`
    with a blank, backslashes, UTF-16. Paths are absolute, or relative to the list's folder or to the working folder. Whatever makes
    most of the first lines name files holds for the whole list.

    Raises:
        DataError: if the list cannot be read.
    """
    lines = _lines(path)
    here = os.path.dirname(path) or "."
    ways = [(folder, cells, turned) for turned in (False, True) for folder in (here, ".") for cells in _CELLS]
    folder, cells, turned = max(ways, key=lambda way: sum(_entry(line, *way)[-1] is None for _, line in lines[:_TRIED]))
    usable: list[tuple[bytes, int, int, str]] = []
    bad: list[Fault] = []
    # The head of a CSV says which column holds the labels; without one, a second column must be the last.
    head = [cell.strip().lower() for cell in cells(lines[0][1])] if lines and cells in _CSV else []
    column = next((place for place, cell in enumerate(head) if cell in _LABELS), 1 if len(head) < 3 else len(head))
    for number, line in lines:
        name, word, size, time, fault = _entry(line, folder, cells, turned, column)
        if fault is None:
            label = word.strip().decode("utf-8", "backslashreplace")
            usable.append((name, size, time, unicodedata.normalize("NFC", label)))
        elif not head or number != lines[0][0] or b"." in name:  # else it is the head
            bad.append((os.fsdecode(name), f"{fault} (line {number})"))
    files = Files(folder, [each[:2] for each in usable], [time for _, _, time, _ in usable])
    images = Images(shown(path), files, bad=bad, notes=tuple(unusable(bad)))
    if not (distinct := {word for *_, word in usable} - {""}):
        return images
    numeric = all(word.isascii() and word.isdigit() and len(word) < 19 for word in distinct)  # ordered as numbers
    classes = tuple(sorted(distinct, key=lambda word: (int(word), word) if numeric else (0, word)))
    rank = {word: position for position, word in enumerate(classes)} | {"": -1}
    return replace(images, labels=np.array([rank[word] for *_, word in usable], np.int64), classes=classes)


def _lines(path: str) -> list[tuple[int, bytes]]:
    """Return the lines that may name an image, with their numbers."""
    try:
        with open(path, "rb") as opened:
            content = opened.read().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {error.strerror}") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        content = content.decode("utf-16", "replace").encode()
    lines = enumerate((line.removesuffix(b"\r") for line in content.split(b"\n")), 1)
    return [(number, line) for number, line in lines if line.strip() and not line.startswith(b"#")]


def _entry(line: bytes, folder: str, cells: Cells, turned: bool, column: int = 1) -> tuple[bytes, bytes, int, int, str | None]:
    """Return path, label, bytes, time of change, and why the file cannot be used, else None, of a line."""
    row = dict(enumerate(cells(line)))
    name, word, size = row.get(0, b""), row.get(column, b""), row.get(2, b"")
    name = name.replace(b"\\", b"/") if turned else name
    if cells is _tabs and size.isdigit():
        return name, word, int(size), 0, None
    return name, word, *judge(os.path.join(os.fsencode(folder), name))


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
