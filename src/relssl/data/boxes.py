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
from pathlib import Path
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
# An image as its annotation says: its path, (height, width), and of each object its edges left, top, right, bottom; class; area
# (0: that of the box); crowd or difficult; run-length mask.
Picture = tuple[str, Size, list[tuple[tuple[float, float, float, float], str, float, bool, bytes | None]]]
Part = tuple[str, list[Picture], list[str]]  # a part of a data set: its name, images and classes

_OBJECT = np.dtype([("boxes", "f4", 4), ("labels", "i8"), ("area", "f4"), ("iscrowd", "i8"), ("masks", "O")])
_THINNEST = 0.01  # pixels below which a side is nothing: boxes of no width divide by zero in a detector
# How releases of COCO, and sets laid out like it, name their parts. Those of two releases must not be mixed: most images of
# val2014 are in train2017 too, under other names.
_COCO_PARTS = (("train2017", "val2017"), ("train2014", "val2014"), ("train", "val"))
_NEEDS = (
    "detection needs a folder in COCO's layout (annotations/ with instances_train2017.json and instances_val2017.json, train2017/, "
    "val2017/), or one year of VOC (Annotations/, JPEGImages/, ImageSets/Main/ with trainval.txt and test.txt, or train.txt and val.txt)"
)


class Scene(NamedTuple):
    """One image before it is read."""

    file: str
    size: Size  # (height, width) in pixels, as its annotation says
    # [n] records: boxes, 4 float32 left, top, right, bottom in pixels, the last two just beyond the object; labels, 1..C; area in
    # pixels, by which objects count as small, medium or large; iscrowd, 1 for crowds and difficult objects, which are never trained
    # on and neither hit nor missed in evaluation; masks, run-length encoded, or None.
    objects: npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Scenes(Dataset[tuple[Tensor, Target]]):
    """A split of a detection data set; images are decoded as they are taken."""

    name: str  # for messages
    layout: str  # coco or voc
    scenes: Sequence[Scene]
    classes: tuple[str, ...]  # names of the labels 1, 2, ...
    max_pixels: int
    dropped: dict[str, int]  # number of objects that were left out, by the reason
    masked: bool  # true if targets have masks

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
        if self.masked:
            from pycocotools import mask as coco

            planes = [coco.decode({"size": size, "counts": counts}) for counts in objects["masks"]]
            target["masks"] = torch.from_numpy(np.array(planes, np.uint8).reshape(-1, *size))
        return image, target

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


def load(folder: str, *, masks: bool, max_pixels: int) -> tuple[Scenes, Scenes]:
    """Return what to train on and what to evaluate on.

    Args:
        folder: in COCO's layout, a VOC year, or a folder that holds one year.
        masks: read the masks too, where both splits have any; needs pycocotools.
        max_pixels: images with more pixels are refused.

    Raises:
        DataError: for a folder in neither layout; a missing part or image; malformed annotations; an image listed twice, or outside
            of the folder; splits that share images; classes that only the second has; a split without a single box.
    """
    path = os.path.expanduser(folder)
    coco = os.path.isdir(os.path.join(path, "annotations"))
    parts = _read_coco(path, masks, max_pixels) if coco else _read_voc(path, max_pixels)
    masked = all(any(mask for *_, entries in pictures for *_, mask in entries) for _, pictures, _ in parts)
    train, test = (_split(part, parts[0][2], "coco" if coco else "voc", masked, max_pixels) for part in parts)
    files = Counter(scene.file for split in (train, test) for scene in split.scenes)
    if gone := [file for file in files if not os.path.isfile(file)]:
        raise DataError(f"{shown(folder)}: {len(gone)} of its {len(files)} images are missing, the first is {shown(gone[0])}")
    if twice := [file for file, times in files.items() if times > 1]:
        fault = f"{len(twice)} images are listed more than once, such as {shown(twice[0])}"
        raise DataError(f"{shown(folder)}: {fault}; list each once, as figures on images that were trained on prove nothing")
    for split in (train, test):
        if not split.objects():
            raise DataError(f"{split.name}: has no box that counts on any of its {len(split)} images; left out: {split.dropped}")
    return train, test


