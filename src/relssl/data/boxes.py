"""Images with the boxes, and masks, of the objects on them, from a folder in COCO's or in PASCAL VOC's layout."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from relssl.data.decode import BadImage, decode
from relssl.data.folder import shown
from relssl.errors import DataError

Target = dict[str, Any]

# Pixels below which a side is nothing: boxes of no width divide by zero in a detector.
_THINNEST = 0.01


@dataclass(frozen=True, eq=False)
class Scene:
    """What is known of one image before it is read.

    Attributes:
        file: its path.
        size: (height, width) in pixels, as its annotation says.
        boxes: float32 [n, 4], left, top, right, bottom in pixels; the right and bottom edge are the first beyond the object.
        labels: int64 [n] in 1..C.
        areas: float32 [n] in pixels, by which objects count as small, medium or large.
        ignored: bool [n]; crowds and difficult objects, which are never trained on and neither hit nor missed in evaluation.
        masks: n run-length encoded masks (COCO's compressed counts), or None where an object has no mask.
    """

    file: str
    size: tuple[int, int]
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    areas: npt.NDArray[np.float32]
    ignored: npt.NDArray[np.bool_]
    masks: tuple[bytes | None, ...]

    def keep(self, which: npt.NDArray[np.bool_]) -> Scene:
        """The same image with some of its objects."""
        masks = tuple(mask for mask, kept in zip(self.masks, which, strict=True) if kept)
        parts = (self.boxes[which], self.labels[which], self.areas[which], self.ignored[which])
        return Scene(self.file, self.size, *parts, masks)


class SceneDraft:
    """The objects of an image as a reader meets them; boxes are cut at the image's edges, and those without extent counted.

    Args:
        file, size: as of Scene.
        max_pixels: images that are said to have more are refused, for outlines in them cost memory by their size.

    Raises:
        DataError: if it is said to have more.
    """

    def __init__(self, file: str, size: tuple[int, int], max_pixels: int) -> None:
        if size[0] * size[1] > max_pixels:
            raise DataError(
                f"{shown(file)}: its annotation says {size[1]} x {size[0]} pixels, more than loader.max_pixels ({max_pixels}); "
                "correct the annotation, or take the image out"
            )
        self.file, self.size, self.dropped = file, size, 0
        self._rows: list[tuple[list[float], int, float, bool, bytes | None]] = []

    def add(self, edges: Sequence[float], label: int, *, ignored: bool, area: float = 0, mask: bytes | None = None) -> None:
        """One object: its edges left, top, right, bottom, and its area if that is known and not the box's."""
        height, width = self.size
        with np.errstate(invalid="ignore", over="ignore"):  # NaN stays NaN, and is dropped below
            left, top, right, bottom = np.clip(np.array(edges, np.float32), 0, [width, height, width, height]).tolist()
        if not (right - left >= _THINNEST and bottom - top >= _THINNEST):
            self.dropped += 1
            return
        known = area if area > 0 and np.isfinite(area) else (right - left) * (bottom - top)
        self._rows.append(([left, top, right, bottom], label, known, ignored, mask))

    def scene(self) -> Scene:
        """All of them together."""
        boxes, labels, areas, ignored, masks = zip(*self._rows, strict=True) if self._rows else ((),) * 5
        return Scene(
            self.file,
            self.size,
            np.array(boxes, np.float32).reshape(-1, 4),
            np.array(labels, np.int64),
            np.array(areas, np.float32),
            np.array(ignored, np.bool_),
            tuple(masks),
        )


@dataclass(frozen=True, eq=False)
class Scenes(Dataset[tuple[Tensor, Target]]):
    """A split of a detection data set; images are decoded when asked for.

    Attributes:
        name: for messages.
        layout: coco or voc.
        scenes: one an image.
        classes: what label 1, 2, ... stands for.
        ids: the data set's own number of each class.
        max_pixels: images with more pixels are refused.
        masked: whether targets have masks.
        dropped: how many objects were left out, by the reason.
    """

    name: str
    layout: str
    scenes: Sequence[Scene]
    classes: tuple[str, ...]
    ids: tuple[int, ...]
    max_pixels: int
    masked: bool
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, row: int) -> tuple[Tensor, Target]:
        """An image, uint8 [3, H, W], and its target as torchvision's detection models and COCO's evaluation want it.

        The target holds boxes fp32 [n, 4], labels int64 [n], area fp32 [n], iscrowd int64 [n] and, if `masked`, masks uint8
        [n, H, W].

        Raises:
            DataError: if the file cannot be read, or is not of the size that its annotation says.
        """
        scene = self.scenes[row]
        try:
            image: Tensor = pil_to_tensor(decode(scene.file, self.max_pixels))
        except (BadImage, OSError) as error:
            reason = error if isinstance(error, BadImage) else f"cannot be read: {error.strerror}"
            raise DataError(f"{shown(scene.file)}: {reason}; replace it, or take it out of {self.name}") from error
        if tuple(image.shape[1:]) != scene.size:
            (height, width), (said_height, said_width) = image.shape[1:], scene.size
            raise DataError(
                f"{shown(scene.file)}: has {width} x {height} pixels, {self.name} says {said_width} x {said_height}; "
                "its boxes do not fit, annotate it anew or take it out"
            )
        return image, self._target(scene)

    def _target(self, scene: Scene) -> Target:
        target: Target = {
            "boxes": torch.from_numpy(scene.boxes),
            "labels": torch.from_numpy(scene.labels),
            "area": torch.from_numpy(scene.areas),
            "iscrowd": torch.from_numpy(scene.ignored.astype(np.int64)),
        }
        if self.masked:
            target["masks"] = _drawn(scene)
        return target

    def fingerprint(self) -> str:
        """16 hex digits that change with the images' names, sizes, order or annotations, but not with where the folder lies."""
        digest = hashlib.sha256(json.dumps([self.classes, self.masked, len(self)]).encode())
        for scene in self.scenes:
            digest.update(json.dumps([os.path.basename(scene.file), scene.size, len(scene.labels)]).encode())
            for column in (scene.boxes, scene.labels, scene.areas, scene.ignored):
                digest.update(column.tobytes())
            for mask in scene.masks if self.masked else ():
                digest.update(mask or b"")
        return digest.hexdigest()[:16]

    def objects(self) -> int:
        """How many objects count."""
        return sum(int((~scene.ignored).sum()) for scene in self.scenes)

    def has_masks(self) -> bool:
        """Whether any object has a mask."""
        return any(mask is not None for scene in self.scenes for mask in scene.masks)

    def with_masks(self) -> Scenes:
        """With masks in the targets; objects that have none are dropped and counted."""
        kept = [scene.keep(np.array([mask is not None for mask in scene.masks], np.bool_)) for scene in self.scenes]
        lost = sum(len(before.labels) - len(after.labels) for before, after in zip(self.scenes, kept, strict=True))
        return replace(self, scenes=kept, masked=True, dropped=counted(self.dropped, "without a mask", lost))

    def for_training(self) -> Scenes:
        """The images that have an object to learn, and of those the objects that are not ignored."""
        kept = [scene.keep(~scene.ignored) for scene in self.scenes]
        return replace(self, scenes=[scene for scene in kept if len(scene.labels)])

    def subset(self, rows: Iterable[int]) -> Scenes:
        """The images at these positions, in this order."""
        return replace(self, scenes=[self.scenes[row] for row in rows])


