"""Detection: boxes as they were drawn, the backbone's own maps, training and figures by hand, and faults in one line."""

import copy
import importlib.util
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

from evaluate import CATEGORIES, draw, write_coco
from relssl.data.boxes import Scenes, load
from relssl.data.plain import PlainView, Reader
from relssl.engine import Engine
from relssl.errors import ConfigError, DataError, NumericError
from relssl.evaluation.detection import (
    Pyramid,
    create_detector,
    detection,
    freeze,
    measure,
    mirror,
    pyramid_levels,
    rate_share,
    train,
)
from relssl.evaluation.metrics import Bootstrap
from relssl.evaluation.result import Task
from relssl.method.backbones import create_backbone
from relssl.settings.evaluation import DetectionConfig
from relssl.weights.spec import BackboneSpec

SIDE = 64
NAME = "test_resnet"  # timm's smallest
SMALL = DetectionConfig(min_size=32, max_size=32, regions=16, batch_size=2, lr=0.01, frozen_stages=0, norm="train", epochs=1)
VIEW = PlainView(224, 256 / 224, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SPEC = BackboneSpec(NAME, {}, "standard", VIEW)
TASK = Task(SPEC, Reader(VIEW), Engine.local("cpu", "fp32"), Bootstrap(100))

Change = Callable[[Any], Any]


def read(folder: Path, masks: bool = True, max_pixels: int = 1 << 24) -> tuple[Scenes, Scenes]:
    return load(str(folder), masks=masks, max_pixels=max_pixels)


def run(folder: Path, backbone: nn.Module | None = None, task: Task = TASK, **settings: Any) -> list[Any]:
    return detection(backbone or create_backbone(NAME), str(folder), replace(SMALL, **settings), task)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_coco(tmp_path / "set", train=3, test=2, side=SIDE, seed=4)
    return tmp_path / "set"


@pytest.fixture
def voc(folder: Path) -> Path:
    """The same images and boxes in VOC's layout."""
    generator, root = np.random.Generator(np.random.PCG64(4)), folder.parent / "VOCdevkit" / "VOC2007"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    for part, source, count in (("trainval", "train", 3), ("test", "val", 2)):
        (root / "ImageSets" / "Main" / f"{part}.txt").write_text("".join(f"{part}_{number}  1\n" for number in range(count)))
        for number in range(count):
            Image.open(folder / source / f"{number:04}.png").save(root / "JPEGImages" / f"{part}_{number}.jpg", quality=95)
            items = ""
            for category, _, (left, top, right, bottom) in draw(generator, SIDE)[1]:
                box = f"<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
                items += f"<object><name>{CATEGORIES[category]}</name><difficult>0</difficult><bndbox>{box}</bndbox></object>"
            size = f"<size><width>{SIDE}</width><height>{SIDE}</height><depth>3</depth></size>"
            (root / "Annotations" / f"{part}_{number}.xml").write_text(f"<annotation>{size}{items}</annotation>")
    return root


def edit(folder: Path, part: str, change: Change) -> None:
    file = folder / "annotations" / f"instances_{part}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def first(**values: Any) -> Change:
    return lambda content: content["annotations"][0].update(values)


def test_boxes_masks_and_labels_are_those_that_were_drawn(folder: Path) -> None:
    generator = np.random.Generator(np.random.PCG64(4))
    drawn, (split, _) = [draw(generator, SIDE) for _ in range(3)], read(folder)
    assert split.classes == ("disc", "square", "triangle")
    for (image, objects), (pixels, target) in zip(drawn, split, strict=True):
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image))
        assert target["boxes"].tolist() == [list(map(float, shape.edges)) for shape in objects]
        assert [split.classes[label - 1] for label in target["labels"]] == [CATEGORIES[shape.category] for shape in objects]
        for mask, shape in zip(target["masks"].numpy(), objects, strict=True):
            filled = Image.new("L", (SIDE, SIDE))
            ImageDraw.Draw(filled).polygon([(float(x), float(y)) for x, y in shape.corners], fill=1)
            # Pillow fills the pixels on the outline, COCO about half of them.
            edge = np.abs(np.diff(shape.corners, axis=0, append=shape.corners[:1])).max(axis=1).sum()
            assert np.abs(np.asarray(filled).astype(int) - mask).sum() <= edge


