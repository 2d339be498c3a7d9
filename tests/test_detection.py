from __future__ import annotations

import copy
import importlib.util
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

import shapes
from relssl.data.boxes import Scenes, load
from relssl.data.plain import PlainView, Reader
from relssl.engine import Engine
from relssl.errors import ConfigError, DataError, NumericError
from relssl.evaluation.detection import (
    Plan,
    Pyramid,
    create_detector,
    curve,
    detection,
    flipped,
    freeze,
    measure,
    pyramid_levels,
    train,
)
from relssl.method.backbones import create_backbone
from relssl.settings.evaluation import DetectionConfig
from relssl.settings.run import EngineConfig
from relssl.weights.spec import BackboneSpec

SIDE = 64
MANY = 1 << 24
NAME = "test_resnet"  # timm's smallest
SMALL = DetectionConfig(min_size=SIDE, max_size=SIDE, regions=16, batch_size=4, lr=0.01, frozen_stages=0, norm="train")


VIEW = PlainView(224, 256 / 224, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def spec(name: str = NAME) -> BackboneSpec:
    return BackboneSpec(name, {}, "standard", VIEW)


def engine() -> Engine:
    return Engine(EngineConfig(device="cpu", precision="fp32", threads=1))


def trained_looking(backbone: nn.Module) -> nn.Module:
    """In eval mode, its batch norm told from a fresh one."""
    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.1, 0.1)
    return backbone.eval()


def detector(settings: DetectionConfig = SMALL) -> tuple[Any, nn.Module]:
    backbone = trained_looking(create_backbone(NAME))
    return create_detector(backbone, spec(), settings, 3, masks=False, autocast=nullcontext), backbone


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shapes.write_coco(tmp_path / "set", train=3, test=2, side=SIDE, seed=1)
    return tmp_path / "set"


def edit(folder: Path, part: str, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "annotations" / f"instances_{part}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# Reading


def test_boxes_masks_and_labels_are_those_that_were_drawn(folder: Path) -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    drawn = [shapes.draw(generator, SIDE) for _ in range(3)]
    train, _ = load(str(folder), masks=True, max_pixels=MANY)
    assert train.classes == ("disc", "square", "triangle") and train.ids == (3, 7, 12)
    for (image, objects), (pixels, target) in zip(drawn, train, strict=True):
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image))
        assert target["boxes"].tolist() == [list(map(float, shape.edges)) for shape in objects]
        assert [train.ids[label - 1] for label in target["labels"]] == [shape.category for shape in objects]
        assert target["masks"].shape == (len(objects), SIDE, SIDE) and target["masks"].dtype == torch.uint8
        for mask, shape in zip(target["masks"].numpy(), objects, strict=True):
            filled = Image.new("L", (SIDE, SIDE))
            ImageDraw.Draw(filled).polygon([(float(x), float(y)) for x, y in shape.corners], fill=1)
            # Pillow fills the pixels on the outline, COCO about half of them.
            edge = np.abs(np.diff(shape.corners, axis=0, append=shape.corners[:1])).max(axis=1).sum()
            assert np.abs(np.asarray(filled).astype(int) - mask).sum() <= edge


