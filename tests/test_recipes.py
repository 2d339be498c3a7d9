"""The recipes hold the papers' settings, say where these come from, and lie on each other as their bases say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relssl.cli import main
from relssl.data.images import Files, Images, Pixels
from relssl.errors import ConfigError
from relssl.settings import recipes
from relssl.settings.reading import leaves, merge, nest
from relssl.settings.recipes import layer, spell_out
from relssl.settings.run import Config, derive, differences, from_mapping, resolve
from relssl.train.pretrain import complete_settings
from relssl.train.run_folder import default_folder
from relssl.weights.card import public

SETS = ("cifar10", "cifar100", "stl10", "tiny-imagenet", "imagenet")
# The settings of the authors' runs for SETS, from the paper and its code.
PAPER: dict[str, tuple[Any, ...]] = {
    "data": SETS,
    "backbone": ("resnet18", "resnet18", "resnet18", "resnet18", "resnet50"),
    "encoder.stem": ("small", "small", "small-pool", "small-pool", "standard"),
    "views.weak.size": (32, 32, 64, 64, 224),
    "views.strong.size": (32, 32, 64, 64, 224),
    "method.memory_size": (4096, 4096, 16384, 16384, 131072),
    "method.teacher_momentum": (0.99, 0.99, 0.996, 0.996, 0.999),
    "method.student_temperature": (0.1,) * 5,
    "method.teacher_temperature": (0.04, 0.03, 0.04, 0.03, 0.04),
    "optimizer.lr": (0.06, 0.06, 0.06, 0.06, 0.05),
    "optimizer.weight_decay": (5e-4, 5e-4, 5e-4, 5e-4, 1e-4),
    "optimizer.decay": ("all", "all", "all", "all", "official"),
    "encoder.projector_hidden": (2048, 2048, 2048, 2048, 4096),
    "encoder.dim": (128, 128, 128, 128, 512),
} | dict.fromkeys(("views.weak.flip", "views.strong.flip", "views.strong.blur"), (0.5,) * 5)
SAME: dict[str, Any] = {
    **{"method.name": "ressl", "method.teacher_momentum_end": None, "method.shuffle": True, "encoder.batch_norm_splits": 8},
    **{"encoder.projector_layers": 2, "encoder.projector_norm": "none", "encoder.projector_output_norm": "none"},
    **{"optimizer.name": "sgd", "optimizer.momentum": 0.9, "optimizer.lr_start": 0.0, "optimizer.warmup_epochs": 5.0},
    **{"epochs": 200, "batch_size": 256, "backbone_args": {"zero_init_last": False}},
    **{"views.weak.scale": (0.2, 1.0), "views.weak.jitter": 0.0, "views.weak.blur": 0.0, "views.strong.scale": (0.2, 1.0)},
    **{"views.strong.jitter": 0.8, "views.strong.brightness": 0.4, "views.strong.contrast": 0.4, "views.strong.saturation": 0.4},
    **{"views.strong.hue": 0.1, "views.strong.grey": 0.2, "views.strong.blur_sigma": (0.1, 2.0), "views.strong.randaugment": 0},
}
FIVE = ((224, 0.2, 1.0), (192, 0.172, 0.86), (160, 0.143, 0.715), (128, 0.114, 0.571), (96, 0.086, 0.429))


def value(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("name", SETS)
def test_the_authors_runs(name: str) -> None:
    config = resolve({"recipe": f"nips/{name}"})
    wanted = {setting: row[SETS.index(name)] for setting, row in PAPER.items()} | SAME
    wanted |= {"encoder.predictor": "none", "method.warmup": "none"}
    assert {setting: value(config, setting) for setting in wanted} == wanted
    assert len(derive(config).strong) == 1


@pytest.mark.parametrize("name", [*SETS, "imagenet-5crop", "imagenet-2x"])
def test_the_extension_is_the_conference_version_and_its_own_settings(name: str) -> None:
    ours, theirs = (differences(resolve({"recipe": recipe})) for recipe in (name, f"nips/{name}"))
    own = leaves_of(recipes.read("_extension"))
    changed = {setting for setting in ours.keys() | theirs.keys() if ours.get(setting) != theirs.get(setting)}
    assert {"recipe"} < changed <= own | {"recipe"}
    assert resolve({"data": name, "recipe": None}).recipe == name if name in SETS else True


def leaves_of(raw: Any) -> set[str]:
    return {name for name in leaves(Config) if _has(raw, name)}


def _has(raw: Any, name: str) -> bool:
    for part in name.split("."):
        if not isinstance(raw, dict) or part not in raw:
            return False
        raw = raw[part]
    return True


def test_several_crops() -> None:
    five, two = (resolve({"recipe": f"nips/imagenet-{kind}"}) for kind in ("5crop", "2x"))
    assert five.views.crops == FIVE and two.views.crops == ((224, 0.2, 1.0),) * 2
    assert all(view.blur == 0.5 for view in (*derive(five).strong, *derive(two).strong))
    plain = differences(resolve({"recipe": "nips/imagenet"}))
    for config in (five, two):
        assert {name for name, value in differences(config).items() if plain.get(name) != value} == {"recipe", "views.crops"}


SOLO = {
    **{"epochs": 1000, "batch_size": 256, "optimizer.lr": 0.05, "optimizer.lr_start": 3e-5, "optimizer.warmup_epochs": 10.0},
    **{"optimizer.weight_decay": 1e-4, "optimizer.decay": "all", "encoder.projector_hidden": 4096, "encoder.dim": 256},
    **{"method.memory_size": 65536, "method.teacher_momentum": 0.99, "method.teacher_momentum_end": 1.0, "method.shuffle": False},
    **{"method.student_temperature": 0.1, "method.teacher_temperature": 0.04, "encoder.batch_norm_splits": 1},
    **{
        "views.weak.scale": (0.08, 1.0),
        "views.strong.scale": (0.08, 1.0),
        "views.strong.saturation": 0.2,
        "views.strong.blur": 0.5,
    },
}


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("cifar10", {"encoder.stem": "small-wide", "views.std": (0.2470, 0.2435, 0.2616)}),
        ("cifar100", {"encoder.stem": "small-wide", "views.std": (0.2673, 0.2564, 0.2762), "views.weak.size": 32}),
        (
            "imagenet100",
            {"encoder.stem": "standard", "views.std": None, "views.strong.size": 224, "epochs": 400, "optimizer.lr": 0.3},
        ),
    ],
)
def test_solo_learns_runs(name: str, own: dict[str, Any]) -> None:
    config, wanted = resolve({"recipe": f"solo/{name}"}), SOLO | own | {"data": name, "backbone": "resnet18"}
    assert {setting: value(config, setting) for setting in wanted} == wanted


def test_reconstructions_and_disagreements_are_told() -> None:
    told = {recipe.name: recipe.source for recipe in recipes.listing()}
    assert all("reconstruction" in told[name] for name in (*SETS, "imagenet-5crop", "imagenet-2x", "nips/imagenet-2x"))
    assert "that code says 800" in told["nips/cifar10"] and "not imitated" in told["solo/cifar10"]
    assert all(
        "the authors' code" in told[f"nips/{name}"] and "0.04" in told[f"nips/{name}"] for name in ("cifar100", "tiny-imagenet")
    )


# Layers

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "epochs": st.integers(5, 99),
    "seed": st.integers(0, 99),
    "optimizer.lr": st.floats(0.01, 1),
    "optimizer.momentum": st.floats(0, 0.9),
    "views.strong": st.sampled_from(("weak", "contrastive", "simclr")),
    "views.strong.size": st.integers(8, 64),
    "views.weak.size": st.integers(8, 64),
    "method.memory_size": st.integers(256, 512),
}
LAYERS = st.lists(st.dictionaries(st.sampled_from(sorted(VALUES)), st.none(), max_size=5), min_size=1, max_size=4)


@given(shapes=LAYERS, data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_recipe_on_its_bases_is_the_last_word_on_each_setting(
    shapes: list[dict[str, None]], data: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("layers")
    drawn = [{name: data.draw(VALUES[name]) for name in shape} for shape in shapes]
    files = [folder / f"{number}.yaml" for number in range(len(drawn))]
    for number, (file, own) in enumerate(zip(files, drawn, strict=True)):
        spelled = {f"{name}.name" if name == "views.strong" else name: value for name, value in own.items()}
        whole = nest(spelled) | ({"base": [str(file) for file in files[:-1]]} if number == len(files) - 1 else {})
        file.write_text(json.dumps(whole))
    flat = {name: value for own in drawn for name, value in own.items()}
    flat = {f"{name}.name" if name == "views.strong" else name: value for name, value in flat.items()}
    assert resolve({"recipe": str(files[-1]), "data": "x"}) == from_mapping(
        merge(nest(flat), {"recipe": str(files[-1]), "data": "x"})
    )


def test_short_forms_and_arguments_of_another_backbone_survive_layering(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: nips/stl10\nbackbone: mobilenetv3_small_050\nviews: {strong: simclr}\nmethod: ressl\n")
    config = resolve({"recipe": str(file)})
    assert config.backbone_args == {} and config.method.memory_size == 16384
    assert (config.views.strong.size, config.views.strong.brightness) == (64, 0.8)
    assert layer(spell_out({"method": "moco"}), {"method": {"memory_size": 9}}) == {"method": {"name": "moco", "memory_size": 9}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: nips/imagnet\n", r"'nips/imagnet' is unknown; the nearest is nips/imagenet"),
        ("base: {a: 1}\n", "base: needs the name of a recipe or a list of names"),
        ("base: [[a]]\n", "base: needs the name of a recipe or a list of names"),
        ("base: [digits, SELF]\n", "which never ends"),
    ],
)
def test_bases_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace("SELF", str(file)))
    with pytest.raises(ConfigError, match=message):
        resolve({"recipe": str(file)})


def test_bases_alone_are_no_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert not [name for name in recipes.names() if "_" in name]
    assert main(["recipes", "_extension"]) == 2
    assert "'_extension' is unknown" in capsys.readouterr().err


def test_recipes_are_listed_in_groups_and_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-2] if line] == list(recipes.names()) and max(map(len, lines)) < 140
    assert lines[lines.index("") + 1].startswith("byol/") and "" in lines[1:-2]
    assert main(["recipes", "nips/imagenet-5crop", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown["settings"]["views.crops"] == [list(crop) for crop in FIVE] and "official code" in shown["source"]
    assert from_mapping(nest(shown["settings"]) | {"recipe": "nips/imagenet-5crop"}) == resolve({"recipe": "nips/imagenet-5crop"})
    assert main(["recipes", "solo/cifar10"]) == 0
    assert "  optimizer.lr_start             3e-05\n" in capsys.readouterr().out


def test_a_recipe_in_a_folder_keeps_its_name_where_files_lose_their_paths() -> None:
    for recipe, folder, told in (
        ("nips/cifar10", "runs/nips-cifar10-0", "nips/cifar10"),
        ("cifar10", "runs/cifar10-0", "cifar10"),
        ("secret/place/my.v2.yaml", "runs/my.v2-0", "my.v2.yaml"),
    ):
        config = from_mapping({"recipe": recipe})
        assert default_folder(config) == folder and public(config).recipe == told


# Views larger than images


@pytest.mark.parametrize(
    "over", [{"views.weak.size": 33}, {"views.strong.size": 33}, {"views.crops": [[32, 0.2, 1], [33, 0.2, 1]]}]
)
def test_views_are_not_larger_than_images_in_memory(over: dict[str, Any]) -> None:
    images = Images("small", Pixels(torch.zeros(4, 3, 32, 40, dtype=torch.uint8)))
    name = next(iter(over))
    with pytest.raises(ConfigError, match=rf"^{name}: 33 is larger than the images of small \(32 x 32 pixels\)"):
        complete_settings(resolve({"data": "cifar10", **over}), images)
    assert complete_settings(resolve({"data": "cifar10", "views.enlarge": True, **over}), images).views.margin == 1.0
    assert complete_settings(resolve({"data": "cifar10"}), images).views.mean == images.mean
    files = Images("files", Files("", [b"a.jpg"], [1]), np.array([0]))
    assert derive(complete_settings(resolve({"data": "cifar10", **over}), files)).views[-1].size in (32, 33)
