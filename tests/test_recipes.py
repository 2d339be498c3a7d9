"""The recipes hold the papers' settings, say where these come from, and lie on each other as their bases say; the baselines differ
from ReSSL's runs in what is their own."""

import json
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from relssl.cli import main
from relssl.errors import ConfigError
from relssl.method.create import create_method
from relssl.method.optim import parameter_groups
from relssl.settings import recipes
from relssl.settings.methods import METHODS
from relssl.settings.reading import changes, nest, read_yaml
from relssl.settings.recipes import layer, spell_out
from relssl.settings.run import derive, differences, from_mapping, resolve, to_yaml
from relssl.train.run_folder import default_folder
from relssl.weights.card import public

SETS = ("cifar10", "cifar100", "stl10", "tiny-imagenet", "imagenet")
# The settings of the authors' runs for SETS, from the paper and its code.
PAPER: dict[str, tuple[Any, ...]] = {
    "method.memory_size": (4096, 4096, 16384, 16384, 131072),
    "method.teacher_momentum": (0.99, 0.99, 0.996, 0.996, 0.999),
    "method.teacher_temperature": (0.04, 0.03, 0.04, 0.03, 0.04),
    "optimizer.lr": (0.06, 0.06, 0.06, 0.06, 0.05),
    "optimizer.weight_decay": (5e-4, 5e-4, 5e-4, 5e-4, 1e-4),
    "encoder.dim": (128, 128, 128, 128, 512),
    "method.student_temperature": (0.1, 0.1, 0.1, 0.1, 0.1),
    "optimizer.decay": ("all", "all", "all", "all", "official"),
}


@pytest.mark.parametrize("name", recipes.NAMES)
def test_every_recipe_is_valid_and_says_where_it_comes_from(name: str, tmp_path: Path) -> None:
    config, recipe = resolve({"recipe": name}), recipes.find(name)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert from_mapping(read_yaml(tmp_path / "config.yaml")) == config
    assert len(recipe["about"]) > 20 and len(recipe["source"]) > 20
    assert from_mapping(nest(differences(config))) == config


@pytest.mark.parametrize("name", SETS)
def test_the_authors_runs_and_the_extension_on_them(name: str) -> None:
    theirs, ours = resolve({"recipe": f"nips/{name}"}), resolve({"data": name})
    assert {key: attrgetter(key)(theirs) for key in PAPER} == {key: row[SETS.index(name)] for key, row in PAPER.items()}
    assert (theirs.encoder.predictor, theirs.method.warmup, len(derive(theirs).strong)) == ("none", "none", 1)
    extension = recipes.read("_extension")
    assert ours.recipe == name
    assert changes(theirs, ours).keys() - {"recipe"} <= extension.keys()


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_its_file_and_its_base_recipe(method: str) -> None:
    config = resolve({"method": method})
    model, derived = create_method(config, classes=10), derive(config)
    assert type(model).__module__ == f"relssl.method.{method}"
    assert (model.teacher is not None, model.memory is not None) == (derived.traits.teacher, derived.traits.memory)
    assert resolve({"method": method, "data": "photos"}).recipe == ("folder" if method == "ressl" else f"{method}/folder")


def test_a_recipe_lies_on_its_bases_and_later_ones_on_earlier(tmp_path: Path) -> None:
    layers: list[dict[str, Any]] = [
        {"epochs": 9, "optimizer.lr": 0.1, "views.strong.name": "weak", "views.strong.size": 8, "method.memory_size": 256},
        {"epochs": 8, "optimizer.lr": 0.2, "views.strong.name": "simclr"},
        {"epochs": 7, "views.weak.size": 16},
    ]
    files = [str(tmp_path / f"{number}.yaml") for number in range(len(layers))]
    for file, own in zip(files, layers, strict=True):
        Path(file).write_text(json.dumps(nest(own) | ({"base": files[:-1]} if file == files[-1] else {})))
    flat = {name: value for own in layers for name, value in own.items()}
    run = {"recipe": files[-1], "data": "x"}
    assert resolve(run) == from_mapping(flat | run)