def counted(counts: dict[str, int], reason: str, more: int) -> dict[str, int]:
    """The counts with more of one reason, which is not named while there are none."""
    return {**counts, reason: counts.get(reason, 0) + more} if more else counts


def present(pictures: str, names: Sequence[str], source: str) -> None:
    """Check that the images a source names lie in its folder.

    Raises:
        DataError: naming how many do not, and the first.
    """
    try:
        listed = set(os.listdir(pictures))
    except OSError as error:
        raise DataError(f"{shown(pictures)}: the images of {shown(source)} cannot be listed: {error.strerror}") from error
    gone = [name for name in names if name not in listed and not os.path.isfile(os.path.join(pictures, name))]
    if gone:
        raise DataError(
            f"{shown(source)}: {len(gone)} of its {len(names)} images are not in {shown(pictures)}, the first is {shown(gone[0])}"
        )


def _drawn(scene: Scene) -> Tensor:
    """uint8 [n, H, W] of the masks of a scene, each of which has one."""
    from pycocotools import mask as coco

    height, width = scene.size
    if not scene.masks:
        return torch.zeros(0, height, width, dtype=torch.uint8)
    planes = coco.decode([{"size": [height, width], "counts": counts} for counts in scene.masks])
    return torch.from_numpy(np.ascontiguousarray(planes.transpose(2, 0, 1)))


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


# How releases of COCO, and sets laid out like it, name their parts. Those of two releases must not be mixed: most images of
# val2014 are in train2017 too, under other names.
_PARTS = (("train2017", "val2017"), ("train2014", "val2014"), ("train", "val"))