@pytest.mark.parametrize("kind", ["runs", "text"])
def test_run_length_masks_equal_polygons(folder: Path, kind: str) -> None:
    from pycocotools import mask as coco

    plain, _ = load(str(folder), masks=True, max_pixels=MANY)

    def encode(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            encoded = coco.merge(coco.frPyObjects(annotation["segmentation"], SIDE, SIDE))
            flat = coco.decode(encoded).ravel(order="F")
            changes = np.flatnonzero(np.diff(flat, prepend=0, append=2)).tolist()  # COCO's runs begin with the background
            runs = np.diff([0, *changes]).tolist()
            counts = runs if kind == "runs" else encoded["counts"].decode()
            annotation["segmentation"] = {"size": [SIDE, SIDE], "counts": counts}

    edit(folder, "train", encode)
    coded, _ = load(str(folder), masks=True, max_pixels=MANY)
    for row in range(len(plain)):
        assert torch.equal(plain[row][1]["masks"], coded[row][1]["masks"])


def write_voc(folder: Path, parts: dict[str, list[list[shapes.Shape]]], source: Path) -> None:
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for part, scenes in parts.items():
        names = [f"{part}_{number}" for number in range(len(scenes))]
        (folder / "ImageSets" / "Main" / f"{part}.txt").write_text("".join(f"{name}  1\n" for name in names))
        for number, (name, objects) in enumerate(zip(names, scenes, strict=True)):
            Image.open(source / {"trainval": "train", "test": "val"}[part] / f"{number:04}.png").save(
                folder / "JPEGImages" / f"{name}.jpg", quality=95
            )
            items = ""
            for shape in objects:
                left, top, right, bottom = shape.edges
                box = f"<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
                items += f"<object><name>{shapes.CATEGORIES[shape.category]}</name><difficult>0</difficult><bndbox>{box}</bndbox></object>"
            size = f"<size><width>{SIDE}</width><height>{SIDE}</height><depth>3</depth></size>"
            (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{items}</annotation>")


@pytest.fixture
def voc(folder: Path) -> Path:
    generator = np.random.Generator(np.random.PCG64(1))
    train, test = ([shapes.draw(generator, SIDE)[1] for _ in range(count)] for count in (3, 2))
    write_voc(folder.parent / "VOCdevkit" / "VOC2007", {"trainval": train, "test": test}, folder)
    return folder.parent / "VOCdevkit" / "VOC2007"


@pytest.mark.parametrize("up", [0, 1, 2])
def test_voc_equals_coco(folder: Path, voc: Path, up: int) -> None:
    of_coco = load(str(folder), masks=False, max_pixels=MANY)
    of_voc = load(str([voc, *voc.parents][up]), masks=True, max_pixels=MANY)
    for one, other in zip(of_coco, of_voc, strict=True):
        assert one.classes == other.classes and not other.masked
        for (pixels, target), (read, same) in zip(one, other, strict=True):
            assert pixels.shape == read.shape
            assert torch.equal(target["boxes"], same["boxes"]) and torch.equal(target["labels"], same["labels"])


def test_difficult_and_crowded_objects_are_ignored_not_learned(folder: Path, voc: Path) -> None:
    file = voc / "Annotations" / "trainval_0.xml"
    file.write_text(file.read_text().replace("<difficult>0", "<difficult>1", 1))
    edit(folder, "train", lambda content: content["annotations"][0].update(iscrowd=1))
    for place in (folder, voc):
        train, _ = load(str(place), masks=False, max_pixels=MANY)
        assert train[0][1]["iscrowd"].tolist()[0] == 1
        assert train.for_training().objects() == train.objects() == sum(len(scene.labels) for scene in train.scenes) - 1
        assert all(scene.labels.size and not scene.ignored.any() for scene in train.for_training().scenes)


def test_boxes_without_extent_are_dropped_and_counted_and_others_cut_at_the_edges(folder: Path) -> None:
    bad = ([5, 5, 0, 9], [5, 5, 9, -1], [SIDE, 3, 9, 9], [float("nan"), 3, 9, 9], [5, 5, 0.001, 9])

    def change(content: dict[str, Any]) -> None:
        first, *_ = content["annotations"]
        content["annotations"] = [{**first, "bbox": list(box)} for box in (*bad, [-7, 50, 30, 1e30])]

    edit(folder, "train", change)
    train, _ = load(str(folder), masks=False, max_pixels=MANY)
    assert train.dropped == {"without extent": len(bad)}
    assert train[0][1]["boxes"].tolist() == [[0, 50, 23, SIDE]]
    assert len(train) == 3 and train[1][1]["boxes"].shape == (0, 4)  # images without boxes stay
    assert len(train.for_training()) == 1


def test_objects_without_a_mask_are_dropped_and_counted_where_masks_are_learned(folder: Path) -> None:
    edit(folder, "train", lambda content: content["annotations"][0].update(segmentation=[]))
    train, test = load(str(folder), masks=True, max_pixels=MANY)
    assert train.dropped == {"without a mask": 1} and train.masked and test.masked
    edit(folder, "val", lambda content: [annotation.pop("segmentation") for annotation in content["annotations"]])
    train, test = load(str(folder), masks=True, max_pixels=MANY)
    assert train.dropped == {} and not train.masked and not test.masked


def first(content: dict[str, Any], **values: Any) -> None:
    content["annotations"][0].update(values)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("train", lambda c: c.update(images=[], annotations=[]), "train.json: has no images"),
        ("train", lambda c: c.update(annotations=[]), "has no box that counts on any of its 3 images"),
        ("train", lambda c: c.pop("categories"), "has no list 'categories'"),
        ("train", lambda c: first(c, image_id=99), "annotation 0 is malformed (image_id 99 is not in the file)"),
        ("train", lambda c: first(c, category_id=99), "category_id 99 is not in the file"),
        ("train", lambda c: c["annotations"][0].pop("bbox"), "annotation 0 has no 'bbox'"),
        ("train", lambda c: first(c, bbox=[1, 2]), "annotation 0 is malformed"),
        ("train", lambda c: first(c, segmentation=[[1, 2, 3]]), "annotation 0 is malformed"),
        ("train", lambda c: first(c, segmentation=[[1, 2, 3, 4]]), "a polygon needs three corners"),
        ("train", lambda c: first(c, segmentation={"size": [SIDE, SIDE], "counts": [1, 2]}), "do not add up"),
        ("train", lambda c: first(c, segmentation={"size": [9999, 1], "counts": "abc"}), "its mask is of size [9999, 1]"),
        ("train", lambda c: first(c, segmentation={"size": [SIDE, SIDE], "counts": "abc"}), "is no run-length encoding"),
        ("train", lambda c: first(c, segmentation={"size": [SIDE, SIDE], "counts": "00000"}), "do not add up"),
        ("train", lambda c: first(c, segmentation={"size": [SIDE, SIDE], "counts": "\n"}), "is no run-length encoding"),
        ("train", lambda c: first(c, bbox=[10**400, 0, 5, 5]), "annotation 0 is malformed"),
        ("train", lambda c: first(c, iscrowd="0"), "iscrowd is '0', not 0 or 1"),
        ("train", lambda c: first(c, segmentation=[[0, 0, SIDE, SIDE] * 20]), "a polygon is longer than an image of 64 x 64"),
        ("train", lambda c: c["images"][0].update(width=10**9, height=10**9), "0000.png: its annotation says 1000000000 x"),
        ("train", lambda c: c["images"][1].update(file_name=""), "must be a path below"),
        ("train", lambda c: c["images"][1].update(file_name="gone.png"), "1 of its 3 images are not in"),
        ("train", lambda c: c["images"][1].update(file_name="../val/0000.png"), "must be a path below"),
        ("train", lambda c: c["images"][1].update(id=10), "id 10 occurs twice"),
        ("train", lambda c: c["images"][1].update(width="64"), "'64' is not a whole number"),
        ("val", lambda c: c["categories"][0].update(name="cat"), "category 7 is cat, in"),
        ("val", lambda c: c["categories"].append({"id": 8, "name": "dog"}), "category 8 is dog, in"),
    ],
)
def test_malformed_annotations_are_named_in_one_line(
    folder: Path, part: str, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit(folder, part, change)
    with pytest.raises(DataError) as raised:
        load(str(folder), masks=True, max_pixels=MANY)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_missing_parts_are_named(folder: Path, voc: Path, tmp_path: Path) -> None:
    (folder / "annotations" / "instances_val.json").rename(folder / "annotations" / "instances_test.json")
    with pytest.raises(DataError, match=r"or train and val; has instances_test.json, instances_train.json$"):
        load(str(folder), masks=False, max_pixels=MANY)
    (voc / "ImageSets" / "Main" / "test.txt").unlink()
    with pytest.raises(DataError, match=r"ImageSets/Main needs trainval.txt and test.txt.*and has trainval.txt"):
        load(str(voc), masks=False, max_pixels=MANY)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no boxes"):
        load(str(tmp_path / "empty"), masks=False, max_pixels=MANY)
    with pytest.raises(DataError, match="is no folder"):
        load(str(tmp_path / "nowhere"), masks=False, max_pixels=MANY)


def test_an_image_listed_twice_is_refused(folder: Path, voc: Path) -> None:
    edit(folder, "val", lambda content: content["images"][1].update(file_name="./0000.png"))
    with pytest.raises(DataError, match=r"instances_val.json: names .*/val/0000.png 2 times; list each image once"):
        load(str(folder), masks=False, max_pixels=MANY)
    with (voc / "ImageSets" / "Main" / "test.txt").open("a") as opened:
        opened.write("test_0\n")
    with pytest.raises(DataError, match=r"names .*test_0.jpg 2 times"):
        load(str(voc), masks=False, max_pixels=MANY)


def test_parts_of_two_releases_are_not_mixed(folder: Path) -> None:
    for old, new in (("train", "train2017"), ("val", "val2014")):  # most of val2014 is in train2017, under other names
        (folder / old).rename(folder / new)
        (folder / "annotations" / f"instances_{old}.json").rename(folder / "annotations" / f"instances_{new}.json")
    with pytest.raises(DataError, match=r"of train2017 and val2017, or .*; has instances_train2017.json, insta"):
        load(str(folder), masks=False, max_pixels=MANY)


def test_sizes_above_the_limit_are_refused_before_training(folder: Path, voc: Path) -> None:
    for place in (folder, voc):
        with pytest.raises(DataError, match=r"its annotation says 64 x 64 pixels, more than loader.max_pixels \(4095\)"):
            load(str(place), masks=False, max_pixels=SIDE * SIDE - 1)


def test_evaluation_on_training_images_is_refused(voc: Path) -> None:
    lists = voc / "ImageSets" / "Main"
    (lists / "test.txt").write_text("trainval_1\n" + (lists / "test.txt").read_text())
    with pytest.raises(DataError, match="1 of its 3 images are trained on as well"):
        load(str(voc), masks=False, max_pixels=MANY)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "boo">]><annotation>&b;</annotation>', "has a DOCTYPE"),
        ("<annotation>", "is no VOC annotation"),
        ("<annotation></annotation>", "size/height is missing"),
        ("<annotation><size><width>nan</width><height>64</height></size></annotation>", "size/width is nan"),
        ("<!-- " + " " * (1 << 20) + "--><annotation/>", "more than 1048576 bytes"),
    ],
)
def test_unsafe_and_broken_xml_is_refused(voc: Path, text: str, message: str) -> None:
    file = voc / "Annotations" / "trainval_1.xml"
    file.write_text(text)
    with pytest.raises(DataError, match=r"trainval_1.xml: is no VOC annotation") as raised:
        load(str(voc), masks=False, max_pixels=MANY)
    assert message in str(raised.value)
    file.write_bytes(text.encode("utf-16"))
    with pytest.raises(DataError):
        load(str(voc), masks=False, max_pixels=MANY)