@pytest.mark.parametrize("kind", ["runs", "text"])
def test_run_length_masks_equal_polygons(folder: Path, kind: str) -> None:
    from pycocotools import mask as coco

    plain, _ = read(folder)

    def encode(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            encoded = coco.merge(coco.frPyObjects(annotation["segmentation"], SIDE, SIDE))
            flat = coco.decode(encoded).ravel(order="F")
            changes = np.flatnonzero(np.diff(flat, prepend=0, append=2)).tolist()  # COCO's runs begin with the background
            counts = np.diff([0, *changes]).tolist() if kind == "runs" else encoded["counts"].decode()
            annotation["segmentation"] = {"size": [SIDE, SIDE], "counts": counts}

    edit(folder, "train", encode)
    coded, _ = read(folder)
    assert all(torch.equal(plain[row][1]["masks"], coded[row][1]["masks"]) for row in range(len(plain)))


@pytest.mark.parametrize("up", [0, 1, 2])
def test_voc_equals_coco(folder: Path, voc: Path, up: int) -> None:
    for one, other in zip(read(folder, masks=False), read([voc, *voc.parents][up]), strict=True):
        assert one.classes == other.classes and not other.masked
        for (pixels, target), (same_pixels, same) in zip(one, other, strict=True):
            assert pixels.shape == same_pixels.shape
            assert torch.equal(target["boxes"], same["boxes"]) and torch.equal(target["labels"], same["labels"])


def test_categories_that_only_training_has_leave_the_others_their_labels(folder: Path) -> None:
    whole = [target["labels"].tolist() for _, target in read(folder)[1]]
    edit(folder, "val", lambda c: c.update(annotations=[each for each in c["annotations"] if each["category_id"] != 3]))
    edit(folder, "val", lambda c: c.update(categories=[each for each in c["categories"] if each["id"] != 3]))
    assert [target["labels"].tolist() for _, target in read(folder)[1]] == [[one for one in each if one != 1] for each in whole]


def test_difficult_and_crowded_objects_are_ignored_not_learned(folder: Path, voc: Path) -> None:
    file = voc / "Annotations" / "trainval_0.xml"
    file.write_text(file.read_text().replace("<difficult>0", "<difficult>1", 1))
    edit(folder, "train", first(iscrowd=1))
    for split, _ in (read(folder), read(voc)):
        assert split[0][1]["iscrowd"].tolist()[0] == 1
        assert split.for_training().objects() == split.objects() == sum(len(scene.objects) for scene in split.scenes) - 1


def test_unusable_objects_are_left_out_and_counted_and_others_cut_at_the_edges(folder: Path) -> None:
    bad = ([5, 5, 0, 9], [5, 5, 9, -1], [SIDE, 3, 9, 9], [float("nan"), 3, 9, 9], [5, 5, 0.001, 9])

    def change(content: dict[str, Any]) -> None:
        content["annotations"] = [{**content["annotations"][0], "bbox": list(box)} for box in (*bad, [-7, 50, 30, 1e30])]
        content["annotations"].append({**content["annotations"][-1], "segmentation": []})

    edit(folder, "train", change)
    split, _ = read(folder)
    assert split.dropped == {"without extent": len(bad), "without a mask": 1} and split.masked
    assert split[0][1]["boxes"].tolist() == [[0, 50, 23, SIDE]]
    assert len(split) == 3 and split[1][1]["boxes"].shape == (0, 4)  # images without boxes stay
    assert len(split.for_training()) == 1
    edit(folder, "val", lambda content: [annotation.pop("segmentation") for annotation in content["annotations"]])
    assert not any(each.masked for each in read(folder))


def runs(counts: Any) -> Change:
    return first(segmentation={"size": [SIDE, SIDE], "counts": counts})


@pytest.mark.parametrize(
    ("part", "change", "where"),
    [
        ("train", lambda c: c.update(annotations=[]), "train.json"),
        ("train", lambda c: c.pop("categories"), "train.json"),
        ("train", lambda c: c["categories"][0].pop("name"), "train.json"),
        ("train", first(image_id=99), "annotation 0"),
        ("train", lambda c: c["annotations"][1].pop("bbox"), "annotation 1"),
        ("train", first(segmentation=[[1, 2, 3, 4]]), "annotation 0"),
        *(("train", runs(counts), "annotation 0") for counts in ([1, 2], "00000", "\n")),
        ("train", first(bbox=[10**400, 0, 5, 5]), "annotation 0"),
        ("train", lambda c: c["images"][0].update(width=10**9, height=10**9), "image 0"),
        ("train", lambda c: c["images"][1].update(file_name="gone.png"), "gone.png"),
        ("train", lambda c: c["images"][1].update(id=10), "image 1"),
        *(
            ("val", lambda c, name=name: c["images"][1].update(file_name=name), "0000.png")
            for name in ("./0000.png", "../train/0000.png")
        ),
        ("val", lambda c: c["images"][1].update(file_name="/etc/hostname"), "hostname"),
        ("val", lambda c: c["categories"][0].update(name="dog"), "dog"),
    ],
)
def test_faults_of_coco_annotations_are_named_in_one_line(folder: Path, part: str, change: Change, where: str) -> None:
    edit(folder, part, change)
    with pytest.raises(DataError) as raised:
        read(folder)
    assert where in str(raised.value) and "\n" not in str(raised.value)


GROWING = '<!ENTITY b "bb"><!ENTITY c "&b;&b;&b;"><!ENTITY d "' + "&c;" * 2**16 + '">'


@pytest.mark.parametrize(
    "text",
    [
        f"<!DOCTYPE a [{GROWING}]><annotation>&d;&d;&d;</annotation>",
        '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/hostname">]><annotation>&b;</annotation>',
        "<annotation>",
        "<annotation></annotation>",
        "<annotation><size><width>nan</width><height>64</height></size></annotation>",
    ],
)
def test_faults_of_voc_annotations_are_named_in_one_line(voc: Path, text: str) -> None:
    (voc / "Annotations" / "trainval_1.xml").write_text(text)
    with pytest.raises(DataError, match=r"^[^\n]*trainval_1\.(xml|jpg)[^\n]*$"):
        read(voc)


def test_parts_that_are_missing_mixed_or_overlap_are_refused(folder: Path, voc: Path, tmp_path: Path) -> None:
    for place in (folder, voc):
        with pytest.raises(DataError, match=r"loader\.max_pixels"):  # before anything is trained
            read(place, max_pixels=SIDE * SIDE - 1)
    lists = voc / "ImageSets" / "Main"
    for name, text, fault in (
        ("test", "trainval_1\ntest_0", "more than once"),
        ("trainval", "../Annotations/trainval_0", "outside"),
    ):
        (lists / f"{name}.txt").write_text(text)
        with pytest.raises(DataError, match=fault):
            read(voc)
    (lists / "test.txt").unlink()
    for old, new in (("train", "train2017"), ("val", "val2014")):  # most of val2014 is in train2017, under other names
        (folder / old).rename(folder / new)
        (folder / "annotations" / f"instances_{old}.json").rename(folder / "annotations" / f"instances_{new}.json")
    (tmp_path / "empty").mkdir()
    for place in (folder, voc, tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(DataError):
            read(place)


def test_the_fingerprint_is_that_of_the_annotations_not_of_the_place(folder: Path) -> None:
    known = [split.fingerprint() for split in read(folder)]
    moved = folder.rename(folder.parent / "elsewhere")
    assert [split.fingerprint() for split in read(moved)] == known
    edit(moved, "train", first(area=1.0))
    edit(moved, "val", lambda content: content["images"].reverse())
    assert not {split.fingerprint() for split in read(moved)} & set(known)


@pytest.mark.parametrize(
    ("name", "stem", "strides"),
    [
        (NAME, "standard", [4, 8, 16, 32]),
        ("resnet18", "small", [2, 4, 8]),
        ("mobilenetv3_small_050", "standard", [4, 8, 16, 32]),
        ("convnext_atto", "standard", [4, 8, 16, 32]),
    ],
)
def test_the_maps_are_the_backbones_own(name: str, stem: str, strides: list[int]) -> None:
    backbone: Any = create_backbone(name, stem).eval()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):  # as if it had been trained
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    levels, network, images = pyramid_levels(backbone, name), copy.deepcopy(backbone), torch.rand(2, 3, SIDE, SIDE)
    freeze(network, name, 0, all_norms=True)
    pyramid = Pyramid(network, levels, lambda: torch.autocast("cpu", torch.bfloat16))
    with torch.no_grad():
        final, rough = backbone.forward_features(images), pyramid(images)
        maps = pyramid.network.forward_intermediates(images, indices=pyramid.indices, intermediates_only=True)
        pyramid.autocast = nullcontext
        exact = pyramid(images)
    assert [stride for _, _, stride in levels] == [SIDE // each.shape[-1] for each in maps] == strides
    torch.testing.assert_close(maps[-1], final, rtol=1e-4, atol=1e-5)
    for level, values in exact.items():  # bf16 is for the networks; maps leave in fp32
        error = (rough[level] - values).abs().max() / values.abs().max()
        assert rough[level].dtype == torch.float32 and 1e-5 < error < 0.1


@pytest.mark.parametrize("arguments", [{}, {"dynamic_img_size": True, "depth": 2}])  # the second of any size, and of one stride
def test_networks_without_a_pyramid_are_refused_by_name(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="vit_tiny_patch16_224"):
        pyramid_levels(create_backbone("vit_tiny_patch16_224", args=arguments), "vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        (NAME, ("conv1.", "bn1.", "layer1.")),
        ("mobilenetv3_small_050", ("conv_stem.", "bn1.", "blocks.0.")),
        ("convnext_atto", ("stem.", "stages.0.")),
    ],
)
@pytest.mark.parametrize("norm", ["frozen", "train"])
def test_the_first_stages_are_fixed(name: str, frozen: tuple[str, ...], norm: str) -> None:
    network = create_backbone(name)
    freeze(network, name, 2, all_norms=norm == "frozen")
    for path, parameter in network.named_parameters():
        assert parameter.requires_grad != path.startswith(frozen), path
    for path, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert norm == "train" and not f"{path}.".startswith(frozen)


def test_learning_rate_rises_and_falls_in_tenths() -> None:
    assert [rate_share(step, 120, 10) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])
    falls = [rate_share(step, 120, 10) for step in (10, 79, 80, 109, 110, 119)]
    assert falls == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_mirrored_boxes_move_with_their_pixels(folder: Path) -> None:
    image, target = read(folder)[0][0]
    mirrored, moved = mirror(image, target)
    for (left, top, right, bottom), (l2, t2, r2, b2) in zip(target["boxes"].int(), moved["boxes"].int(), strict=True):
        assert torch.equal(image[:, top:bottom, left:right].flip(-1), mirrored[:, t2:b2, l2:r2])
    again, back = mirror(mirrored, moved)
    assert torch.equal(again, image) and all(torch.equal(back[name], target[name]) for name in target)