def load(folder: str, *, masks: bool, max_pixels: int) -> tuple[Scenes, Scenes]:
    """What to train on and what to evaluate on, of a folder in COCO's or in VOC's layout.

    Args:
        masks: read the masks too, where the data set has them; needs pycocotools.
        max_pixels: images with more pixels are refused.

    Returns:
        The two splits; their targets have masks if `masks` and both splits have any.

    Raises:
        DataError: for a folder in neither layout, a missing part, image or category, malformed annotations, an image listed twice, splits
            that share images or differ in their categories, or a split without a single box.
    """
    path = os.path.expanduser(folder)
    if not os.path.isdir(path):
        raise DataError(f"{shown(folder)}: is no folder; detection needs one in COCO's or VOC's layout")
    if os.path.isdir(os.path.join(path, "annotations")):
        train, test = (_read(path, part, masks, max_pixels) for part in _parts_coco(path))
        _same_categories(train, test)
    else:
        year = find(path)
        if year is None:
            raise DataError(
                f"{shown(folder)}: holds no boxes; detection needs COCO's layout (annotations/instances_train2017.json, "
                "instances_val2017.json, train2017/, val2017/) or VOC's (Annotations, ImageSets/Main, JPEGImages)"
            )
        train, test = read(year, max_pixels)
    if masks and train.has_masks() and test.has_masks():
        train, test = train.with_masks(), test.with_masks()
    _usable(train, test)
    return train, test


def _usable(train: Scenes, test: Scenes) -> None:
    for split in (train, test):
        if not len(split):
            raise DataError(f"{split.name}: has no images")
        files = Counter(scene.file for scene in split.scenes)
        if len(files) < len(split):
            often = max(files, key=files.__getitem__)
            raise DataError(f"{split.name}: names {shown(often)} {files[often]} times; list each image once, as it counts once")
        if not split.objects():
            lost = "".join(f", {count} dropped as {reason}" for reason, count in split.dropped.items())
            raise DataError(f"{split.name}: has no box that counts on any of its {len(split)} images{lost}")
    both = {scene.file for scene in train.scenes} & {scene.file for scene in test.scenes}
    if both:
        raise DataError(
            f"{test.name}: {len(both)} of its {len(test)} images are trained on as well, such as {shown(min(both))}; "
            "figures on them prove nothing, list them in one part only"
        )


def _same_categories(train: Scenes, test: Scenes) -> None:
    """A category must have one number and one name; what only training has is allowed, as it is merely never found."""
    known = dict(zip(train.ids, train.classes, strict=True))
    for number, name in zip(test.ids, test.classes, strict=True):
        if known.get(number) != name:
            there = f"{shown(known[number])} there" if number in known else "not there"
            raise DataError(f"{test.name}: category {number} is {shown(name)}, in {train.name} it is {there}; number them alike")


def _parts_coco(folder: str) -> tuple[str, str]:
    """The first pair of parts of which both have their annotations."""
    for pair in _PARTS:
        if all(os.path.isfile(_json(folder, part)) for part in pair):
            return pair
    place = os.path.dirname(_json(folder, ""))
    there = ", ".join(sorted(name for name in os.listdir(place) if name.endswith(".json")))
    wanted = ", or ".join(" and ".join(pair) for pair in _PARTS)
    raise DataError(f"{shown(place)}: needs instances_PART.json of {wanted}; has {there or 'no json'}")


def _read(folder: str, part: str, masks: bool, max_pixels: int) -> Scenes:
    file = _json(folder, part)
    places = [os.path.join(folder, part), os.path.join(folder, "images", part)]
    pictures = next((place for place in places if os.path.isdir(place)), None)
    if pictures is None:
        raise DataError(f"{shown(places[0])}: is missing, the images of {shown(file)}")
    content = _content(file)
    categories = _categories(file, content["categories"])
    drafts = _images(file, content["images"], pictures, max_pixels)
    labels = {number: label for label, number in enumerate(categories, 1)}
    for position, entry in enumerate(content["annotations"]):
        try:
            _add(entry, drafts, labels, masks)
        except KeyError as error:
            raise DataError(f"{shown(file)}: annotation {position} has no {error}") from error
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(f"{shown(file)}: annotation {position} is malformed ({_brief(error)})") from error
    dropped = counted({}, "without extent", sum(draft.dropped for draft in drafts.values()))
    scenes, names = [draft.scene() for draft in drafts.values()], tuple(categories.values())
    return Scenes(shown(file), "coco", scenes, names, tuple(categories), max_pixels, False, dropped)


def _json(folder: str, part: str) -> str:
    return os.path.join(folder, "annotations", f"instances_{part}.json")