def test_images_that_do_not_fit_their_boxes_are_refused(folder: Path) -> None:
    train, _ = load(str(folder), masks=False, max_pixels=MANY)
    Image.new("RGB", (SIDE, SIDE + 1)).save(folder / "train" / "0001.png")
    with pytest.raises(DataError, match=r"0001.png: has 64 x 65 pixels, .* says 64 x 64"):
        train[1]
    (folder / "train" / "0001.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0001.png: is none of"):
        train[1]


def test_the_fingerprint_is_that_of_the_annotations_not_of_the_place(folder: Path) -> None:
    def prints(place: Path) -> list[str]:
        return [split.fingerprint() for split in load(str(place), masks=True, max_pixels=MANY)]

    known = prints(folder)
    moved = folder.rename(folder.parent / "elsewhere")
    assert prints(moved) == known
    edit(moved, "train", lambda content: first(content, area=1.0))
    edit(moved, "val", lambda content: content["images"].reverse())
    assert not set(prints(moved)) & set(known)


# The detector


@pytest.mark.parametrize(
    ("name", "stem", "strides"),
    [
        ("test_resnet", "standard", [4, 8, 16, 32]),
        ("resnet18", "standard", [4, 8, 16, 32]),
        ("resnet18", "small", [2, 4, 8]),
        ("mobilenetv3_small_050", "standard", [4, 8, 16, 32]),
        ("efficientnet_b0", "standard", [4, 8, 16, 32]),
        ("convnext_atto", "standard", [4, 8, 16, 32]),
    ],
)
def test_the_maps_are_the_backbones_own(name: str, stem: str, strides: list[int]) -> None:
    backbone = trained_looking(create_backbone(name, stem))
    levels = pyramid_levels(backbone, name)
    assert [stride for _, _, stride in levels] == strides
    network = copy.deepcopy(backbone)
    freeze(network, name, 0, all_norms=True)
    images = torch.rand(2, 3, 64, 64)
    known = backbone.feature_info if isinstance(backbone.feature_info, list) else backbone.feature_info.info
    seen: list[torch.Tensor] = []
    hook = backbone.get_submodule(known[-1]["module"]).register_forward_hook(lambda module, given, made: seen.append(made))
    with torch.no_grad():
        final = backbone.forward_features(images)
        maps = Pyramid(network, levels, nullcontext).maps(images)
    hook.remove()
    assert [each.shape[-1] for each in maps] == [64 // stride for stride in strides]
    torch.testing.assert_close(maps[-1], seen[0], rtol=1e-4, atol=1e-5)
    if name != "efficientnet_b0":  # whose features pass one more convolution
        torch.testing.assert_close(maps[-1], final, rtol=1e-4, atol=1e-5)


def test_bf16_is_for_the_networks_and_maps_leave_in_fp32() -> None:
    backbone = trained_looking(create_backbone(NAME))
    pyramid = Pyramid(backbone, pyramid_levels(backbone, NAME), lambda: torch.autocast("cpu", torch.bfloat16))
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        rough = pyramid(images)
        pyramid.autocast = nullcontext
        exact = pyramid(images)
    for name, level in exact.items():
        error = (rough[name] - level).abs().max() / level.abs().max()
        assert rough[name].dtype == torch.float32 and 1e-5 < error < 0.05


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mixer_s32_224"])
def test_networks_without_a_pyramid_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} .*take a convolutional backbone"):
        pyramid_levels(create_backbone(name), name)


