"""Every setting of a run with its help, range and default, the checks between settings, and what follows from them; no torch.

`Config` is what the user asked for, `derive(config)` what follows from it.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import BeforeValidator, Field, WrapValidator
from pydantic.dataclasses import dataclass

from relssl.errors import ConfigError
from relssl.settings import parts, recipes
from relssl.settings.checks import find_faults
from relssl.settings.methods import METHODS, Traits, traits_of
from relssl.settings.reading import NULL, RETIRED, RISING, STRICT, PathText, Text, build, leaves, read_yaml, setting

MOST_CHANNELS = 16  # of an image
# Shares of red, green and blue in grey, as torchvision makes it.
LUMA = (0.2989, 0.587, 0.114)

# The named view recipes; a view's other settings lie over those of its recipe.
VIEWS: dict[str, dict[str, Any]] = read_yaml(Path(__file__).with_name("views.yaml"))

Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Shares = Annotated[tuple[Share, Share], RISING]
Positive = Annotated[float, Field(gt=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, lt=1 << 63)]
Natural = Annotated[int, Field(ge=0, lt=1 << 63)]
Parts = Annotated[int, Field(ge=1, le=1024)]
Width = Annotated[int, Field(ge=1, le=65536)]
Pixels = Annotated[int, Field(ge=4, le=2048)]
Crop = Annotated[tuple[Pixels, Share, Share], RISING]
Zoom = Annotated[float, Field(gt=0, le=10)]
Sigma = Annotated[float, Field(gt=0, le=16)]
Margin = Annotated[float, Field(ge=1, le=4)]
Logger = Literal["tensorboard", "csv", "wandb", "mlflow"]
# What other programs call a precision.
_PRECISIONS = {"bfloat16": "bf16", "bf16-mixed": "bf16", "float32": "fp32", "32": "fp32", "32-true": "fp32"}


def _device(name: Any) -> Any:
    if not isinstance(name, str) or not re.fullmatch("auto|cpu|mps|(cuda|gpu)(:[0-9]{1,3})?", name):
        raise ValueError("must be auto, cpu, mps, cuda, or one of several such as cuda:1")
    return name.replace("gpu", "cuda")


if TYPE_CHECKING:  # callers hold these as text from elsewhere; what they may be is checked as settings are read
    MethodName: TypeAlias = str
    ViewName: TypeAlias = str
    Device: TypeAlias = str
    Precision: TypeAlias = str
else:
    _PART = WrapValidator(lambda name, named: name if parts.is_part(name) else named(name))
    MethodName, ViewName = Annotated[Literal[tuple(METHODS)], _PART], Annotated[Literal[tuple(VIEWS)], _PART]
    Device = Annotated[str, BeforeValidator(_device)]
    Precision = Annotated[Literal["auto", "fp32", "bf16"], BeforeValidator(lambda name: _PRECISIONS.get(str(name), name))]


@dataclass(frozen=True, config=STRICT)
class ViewConfig:
    """One random view of an image; operations apply in the order of these fields."""

    @property
    def fixed(self) -> bool:
        """True if nothing about the view is random."""
        chances = (self.affine, self.flip, self.jitter, self.grey, self.blur, self.solarize, self.randaugment)
        return self.scale is None and not any(chances) and not parts.is_part(self.name)

    name: ViewName = setting(
        "weak", "named view recipe below the other keys, or your own, package.module:function, which has a size alone"
    )
    size: Pixels = setting(32, "side of the view in pixels")
    scale: Shares | None = setting(None, "share of the image's area that the random crop keeps")
    ratio: Annotated[tuple[Positive, Positive], RISING] = setting((0.75, 4 / 3), "aspect ratio of the crop, width by height")
    affine: Probability = setting(0.0, "probability of a random rotation, shift and zoom")
    degrees: float = setting(0.0, "largest rotation either way, in degrees", ge=0, le=180)
    translate: Probability = setting(0.0, "largest shift either way, as a share of the side")
    zoom: Annotated[tuple[Zoom, Zoom], RISING] = setting((1.0, 1.0), "range of the zoom factor")
    flip: Probability = setting(0.0, "probability of a horizontal flip")
    jitter: Probability = setting(0.0, "probability of colour jitter")
    brightness: Probability = setting(0.0, "colour jitter: brightness factor within 1 +- this")
    contrast: Probability = setting(0.0, "colour jitter: contrast factor within 1 +- this")
    saturation: Probability = setting(0.0, "colour jitter: saturation factor within 1 +- this")
    hue: float = setting(0.0, "colour jitter: hue shift within +- this share of the circle", ge=0, le=0.5)
    grey: Probability = setting(0.0, "probability of turning grey")
    blur: Probability = setting(0.0, "probability of Gaussian blur")
    blur_sigma: Annotated[tuple[Sigma, Sigma], RISING] = setting((0.1, 2.0), "range of the blur's standard deviation, in pixels")
    solarize: Probability = setting(0.0, "probability of inverting what is brighter than half (levels from 128 of 255)")
    randaugment: int = setting(0, "RandAugment operations drawn (FixMatch pool), each applied with probability 0.5", ge=0, le=14)


@dataclass(frozen=True, config=STRICT)
class ViewsConfig:
    """The views of teacher and student."""

    weak: ViewConfig = ViewConfig()  # the teacher's view; of two equal views the first; of supervised learning the only one
    strong: ViewConfig = ViewConfig()  # the student's views; of two equal views the second
    crops: tuple[Crop, ...] = setting((), "student crops [size, min scale, max scale]; empty: as `strong`")
    channels: int = setting(3, "channels that the networks see: your own data's, else 3, or 1: all grey", ge=1, le=MOST_CHANNELS)
    enlarge: bool = setting(False, "let views be larger than the images of a set in memory, which blows them up")
    mean: tuple[Probability, ...] | None = setting(None, "channel means in 0..1; null: the data set's")
    margin: Margin | None = setting(None, "plain view: sizes of the shorter side before the crop; null: 1, files 256/224")
    interpolation: Literal["bilinear", "bicubic"] = setting("bilinear", "plain view: how images are scaled, antialiased")
    std: tuple[Share, ...] | None = setting(None, "channel deviations in 0..1; null: the data set's")

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return means and deviations of the channels that the networks see, in 0..1, once the data has filled them in.

        Those of colours that turn grey are weighted as grey is made, which makes the deviation a little too large for colourful images.

        Raises:
            ConfigError: for another number of them.
        """
        assert self.mean is not None and self.std is not None
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (self.channels, 3 if self.channels == 1 else self.channels):
                raise ConfigError(
                    f"views.{name}: has {len(values)} values for the {self.channels} channels that the networks see"
                )
        mean, std = (
            values if len(values) == self.channels else (sum(w * value for w, value in zip(LUMA, values, strict=True)),)
            for values in (self.mean, self.std)
        )
        return mean, std


