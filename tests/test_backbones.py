"""Every named family trains a step of ReSSL; figures are the published ones; sizes, channels and names are held to."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from PIL import Image
from timm.layers import ScaledStdConv2d, StdConv2d
from torchvision.transforms.functional import rgb_to_grayscale

import relssl
from relssl.cli import main
from relssl.data.batched import normalise
from relssl.errors import ConfigError
from relssl.method import Encoder, ReSSL, create_student
from relssl.method.backbones import NAMED, channels_of, create_backbone, feature_width, find, within
from relssl.settings.run import from_mapping, resolve
from relssl.weights.export import export
from relssl.weights.formats import FORMATS
from relssl.weights.opening import open_backbones
from relssl.weights.spec import BackboneSpec
from small_runs import equal_runs, small_run

SIZES = (64, 56, 48, 40, 32)  # of five crops: the paper's, as far as they go at a small scale
# The patches of 16 that divide only two of the sizes are halved, and deep networks cut short, so that the test is quick.
ARGS: dict[str, dict[str, Any]] = {
    "vit_small_patch16_224": {"patch_size": 8, "depth": 3},
    "convnext_tiny": {"depths": [1, 1, 2, 1]},
    "resnet34": {"layers": [1, 1, 1, 1]},
    "resnet50": {"layers": [1, 1, 1, 1]},
}
# One of each kind; the others are for `make torture`.
QUICK = ("resnet50", "efficientnet_b0", "mobilenetv3_small_100", "torchvision/shufflenet_v2_x1_0", "vit_small_patch16_224")
TINY_VIT: dict[str, Any] = {"backbone": "vit_tiny_patch16_224", "backbone_args": {"depth": 1, "embed_dim": 24, "num_heads": 2}}


def quick(cases: Any, names: tuple[str, ...]) -> list[Any]:
    """The cases of the networks named, and the others for `make torture`."""
    named = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=() if case[0] in names else pytest.mark.torture) for case in named]


def step(network: torch.nn.Module, sizes: tuple[int, ...]) -> torch.Tensor:
    """A step on noise; the gradient of the network's first weights."""
    encoder = Encoder(network, feature_width(network, sizes[0]), projector_hidden=16, dim=8)
    model, channels = ReSSL(encoder, 16, 8), channels_of(network)
    weak, strong = torch.rand(2, channels, sizes[0], sizes[0]), [torch.rand(2, channels, size, size) for size in sizes]
    result = model.step(weak, strong, student_temperature=0.1, teacher_temperature=0.04)
    result.loss.backward()
    model.push(result.keys, torch.arange(2))
    assert result.queries.shape == (len(sizes), 2, 8) and result.loss.isfinite() and (model.memory.ids >= 0).sum() == 2
    gradient = next(module.weight for module in network.modules() if isinstance(module, torch.nn.Conv2d)).grad
    assert gradient is not None and gradient.isfinite().all() and gradient.abs().sum() > 0
    return gradient


@pytest.mark.parametrize("name", quick(NAMED, QUICK))
def test_every_named_network_trains_a_step_on_five_crops(name: str) -> None:
    stem = "standard" if name in ("convnext_tiny", "vit_small_patch16_224") else "small-pool"
    step(create_backbone(name, stem, ARGS.get(name), SIZES[0]), SIZES)


# torchvision's model pages for ResNets, MobileNetV3, EfficientNets, ShuffleNetV2, RegNet and ConvNeXt, with classifiers of 1000 classes;
# MobileNetV2's and DeiT's papers.
PUBLISHED = [
    ("resnet18", 11_689_512, 1.81), ("resnet50", 25_557_032, 4.09), ("efficientnet_b0", 5_288_548, 0.39),
    ("mobilenetv2_100", 3_504_872, 0.30), ("mobilenetv3_large_100", 5_483_032, 0.22), ("mobilenetv3_small_100", 2_542_856, 0.06),
    ("torchvision/shufflenet_v2_x1_0", 2_278_604, 0.14), ("torchvision/regnet_y_400mf", 4_344_144, 0.40),
    ("convnext_tiny", 28_589_128, 4.46), ("vit_small_patch16_224", 22_050_664, 4.6),
]  # fmt: skip