def test_a_transformer_of_any_size_is_refused_for_its_single_stride() -> None:
    backbone = create_backbone("vit_tiny_patch16_224", args={"dynamic_img_size": True, "depth": 2})
    with pytest.raises(ConfigError, match="all of one size"):
        pyramid_levels(backbone, "vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("name", "stages", "frozen"),
    [
        ("resnet18", 0, ()),
        ("resnet18", 1, ("conv1", "bn1")),
        ("resnet18", 2, ("conv1", "bn1", "layer1")),
        ("resnet18", 5, ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")),
        ("mobilenetv3_small_050", 2, ("conv_stem", "bn1", "blocks.0")),
        ("convnext_atto", 1, ("stem",)),
        ("convnext_atto", 2, ("stem", "stages.0")),
    ],
)
@pytest.mark.parametrize("norm", ["frozen", "train"])
def test_the_first_stages_are_frozen(name: str, stages: int, frozen: tuple[str, ...], norm: str) -> None:
    network = create_backbone(name)
    freeze(network, name, stages, all_norms=norm == "frozen")
    for path, parameter in network.named_parameters():
        assert parameter.requires_grad != any(path.startswith(f"{part}.") for part in frozen), path
    for path, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert norm == "train" and not any(f"{path}.".startswith(f"{part}.") for part in frozen)


def test_what_is_frozen_does_not_move_and_the_backbone_given_is_left_alone(folder: Path) -> None:
    model, backbone = detector(DetectionConfig(min_size=SIDE, max_size=SIDE, regions=16))
    given = {name: value.clone() for name, value in backbone.state_dict().items()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    split, _ = load(str(folder), masks=False, max_pixels=MANY)
    assert len(list(train(model, split, 0, engine(), settings=SMALL, plan=Plan(3, 2, 0), seed=0))) == 3
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    network = {name.removeprefix("backbone.network.") for name in moved if name.startswith("backbone.network.")}
    assert network and all(name.startswith(("layer2.", "layer3.", "layer4.")) and "bn" not in name for name in network)
    assert "rpn.head.cls_logits.weight" in moved and "roi_heads.box_predictor.cls_score.weight" in moved
    assert all(torch.equal(value, given[name]) for name, value in backbone.state_dict().items())


# Training and measuring


def test_learning_rate_rises_and_falls_in_tenths() -> None:
    plan = Plan.of(120, DetectionConfig(epochs=2, batch_size=2, warmup_steps=10))
    assert plan == Plan(120, 2, 10)
    rises = [plan.factor(step) for step in range(10)]
    assert rises == pytest.approx([(step + 1) / 10 for step in range(10)])
    falls = [plan.factor(step) for step in (10, 79, 80, 109, 110, 119)]
    assert falls == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert Plan.of(1, DetectionConfig(epochs=0.1)).steps == 1
    assert Plan.of(8, DetectionConfig()).warmup == 16  # of 48 steps


def test_flips_are_their_own_inverse_and_move_boxes_with_their_pixels(folder: Path) -> None:
    train, _ = load(str(folder), masks=True, max_pixels=MANY)
    image, target = train[0]
    mirrored, moved = flipped(image, target)
    for (left, top, right, bottom), (l2, t2, r2, b2) in zip(target["boxes"].int(), moved["boxes"].int(), strict=True):
        assert torch.equal(image[:, top:bottom, left:right].flip(-1), mirrored[:, t2:b2, l2:r2])
    again, back = flipped(mirrored, moved)
    assert torch.equal(again, image) and all(torch.equal(back[name], target[name]) for name in target)


def test_the_curve_averages_all_steps() -> None:
    losses = np.random.default_rng(0).random(257).tolist()
    points = curve(losses)
    assert len(points) == 100 and points[-1][0] == 257
    lengths = np.diff([0, *[step for step, _ in points]])
    assert float(lengths @ [value for _, value in points]) == pytest.approx(sum(losses), abs=1e-3)
    assert curve([2.0, 4.0]) == [[1, 2.0], [2, 4.0]]


class Answers(nn.Module):
    """Gives prepared answers, one an image."""

    def __init__(self, answers: list[dict[str, torch.Tensor]]) -> None:
        super().__init__()
        self.answers = iter(answers)

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return [next(self.answers)]


def told(split: Scenes, *, shrink: float = 1.0) -> list[dict[str, torch.Tensor]]:
    """The truth as answers, boxes cut to a share of their width."""
    answers = []
    for _, target in split:
        boxes = target["boxes"].clone()
        boxes[:, 2] = boxes[:, 0] + shrink * (boxes[:, 2] - boxes[:, 0])
        answers.append(
            {
                "boxes": boxes,
                "labels": target["labels"],
                "scores": torch.ones(len(boxes)),
                "masks": target["masks"][:, None].float(),
            }
        )
    return answers


def test_measure_by_hand(folder: Path) -> None:
    _, test = load(str(folder), masks=True, max_pixels=MANY)
    perfect = measure(Answers(told(test)), test, 0, engine())
    for figures, per_class in perfect.values():
        assert figures["map"] == figures["map_50"] == figures["map_75"] == pytest.approx(100)
        assert "map_large" not in figures  # there are none
        assert set(per_class.values()) == {100.0} and set(per_class) <= set(test.classes)
    # Boxes of 0.72 of the width overlap by 0.72: right at 0.50, 0.55, ..., 0.70, five of ten thresholds.
    narrow = measure(Answers(told(test, shrink=0.72)), test, 0, engine())
    assert narrow["boxes"][0]["map"] == pytest.approx(50) and narrow["boxes"][0]["map_75"] == 0
    assert narrow["masks"][0]["map"] == pytest.approx(100)


def test_crowds_are_neither_hit_nor_missed(folder: Path) -> None:
    edit(folder, "val", lambda content: first(content, iscrowd=1))
    _, test = load(str(folder), masks=True, max_pixels=MANY)
    answers = told(test)
    figures, _ = measure(Answers(answers), test, 0, engine())["boxes"]
    assert figures["map"] == pytest.approx(100)
    answers[0] = {name: value[1:] for name, value in answers[0].items()}
    figures, _ = measure(Answers(answers), test, 0, engine())["boxes"]
    assert figures["map"] == pytest.approx(100)


def test_detection_learns_and_repeats(tmp_path: Path) -> None:
    """Eight images learned by heart: the second part holds them again, under other names."""
    folder = tmp_path / "set"
    shapes.write_coco(folder, train=8, test=1, side=SIDE)
    for image in (folder / "train").iterdir():
        (folder / "val" / image.name).write_bytes(image.read_bytes())
    annotations = folder / "annotations"
    (annotations / "instances_val.json").write_bytes((annotations / "instances_train.json").read_bytes())
    torch.manual_seed(0)
    backbone = create_backbone(NAME).eval()
    lines: list[str] = []

    def run(epochs: float) -> Any:
        settings = DetectionConfig(**{**vars(SMALL), "epochs": epochs, "model": "faster-rcnn"})
        state = torch.get_rng_state()
        (found,) = detection(backbone, str(folder), spec(), Reader(VIEW), engine(), settings=settings, seed=0, say=lines.append)
        assert torch.equal(torch.get_rng_state(), state)  # draws from nobody else's
        return found

    untrained, learned = run(0.5), run(20)
    assert untrained.figures["map"] < 3
    assert learned.main == "map" and learned.figures["map"] > 10 and learned.figures["map_50"] > 30
    points = learned.details["loss"]
    assert points[-1][0] == learned.details["steps"] == 40 and points[-1][1] < 0.7 * points[0][1]
    assert learned.details["images"] == {"training": 8, "without_objects": 0, "test": 8}
    assert "3 classes, 8 images, 40 steps of 4" in lines[-12] and lines[-2].startswith("step 40 of 40: loss ")
    again = run(0.5)
    assert again.details["loss"] == untrained.details["loss"] and again.figures == untrained.figures
    json.dumps(learned.plain())


def test_mask_rcnn_gives_a_finding_for_boxes_and_one_for_masks(tmp_path: Path) -> None:
    shapes.write_coco(tmp_path / "set", train=3, test=1, side=SIDE)
    settings = DetectionConfig(**{**vars(SMALL), "epochs": 1, "max_images": 2, "batch_size": 2})
    folder = tmp_path / "set"
    found = detection(
        create_backbone(NAME), str(folder), spec(), Reader(VIEW), engine(), settings=settings, seed=0, say=lambda line: None
    )
    assert [one.setting for one in found] == [{"model": "mask-rcnn", "of": "boxes"}, {"model": "mask-rcnn", "of": "masks"}]
    assert all(math.isfinite(one.figures["map"]) for one in found)
    assert "Of 3 training images 2 were used, chosen by the seed." in found[0].notes


def test_voc_quotes_its_customary_figure(voc: Path) -> None:
    settings = DetectionConfig(**{**vars(SMALL), "epochs": 1.0, "batch_size": 2})
    (found,) = detection(
        create_backbone(NAME), str(voc), spec(), Reader(VIEW), engine(), settings=settings, seed=0, say=lambda line: None
    )
    assert found.main == "map_50" and "11 of VOC2007's own rule" in found.notes[-1]
    settings = DetectionConfig(model="mask-rcnn")
    with pytest.raises(ConfigError, match="mask-rcnn needs masks"):
        detection(
            create_backbone(NAME), str(voc), spec(), Reader(VIEW), engine(), settings=settings, seed=0, say=lambda line: None
        )


def test_workers_change_nothing_and_broken_images_are_named_through_them(folder: Path) -> None:
    split, _ = load(str(folder), masks=False, max_pixels=MANY)

    def losses(workers: int) -> list[float]:
        torch.manual_seed(0)
        model, _ = detector()
        return list(train(model, split, workers, engine(), settings=SMALL, plan=Plan(2, 1, 0), seed=0))

    assert losses(0) == losses(2)
    for image in (folder / "train").iterdir():
        image.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"^[^\n]*png: is none of [^\n]*$"):
        losses(2)


def test_a_loss_that_is_not_finite_is_named_with_its_step(folder: Path) -> None:
    settings = DetectionConfig(**{**vars(SMALL), "epochs": 4.0, "lr": 1e9, "warmup_steps": 0, "model": "faster-rcnn"})
    with pytest.raises(NumericError, match=r"the loss is (nan|inf) at step \d+ of 3 .*lower detection.lr"):
        detection(
            create_backbone(NAME), str(folder), spec(), Reader(VIEW), engine(), settings=settings, seed=0, say=lambda line: None
        )


def test_what_is_missing_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(settings: DetectionConfig) -> None:
        detection(
            create_backbone("vit_tiny_patch16_224"),
            str(tmp_path),
            spec("vit_tiny_patch16_224"),
            Reader(VIEW),
            engine(),
            settings=settings,
            seed=0,
            say=lambda line: None,
        )

    with pytest.raises(ConfigError, match="vit_tiny_patch16_224 does not take images of any size"):
        run(DetectionConfig())
    with pytest.raises(ConfigError, match=r"detection.min_size: 800 must not exceed detection.max_size \(600\)"):
        run(DetectionConfig(max_size=600))
    with pytest.raises(ConfigError, match=r"detection.norm: train needs detection.batch_size of 2"):
        run(DetectionConfig(norm="train", batch_size=1))
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pycocotools" else there(name))
    with pytest.raises(ConfigError, match=r"needs pycocotools; install with `pip install 'relssl\[detection\]'`"):
        run(DetectionConfig())
