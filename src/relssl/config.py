"""Every setting of a run, with its help, range and default; read by all modules, imports no torch.

`resolve()` puts a run's settings together: defaults, then the recipe, then a config file, then what the caller overrides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from relssl import recipes
from relssl.errors import ConfigError
from relssl.schema import NULL, build, merge, nest, read_yaml, setting
from relssl.sections import CheckpointConfig, EncoderConfig, EngineConfig, LoaderConfig, LogConfig, MethodConfig, OptimizerConfig
from relssl.views import VIEWS, ViewConfig, ViewsConfig


@dataclass(frozen=True)
class Config:
    """A run."""

    data: str = setting("digits", "name of a data set, folder of images, or list file")
    recipe: str | None = setting(None, "named recipe or recipe file; null: the one named after the data, else `folder`")
    data_root: str | None = setting(None, "where named data sets lie; null: $RELSSL_DATA, else ~/.cache/relssl")
    out: str | None = setting(None, "run folder; null: runs/RECIPE-SEED")
    backbone: str = setting("resnet18", "timm name of the network")
    backbone_args: dict[str, Any] = setting({}, "arguments for timm.create_model, as {name: value}")
    compile: str = setting(
        "auto",
        "compile the networks with torch.compile, and on one GPU replay them as CUDA graphs; auto: on GPUs, if it turns out faster",
        choices=("auto", "off", "on"),
    )
    epochs: int = setting(200, "passes over the images", ge=1)
    batch_size: int = setting(256, "images an optimizer step, over all devices and accumulated parts", ge=2)
    accumulate: int = setting(1, "equal parts a batch is computed in, one after another", ge=1)
    seed: int = setting(0, "seed of the weights, the memory, the order and the views", ge=0)
    max_images: int | None = setting(None, "train on this many images, chosen by the seed; null: all", ge=1)
    time_limit: float | None = setting(None, "minutes after which the run saves and stops with exit code 75", gt=0)
    views: ViewsConfig = setting(ViewsConfig(), "views")
    encoder: EncoderConfig = setting(EncoderConfig(), "encoder")
    method: MethodConfig = setting(MethodConfig(), "method")
    optimizer: OptimizerConfig = setting(OptimizerConfig(), "optimizer")
    engine: EngineConfig = setting(EngineConfig(), "engine")
    loader: LoaderConfig = setting(LoaderConfig(), "loader")
    log: LogConfig = setting(LogConfig(), "log")
    checkpoint: CheckpointConfig = setting(CheckpointConfig(), "checkpoint")

    @property
    def strong_views(self) -> tuple[ViewConfig, ...]:
        """The student's views, one each; a single crop is a list of one."""
        if not self.views.crops:
            return (self.views.strong,)
        return tuple(dataclasses.replace(self.views.strong, size=s, scale=(lo, hi)) for s, lo, hi in self.views.crops)

    @property
    def all_views(self) -> tuple[ViewConfig, ...]:
        """What a loader makes of each image: the teacher's view, then the student's."""
        return (self.views.weak, *self.strong_views)


def resolve(overrides: Mapping[str, Any], config_file: str | Path | None = None) -> Config:
    """The settings of a run from dotted or nested `overrides` and an optional YAML file.

    Raises:
        ConfigError: with one line for every fault found.
    """
    over = _spell_views(nest(overrides))
    if config_file is not None:
        over = _layer(_spell_views(read_yaml(Path(config_file))), over)
    asked = over.get("recipe")
    asked = None if asked is None or str(asked).lower() in NULL else asked
    name = str(asked or recipes.for_data(str(over.get("data", "digits"))))
    return from_mapping(_layer(_spell_views(recipes.read(name)), over | {"recipe": name}))