@dataclass(frozen=True, config=STRICT)
class EncoderConfig:
    """The network around the backbone."""

    stem: Literal["standard", "small", "small-pool", "small-wide"] = setting(
        "standard", "first layers: the backbone's own, or a 3x3 convolution of stride 1; -pool: and max-pool; -wide: padded by 2"
    )
    projector_hidden: Width = setting(2048, "hidden width of the projector")
    dim: int = setting(128, "dimension D of the embeddings", ge=2, le=65536)
    projector_layers: int = setting(2, "linear layers of the projector", ge=1, le=8)
    projector_norm: Literal["none", "batch"] = setting("none", "normalisation of the projector's hidden layers")
    projector_output_norm: Literal["none", "batch", "plain"] = setting(
        "none", "of the projector's output; plain: no scale and shift"
    )
    predictor: Literal["none", "mlp", "residual"] = setting("none", "the student's own head; residual starts as the identity")
    predictor_hidden: Width = setting(512, "hidden width of the predictor")
    predictor_norm: Literal["none", "batch"] = setting("batch", "normalisation of the predictor's hidden layer")
    frozen_stages: Natural = setting(0, "first stages of the backbone (timm's; the stem is one) that stay as `start` has them")
    batch_norm_splits: Parts = setting(1, "least parts of a batch for batch norms, devices and accumulated ones included")


