"""Images with the boxes and masks of the objects in them, from a folder in COCO's or in PASCAL VOC's layout.

VOC's annotations are read as what COCO's would say, so that all are checked alike. Masks are pycocotools' run lengths. Its own reader
and torchvision's data sets are not used: they print, open images of any size, keep crowds and difficult objects among the others, and
of VOC's layout know no classes but VOC's twenty.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
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
Part = tuple[str, str, Any]  # of a data set: its name, the folder of its images, what a file of COCO's annotations says of it

_OBJECT = np.dtype([("boxes", "f4", 4), ("labels", "i8"), ("area", "f4"), ("iscrowd", "i8"), ("masks", "O")])
_THINNEST = 0.01  # pixels below which a side is nothing: boxes of no width divide by zero in a detector
# How releases of COCO, and sets laid out like it, name their parts. Those of two releases must not be mixed: most images of
# val2014 are in train2017 too, under other names.
_COCO_PARTS = (("train2017", "val2017"), ("train2014", "val2014"), ("train", "val"))
_VOC_PARTS = (("trainval", "test"), ("train", "test"), ("train", "val"))
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
    scenes: Sequence[Scene]
    dropped: dict[str, int]  # number of objects that were left out, by the reason
    layout: str  # coco or voc
    classes: tuple[str, ...]  # names of the labels 1, 2, ...
    max_pixels: int
    masked: bool  # true if targets have masks

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, row: int) -> tuple[Tensor, Target]:
        """Return an image, uint8 [3, H, W], and its target as torchvision's detection models and COCO's evaluation want it: boxes
        fp32 [n, 4], labels int64 [n], area fp32 [n], iscrowd int64 [n] and, if `masked`, masks uint8 [n, H, W].

        DataError if the file cannot be read, or is not of the size that its annotation says.
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
        digest = hashlib.sha256(repr((self.classes, self.masked)).encode())
        for file, size, objects in self.scenes:
            digest.update(repr((os.path.basename(file), size, objects.tolist())).encode())
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
    parts = _read_coco(path) if coco else _read_voc(path)
    for title, _, content in parts:
        with _reading(title):
            content["categories"].sort(key=lambda each: (each["id"], each["name"]))
            masks = masks and any(each.get("segmentation") for each in content["annotations"])
    classes = tuple(dict.fromkeys(each["name"] for each in parts[0][2]["categories"]))
    read = ((part[0], *_scenes(part, classes, masks, max_pixels)) for part in parts)
    train, test = (Scenes(*each, "coco" if coco else "voc", classes, max_pixels, masks) for each in read)
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


@contextmanager
def _reading(file: str, place: Sequence[str] = ("it",)) -> Iterator[None]:
    """Turn whatever a file of any content raises while it is read into a DataError of one line that names the last `place`."""
    try:
        yield
    except (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, SyntaxError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:120]
        raise DataError(f"{file}: {place[-1]} cannot be read ({reason}); correct it, or take it out") from error


def _read_coco(folder: str) -> list[Part]:
    """Read the first pair of parts of which both have their annotations."""
    for names in _COCO_PARTS:
        files = [os.path.join(folder, "annotations", f"instances_{name}.json") for name in names]
        if all(map(os.path.isfile, files)):
            parts = list[Part]()
            for name, file in zip(names, files, strict=True):
                places = (os.path.join(folder, name), os.path.join(folder, "images", name))
                with _reading(shown(file)):
                    parts.append((shown(file), next(filter(os.path.isdir, places), folder), json.loads(Path(file).read_bytes())))
            return parts
    raise DataError(f"{shown(folder)}: annotations/ has not the files of both parts; {_NEEDS}")


def _read_voc(folder: str) -> list[Part]:
    """Read the first pair of parts of which both list images; VOC2012's test has no annotations, so that its train and val are taken.

    The folder is a year's, or holds one VOCxxxx, itself or in VOCdevkit. Difficult objects become crowds; a category is its own number.
    """
    ways = (os.path.join(glob.escape(folder), way, "Annotations") for way in ("", "VOC*", "VOCdevkit/VOC*"))
    years = [os.path.dirname(place) for way in ways for place in glob.glob(way)]
    if len(years) != 1:
        raise DataError(f"{shown(folder)}: holds {len(years)} years of VOC; {_NEEDS}")
    year, names = Path(years[0]), dict[str, list[str]]()
    for pair in _VOC_PARTS:
        for part in pair:
            file = year / f"ImageSets/Main/{part}.txt"
            with _reading(shown(str(file))):
                lines = file.read_text("utf-8").splitlines() if file.is_file() else []
            names[part] = [line.split()[0] for line in lines if line.strip()]
        if all(names[part] for part in pair) and (pair[1] == "val" or (year / f"Annotations/{names['test'][0]}.xml").is_file()):
            return [(f"{shown(str(year))} ({part})", str(year / "JPEGImages"), _parse(year, names[part])) for part in pair]
    raise DataError(f"{shown(folder)}: ImageSets/Main/ has not the images of both parts; {_NEEDS}")