def _split(part: Part, classes: Sequence[str], layout: str, masked: bool, max_pixels: int) -> Scenes:
    """Return a split whose boxes are cut at the images' edges; objects without extent, or a mask where masks are wanted, are left out."""
    title, pictures, _ = part
    labels, scenes, dropped = {word: label for label, word in enumerate(classes, 1)}, [], Counter[str]()
    if strange := {word for *_, entries in pictures for _, word, *_ in entries} - labels.keys():
        raise DataError(f"{title}: has objects of the class {shown(min(strange))}, training has not; give both the same")
    for file, (height, width), entries in pictures:
        with np.errstate(invalid="ignore", over="ignore"):  # NaN stays NaN, and is left out below
            objects = np.array([(edges, labels[word], *rest) for edges, word, *rest in entries], _OBJECT)
        edges = np.clip(objects["boxes"].astype(np.float64), 0, [width, height, width, height])
        sides = edges[:, 2:] - edges[:, :2]
        known = (objects["area"] > 0) & np.isfinite(objects["area"])
        objects["boxes"], objects["area"] = edges, np.where(known, objects["area"], sides.prod(axis=1))
        solid, outlined = (sides >= _THINNEST).all(axis=1), objects["masks"].astype(bool) | (not masked)
        scenes.append(Scene(file, (height, width), objects[solid & outlined]))
        dropped.update({"without extent": int((~solid).sum()), "without a mask": int((solid & ~outlined).sum())})
    return Scenes(title, layout, scenes, tuple(classes), max_pixels, dict(+dropped), masked)


@contextmanager
def _reading(file: str, place: Sequence[str] = ("it",)) -> Iterator[None]:
    """Turn whatever a file of any content raises while it is read into a DataError of one line that names the last `place`."""
    try:
        yield
    except (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, SyntaxError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:120]
        raise DataError(f"{shown(file)}: {place[-1]} cannot be read ({reason}); correct it, or take it out") from error


def _picture(folder: str, name: str, width: float, height: float, max_pixels: int) -> Picture:
    """Return an image in a folder: annotations can make nobody read what lies elsewhere, nor outlines take any memory."""
    path = os.path.normpath(os.path.join(folder, name))
    if not path.startswith(os.path.join(os.path.normpath(folder), "")):
        raise ValueError(f"{shown(name)} lies outside of the image folder")
    if min(width, height) < 1 or width * height > max_pixels or width % 1 or height % 1:
        raise ValueError(f"its size is {width:g} x {height:g}, loader.max_pixels is {max_pixels}")
    return path, (int(height), int(width)), []


def _read_coco(folder: str, masks: bool, max_pixels: int) -> list[Part]:
    """Read the first pair of parts of which both have their annotations; classes are in the order of their numbers."""
    files = {name: os.path.join(folder, "annotations", f"instances_{name}.json") for pair in _COCO_PARTS for name in pair}
    for names in _COCO_PARTS:
        if all(os.path.isfile(files[name]) for name in names):
            return [_read_instances(folder, name, files[name], masks, max_pixels) for name in names]
    raise DataError(f"{shown(folder)}: annotations/ has not the files of both parts; {_NEEDS}")


def _read_instances(folder: str, name: str, file: str, masks: bool, max_pixels: int) -> Part:
    place, pictures = ["it"], dict[int, Picture]()
    within = next(filter(os.path.isdir, (os.path.join(folder, name), os.path.join(folder, "images", name))), folder)
    with _reading(file, place):
        content = json.loads(Path(file).read_bytes())
        classes = dict(sorted((int(entry["id"]), str(entry["name"])) for entry in content["categories"]))
        for position, entry in enumerate(content["images"]):
            place[0] = f"image {position}"
            if entry["id"] in pictures:
                raise ValueError(f"id {entry['id']} occurs twice")
            pictures[entry["id"]] = _picture(within, entry["file_name"], entry["width"], entry["height"], max_pixels)
        for position, entry in enumerate(content["annotations"]):
            place[0] = f"annotation {position}"
            _, size, entries = pictures[entry["image_id"]]
            left, top, width, height = map(float, entry["bbox"])
            mask = _mask(entry.get("segmentation"), *size) if masks else None
            edges, area = (left, top, left + width, top + height), float(entry.get("area") or 0)
            entries.append((edges, classes[entry["category_id"]], area, bool(entry.get("iscrowd")), mask))
    return shown(file), list(pictures.values()), list(dict.fromkeys(classes.values()))