@dataclass(frozen=True, config=STRICT)
class MethodConfig:
    """ReSSL itself, and what it is compared with."""

    name: MethodName = setting(
        "ressl", "; ".join(f"{name}: {traits.about}" for name, traits in METHODS.items()) + "; or your own, package.module:Class"
    )
    symmetric: bool = setting(False, "moco, sce: both networks see both views, matched crosswise; the first one's keys are kept")
    shuffle: bool = setting(False, "the teacher's batch is shuffled over parts and ranks, so that batch norm tells it nothing")
    positive_share: Probability = setting(0.5, "sce: the positive's share of the target, the teacher's relation has the rest")
    allow_unsharpened: bool = setting(False, "let the teacher's temperature reach the student's, for ablations: it collapses")
    memory_size: int = setting(4096, "past teacher embeddings K that relations are taken to", ge=2, le=1 << 24)
    student_temperature: float = setting(0.1, "softmax temperature of the student's relation", gt=0, le=10)
    relation: Literal["embeddings", "features"] = setting(
        "embeddings", "ressl: what the teacher's relation compares; features: its backbone's, an option of later methods"
    )
    sinkhorn_iterations: int = setting(
        0,
        "ressl: iterations that balance the teacher's relations over the memory, an option of later methods; 0: none",
        ge=0,
        le=100,
    )
    teacher_temperature: float = setting(0.04, "softmax temperature of the teacher's relation; lower is sharper", gt=0, le=10)
    teacher_temperature_start: float | None = setting(None, "teacher temperature at step 0; null: constant", gt=0, le=10)
    teacher_temperature_epochs: float = setting(0.0, "epochs from the start temperature to the final one, linearly", ge=0)
    teacher_momentum: Probability = setting(0.99, "momentum m of the teacher's moving average")
    teacher_momentum_end: Probability | None = setting(None, "momentum at the last step, reached on a cosine; null: constant")
    warmup: Literal["none", "hard", "linear", "cosine"] = setting("none", "how InfoNCE's part of the loss falls from 1 to 0")
    warmup_share: Probability = setting(0.2, "share of the run over which InfoNCE's part falls")
    loss_form: Literal["auto", "plain", "tiled"] = setting("auto", "tiled takes less memory and time; auto: tiled, on MPS plain")
    info_nce_temperature: float = setting(0.1, "temperature of the InfoNCE loss (moco and simclr: of their loss)", gt=0, le=10)


@dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
    """A linear warm-up and a cosine to zero, per step."""

    name: Literal["sgd", "lars", "adamw"] = setting("sgd", "sgd, lars (large batches; timm's) or adamw (transformers)")
    lr: float = setting(0.06, "peak learning rate, for the whole batch as it is", gt=0, le=1000)
    lr_start: float = setting(0.0, "learning rate at the first step", ge=0, le=1000)
    predictor_lr: float = setting(1.0, "the predictor's learning rate, in times the others'", gt=0, le=1000)
    predictor_schedule: Literal["same", "constant"] = setting("same", "of the predictor's learning rate; constant: as SimSiam's")
    momentum: Momentum = setting(0.9, "momentum of sgd and lars")
    betas: tuple[Momentum, Momentum] = setting((0.9, 0.999), "decay rates of adamw's two moments")
    weight_decay: Probability = setting(5e-4, "weight decay")
    decay: Literal["all", "weights", "official"] = setting(
        "all",
        "what decays; weights: all but norms and biases; official: so by the ImageNet code's names, with downsampling norms",
    )
    warmup_epochs: float = setting(5.0, "epochs over which the learning rate rises from lr_start to lr", ge=0)
    heads_first: float = setting(0.0, "first epochs, in which the heads alone train and the backbone stays as `start`", ge=0)
    layer_decay: Share | None = setting(None, "learning rate of each layer (timm's groups) in times the next one's; null: alike")
    clip: float | None = setting(None, "largest gradient norm; null: no clipping", gt=0)