def _content(file: str) -> dict[str, list[Any]]:
    try:
        with open(file, "rb") as opened:
            content = json.load(opened)
    except OSError as error:
        raise DataError(f"{shown(file)}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # the first also for bytes that are no text
        raise DataError(f"{shown(file)}: is no JSON ({_brief(error)})") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{shown(file)}: has no list {key!r}; it needs images, annotations and categories")
    return {key: content[key] for key in ("images", "annotations", "categories")}


def _categories(file: str, entries: list[Any]) -> dict[int, str]:
    """{number: name}, by rising number."""
    try:
        found = {_whole_coco(entry["id"]): str(entry["name"]) for entry in entries}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{shown(file)}: a category lacks its id or name ({_brief(error)})") from error
    if len(found) < len(entries):
        raise DataError(f"{shown(file)}: two categories have the same id")
    return dict(sorted(found.items()))


def _images(file: str, entries: list[Any], pictures: str, max_pixels: int) -> dict[int, SceneDraft]:
    drafts: dict[int, SceneDraft] = {}
    names = []
    for position, entry in enumerate(entries):
        try:
            number, name, size = (
                _whole_coco(entry["id"]),
                entry["file_name"],
                (_whole_coco(entry["height"]), _whole_coco(entry["width"])),
            )
            if not isinstance(name, str) or not name or os.path.isabs(name) or ".." in name.split("/") or "\0" in name:
                raise ValueError("file_name must be a path below the folder of the images")
            if min(size) < 1 or number in drafts:
                raise ValueError(f"id {number} occurs twice" if number in drafts else f"its size is {size[1]} x {size[0]}")
        except (KeyError, TypeError, ValueError) as error:
            lacking = f"has no {error}" if isinstance(error, KeyError) else f"is malformed ({_brief(error)})"
            raise DataError(f"{shown(file)}: image {position} {lacking}") from error
        drafts[number] = SceneDraft(os.path.normpath(os.path.join(pictures, name)), size, max_pixels)
        names.append(name)
    present(pictures, names, file)
    return drafts


def _add(entry: Mapping[str, Any], drafts: dict[int, SceneDraft], labels: dict[int, int], masks: bool) -> None:
    draft, label = drafts.get(entry["image_id"]), labels.get(entry["category_id"])
    if draft is None or label is None:
        unknown = f"image_id {entry['image_id']!r}" if draft is None else f"category_id {entry['category_id']!r}"
        raise ValueError(f"{unknown} is not in the file")
    left, top, width, height = (float(number) for number in entry["bbox"])
    crowd = entry.get("iscrowd") or 0
    if crowd not in (0, 1):
        raise ValueError(f"iscrowd is {crowd!r}, not 0 or 1")
    area, mask = float(entry.get("area") or 0), _mask(entry.get("segmentation"), draft.size) if masks else None
    draft.add((left, top, left + width, top + height), label, ignored=crowd == 1, area=area, mask=mask)


def _mask(outline: Any, size: tuple[int, int]) -> bytes | None:
    """The run-length encoding of polygons, or of an encoding of either kind; None if there is no outline."""
    from pycocotools import mask as coco

    if not outline:
        return None
    height, width = size
    if isinstance(outline, Mapping):
        if [_whole_coco(side) for side in outline["size"]] != [height, width]:
            raise ValueError(f"its mask is of size {outline['size']}, its image {[height, width]}")
        counts = outline["counts"]
        runs = _runs(counts.encode("ascii")) if isinstance(counts, str) else [_whole_coco(run) for run in counts]
        if any(run < 0 for run in runs) or sum(runs) != height * width:  # of which pycocotools fills a part, and leaves the rest
            raise ValueError("the runs of its mask do not add up to the image's pixels")
        return _bytes(coco.frPyObjects({"size": [height, width], "counts": runs}, height, width))
    # A corner far outside would cost memory by its distance.
    polygons = [np.clip(np.array(part, np.float64).reshape(-1, 2), 0, [width, height]) for part in outline]
    if any(len(polygon) < 3 or not np.isfinite(polygon).all() for polygon in polygons):
        raise ValueError("a polygon needs three corners, each of two numbers")
    room = height * width + 2 * (height + width)  # a longer outline covers pixels more than once, and costs memory by its length
    if any(np.abs(polygon - np.roll(polygon, 1, axis=0)).sum() > room for polygon in polygons):
        raise ValueError(f"a polygon is longer than an image of {width} x {height} has room for")
    return _bytes(coco.merge(coco.frPyObjects([polygon.ravel().tolist() for polygon in polygons], height, width)))


def _runs(text: bytes) -> list[int]:
    """The runs in COCO's compressed form: numbers in groups of five bits from the lowest, the sixth bit saying that more follow.

    The last group's highest bit is the sign; from the fourth number on, each is the difference to the one before the last.
    """
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        group = letter - 48
        if not 0 <= group < 64 or shift > 60:
            raise ValueError("its mask is no run-length encoding")
        value |= (group & 31) << shift
        shift += 5
        if not group & 32:
            value -= (group & 16) << (shift - 4)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("its mask is no run-length encoding")
    return runs


def _bytes(encoded: Mapping[str, Any]) -> bytes:
    counts: bytes = encoded["counts"]
    return counts


def _whole_coco(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
