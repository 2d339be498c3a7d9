"""Images with the boxes and masks of the objects in them, from a folder in COCO's or in PASCAL VOC's layout.

Masks are pycocotools' run lengths. Its own reader and torchvision's data sets are not used: they print, open images of any size,
keep crowds and difficult objects among the others, and of VOC's layout know no classes but VOC's twenty.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
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
Size = tuple[int, int]
# Edges left, top, right, bottom; category by number or name; area (0: that of the box); crowd or difficult; run-length mask.
Entry = tuple[tuple[float, float, float, float], int | str, float, bool, bytes | None]

_OBJECT = np.dtype([("boxes", "f4", 4), ("labels", "i8"), ("area", "f4"), ("iscrowd", "i8"), ("masks", "O")])
_THINNEST = 0.01  # pixels below which a side is nothing: boxes of no width divide by zero in a detector
# How releases of COCO, and sets laid out like it, name their parts. Those of two releases must not be mixed: most images of
# val2014 are in train2017 too, under other names.
_COCO_PARTS = (("train2017", "val2017"), ("train2014", "val2014"), ("train", "val"))


class Scene(NamedTuple):
    """One image before it is read.

    Attributes:
        file: its path.
        size: (height, width) in pixels, as its annotation says.
        objects: [n] records of boxes, 4 float32 left, top, right, bottom in pixels, the last two just beyond the object; labels,
            1..C; area in pixels, by which objects count as small, medium or large; iscrowd, 1 for crowds and difficult objects,
            which are never trained on and neither hit nor missed in evaluation; masks, run-length encoded, or None.
    """

    file: str
    size: Size
    objects: npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Scenes(Dataset[tuple[Tensor, Target]]):
    """A split of a detection data set; images are decoded as they are taken.

    Attributes:
        name: for messages.
        layout: coco or voc.
        classes: names of the labels 1, 2, ...
        dropped: number of objects that were left out, by the reason.
        masked: true if targets have masks.
    """

    name: str
    layout: str
    scenes: Sequence[Scene]
    classes: tuple[str, ...]
    max_pixels: int
    dropped: dict[str, int]
    masked: bool = False

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, row: int) -> tuple[Tensor, Target]:
        """Return an image, uint8 [3, H, W], and its target as torchvision's detection models and COCO's evaluation want it: boxes
        fp32 [n, 4], labels int64 [n], area fp32 [n], iscrowd int64 [n] and, if `masked`, masks uint8 [n, H, W].

        Raises:
            DataError: if the file cannot be read, or is not of the size that its annotation says.
        """
        file, size, objects = self.scenes[row]
        try:
            image: Tensor = pil_to_tensor(decode(file, self.max_pixels))
            if tuple(image.shape[1:]) != size:
                raise BadImage(f"has {image.shape[2]} x {image.shape[1]} pixels, its annotation says {size[1]} x {size[0]}")
        except (BadImage, OSError) as error:
            raise DataError(f"{shown(file)}: {error}; replace it, or take it out of {self.name}") from error
        target: Target = {name: torch.from_numpy(objects[name].copy()) for name in ("boxes", "labels", "area", "iscrowd")}
        return image, target | {"masks": _planes(objects["masks"], size)} if self.masked else target

    def fingerprint(self) -> str:
        """Return 16 hex digits that change with the images' names, sizes, order or annotations, but not with the folder's place."""
        digest = hashlib.sha256(json.dumps([self.classes, self.masked, len(self)]).encode())
        for file, size, objects in self.scenes:
            digest.update(json.dumps([os.path.basename(file), size, len(objects)]).encode())
            for column in (objects["boxes"], objects["labels"], objects["area"], objects["iscrowd"].astype(bool)):
                digest.update(column.tobytes())
            for mask in objects["masks"] if self.masked else ():
                digest.update(mask)
        return digest.hexdigest()[:16]

    def objects(self) -> int:
        """Return the number of objects that count."""
        return sum(int((scene.objects["iscrowd"] == 0).sum()) for scene in self.scenes)

    def for_training(self) -> Scenes:
        """Return the images that have an object to learn, with those of their objects that are neither crowds nor difficult."""
        scenes = [scene._replace(objects=scene.objects[scene.objects["iscrowd"] == 0]) for scene in self.scenes]
        return replace(self, scenes=[scene for scene in scenes if len(scene.objects)])

    def with_masks(self) -> Scenes:
        """Return the split with masks in its targets; objects that have none are left out and counted."""
        scenes = [scene._replace(objects=scene.objects[scene.objects["masks"].astype(bool)]) for scene in self.scenes]
        lost = sum(len(scene.objects) for scene in self.scenes) - sum(len(scene.objects) for scene in scenes)
        return replace(self, scenes=scenes, masked=True, dropped=self.dropped | ({"without a mask": lost} if lost else {}))


def load(folder: str, *, masks: bool, max_pixels: int) -> tuple[Scenes, Scenes]:
    """Return what to train on and what to evaluate on.

    Args:
        folder: in COCO's layout, a VOC year, or a folder that holds one year.
        masks: read the masks too, where both splits have any; needs pycocotools.
        max_pixels: images with more pixels are refused.

    Raises:
        DataError: for a folder in neither layout; a missing part, image or category; malformed annotations; an image listed twice,
            or outside of the folder; splits that share images or differ in their categories; a split without a single box.
    """
    path = os.path.expanduser(folder)
    coco = os.path.isdir(os.path.join(path, "annotations"))
    train, test = _read_coco(path, masks, max_pixels) if coco else _read_voc(_voc_year(path), max_pixels)
    if all(any(scene.objects["masks"].any() for scene in split.scenes) for split in (train, test)):
        train, test = train.with_masks(), test.with_masks()
    for split in (train, test):
        files = Counter(scene.file for scene in split.scenes)
        if gone := [file for file in files if not os.path.isfile(file)]:
            raise DataError(f"{split.name}: {len(gone)} of its {len(files)} images are missing, the first is {shown(gone[0])}")
        if twice := [file for file, times in files.items() if times > 1]:
            raise DataError(f"{split.name}: names {shown(twice[0])} {files[twice[0]]} times; list each image once")
        if not split.objects():
            raise DataError(f"{split.name}: has no box that counts on any of its {len(split)} images; left out: {split.dropped}")
    if both := {scene.file for scene in train.scenes} & {scene.file for scene in test.scenes}:
        fault = f"{len(both)} of its {len(test)} images are trained on as well, such as {shown(min(both))}"
        raise DataError(f"{test.name}: {fault}; figures on them prove nothing, list them in one part only")
    return train, test


def _split(
    name: str, layout: str, images: Sequence[tuple[str, Size, list[Entry]]], categories: Mapping[Any, str], max_pixels: int
) -> Scenes:
    """Return the split of images (file, size, entries): boxes are cut at the images' edges, and those without extent left out."""
    labels, scenes, lost = {category: label for label, category in enumerate(categories, 1)}, [], 0
    for file, (height, width), entries in images:
        with np.errstate(invalid="ignore", over="ignore"):  # NaN stays NaN, and is left out below
            objects = np.array([(edges, labels[category], *rest) for edges, category, *rest in entries], _OBJECT)
        edges = np.clip(objects["boxes"].astype(np.float64), 0, [width, height, width, height])
        sides = edges[:, 2:] - edges[:, :2]
        known = (objects["area"] > 0) & np.isfinite(objects["area"])
        objects["boxes"], objects["area"] = edges, np.where(known, objects["area"], sides.prod(axis=1))
        scenes.append(Scene(file, (height, width), objects[(sides >= _THINNEST).all(axis=1)]))
        lost += len(objects) - len(scenes[-1].objects)
    return Scenes(name, layout, scenes, tuple(categories.values()), max_pixels, {"without extent": lost} if lost else {})