@pytest.mark.parametrize(("name", "parameters", "gflops"), quick(PUBLISHED, ("resnet18", "torchvision/shufflenet_v2_x1_0")))
def test_figures_are_the_published_ones(name: str, parameters: int, gflops: float) -> None:
    (network,) = within([name], 224)
    assert network.features is not None and network.parameters + 1000 * network.features + 1000 == parameters
    # Half a unit of the last digit that is published, for the smallest networks.
    assert network.gflops == pytest.approx(gflops, rel=0.03, abs=0.005)


def test_measuring_is_the_network_itself_and_draws_nothing() -> None:
    before = torch.get_rng_state()
    convolutional, patches = within(["resnet18", "vit_tiny_patch16_224"], 64)
    (undivided,) = within(["vit_tiny_patch16_224"], 50)
    assert torch.equal(before, torch.get_rng_state())
    real = create_backbone("vit_tiny_patch16_224", size=64)
    assert patches.parameters == sum(parameter.numel() for parameter in real.parameters()) and patches.smallest == 16
    assert convolutional.smallest == 4 and convolutional.small_stem and not patches.small_stem
    assert undivided.gflops is None and undivided.features is None and undivided.parameters > 5e6


def test_torchvisions_networks_are_its_own_without_the_classifier() -> None:
    torch.manual_seed(1)
    ours = create_backbone("torchvision/mobilenet_v3_small")
    torch.manual_seed(1)
    theirs = torchvision.models.mobilenet_v3_small()
    theirs.classifier[2], theirs.classifier[3] = torch.nn.Identity(), torch.nn.Identity()
    images = torch.rand(2, 3, 64, 64)
    # In training mode: no dropout is left in front of the features.
    assert torch.equal(ours.train()(images), theirs.train()(images)) and feature_width(ours, 64) == 1024
    names = {"torchvision/squeezenet1_1": 512, "torchvision/googlenet": 1024, "torchvision/vit_b_16": 768}
    assert {name: next(within([name], 32)).features for name in names} == names


@pytest.mark.parametrize(
    ("name", "first", "pool"),
    [
        ("efficientnet_b0", "conv_stem", None),
        ("regnety_004", "stem.conv", None),
        ("torchvision/shufflenet_v2_x1_0", "conv1.0", "maxpool"),
        ("torchvision/mobilenet_v2", "features.0.0", None),
        ("densenet121", "features.conv0", "features.pool0"),
    ],
)
def test_small_stems_keep_the_resolution_and_have_no_max_pool(name: str, first: str, pool: str | None) -> None:
    with torch.device("meta"):
        plain, small, pooled = (create_backbone(name, stem) for stem in ("standard", "small", "small-pool"))
        convolution = small.get_submodule(first)
        assert isinstance(convolution, torch.nn.Conv2d) and convolution.kernel_size == (3, 3)
        assert plain.get_submodule(first).stride == (2, 2) and convolution(torch.zeros(1, 3, 32, 32)).shape[-2:] == (32, 32)
    if pool:
        assert [type(each.get_submodule(pool)) for each in (small, pooled)] == [torch.nn.Identity, torch.nn.MaxPool2d]


def test_position_embeddings_have_the_runs_size_and_are_interpolated() -> None:
    views = {"weak": {"size": 64}, "crops": [[64, 0.2, 1.0], [32, 0.1, 0.5]]}
    backbone = create_student(from_mapping(TINY_VIT | {"encoder": {"stem": "standard"}, "views": views})).backbone.eval()
    assert backbone.pos_embed.shape == (1, 1 + 4 * 4, 24)
    # At another size the network is the one whose embeddings are those interpolated by timm's own function.
    other = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=1, embed_dim=24, num_heads=2).eval()
    weights = backbone.state_dict()
    weights["pos_embed"] = timm.layers.resample_abs_pos_embed(weights["pos_embed"], [2, 2], num_prefix_tokens=1)
    other.load_state_dict(weights)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(backbone(images), other(images))
    # Arguments that are given stay.
    for given, grid in (({"img_size": 96}, 6), ({"dynamic_img_size": True}, 14)):
        network = create_backbone("vit_tiny_patch16_224", args={"depth": 1, **given}, size=32)
        assert network.pos_embed.shape[1] == 1 + grid**2 and feature_width(network, 32) == 192


