"""The baselines' recipes hold their publications' settings, and on small sets ReSSL's but for what they say."""

from __future__ import annotations

from typing import Any

import pytest

from relssl.settings import recipes
from relssl.settings.reading import leaves
from relssl.settings.run import METHODS, Config, derive, differences, resolve

BASELINES = [name for name in METHODS if name != "ressl"]
SMALL_SETS = ("cifar10", "cifar100", "stl10", "tiny-imagenet")
# What a method may change of ReSSL's run on a small set, beside `method.name`.
OWN_NORMS = {"encoder.batch_norm_splits", "method.shuffle"}
HEADS = {"encoder.projector_hidden", "encoder.projector_norm", "encoder.predictor", "encoder.predictor_hidden", "encoder.dim"}
OWN: dict[str, set[str]] = {
    "moco": {"method.info_nce_temperature"},
    "simclr": OWN_NORMS | {"method.info_nce_temperature"},
    "byol": OWN_NORMS | HEADS,
    "simsiam": OWN_NORMS
    | HEADS
    | {"encoder.projector_output_norm", "batch_size", "optimizer.warmup_epochs", "optimizer.predictor_schedule"}
    | {"views.strong.blur", "views.weak.blur"},
    "sce": HEADS | {"method.teacher_temperature"},
    "supervised": OWN_NORMS | {"optimizer.lr"},
}


def value(config: Config, name: str) -> Any:
    found: Any = config
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("data", SMALL_SETS)
@pytest.mark.parametrize("method", BASELINES)
def test_small_sets_differ_from_ressl_in_what_is_the_methods_own(method: str, data: str) -> None:
    config, ours = resolve({"method": method, "data": data}), resolve({"recipe": f"nips/{data}"})
    assert config.recipe == f"{method}/{data}" and config.method.name == method
    apart, plain = differences(config), differences(ours)
    changed = {name for name in apart.keys() | plain.keys() if value(config, name) != value(ours, name)}
    assert changed <= OWN[method] | {"recipe", "method.name", "views.weak.name"}
    assert (config.epochs, config.backbone, config.encoder.stem) == (200, "resnet18", ours.encoder.stem)
    equal = method in ("moco", "simclr", "byol", "simsiam")  # both views are alike
    assert config.views.weak == (config.views.strong if equal else ours.views.weak)
    assert derive(config).views == ((config.views.weak,) if method == "supervised" else (config.views.weak, config.views.strong))


@pytest.mark.parametrize("method", BASELINES)
def test_fashion_mnist_is_as_cifar10_without_colour(method: str) -> None:
    config, cifar = resolve({"method": method, "data": "fashion-mnist"}), resolve({"method": method, "data": "cifar10"})
    changed = {name for name in leaves(Config) if value(config, name) != value(cifar, name)}
    colours = {f"views.{side}.{name}" for side in ("weak", "strong") for name in ("saturation", "hue", "grey")}
    assert config.recipe == f"{method}/fashion-mnist"
    assert changed <= {"data", "recipe", "epochs", "views.enlarge"} | colours
    assert all(value(config, name) == 0 for name in colours)