@contextmanager
def _reading(file: str, place: Sequence[str] = ("it",)) -> Iterator[None]:
    """Turn whatever a file of any content raises while it is read into a DataError of one line that names the last `place`."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{shown(file)}: cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, ElementTree.ParseError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:120]
        raise DataError(f"{shown(file)}: {place[-1]} is malformed ({reason}); correct it, or take it out") from error


def _size(width: float, height: float, max_pixels: int) -> Size:
    """Return (height, width) of an annotation; larger images are refused before their outlines take memory by the pixels."""
    if min(width, height) < 1 or width * height > max_pixels or width % 1 or height % 1:
        raise ValueError(f"its size is {width:g} x {height:g}, loader.max_pixels is {max_pixels}")
    return int(height), int(width)


def _within(folder: str, name: str) -> str:
    """Return the path of an image of this name in a folder, so that annotations can make nobody read what lies elsewhere."""
    path = os.path.normpath(os.path.join(folder, name))
    if not path.startswith(os.path.join(os.path.normpath(folder), "")):
        raise ValueError(f"{shown(name)} lies outside of the image folder")
    return path


def _read_coco(folder: str, masks: bool, max_pixels: int) -> tuple[Scenes, Scenes]:
    """Return the first pair of parts of which both have their annotations."""
    there = {os.path.basename(file) for file in glob.glob(os.path.join(glob.escape(folder), "annotations", "*.json"))}
    for train, test in _COCO_PARTS:
        if {f"instances_{train}.json", f"instances_{test}.json"} <= there:
            split, categories = _read_instances(folder, train, masks, max_pixels, None)
            return split, _read_instances(folder, test, masks, max_pixels, categories)[0]
    parts, present = ", or ".join(map(" and ".join, _COCO_PARTS)), ", ".join(sorted(there)) or "no json"
    raise DataError(f"{shown(folder)}: annotations/ needs instances_PART.json of {parts}; has {present}")


def _read_instances(
    folder: str, part: str, masks: bool, max_pixels: int, known: dict[int, str] | None
) -> tuple[Scenes, dict[int, str]]:
    """Return a part of a set in COCO's layout and its categories, {number: name}: those that are `known` from training, if any.

    Categories that only training has are allowed, as they are merely never met.
    """
    file, place = os.path.join(folder, "annotations", f"instances_{part}.json"), ["it"]
    pictures = next(filter(os.path.isdir, (os.path.join(folder, part), os.path.join(folder, "images", part))), folder)
    images: dict[int, tuple[str, Size, list[Entry]]] = {}
    with _reading(file, place):
        with open(file, "rb") as opened:
            content = json.load(opened)
        categories = dict(sorted((int(entry["id"]), str(entry["name"])) for entry in content["categories"]))
        for number, name in categories.items():
            if known is not None and known.get(number) != name:
                raise ValueError(f"its category {number} is {name}, in training it is {known.get(number)}; number them alike")
        categories = known or categories
        for position, entry in enumerate(content["images"]):
            place[0] = f"image {position}"
            if entry["id"] in images:
                raise ValueError(f"id {entry['id']} occurs twice")
            path, size = _within(pictures, entry["file_name"]), _size(entry["width"], entry["height"], max_pixels)
            images[entry["id"]] = (path, size, [])
        for position, entry in enumerate(content["annotations"]):
            place[0] = f"annotation {position}"
            if entry["category_id"] not in categories or (crowd := entry.get("iscrowd") or 0) not in (0, 1):
                raise ValueError("its category_id is not in the file, or iscrowd not 0 or 1")
            _, size, entries = images[entry["image_id"]]
            left, top, width, height = map(float, entry["bbox"])
            mask = _mask(entry.get("segmentation"), size) if masks else None
            edges, area = (left, top, left + width, top + height), float(entry.get("area") or 0)
            entries.append((edges, entry["category_id"], area, crowd == 1, mask))
    return _split(shown(file), "coco", list(images.values()), categories, max_pixels), categories


def _mask(outline: Any, size: Size) -> bytes | None:
    """Return the run-length encoding of polygons, or of an encoding of either kind; None if there is no outline."""
    from pycocotools import mask as coco

    if not outline:
        return None
    height, width = size
    if isinstance(outline, Mapping):
        runs = _runs(outline["counts"]) if isinstance(outline["counts"], str) else outline["counts"]
        # Of other runs pycocotools fills a part, and leaves in the rest what the memory held before.
        if list(outline["size"]) != [height, width] or min(runs) < 0 or sum(runs) != height * width:
            raise ValueError("the runs of its mask do not add up to the image's pixels")
        encoded: dict[str, bytes] = coco.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    else:
        # A corner far outside would cost memory by its distance.
        polygons = [np.clip(np.array(part, np.float64).reshape(-1, 2), 0, [width, height]) for part in outline]
        if any(len(polygon) < 3 or not np.isfinite(polygon).all() for polygon in polygons):
            raise ValueError("a polygon needs three corners, each of two numbers")
        encoded = coco.merge(coco.frPyObjects([polygon.ravel().tolist() for polygon in polygons], height, width))
    return encoded["counts"]


def _runs(text: str) -> list[int]:
    """Return the runs of COCO's compressed form: groups of five bits from the lowest, a sixth saying that more follow, the last
    group's highest bit being the sign; from the fourth number on, each is the difference to the one before the last."""
    runs: list[int] = []
    value = shift = 0
    for group in (letter - 48 for letter in text.encode("ascii")):
        value |= (group & 31) << shift
        shift = min(shift + 5, 60)
        if not group & 32:
            runs.append(value - ((group & 16) << (shift - 4)) + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def _planes(masks: npt.NDArray[Any], size: Size) -> Tensor:
    """Return uint8 [n, H, W] of n run-length encoded masks."""
    from pycocotools import mask as coco

    encoded = [{"size": list(size), "counts": counts} for counts in masks]
    planes = coco.decode(encoded) if encoded else np.empty((*size, 0), np.uint8)
    return torch.from_numpy(np.ascontiguousarray(planes.transpose(2, 0, 1)))


def _voc_year(folder: str) -> str:
    """Return the year's folder: `folder` itself, its only VOCxxxx, or that of its VOCdevkit."""
    places = [folder, *(place for way in ("VOC*", "VOCdevkit/VOC*") for place in glob.glob(f"{glob.escape(folder)}/{way}"))]
    years = sorted(place for place in places if os.path.isdir(os.path.join(place, "Annotations")))
    if len(years) == 1:
        return years[0]
    fault = f"holds {len(years)} years; name one of them, such as {shown(years[0])}" if years else "holds no boxes"
    layouts = "COCO's layout (annotations/instances_train2017.json, instances_val2017.json, train2017/, val2017/) or in VOC's"
    raise DataError(f"{shown(folder)}: {fault}; detection needs a folder in {layouts} (Annotations, ImageSets/Main, JPEGImages)")


def _read_voc(folder: str, max_pixels: int) -> tuple[Scenes, Scenes]:
    """Return trainval and test where test has its annotations, as VOC2012's has not; else train and val.

    Difficult objects are ignored. The classes are those of the training images, by name.
    """
    names: dict[str, list[str]] = {}
    for part in ("trainval", "train", "val", "test"):
        file = os.path.join(folder, "ImageSets", "Main", f"{part}.txt")
        if os.path.isfile(file):
            with _reading(file), open(file, encoding="utf-8") as opened:
                names[part] = [line.split()[0] for line in opened if line.strip()]
    tested = any(os.path.isfile(os.path.join(folder, "Annotations", f"{name}.xml")) for name in names.get("test", ())[:1])
    parts = ("trainval" if tested and "trainval" in names else "train", "test" if tested else "val")
    if not set(parts) <= set(names):
        needs = "ImageSets/Main needs trainval.txt and test.txt, or train.txt and val.txt"
        raise DataError(f"{shown(folder)}: no images to train and to evaluate on; {needs}, and has {sorted(names) or 'none'}")
    sides = [[_parse(folder, name, max_pixels) for name in names[part]] for part in parts]
    known, met = (sorted({str(category) for *_, entries in side for _, category, *_ in entries}) for side in sides)
    if strange := sorted(set(met) - set(known)):
        raise DataError(f"{shown(folder)}: {parts[1]} has objects of the class {shown(strange[0])}, {parts[0]} has none")
    classes = {word: word for word in known}
    train, test = (
        _split(f"{shown(folder)} ({part})", "voc", side, classes, max_pixels) for part, side in zip(parts, sides, strict=True)
    )
    return train, test


def _parse(folder: str, name: str, max_pixels: int) -> tuple[str, Size, list[Entry]]:
    """Return an image's path, size and objects; expat fetches no other file, and refuses entities that grow."""
    entries, file = list[Entry](), os.path.join(folder, "Annotations", f"{name}.xml")
    with _reading(file):
        image = _within(os.path.join(folder, "JPEGImages"), f"{name}.jpg")
        root = ElementTree.parse(file).getroot()
        width, height = (float(root.findtext(f"size/{side}", "missing")) for side in ("width", "height"))
        size = _size(width, height, max_pixels)
        for element in root.iterfind("object"):
            left, top, right, bottom = (
                float(element.findtext(f"bndbox/{edge}", "missing")) for edge in ("xmin", "ymin", "xmax", "ymax")
            )
            if not (word := element.findtext("name", "").strip()):
                raise ValueError("an object has no name")
            difficult = element.findtext("difficult", "").strip() == "1"
            entries.append(((left - 1, top - 1, right, bottom), word, 0, difficult, None))
    return image, size, entries