def _mask(outline: Any, height: int, width: int) -> bytes | None:
    """Return the run-length encoding of polygons, or of an encoding of either kind; None if there is no outline."""
    from pycocotools import mask as coco

    if not outline:
        return None
    if isinstance(outline, Mapping):
        runs, encoded = outline["counts"], {"size": [height, width], "counts": outline["counts"]}
        if not isinstance(runs, str):
            encoded = coco.frPyObjects(encoded, height, width)
        # Of runs that fill a part, pycocotools leaves in the rest what the memory held before; what it encodes again fills all.
        whole = (
            coco.encode(coco.decode(encoded))["counts"] == runs.encode() if isinstance(runs, str) else sum(runs) == height * width
        )
        if list(outline["size"]) != [height, width] or not whole:
            raise ValueError("the runs of its mask do not add up to the image's pixels")
    else:
        # A corner far outside would cost memory by its distance.
        polygons = [np.clip(np.array(part, np.float64).reshape(-1, 2), 0, [width, height]) for part in outline]
        if any(len(polygon) < 3 or not np.isfinite(polygon).all() for polygon in polygons):
            raise ValueError("a polygon needs three corners, each of two numbers")
        encoded = coco.merge(coco.frPyObjects([polygon.ravel().tolist() for polygon in polygons], height, width))
    counts: bytes = encoded["counts"]
    return counts


def _read_voc(folder: str, max_pixels: int) -> list[Part]:
    """Read trainval and test where test has its annotations, as VOC2012's has not; else train and val.

    The folder is a year's, or holds one VOCxxxx, itself or in VOCdevkit. Difficult objects are ignored. The classes are those of a
    part's images, by name.
    """
    ways = (os.path.join(glob.escape(folder), way, "Annotations") for way in ("", "VOC*", "VOCdevkit/VOC*"))
    years = [os.path.dirname(place) for way in ways for place in glob.glob(way)]
    if len(years) != 1:
        raise DataError(f"{shown(folder)}: holds {len(years)} years of VOC; {_NEEDS}")
    folder = years[0]
    names: dict[str, list[str]] = {}
    for part in ("trainval", "train", "val", "test"):
        file = Path(folder, "ImageSets", "Main", f"{part}.txt")
        with _reading(str(file)):
            lines = file.read_text("utf-8").splitlines() if file.is_file() else []
        names[part] = [line.split()[0] for line in lines if line.strip()]
    tested = any(os.path.isfile(os.path.join(folder, "Annotations", f"{name}.xml")) for name in names["test"][:1])
    parts = ("trainval" if tested and names["trainval"] else "train", "test" if tested else "val")
    if not all(names[part] for part in parts):
        raise DataError(f"{shown(folder)}: {' or '.join(parts)} has no images; {_NEEDS}")
    read = {part: [_parse(folder, name, max_pixels) for name in names[part]] for part in parts}
    return [
        (f"{shown(folder)} ({part})", pictures, sorted({word for *_, entries in pictures for _, word, *_ in entries}))
        for part, pictures in read.items()
    ]


def _parse(folder: str, name: str, max_pixels: int) -> Picture:
    """Return an image and its objects; expat fetches no other file, and refuses entities that grow."""
    file = os.path.join(folder, "Annotations", f"{name}.xml")
    with _reading(file):
        root = ElementTree.parse(file).getroot()
        width, height = (float(root.findtext(f"size/{side}", "missing")) for side in ("width", "height"))
        picture = _picture(os.path.join(folder, "JPEGImages"), f"{name}.jpg", width, height, max_pixels)
        for element in root.iterfind("object"):
            edges = (f"bndbox/{edge}" for edge in ("xmin", "ymin", "xmax", "ymax"))
            left, top, right, bottom = (float(element.findtext(edge, "missing")) for edge in edges)
            if not (word := element.findtext("name", "").strip()):
                raise ValueError("an object has no name")
            difficult = element.findtext("difficult", "").strip() == "1"
            picture[2].append(((left - 1, top - 1, right, bottom), word, 0, difficult, None))
    return picture
