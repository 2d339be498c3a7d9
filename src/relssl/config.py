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
from relssl.methods import METHODS
from relssl.recipes import layer, spell_out
from relssl.schema import NULL, build, leaves, merge, nest, read_yaml, setting
from relssl.sections import CheckpointConfig, EncoderConfig, EngineConfig, LoaderConfig, LogConfig, MethodConfig, OptimizerConfig
from relssl.views import VIEWS, ViewConfig, ViewsConfig


@dataclass(frozen=True)
class Config:
    """A run."""

    data: str = setting("digits", "name of a data set, folder of images, or list file")
    recipe: str | None = setting(None, "named recipe or recipe file; null: the one named after the data, else `folder`")
    data_root: str | None = setting(None, "where named data sets lie; null: $RELSSL_DATA, else ~/.cache/relssl")
    out: str | None = setting(None, "run folder; null: runs/RECIPE-SEED")
    backbone: str = setting("resnet18", "the network: timm's name, or torchvision/ and torchvision's (see relssl backbones)")
    backbone_args: dict[str, Any] = setting({}, "arguments for timm.create_model or torchvision's function, as {name: value}")
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
        """The student's views, one each; a single crop is a list of one. Supervised learning has the first view alone."""
        if METHODS[self.method.name].labels:
            return ()
        if not self.views.crops:
            return (self.views.strong,)
        return tuple(dataclasses.replace(self.views.strong, size=s, scale=(lo, hi)) for s, lo, hi in self.views.crops)

    @property
    def all_views(self) -> tuple[ViewConfig, ...]:
        """What a loader makes of each image: the teacher's view, then the student's."""
        return (self.views.weak, *self.strong_views)

    @property
    def two_way(self) -> bool:
        """Whether student and teacher see both views."""
        fixed = METHODS[self.method.name].two_way
        return self.method.symmetric if fixed is None else fixed

    @property
    def passes(self) -> int:
        """Equal shares that a batch is computed in: parts one after another, each shared out among the devices."""
        return self.accumulate * self.engine.devices * self.engine.nodes

    @property
    def norm_splits(self) -> int:
        """Parts that a batch norm splits each share into: what `encoder.batch_norm_splits` asks for beyond the shares."""
        return max(1, self.encoder.batch_norm_splits // self.passes)

    @property
    def networks(self) -> tuple[str, ...]:
        """What the run trains: a student, and with most methods a teacher."""
        return ("student", "teacher") if METHODS[self.method.name].teacher else ("student",)


def resolve(overrides: Mapping[str, Any], config_file: str | Path | None = None) -> Config:
    """The settings of a run from dotted or nested `overrides` and an optional YAML file.

    Raises:
        ConfigError: with one line for every fault found.
    """
    over: dict[str, Any] = {}
    for key, value in overrides.items():  # each spelled out by itself: `method` beside `method.symmetric` stays a method's name
        over = merge(over, spell_out(nest({key: value})))
    if config_file is not None:
        over = layer(spell_out(read_yaml(Path(config_file))), over)
    asked = over.get("recipe")
    asked = None if asked is None or str(asked).lower() in NULL else asked
    name = str(asked or recipes.for_run(str(over.get("data", "digits")), _method(over)))
    return from_mapping(layer(recipes.read(name), over | {"recipe": name}))


def _method(raw: Mapping[str, Any]) -> str:
    """The method that is asked for, known or not."""
    section = raw.get("method")
    return str(section.get("name", "ressl")) if isinstance(section, Mapping) else "ressl"


def from_mapping(raw: Mapping[str, Any]) -> Config:
    """A checked Config of a nested mapping, such as a run's config.yaml."""
    config: Config = build(Config, _expand_views(merge(_VIEWS_DEFAULT, spell_out(raw))))
    faults = check(config)
    if faults:
        raise ConfigError(*faults)
    return config


_VIEWS_DEFAULT = {"views": {"weak": {"name": "weak"}, "strong": {"name": "contrastive"}}}


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
    traits = METHODS[method.name]
    flattest = max(method.teacher_temperature, method.teacher_temperature_start or 0)
    if traits.sharpened and flattest >= method.student_temperature and not method.allow_unsharpened:
        faults.append(
            f"method.teacher_temperature: {flattest:g} must be below method.student_temperature "
            f"({method.student_temperature:g}), or the teacher's relation is not sharper and training collapses; "
            "method.allow_unsharpened true runs it all the same"
        )
    if method.symmetric and traits.two_way is not None:
        symmetric = ", ".join(name for name, other in METHODS.items() if other.two_way is None)
        faults.append(f"method.symmetric: is for {symmetric}; {method.name} {'is so' if traits.two_way else 'has one direction'}")
    if config.two_way and config.views.crops:
        faults.append(f"views.crops: {method.name} compares two views, views.weak and views.strong; leave views.crops empty")
    if traits.predictor and config.encoder.predictor == "none":
        faults.append(f"encoder.predictor: {method.name} collapses without one; needs mlp or residual")
    if config.accumulate > 1 and traits.whole_batch:
        faults.append(f"accumulate: must be 1 with {method.name}, whose negatives are the rest of the batch")
    faults += _sharing(config)
    if traits.memory and method.memory_size < config.batch_size:
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
    faults += _channel_faults(config)
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


def _sharing(config: Config) -> list[str]:
    """The faults in how a batch is shared out."""
    size, shares, splits = config.batch_size, config.passes, config.encoder.batch_norm_splits
    if size % shares:
        return [
            f"batch_size: {size} must divide into accumulate x devices x nodes = "
            f"{config.accumulate} x {config.engine.devices} x {config.engine.nodes} equal parts"
        ]
    if size // shares < 2:
        return [f"batch_size: {size} leaves one image a part, too few for batch normalisation; raise it"]
    name = "encoder.batch_norm_splits"
    if splits > shares and size % splits:
        return [f"{name}: {splits} must divide batch_size ({size}); change either"]
    if splits > shares and splits % shares:
        return [f"{name}: {splits} must be a multiple of accumulate x devices x nodes ({shares}), or not exceed it"]
    if splits > shares and size // splits < 2:
        return [f"{name}: {splits} of batch_size ({size}) leaves one image a part; needs {size // 2} at most"]
    return []


def differences(config: Config) -> dict[str, Any]:
    """{dotted name: value} of the settings that are not what they would be without a recipe, in the order of Config's fields;
    those of a view, that are not what its named view recipe says."""

    def value(of: Any, name: str) -> Any:
        for part in name.split("."):
            of = getattr(of, part)
        return of

    sides = {side: {"name": value(config, f"views.{side}.name")} for side in ("weak", "strong")}
    plain, named = from_mapping({}), from_mapping({"views": sides})
    usual = {name: value(plain if name.endswith(".name") else named, name) for name in leaves(Config)}
    return {name: value(config, name) for name in usual if value(config, name) != usual[name]}


def _channel_faults(config: Config) -> list[str]:
    channels = config.views.channels
    if channels == 2:
        return ["views.channels: must be 3, or 1 for grey views, got 2"]
    asked = config.backbone_args.get("in_chans", channels)
    if asked == channels:
        return []
    other = f"; set views.channels {asked}" if asked in (1, 3) else ", as images are read in colour or grey; leave it out"
    return [f"backbone_args: in_chans {asked} does not fit views.channels {channels}{other}"]


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that `from_mapping(read_yaml(...))` reads back to an equal Config."""
    plain = dataclasses.asdict(config, dict_factory=lambda items: {k: _plain(v) for k, v in items})
    return yaml.safe_dump(plain, sort_keys=False, width=120, default_flow_style=None)


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