PUBLISHED: dict[str, dict[str, Any]] = {
    "moco/cifar10": {"method.info_nce_temperature": 0.2, "method.memory_size": 4096, "method.teacher_momentum": 0.99},
    "moco/cifar10-symmetric": {"method.symmetric": True, "method.info_nce_temperature": 0.2, "optimizer.lr": 0.06},
    "sce/cifar10": {
        **{"method.teacher_temperature": 0.05, "method.positive_share": 0.5, "encoder.projector_hidden": 512},
        **{"encoder.projector_norm": "batch", "encoder.batch_norm_splits": 8, "method.shuffle": True},
    },
    "simsiam/cifar10": {
        **{"batch_size": 512, "optimizer.lr": 0.06, "optimizer.weight_decay": 5e-4, "views.strong.blur": 0.0},
        **{"encoder.projector_layers": 2, "encoder.projector_output_norm": "plain", "optimizer.predictor_schedule": "constant"},
    },
    "moco/imagenet": {
        **{"optimizer.lr": 0.03, "batch_size": 256, "optimizer.weight_decay": 1e-4, "optimizer.decay": "all", "epochs": 200},
        **{"method.info_nce_temperature": 0.2, "method.teacher_momentum": 0.999, "method.memory_size": 65536},
        **{"encoder.projector_hidden": 2048, "encoder.dim": 128, "method.symmetric": False, "views.weak.jitter": 0.8},
    },
    "simclr/imagenet": {
        **{"optimizer.name": "lars", "optimizer.lr": 0.3 * 4096 / 256, "batch_size": 4096, "optimizer.weight_decay": 1e-6},
        **{"method.info_nce_temperature": 0.1, "optimizer.warmup_epochs": 10.0, "views.weak.brightness": 0.8},
    },
    "byol/imagenet": {
        **{"optimizer.name": "lars", "optimizer.lr": 0.2 * 4096 / 256, "batch_size": 4096, "optimizer.weight_decay": 1.5e-6},
        **{"method.teacher_momentum": 0.996, "method.teacher_momentum_end": 1.0, "encoder.predictor_hidden": 4096},
        **{"encoder.projector_hidden": 4096, "encoder.dim": 256, "views.weak.blur": 1.0, "views.strong.solarize": 0.2},
    },
    "simsiam/imagenet": {
        **{"optimizer.lr": 0.05 * 512 / 256, "batch_size": 512, "optimizer.weight_decay": 1e-4, "encoder.projector_layers": 3},
        **{"encoder.dim": 2048, "encoder.predictor_hidden": 512, "optimizer.predictor_schedule": "constant"},
    },
    "sce/imagenet": {
        **{"method.symmetric": True, "method.teacher_temperature": 0.07, "method.teacher_momentum": 0.99, "encoder.dim": 256},
        **{"optimizer.lr": 4.8, "batch_size": 4096, "epochs": 200, "method.memory_size": 65536, "views.weak.scale": (0.2, 1.0)},
    },
    "supervised/imagenet": {"optimizer.lr": 0.1, "batch_size": 256, "optimizer.weight_decay": 1e-4, "views.weak.jitter": 0.0},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name: str) -> None:
    config = resolve({"recipe": name})
    wanted = PUBLISHED[name] | {"method.name": name.split("/")[0], "data": name.split("/")[1].removesuffix("-symmetric")}
    assert {setting: value(config, setting) for setting in wanted} == wanted


@pytest.mark.parametrize("method", BASELINES)
def test_any_folder_and_the_built_in_set_have_recipes_of_each_method(method: str) -> None:
    folder, digits = resolve({"method": method, "data": "photos"}), resolve({"method": method})
    assert (folder.recipe, folder.data, folder.method.name) == (f"{method}/folder", "photos", method)
    assert folder.batch_size == 256 and folder.views.weak.size == 224 and folder.log.knn_images is None
    assert (digits.recipe, digits.data, digits.method.name) == (f"{method}/digits", "digits", method)
    assert digits.backbone_args == resolve({}).backbone_args


@pytest.mark.parametrize("turned", [False, True])
def test_a_methods_name_stays_beside_its_settings(turned: bool) -> None:
    given = {"method": "byol", "method.teacher_momentum": 0.5, "views.strong": "weak", "views.strong.flip": 0.25}
    config = resolve(dict(reversed(given.items())) if turned else given)
    assert (config.recipe, config.method.name, config.method.teacher_momentum) == ("byol/digits", "byol", 0.5)
    assert (config.views.strong.name, config.views.strong.flip, config.views.strong.scale) == ("weak", 0.25, (0.2, 1.0))


def test_what_is_not_known_is_told() -> None:
    told = {recipe.name: recipe.source for recipe in recipes.listing()}
    assert all("reconstruction" in told[f"{method}/cifar10"] for method in BASELINES)
    assert "reconstruction" in told["supervised/imagenet"] and "800 there" in told["simsiam/cifar10"]