def test_windows_take_several_sizes_too() -> None:
    step(create_backbone("swin_tiny_patch4_window7_224", args={"depths": [1, 1, 1, 1], "embed_dim": 24}, size=64), (64, 32))


@pytest.mark.parametrize(
    ("name", "stem", "args", "size", "setting"),
    [
        ("resnot18", "standard", {}, None, "backbone: .* resnet18"),
        ("shufflenet_v2_x1_0", "standard", {}, None, "backbone: .* torchvision/shufflenet_v2_x1_0"),
        ("torchvision/fasterrcnn_resnet50_fpn", "standard", {}, None, "backbone: "),
        ("torchvision/resnet18", "standard", {"depth": 3}, None, "backbone_args: "),
        ("torchvision/vit_b_16", "standard", {}, 50, "backbone_args: .*'image_size': 50.* indivisible"),
        ("vit_tiny_patch16_224", "small", {}, 32, "encoder.stem: "),
        ("convnext_atto", "small", {}, 32, "encoder.stem: "),
        ("resnet18", "standard", {"widths": 3}, None, "backbone_args: "),
    ],
)
def test_what_cannot_be_built_is_refused(name: str, stem: str, args: dict[str, Any], size: int | None, setting: str) -> None:
    with pytest.raises(ConfigError, match=setting) as refusal:
        create_backbone(name, stem, args, size)
    assert refusal.value.exit_code == 2 and "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["tresnet_m", "vit_tiny_patch16_224", "torchvision/shufflenet_v2_x1_0"])
def test_any_number_of_channels_passes_the_building_blocks(name: str) -> None:
    args = {"in_chans": 4} | ({"depth": 1} if name.startswith("vit") else {})
    network = create_backbone(name, args=args, size=32)
    step(network, (32,))
    own = torch.nn.Sequential(torch.nn.Conv2d(5, 8, 3))
    assert [channels_of(each) for each in (network, own, torch.nn.Linear(4, 4))] == [4, 5, 3]


def test_small_stems_keep_what_networks_without_norms_rely_on() -> None:
    network = create_backbone("resnetv2_50x1_bit", "small")
    assert type(network.stem.conv) is StdConv2d and network.stem(torch.zeros(1, 3, 32, 32)).shape[-2:] == (32, 32)
    assert type(create_backbone("nf_resnet26", "small").stem.conv) is ScaledStdConv2d
    with pytest.raises(ConfigError, match=r"encoder\.stem standard may take them"):
        create_student(resolve({"data": "digits", "backbone": "mobileone_s0", "encoder.stem": "small"}))


def test_grey_views_are_torchvisions_grey_normalised() -> None:
    config = resolve({"data": "digits", "views.channels": 1, "views.mean": "0.2,0.3,0.4", "views.std": "0.1,0.2,0.3"})
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    mean, std = 0.2989 * 0.2 + 0.587 * 0.3 + 0.114 * 0.4, 0.2989 * 0.1 + 0.587 * 0.2 + 0.114 * 0.3
    expected = (rgb_to_grayscale(images.double() / 255) - mean) / std
    for given in (images, images.float() / 255):
        torch.testing.assert_close(normalise(given, *config.views.statistics()).double(), expected, rtol=1e-5, atol=1e-5)
    one_of_them = replace(config.views, mean=(0.5,)).statistics()
    assert one_of_them[0] == (0.5,) and one_of_them[1] == pytest.approx((std,))