def _parse(year: Path, names: Sequence[str]) -> dict[str, Any]:
    """Return what COCO's annotations of these images would say; expat fetches no other file, and refuses entities that grow."""
    images, annotations = list[Any](), list[Any]()
    for name in names:
        file = str(year / f"Annotations/{name}.xml")
        with _reading(shown(file)):
            root = ElementTree.parse(file).getroot()
            width, height = (float(root.findtext(f"size/{side}", "missing")) for side in ("width", "height"))
            images.append({"id": name, "file_name": f"{name}.jpg", "width": width, "height": height})
            for element in root.iterfind("object"):
                edges = (f"bndbox/{edge}" for edge in ("xmin", "ymin", "xmax", "ymax"))
                left, top, right, bottom = (float(element.findtext(edge, "missing")) for edge in edges)
                if not (word := element.findtext("name", "").strip()):
                    raise ValueError("an object has no name")
                box, crowd = (left - 1, top - 1, right - left + 1, bottom - top + 1), element.findtext("difficult", "").strip()
                annotations.append({"image_id": name, "category_id": word, "bbox": box, "iscrowd": crowd == "1"})
    categories = [{"id": word, "name": word} for word in {each["category_id"] for each in annotations}]
    return {"images": images, "annotations": annotations, "categories": categories}


def _scenes(part: Part, classes: Sequence[str], masked: bool, max_pixels: int) -> tuple[list[Scene], dict[str, int]]:
    """Return the images of a part, and how many objects were left out: those without extent, once cut at the image's edges, and those
    without a mask if `masked`."""
    (title, folder, content), place, labels = part, ["it"], {name: label for label, name in enumerate(classes, 1)}
    images, rows = dict[Any, tuple[str, Size]](), defaultdict[Any, list[Any]](list)
    scenes, dropped = list[Scene](), Counter[str]()
    with _reading(title, place):
        names = {each["id"]: each["name"] for each in content["categories"]}
        for number, each in enumerate(content["images"]):
            place[0] = f"image {number}"
            name, width, height = each["file_name"], each["width"], each["height"]
            path = os.path.normpath(os.path.join(folder, name))
            # Annotations can make nobody read what lies elsewhere, nor outlines take any memory.
            if not path.startswith(os.path.join(os.path.normpath(folder), "")):
                raise ValueError(f"{shown(name)} lies outside of the image folder")
            if min(width, height) < 1 or width * height > max_pixels or width % 1 or height % 1:
                raise ValueError(f"{shown(name)} is of {width:g} x {height:g} pixels, loader.max_pixels is {max_pixels}")
            if images.setdefault(each["id"], (path, (int(height), int(width))))[0] is not path:
                raise ValueError(f"id {each['id']} occurs twice")
        for number, each in enumerate(content["annotations"]):
            place[0] = f"annotation {number}"
            (_, size), (left, top, width, height) = images[each["image_id"]], map(float, each["bbox"])
            if (name := names[each["category_id"]]) not in labels:
                raise ValueError(f"training has no class {shown(name)}, give both the same")
            mask = _mask(each["segmentation"], *size) if masked and each.get("segmentation") else None
            box, area = (left, top, left + width, top + height), float(each.get("area") or 0)
            rows[each["image_id"]].append((box, labels[name], area, bool(each.get("iscrowd")), mask))
    for id, (path, size) in images.items():
        with np.errstate(invalid="ignore", over="ignore"):  # NaN stays NaN, and is left out below
            objects = np.array(rows[id], _OBJECT)
        edges = np.clip(objects["boxes"].astype(np.float64), 0, [*size[::-1]] * 2)
        sides = edges[:, 2:] - edges[:, :2]
        known = (objects["area"] > 0) & np.isfinite(objects["area"])
        objects["boxes"], objects["area"] = edges, np.where(known, objects["area"], sides.prod(axis=1))
        solid, outlined = (sides >= _THINNEST).all(axis=1), objects["masks"].astype(bool) | (not masked)
        scenes.append(Scene(path, size, objects[solid & outlined]))
        dropped.update({"without extent": int((~solid).sum()), "without a mask": int((solid & ~outlined).sum())})
    return scenes, dict(+dropped)


def _mask(outline: Any, height: int, width: int) -> bytes:
    """Return the run-length encoding of polygons, or of an encoding of either kind; ValueError if they are none of the image."""
    from pycocotools import mask as coco

    if isinstance(outline, dict):
        runs, encoded = outline["counts"], {"size": [height, width], "counts": outline["counts"]}
        # Of runs that fill a part, pycocotools leaves in the rest what the memory held before; what it encodes again fills all.
        if isinstance(runs, str):
            whole = coco.encode(coco.decode(encoded))["counts"] == runs.encode()
        else:
            encoded, whole = coco.frPyObjects(encoded, height, width), sum(runs) == height * width
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