class Answers(nn.Module):
    """The truth as answers, one an image, boxes cut to a share of their width, the first object perhaps left out."""

    def __init__(self, split: Scenes, *, shrink: float = 1.0, skip: int = 0) -> None:
        super().__init__()
        self.targets, self.shrink, self.skip = iter([target for _, target in split]), shrink, skip

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        target = {name: value[self.skip :] for name, value in next(self.targets).items()}
        self.skip, boxes = 0, target["boxes"].clone()
        boxes[:, 2] = boxes[:, 0] + self.shrink * (boxes[:, 2] - boxes[:, 0])
        masks = target["masks"][:, None].float()
        return [{"boxes": boxes, "labels": target["labels"], "scores": torch.ones(len(boxes)), "masks": masks}]


def test_figures_by_hand(folder: Path) -> None:
    _, test = read(folder)
    for figures, per_class in measure(Answers(test), test, TASK).values():
        assert figures["map"] == figures["map_50"] == figures["map_75"] == pytest.approx(100)
        assert "map_large" not in figures  # there are none
        assert set(per_class.values()) == {100.0} and set(per_class) <= set(test.classes)
    # Boxes of 0.72 of the width overlap by 0.72: right at 0.50, 0.55, ..., 0.70, five of ten thresholds.
    narrow = measure(Answers(test, shrink=0.72), test, TASK)
    assert narrow["boxes"][0]["map"] == pytest.approx(50) and narrow["boxes"][0]["map_75"] == 0
    assert narrow["masks"][0]["map"] == pytest.approx(100)
    edit(folder, "val", first(iscrowd=1))  # crowds are neither hit nor missed
    _, test = read(folder)
    for skip in (0, 1):
        assert measure(Answers(test, skip=skip), test, TASK)["boxes"][0]["map"] == pytest.approx(100)