def test_a_recipe_with_its_own_data_is_based_on_their_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: continue\ndata: photos\nstart: x\n")
    mine = resolve({"recipe": str(file)})
    assert mine == replace(resolve({"recipe": "continue", "data": "photos", "start": "x"}), recipe=str(file))


def test_short_forms_and_arguments_of_another_backbone(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: nips/stl10\nbackbone: mobilenetv3_small_050\nviews: {strong: simclr}\nmethod: ressl\n")
    config = resolve({"recipe": str(file)})
    assert config.backbone_args == {} and config.method.memory_size == 16384
    assert (config.views.strong.size, config.views.strong.brightness) == (64, 0.8)
    assert layer(spell_out({"method": "moco"}), {"method.memory_size": 9}) == {"method.name": "moco", "method.memory_size": 9}
    assert resolve({"recipe": "null", "data": "cifar10"}).recipe == "cifar10"
    assert resolve({"recipe": "digits", "backbone": "resnet18"}).backbone_args["layers"] == [1, 1, 1, 1]
    for method in ("byol", "simclr", "ressl"):
        more = resolve({"recipe": "continue", "data": "photos", "method": method, "start": "x"}).optimizer
        assert (more.name, more.lr) == ("sgd", 0.02)
    rate = {"recipe": "digits", "backbone_args": "{drop_path_rate: 0.1}"}
    assert resolve(rate).backbone_args == resolve({"recipe": "digits"}).backbone_args | {"drop_path_rate": 0.1}
    assert resolve(rate | {"backbone_args": "{}"}).backbone_args == {}
    given = tmp_path / "given.yaml"
    given.write_text("backbone_args: {drop_path_rate: 0.1}")  # without the name of its network
    for backbone in ("resnet50", "convnext_tiny"):
        assert resolve({"data": "photos", "backbone": backbone}, given).backbone_args["drop_path_rate"] == 0.1
    over = {"method": "byol", "method.teacher_momentum": 0.5, "views.strong": "weak", "views.strong.flip": 0.25}
    for given_settings in (over, dict(reversed(over.items()))):
        config = resolve(given_settings)
        assert (config.recipe, config.method.name, config.method.teacher_momentum) == ("byol/digits", "byol", 0.5)
        assert (config.views.strong.name, config.views.strong.flip, config.views.strong.scale) == ("weak", 0.25, (0.2, 1.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: nips/imagnet\n", "nearest is nips/imagenet"),
        ("base: {a: 1}\n", "base: needs"),
        ("base: [[a]]\n", "base: needs"),
        ("base: [digits, SELF]\n", "never ends"),
    ],
)
def test_bases_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace("SELF", str(file)))
    with pytest.raises(ConfigError, match=message):
        resolve({"recipe": str(file)})


def test_recipes_are_listed_in_groups_and_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-2] if line] == list(recipes.NAMES) and max(map(len, lines)) < 140
    assert main(["recipes", "nips/imagenet-5crop", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert from_mapping(nest(shown["settings"]) | {"recipe": "nips/imagenet-5crop"}) == resolve({"recipe": "nips/imagenet-5crop"})


def test_a_recipe_in_a_folder_keeps_its_name_where_files_lose_their_paths() -> None:
    for recipe, folder, name in (
        ("nips/cifar10", "runs/nips-cifar10-0", "nips/cifar10"),
        ("secret/place/my.v2.yaml", "runs/my.v2-0", "my.v2.yaml"),
    ):
        config = from_mapping({"recipe": recipe})
        assert default_folder(config) == folder and public(config).recipe == name


def test_imagenets_runs_of_others_start_and_decay_as_their_code_does() -> None:
    for method in METHODS:
        config = resolve({"recipe": f"{method}/imagenet" if method != "ressl" else "nips/imagenet"})
        assert config.backbone_args == {"zero_init_last": method in ("byol", "simclr", "simsiam")}
        if config.optimizer.name == "lars":
            groups = parameter_groups(create_method(config).student, decay=config.optimizer.decay, weight_decay=1.0)
            assert {each.ndim > 1 for group in groups if group["weight_decay"] for each in group["params"]} == {True}