def _layer(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over` on top; arguments that were meant for another backbone stay behind."""
    if over.get("backbone", base.get("backbone")) != base.get("backbone"):
        base = {key: value for key, value in base.items() if key != "backbone_args"}
    return merge(base, over)


def from_mapping(raw: Mapping[str, Any]) -> Config:
    """A checked Config of a nested mapping, such as a run's config.yaml."""
    config: Config = build(Config, _expand_views(merge(_VIEWS_DEFAULT, _spell_views(raw))))
    faults = check(config)
    if faults:
        raise ConfigError(*faults)
    return config


_VIEWS_DEFAULT = {"views": {"weak": {"name": "weak"}, "strong": {"name": "contrastive"}}}


def _spell_views(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`strong: contrastive` is short for `strong: {name: contrastive}`; spelled out, later layers can merge into it."""
    views = raw.get("views")
    if not isinstance(views, Mapping):
        return dict(raw)
    spelled = {
        side: {"name": view} if isinstance(view, str) and side in ("weak", "strong") else view for side, view in views.items()
    }
    return {**raw, "views": spelled}


def _expand_views(raw: dict[str, Any]) -> dict[str, Any]:
    """Put the named view recipes under the keys that were given."""
    views = raw["views"]
    if not isinstance(views, Mapping):
        return raw
    expanded = {
        side: merge(VIEWS.get(str(view.get("name")), {}), view)
        if side in ("weak", "strong") and isinstance(view, Mapping)
        else view
        for side, view in views.items()
    }
    return {**raw, "views": expanded}


def check(config: Config) -> list[str]:
    """The faults that lie between settings, one line each."""
    method, faults = config.method, []
    if method.teacher_temperature >= method.student_temperature:
        faults.append(
            f"method.teacher_temperature: {method.teacher_temperature:g} must be below method.student_temperature "
            f"({method.student_temperature:g}), or the teacher's relation is not sharper and training collapses"
        )
    if config.batch_size % (config.accumulate * config.engine.devices * config.engine.nodes):
        faults.append(
            f"batch_size: {config.batch_size} must divide into accumulate x devices x nodes = "
            f"{config.accumulate} x {config.engine.devices} x {config.engine.nodes} equal parts"
        )
    elif config.batch_size // (config.accumulate * config.engine.devices * config.engine.nodes) < 2:
        faults.append(f"batch_size: {config.batch_size} leaves one image a part, too few for batch normalisation; raise it")
    if method.memory_size < config.batch_size:
        faults.append(f"method.memory_size: {method.memory_size} must be at least batch_size ({config.batch_size})")
    if config.loader.decoder == "torchvision" and config.loader.photometric == "worker":
        faults.append("loader.photometric: must be auto or device with loader.decoder torchvision, where workers see no pixels")
    if config.optimizer.warmup_epochs > config.epochs:
        faults.append(f"optimizer.warmup_epochs: {config.optimizer.warmup_epochs:g} must not exceed epochs ({config.epochs})")
    for side in ("weak", "strong"):
        view: ViewConfig = getattr(config.views, side)
        for key in ("scale", "ratio", "zoom", "blur_sigma"):
            bounds = getattr(view, key)
            if bounds is not None and bounds[0] > bounds[1]:
                faults.append(f"views.{side}.{key}: the first bound must not exceed the second, got {list(bounds)}")
    largest = max(view.size for view in config.all_views)
    if config.loader.cache is not None and config.loader.cache < largest:
        faults.append(
            f"loader.cache: {config.loader.cache} pixels are fewer than the largest view has ({largest}), which would only be "
            f"enlarged again; needs {largest} or more"
        )
    if config.loader.cache is not None and config.loader.decoder != "pillow":
        faults.append(f"loader.decoder: {config.loader.decoder} has nothing to decode beside loader.cache; leave one out")
    for size, low, high in config.views.crops:
        if low > high or high > 1:
            faults.append(f"views.crops: scales must rise and end at 1 at most, got [{size}, {low:g}, {high:g}]")
    return faults


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that `from_mapping(read_yaml(...))` reads back to an equal Config."""
    plain = dataclasses.asdict(config, dict_factory=lambda items: {k: _plain(v) for k, v in items})
    return yaml.safe_dump(plain, sort_keys=False, width=120, default_flow_style=None)


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