@pytest.mark.torture
def test_detection_learns_and_repeats(tmp_path: Path) -> None:
    """Four images learned by heart: the second part holds them again, under other names."""
    folder, lines = tmp_path / "set", list[str]()
    write_coco(folder, train=4, test=1, side=SIDE)
    for image in (folder / "train").iterdir():
        (folder / "val" / image.name).write_bytes(image.read_bytes())
    annotations = folder / "annotations"
    (annotations / "instances_val.json").write_bytes((annotations / "instances_train.json").read_bytes())
    backbone, state = create_backbone(NAME).eval(), torch.get_rng_state()
    (untrained,), (again,) = (run(folder, backbone, model="faster-rcnn") for _ in range(2))
    (learned,) = run(folder, backbone, replace(TASK, say=lines.append), model="faster-rcnn", epochs=6.0)
    assert torch.equal(torch.get_rng_state(), state)  # draws from nobody else's
    assert again.details["loss"] == untrained.details["loss"] and again.figures == untrained.figures
    assert learned.main == "map" and learned.figures["map_50"] > untrained.figures["map_50"] + 5
    points = learned.details["loss"]
    assert points[-1][0] == learned.details["steps"] == 12 and points[-1][1] < 0.9 * points[0][1]
    assert learned.details["images"] == {"training": 4, "without_objects": 0, "test": 4} and len(lines) >= 12