SHUFFLE: dict[str, Any] = {
    **{"backbone": "torchvision/shufflenet_v2_x0_5", "backbone_args": {}, "encoder.stem": "small", "views.channels": 1},
    **{"epochs": 1, "max_images": 64, "log.knn_every": 0, "optimizer.warmup_epochs": 0},
}


@pytest.fixture(scope="module")
def grey_shuffle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one of torchvision's networks on grey views."""
    return small_run(tmp_path_factory.mktemp("runs") / "grey", **SHUFFLE).folder


def test_a_run_of_a_torchvision_network_on_grey_views(grey_shuffle: Path, tmp_path: Path) -> None:
    backbone = relssl.load_backbone(grey_shuffle)
    view = backbone.transform(Image.new("RGB", (40, 50), (10, 20, 30)))
    assert view.shape == (1, 32, 32) and backbone(view[None]).shape == (1, 1024) == (1, backbone.num_features)
    again = relssl.load_backbone(grey_shuffle / "export/backbone.safetensors")
    assert torch.equal(backbone(view[None]), again(view[None]))
    card = (grey_shuffle / "export/backbone.md").read_text()
    assert "Input: grey, 32 x 32" in card and "torchvision.models.shufflenet_v2_x0_5()" in card and "[N, 1, S, S]" in card
    Image.new("RGB", (40, 40), (200, 10, 90)).save(tmp_path / "one.png")
    embedded = relssl.embed(grey_shuffle, str(tmp_path), tmp_path / "features.npz")
    assert embedded["dim"] == 1024 and embedded["images"] == 1


@pytest.mark.parametrize("format", FORMATS)
def test_it_is_exported_to_formats_that_torchvision_needs_alone(grey_shuffle: Path, tmp_path: Path, format: str) -> None:
    target = tmp_path / f"backbone{FORMATS[format].suffix}"
    if format in ("timm", "hf", "detectron2"):
        with pytest.raises(ConfigError, match=f"format: {format} .*torchvision/shufflenet_v2_x0_5"):
            export(grey_shuffle, format=format, out=target)
        assert not list(tmp_path.iterdir())
    elif format in ("safetensors", "torchvision"):  # graphs are written in other tests
        assert export(grey_shuffle, format=format, out=target).parity.difference == 0


def test_a_transformers_size_and_channels_go_with_it(tmp_path: Path) -> None:
    over = {**TINY_VIT, "encoder.stem": "standard", "views.channels": 1, "views.crops": [[32, 0.2, 1.0], [16, 0.1, 0.5]]}
    optimizer = {"name": "adamw", "lr": 1e-3, "warmup_epochs": 0}
    run = small_run(tmp_path / "run", **over, epochs=1, max_images=64, optimizer=optimizer, log={"knn_every": 0}).folder
    spec = BackboneSpec.of(relssl.load_run(run).config)
    expected = {"dynamic_img_size": True, "img_size": 32, "in_chans": 1, **TINY_VIT["backbone_args"]}
    assert spec.all_arguments() == expected and spec.create().pos_embed.shape[1] == 1 + 2 * 2
    exported = export(run, format="timm", out=tmp_path / "vit.safetensors")
    assert exported.parity.difference == 0 and "img_size=32" in exported.lines[1] and "in_chans=1" in exported.lines[1]
    scope: dict[str, Any] = {}
    exec("\n".join(exported.lines), scope)
    image, opened = Image.effect_noise((32, 32), 80).convert("RGB"), open_backbones(run)
    # Grey is rounded to 8 bits there.
    torch.testing.assert_close(scope["transform"](image), opened.backbone.transform(image), rtol=0, atol=0.02)
    # Evaluated at another size, the network made for 32 pixels interpolates.
    assert feature_width(opened.backbone, opened.reader(48).view.size) == 24
    with pytest.raises(ConfigError, match="hf is read with colour images"):
        export(run, format="hf", out=tmp_path / "hf")
    with pytest.raises(ConfigError, match="detection: takes colour images"):
        relssl.evaluate(run, "coco", protocol="detection")


