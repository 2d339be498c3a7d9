"""Boxes and masks in COCO's layout: annotations/instances_{train,val}*.json beside the folders of the images.

The fields are those of COCO's own description of its format (cocodataset.org, "Data format", object detection).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from relssl.data import voc_boxes
from relssl.data.objects import SceneDraft, Scenes, counted, present
from relssl.data.paths import shown
from relssl.errors import DataError

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
        train, test = (_read(path, part, masks, max_pixels) for part in _parts(path))
        _same_categories(train, test)
    else:
        year = voc_boxes.find(path)
        if year is None:
            raise DataError(
                f"{shown(folder)}: holds no boxes; detection needs COCO's layout (annotations/instances_train2017.json, "
                "instances_val2017.json, train2017/, val2017/) or VOC's (Annotations, ImageSets/Main, JPEGImages)"
            )
        train, test = voc_boxes.read(year, max_pixels)
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


def _parts(folder: str) -> tuple[str, str]:
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
        found = {_whole(entry["id"]): str(entry["name"]) for entry in entries}
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
            number, name, size = _whole(entry["id"]), entry["file_name"], (_whole(entry["height"]), _whole(entry["width"]))
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
        if [_whole(side) for side in outline["size"]] != [height, width]:
            raise ValueError(f"its mask is of size {outline['size']}, its image {[height, width]}")
        counts = outline["counts"]
        runs = _runs(counts.encode("ascii")) if isinstance(counts, str) else [_whole(run) for run in counts]
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


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