def test_mask_rcnn_has_figures_of_boxes_and_masks_and_voc_its_customary_one(folder: Path, voc: Path) -> None:
    findings = run(folder, max_images=2)
    assert [each.setting for each in findings] == [{"model": "mask-rcnn", "of": "boxes"}, {"model": "mask-rcnn", "of": "masks"}]
    assert all(np.isfinite(each.figures["map"]) for each in findings) and findings[0].details["images"]["training"] == 2
    json.dumps(findings[0].plain())
    (finding,) = run(voc, epochs=0.1)
    assert finding.main == "map_50" and (finding.details["steps"], finding.details["warmup_steps"]) == (1, 0)  # a third at most
    with pytest.raises(ConfigError, match=r"detection\.model"):
        run(voc, model="mask-rcnn")


def test_workers_change_nothing_and_images_that_do_not_fit_are_named_through_them(folder: Path) -> None:
    split, _ = read(folder, masks=False)

    def losses(workers: int) -> list[float]:
        torch.manual_seed(0)
        model = create_detector(create_backbone(NAME), SPEC, SMALL, 3, masks=False, autocast=nullcontext)
        return list(train(model, split, SMALL, replace(TASK, reader=Reader(VIEW, workers)), 2, 0))

    assert losses(0) == losses(1)
    Image.new("RGB", (SIDE, SIDE + 1)).save(folder / "train" / "0001.png")
    (folder / "train" / "0002.png").write_bytes(b"no image")
    for row in (1, 2):
        with pytest.raises(DataError, match=f"000{row}.png"):
            split[row]
    with pytest.raises(DataError, match=r"^[^\n]*png[^\n]*$"):
        losses(1)


def test_a_loss_that_is_not_finite_ends_it_with_the_setting_named(folder: Path) -> None:
    with pytest.raises(NumericError, match=r"detection\.lr"):
        run(folder, epochs=4.0, lr=1e9, warmup_steps=0, model="faster-rcnn")


def test_what_cannot_work_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for setting, more in (("min_size", {"min_size": 64}), ("norm", {"norm": "train", "batch_size": 1})):
        with pytest.raises(ConfigError, match=rf"detection\.{setting}"):
            run(tmp_path, **more)
    spec_of = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pycocotools" else spec_of(name))
    with pytest.raises(ConfigError, match=r"pip install 'relssl\[detection\]'"):
        run(tmp_path)