def test_networks_are_listed_and_searched(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backbones", "--family", "mobilenetv3", "--max_params", "3", "--size", "32"]) == 0
    listing = capsys.readouterr().out
    assert "mobilenetv3_small_100" in listing and "mobilenetv3_large_100" not in listing
    assert main(["backbones", "torchvision/shufflenet_v2_x0_5", "--max_gflops", "0.1", "--size", "32", "--json"]) == 0
    (only,) = json.loads(capsys.readouterr().out)
    assert only["name"] == "torchvision/shufflenet_v2_x0_5" and only["small_stem"] and only["smallest"] == 4
    for words in (["resnot"], ["--family", "mobilnetv2"], ["--size", "0"]):
        assert main(["backbones", *words]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert find() == list(NAMED) and find("resnet1?") == ["resnet18"] and "torchvision/swin_t" in find("swin_t")
    assert find(family="shufflenetv2") == ["torchvision/shufflenet_v2_x1_0"]
    assert "swin_tiny_patch4_window7_224" in find(family="swin") and len(find(everything=True)) > 1000


NARROW = """
import torch
from relssl.engine import Engine
engine = Engine.local("cpu", "fp32")
network = engine.place(torch.nn.Sequential(torch.nn.Conv2d(3, 48, 1, stride=2), torch.nn.BatchNorm2d(48)))
network(engine.place(torch.rand(8, 3, 64, 64))).sum().backward()
"""


def test_a_stem_that_crashes_torch_without_avx512_trains() -> None:
    """RepVGG, MobileOne and FastViT have it. On other processors than Intel's and AMD's these two variables change nothing."""
    older = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", NARROW], env=os.environ | older, check=True, timeout=100)


TAKEN = (
    *("levit_128s", "mobilevit_xxs", "fastvit_t8", "repvgg_a0", "xcit_nano_12_p16_224", "pvt_v2_b0", "edgenext_xx_small"),
    *("ghostnet_050", "hgnetv2_b0", "mixer_s32_224", "eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224"),
    *("swinv2_tiny_window8_256", "swinv2_cr_tiny_ns_224", "beit_base_patch16_224", "tiny_vit_5m_224", "coatnet_nano_rw_224"),
    *("maxvit_rmlp_pico_rw_256", "gcvit_xxtiny", "mobileone_s0", "iformer_t"),
)
THIN: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": {"depth": 2, "embed_dim": 48, "num_heads": 2},
    "levit_128s": {"embed_dim": [16, 24, 32], "key_dim": 8, "num_heads": [2, 3, 4], "depth": [1, 1, 1]},
}


@pytest.mark.parametrize("name", quick(TAKEN, ("levit_128s",)))
def test_networks_that_people_take_train_save_resume_and_export(name: str, tmp_path: Path) -> None:
    """LeViT keeps integer tables as buffers, as Swin does; the others are for `make torture`."""
    side = 56 if "patch14" in name else 64
    short = {
        "max_images": 16,
        "batch_size": 8,
        "epochs": 1,
        "optimizer": {"warmup_epochs": 0},
        "log": {"knn_every": 0, "every": 1},
    }
    short |= {"method": {"memory_size": 16}, "checkpoint": {"every_steps": 1}, "encoder": {"stem": "standard"}}
    views = {"enlarge": True, "weak": {"size": side}, "strong": {"size": side}}
    run = small_run(tmp_path / "run", backbone=name, backbone_args=THIN.get(name, {}), **short, views=views).folder
    shutil.copytree(run, tmp_path / "cut", ignore=shutil.ignore_patterns("export", "status.json", "step-00000002"))
    relssl.resume(tmp_path / "cut", quiet=True)
    assert equal_runs(run, tmp_path / "cut")
    with torch.no_grad():
        assert relssl.load_backbone(run / "export/backbone.safetensors")(torch.rand(1, 3, side, side)).isfinite().all()