@dataclass(frozen=True, config=STRICT)
class EngineConfig:
    """Devices and precision."""

    device: Device = setting("auto", "where to run: auto, cpu, mps, cuda, or one of several such as cuda:1")
    devices: Parts = setting(1, "processes on this machine, one a device; the batch is shared out among them")
    nodes: int = setting(1, "machines", ge=1, le=4096)
    precision: Precision = setting("auto", "auto: bf16 where the hardware is fast at it, else fp32; fp16 is not used")
    threads: Parts | None = setting(None, "CPU threads a process; null: all cores shared out")
    deterministic: bool = setting(False, "refuse GPU kernels whose result varies from run to run")
    timeout: float = setting(600.0, "seconds a rank waits for the others", gt=0)


@dataclass(frozen=True, config=STRICT)
class LoaderConfig:
    """The way of images to the networks."""

    path: Literal["auto", "resident", "files"] = setting("auto", "resident: on the device; files: decoded in workers")
    views_ahead: Parts | None = setting(None, "resident path: steps whose views are made at once; null: 8 on GPUs, else 1")
    workers: int | None = setting(None, "loader processes of the files path; null: one fewer than the cores", ge=0, le=1024)
    reduced_decode: bool = setting(True, "files path: decode a JPEG at 1/2, 1/4 or 1/8 where each view keeps its resolution")
    cache: int | None = setting(None, "files path: shrink shorter sides to this many pixels, once; null: no", ge=16, le=8192)
    cache_folder: PathText | None = setting(None, "folder of shrunk images; null: `shrunk` in $RELSSL_CACHE or ~/.cache/relssl")
    max_bad_fraction: Probability = setting(0.1, "stop when more than this share of the images cannot be read")
    max_pixels: Count = setting(89_000_000, "images with more pixels than this are skipped")


@dataclass(frozen=True, config=STRICT)
class LogConfig:
    """Measurements while training."""

    every: Count = setting(10, "steps between rows of metrics.jsonl")
    knn_every: Natural = setting(10, "epochs between online evaluations, of kNN when labels exist; 0: never")
    knn: tuple[Count, Positive] = setting((200, 0.1), "neighbours k and temperature of the online kNN")
    knn_images: tuple[Count, Count] | None = setting(None, "training and test images of the online kNN at most; null: all")
    alarms: Literal["warn", "stop", "off"] = setting("warn", "what signs of training that cannot learn do; stop: end it, saved")
    report: bool = setting(True, "write report.html, a page to look at, when the run is complete")
    to: tuple[Logger, ...] = setting(("tensorboard",), "where rows go besides metrics.jsonl; empty: nowhere")


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    """When the state is saved."""

    every: Count = setting(1, "epochs between checkpoints")
    every_steps: Count | None = setting(None, "steps between further checkpoints; null: none")
    keep: int = setting(2, "newest checkpoints that are kept", ge=2, le=1000)
    best: Literal["knn", "label-free", "off"] = setting("knn", "figure of the best checkpoint; label-free: positive_margin")


