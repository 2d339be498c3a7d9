"""Boxes in PASCAL VOC's layout: VOC2007/Annotations/*.xml, JPEGImages and ImageSets/Main/{trainval,train,val,test}.txt.

The layout is that of the VOC2007 development kit: edges are counted from 1 and include the last pixel.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from xml.etree import ElementTree

from relssl.data.objects import SceneDraft, Scenes, counted, present
from relssl.data.paths import shown
from relssl.errors import DataError

_MAX_XML = 1 << 20
_YEAR = re.compile(r"VOC\d{4}", re.ASCII)


@dataclass(frozen=True)
class _Object:
    name: str
    edges: tuple[float, float, float, float]
    difficult: bool


def find(folder: str) -> str | None:
    """The year's folder: `folder` itself, its only VOCxxxx, or that of its VOCdevkit; None if there is none.

    Raises:
        DataError: if there are several years.
    """
    for place in (folder, os.path.join(folder, "VOCdevkit")):
        if os.path.isdir(os.path.join(place, "Annotations")) and os.path.isdir(os.path.join(place, "ImageSets")):
            return place
        years = sorted(name for name in os.listdir(place) if _YEAR.fullmatch(name)) if os.path.isdir(place) else []
        if len(years) > 1:
            raise DataError(f"{shown(place)}: holds {' and '.join(years)}; name one of them, such as {shown(place)}/{years[0]}")
        if years:
            return os.path.join(place, years[0])
    return None


def read(folder: str, max_pixels: int) -> tuple[Scenes, Scenes]:
    """What to train on and what to evaluate on: trainval and test where test has its annotations, else train and val.

    Difficult objects are marked as ignored. The classes are those of the training images, by name.

    Raises:
        DataError: naming the list, image or annotation that is missing or malformed, or a class met only in evaluation.
    """
    parts = _parts(folder)
    found = {part: _annotations(folder, part, max_pixels) for part in parts}
    train, test = (found[part] for part in parts)
    classes = sorted({thing.name for _, things in train for thing in things})
    strange = sorted({thing.name for _, things in test for thing in things} - set(classes))
    if strange:
        raise DataError(f"{shown(folder)}: {parts[1]} has objects of the class {shown(strange[0])}, {parts[0]} has none")
    labels = {name: label for label, name in enumerate(classes, 1)}
    made = [_scenes(folder, part, found[part], labels, max_pixels) for part in parts]
    return made[0], made[1]


def _parts(folder: str) -> tuple[str, str]:
    lists = {part for part in ("trainval", "train", "val", "test") if os.path.isfile(_list(folder, part))}
    # VOC2012's test images come without annotations: its custom is train and val.
    if "test" in lists and all(os.path.isfile(_annotation(folder, name)) for name in _names(folder, "test")[:1]):
        if lists & {"trainval", "train"}:
            return ("trainval" if "trainval" in lists else "train"), "test"
    elif {"train", "val"} <= lists:
        return "train", "val"
    wanted = "trainval.txt and test.txt, or train.txt and val.txt"
    raise DataError(
        f"{shown(folder)}: no images to train and to evaluate on; ImageSets/Main needs {wanted}, and has "
        f"{', '.join(f'{part}.txt' for part in sorted(lists)) or 'none'}"
    )


def _list(folder: str, part: str) -> str:
    return os.path.join(folder, "ImageSets", "Main", f"{part}.txt")


def _annotation(folder: str, name: str) -> str:
    return os.path.join(folder, "Annotations", f"{name}.xml")


def _names(folder: str, part: str) -> list[str]:
    file = _list(folder, part)
    try:
        with open(file, encoding="utf-8") as opened:
            names = [line.split()[0] for line in opened if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{shown(file)}: cannot be read: {error}") from error
    if not names:
        raise DataError(f"{shown(file)}: names no image")
    for name in names:
        if os.path.basename(name) != name or name in (".", ".."):
            raise DataError(f"{shown(file)}: {shown(name)} is no name of an image; a name has no folder and no suffix")
    return names


def _annotations(folder: str, part: str, max_pixels: int) -> list[tuple[SceneDraft, list[_Object]]]:
    """The images of a part, without their boxes so far, and their objects."""
    names, pictures = _names(folder, part), os.path.join(folder, "JPEGImages")
    files = [f"{name}.jpg" for name in names]
    present(pictures, files, _list(folder, part))
    parsed = zip(files, (_parse(_annotation(folder, name)) for name in names), strict=True)
    return [(SceneDraft(os.path.join(pictures, file), size, max_pixels), things) for file, (size, things) in parsed]


def _parse(file: str) -> tuple[tuple[int, int], list[_Object]]:
    """(height, width) and the objects of an annotation."""
    try:
        root = ElementTree.fromstring(_safe(file))
        size = (_whole(root, "size/height"), _whole(root, "size/width"))
        if min(size) < 1:
            raise ValueError(f"its size is {size[1]} x {size[0]}")
        return size, [_object(element) for element in root.findall("object")]
    except OSError as error:
        raise DataError(f"{shown(file)}: cannot be read: {error.strerror}") from error
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{shown(file)}: is no VOC annotation ({error})") from error


def _safe(file: str) -> bytes:
    """The bytes of an XML file that defines nothing: entities can name other files, or grow without end."""
    with open(file, "rb") as opened:
        data = opened.read(_MAX_XML + 1)
    if len(data) > _MAX_XML:
        raise ValueError(f"it has more than {_MAX_XML} bytes")
    # Zero bytes are those of UTF-16, in which a DOCTYPE would not be seen.
    if b"\0" in data or b"<!doctype" in data.lower() or b"<!entity" in data.lower():
        raise ValueError("it has a DOCTYPE or is not plain text, and is not read for safety")
    return data


def _object(element: ElementTree.Element) -> _Object:
    left, top, right, bottom = (_number(element, f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax"))
    name = (element.findtext("name") or "").strip()
    if not name:
        raise ValueError("an object has no name")
    return _Object(name, (left - 1, top - 1, right, bottom), (element.findtext("difficult") or "0").strip() == "1")


def _number(element: ElementTree.Element, path: str) -> float:
    text = element.findtext(path)
    try:
        return float(text or "")
    except ValueError as error:
        raise ValueError(f"{path} is {'missing' if text is None else repr(text[:20])}, not a number") from error


def _whole(element: ElementTree.Element, path: str) -> int:
    number = _number(element, path)
    if not number.is_integer():
        raise ValueError(f"{path} is {number:g}, not a whole number")
    return int(number)


def _scenes(
    folder: str, part: str, found: list[tuple[SceneDraft, list[_Object]]], labels: dict[str, int], max_pixels: int
) -> Scenes:
    for draft, things in found:
        for thing in things:
            draft.add(thing.edges, labels[thing.name], ignored=thing.difficult)
    dropped = counted({}, "without extent", sum(draft.dropped for draft, _ in found))
    scenes, ids = [draft.scene() for draft, _ in found], tuple(labels.values())
    return Scenes(f"{shown(folder)} ({part})", "voc", scenes, tuple(labels), ids, max_pixels, False, dropped)