@dataclass(frozen=True, config=STRICT)
class Config:
    """A run, as the user asked for it."""

    data: PathText = setting("digits", "name of a data set, folder of images, list file, hf:NAME, hf:FOLDER or shards:PATTERN")
    recipe: PathText | None = setting(None, "named recipe or recipe file; null: the one named after the data, else `folder`")
    data_root: PathText | None = setting(None, "where named data sets lie; null: $RELSSL_DATA, else ~/.cache/relssl")
    out: PathText | None = setting(None, "run folder; null: runs/RECIPE-SEED")
    backbone: Text = setting(
        "resnet18", "the network: timm's name, torchvision/ and torchvision's (see relssl backbones), or package.module:function"
    )
    backbone_args: dict[str, Any] = setting({}, "arguments for timm.create_model or the network's function, as {name: value}")
    start: PathText | None = setting(None, "weights to begin with; a run, file or timm name, with its network; null: random")
    start_from: Text | None = setting(None, "layout of start, if another program wrote it; null: recognised by its names")
    teacher: PathText | None = setting(None, "a frozen teacher; a run, a file or a timm name; null: the student's moving average")
    teacher_from: Text | None = setting(None, "layout of teacher, if another program wrote it; null: recognised by its names")
    compile: Literal["auto", "off", "on"] = setting("auto", "torch.compile; auto: for CUDA in runs of 2,000 steps or more")
    epochs: Count = setting(200, "passes over the images")
    max_steps: Count | None = setting(None, "optimizer steps after which the run ends, if `epochs` are more; null: none")
    batch_size: int = setting(256, "images an optimizer step, over all devices and accumulated parts", ge=2, lt=1 << 63)
    fit_batch: bool = setting(False, "lower batch_size to what fits in memory, and optimizer.lr with it; as batch_size auto")
    accumulate: Count = setting(1, "equal parts a batch is computed in, one after another")
    seed: Natural = setting(0, "seed of weights, memory, order and views")
    max_images: Count | None = setting(None, "train on this many images, chosen by the seed; null: all")
    time_limit: float | None = setting(None, "minutes after which the run saves and stops; with exit code 75", gt=0)
    views: ViewsConfig = ViewsConfig()
    encoder: EncoderConfig = EncoderConfig()
    method: MethodConfig = MethodConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    loader: LoaderConfig = LoaderConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    # No setting: the dotted names of those that the user typed; the others give way to small data. None, as of stored runs: nothing does.
    typed: Annotated[frozenset[str] | None, Field(exclude=True)] = dataclasses.field(default=None, compare=False, repr=False)

    def steps(self, images: int) -> int:
        """Return the optimizer steps of the run on so many images."""
        return min(self.epochs * (images // self.batch_size), self.max_steps or 1 << 63)

    @property
    def length(self) -> str:
        """The length in words, as set."""
        return f"{self.epochs} epochs" if self.max_steps is None else f"at most {self.max_steps} steps"


@dataclass(frozen=True)
class Derived:
    """Consequences of the settings of a run."""

    traits: Traits
    views: tuple[ViewConfig, ...]  # made of each image: the teacher's view, then the student's
    strong: tuple[ViewConfig, ...]  # the student's views; a single crop is a list of one, and supervised learning has none
    two_way: bool  # student and teacher see both views
    passes: int  # equal parts that a batch is computed in: accumulated one after another, each shared out among the devices
    share: int  # images in each of these parts
    norm_splits: int  # parts that a batch norm splits each share into, as `encoder.batch_norm_splits` wants beyond the passes
    backward: int  # views of a sample through which a step propagates back
    networks: tuple[str, ...]  # a student, and with most methods a teacher


def derive(config: Config) -> Derived:
    """Compute what follows from the settings of a run."""
    traits, views = traits_of(config.method.name), config.views
    strong = tuple(dataclasses.replace(views.strong, size=size, scale=(low, high)) for size, low, high in views.crops)
    strong = () if traits.labels else strong or (views.strong,)
    two_way = config.method.symmetric if traits.two_way is None else traits.two_way
    passes = config.accumulate * config.engine.devices * config.engine.nodes
    return Derived(
        traits=traits,
        views=(views.weak, *strong),
        strong=strong,
        two_way=two_way,
        passes=passes,
        share=config.batch_size // passes,
        norm_splits=max(1, config.encoder.batch_norm_splits // passes),
        backward=1 + len(strong) if two_way else max(1, len(strong)),
        networks=("student", "teacher") if traits.teacher and config.teacher is None else ("student",),
    )


@contextlib.contextmanager
def handed_over(data: Any, config: str | Path | None, settings: Config | None, overrides: Mapping[str, Any]) -> Iterator[Config]:
    """Yield the settings that a call in Python gives, with the objects that it hands over at hand; arguments as of `pretrain`.

    Raises:
        ConfigError: as `resolve`, and if other settings are given beside `settings`.
    """
    named = {name: value for name, value in {"data": data, "config": config}.items() if value is not None}
    if settings is not None and (beside := [*named, *overrides]):
        raise ConfigError(f"settings: holds all settings; leave out {', '.join(beside)}, or put it into dataclasses.replace")
    over = recipes.spell_out(overrides)
    if data is not None and over.setdefault("data", data) is not data:
        raise ConfigError("data: is given twice; give it once")
    over, objects = parts.named(over)
    with parts.at_hand(objects):
        yield resolve(over, config) if settings is None else settings


def resolve(overrides: Mapping[str, Any], config_file: str | Path | None = None) -> Config:
    """Return the settings of a run from dotted or nested `overrides` and an optional YAML file, laid over its recipe.

    Raises:
        ConfigError: with one line for every fault.
    """
    over = recipes.spell_out(overrides)
    if config_file is not None:
        over = recipes.layer(_current(read_yaml(Path(config_file))), over)
    recipe, method = str(over.get("recipe") or ""), str(over.get("method.name", "ressl"))
    below = {} if recipe.lower() in NULL or "data" in over else recipes.read(recipe)
    usual = recipes.for_run(str(over.get("data", below.get("data", "digits"))), method)
    recipe = usual if recipe.lower() in NULL else recipe
    typed = frozenset([*over, *("backbone_args" for name in over if name.startswith("backbone_args."))])
    below = recipes.read(recipe, data=usual)
    return _checked(recipes.layer(_current(below), over | {"recipe": recipe}), typed)


def from_mapping(raw: Mapping[str, Any]) -> Config:
    """Return the checked Config of a mapping, such as a run's config.yaml; retired settings in it are passed over."""
    return _checked(_current(raw))


def _current(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a file without those that are no more."""
    return {name: value for name, value in recipes.spell_out(raw).items() if not {name, f"{name} {value}"} & RETIRED.keys()}


def _checked(raw: dict[str, Any], typed: frozenset[str] | None = None) -> Config:
    """Put the named view recipes under the keys of each view, build, and check what lies between settings."""
    for name, usual in (("views.weak", "weak"), ("views.strong", "contrastive")):
        named = {"name": usual} | VIEWS.get(str(raw.get(f"{name}.name", usual)), {})
        raw = {f"{name}.{key}": value for key, value in named.items()} | raw
    # What the recipe says of the first layers and operations is for parts of ours.
    own = [f"{view}." for view in ("views.weak", "views.strong") if parts.is_part(raw.get(f"{view}.name"))]
    theirs = {f"{view}{key}" for view in own for key in ViewConfig.__dataclass_fields__ if key not in ("name", "size")}
    theirs |= {"encoder.stem"} if parts.is_part(raw.get("backbone")) else set()
    raw = {name: value for name, value in raw.items() if name not in theirs - (typed or set())}
    return check(dataclasses.replace(build(Config, raw), typed=typed))


def check(config: Config) -> Config:
    """Return settings that fit each other; ConfigError with a line for each two that do not."""
    if faults := list(find_faults(config, derive(config))):
        raise ConfigError(*faults)
    return config


def differences(config: Config) -> dict[str, Any]:
    """Return {dotted name: value} of the settings that are not what they would be without a recipe, in the order of the fields;
    those of a view, that are not what its named view recipe says."""
    plain, named = from_mapping({}), from_mapping({"views": {"weak": config.views.weak.name, "strong": config.views.strong.name}})
    pairs = {name: (attrgetter(name)(config), attrgetter(name)(plain if ".name" in name else named)) for name in leaves(Config)}
    return {name: value for name, (value, usual) in pairs.items() if value != usual}


def to_mapping(config: Config) -> dict[str, Any]:
    """Return all settings, section by section, as `from_mapping` reads them back to an equal Config."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name != "typed"}


def to_yaml(config: Config) -> str:
    """Return all settings as YAML that `from_mapping(read_yaml(...))` reads back to an equal Config."""
    plain = json.loads(json.dumps(to_mapping(config)))  # without tuples
    return yaml.safe_dump(plain, sort_keys=False, width=120, default_flow_style=None)
