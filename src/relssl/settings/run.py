"""What each method is made of, known without torch; the methods themselves are in `method/`, one file each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from relssl.errors import ConfigError
from relssl.settings import recipes
from relssl.settings.reading import NULL, build, leaves, merge, nest, read_yaml, setting
from relssl.settings.recipes import layer, spell_out


@dataclass(frozen=True)
class Traits:
    """What a method needs.

    Attributes:
        about: one line for help and docs.
        title: its name in the literature. paper: where it was published.
        teacher: whether a momentum teacher follows the student.
        memory: whether past keys are kept.
        sharpened: whether a teacher's relation is matched, which has to be sharper than the student's.
        two_way: whether the student sees both views (`views.weak` and `views.strong`), and a teacher too; None: if
            `method.symmetric` says so.
        predictor: whether it cannot do without `encoder.predictor`.
        tiled: whether its loss over the memory can be computed in tiles.
        labels: whether it trains on labels.
        whole_batch: whether a batch cannot be computed in parts, as its samples are compared with each other.
    """

    about: str
    title: str
    paper: str
    teacher: bool = False
    memory: bool = False
    sharpened: bool = False
    two_way: bool | None = False
    predictor: bool = False
    tiled: bool = False
    labels: bool = False
    whole_batch: bool = False


METHODS = {
    "ressl": Traits(
        "relations to a memory, sharpened by a teacher of weak views",
        "ReSSL",
        "arXiv 2107.09282",
        teacher=True,
        memory=True,
        sharpened=True,
        tiled=True,
    ),
    "moco": Traits(
        "InfoNCE against a memory of a teacher's keys (MoCo v2)",
        "MoCo v2",
        "arXiv 2003.04297",
        teacher=True,
        memory=True,
        two_way=None,
        tiled=True,
    ),
    "sce": Traits(
        "a mixture of the positive and the teacher's relation as target",
        "SCE",
        "arXiv 2111.14585",
        teacher=True,
        memory=True,
        sharpened=True,
        two_way=None,
    ),
    "simclr": Traits("NT-Xent among the embeddings of the batch", "SimCLR", "arXiv 2002.05709", two_way=True, whole_batch=True),
    "byol": Traits(
        "a predictor finds the teacher's embedding of the other view",
        "BYOL",
        "arXiv 2006.07733",
        teacher=True,
        two_way=True,
        predictor=True,
    ),
    "simsiam": Traits(
        "a predictor finds the student's own embedding of the other view",
        "SimSiam",
        "arXiv 2011.10566",
        two_way=True,
        predictor=True,
    ),
    "supervised": Traits("cross-entropy to the labels, as an upper mark", "labels", "", labels=True),
}


# Shares of red, green and blue in grey, as torchvision makes it.
LUMA = (0.2989, 0.587, 0.114)

_BYOL: dict[str, Any] = {
    "scale": (0.08, 1.0),
    "flip": 0.5,
    "jitter": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "grey": 0.2,
}

# The view recipes by name. `weak`, `contrastive` and `strong` are the official code's target, MoCo v2 and strong
# augmentations (NIPS paper, section 4; the RandAugment pool is FixMatch's). `byol-first` and `byol-second` are T and T' of Grill et
# al. 2020, table 6; `simclr` is Chen et al. 2020, appendix A, at colour strength 1; `supervised` is what ImageNet classifiers
# train on. The digit views move the digit instead of the colours, which handwriting has none of.
VIEWS: dict[str, dict[str, Any]] = {
    "weak": {"scale": (0.2, 1.0), "flip": 0.5},
    "contrastive": {
        "scale": (0.2, 1.0),
        "flip": 0.5,
        "jitter": 0.8,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.4,
        "hue": 0.1,
        "grey": 0.2,
        "blur": 0.5,
    },
    "strong": {
        "scale": (0.08, 1.0),
        "flip": 0.5,
        "jitter": 0.8,
        "brightness": 0.8,
        "contrast": 0.8,
        "saturation": 0.8,
        "hue": 0.2,
        "grey": 0.2,
        "blur": 0.5,
        "randaugment": 5,
    },
    "byol-first": {**_BYOL, "blur": 1.0},
    "byol-second": {**_BYOL, "blur": 0.1, "solarize": 0.2},
    "simclr": {
        "scale": (0.08, 1.0),
        "flip": 0.5,
        "jitter": 0.8,
        "brightness": 0.8,
        "contrast": 0.8,
        "saturation": 0.8,
        "hue": 0.2,
        "grey": 0.2,
        "blur": 0.5,
    },
    "supervised": {"scale": (0.08, 1.0), "flip": 0.5},
    "digit-weak": {"affine": 1.0, "degrees": 5.0, "translate": 0.05, "zoom": (0.9, 1.1)},
    "digit-strong": {
        "affine": 1.0,
        "degrees": 20.0,
        "translate": 0.15,
        "zoom": (0.7, 1.3),
        "jitter": 0.8,
        "brightness": 0.4,
        "contrast": 0.4,
        "blur": 0.3,
        "blur_sigma": (0.1, 1.0),
    },
}


@dataclass(frozen=True)
class ViewConfig:
    """How one random view of an image is drawn; operations apply in the order of these fields."""

    name: str = setting("weak", "named view recipe the other keys start from", choices=tuple(VIEWS))
    size: int = setting(32, "side of the view in pixels", ge=4, le=2048)
    scale: tuple[float, float] | None = setting(None, "share of the image's area that the random crop keeps", gt=0, le=1)
    ratio: tuple[float, float] = setting((0.75, 4 / 3), "aspect ratio of the random crop, width by height", gt=0)
    affine: float = setting(0.0, "probability of a random rotation, shift and zoom", ge=0, le=1)
    degrees: float = setting(0.0, "largest rotation either way, in degrees", ge=0, le=180)
    translate: float = setting(0.0, "largest shift either way, as a share of the side", ge=0, le=1)
    zoom: tuple[float, float] = setting((1.0, 1.0), "range of the zoom factor", gt=0, le=10)
    flip: float = setting(0.0, "probability of a horizontal flip", ge=0, le=1)
    jitter: float = setting(0.0, "probability of colour jitter", ge=0, le=1)
    brightness: float = setting(0.0, "colour jitter: brightness factor within 1 +- this", ge=0, le=1)
    contrast: float = setting(0.0, "colour jitter: contrast factor within 1 +- this", ge=0, le=1)
    saturation: float = setting(0.0, "colour jitter: saturation factor within 1 +- this", ge=0, le=1)
    hue: float = setting(0.0, "colour jitter: hue shift within +- this share of the circle", ge=0, le=0.5)
    grey: float = setting(0.0, "probability of turning grey", ge=0, le=1)
    blur: float = setting(0.0, "probability of Gaussian blur", ge=0, le=1)
    blur_sigma: tuple[float, float] = setting((0.1, 2.0), "range of the blur's standard deviation, in pixels", gt=0, le=16)
    solarize: float = setting(0.0, "probability of inverting what is brighter than half (levels from 128 of 255)", ge=0, le=1)
    randaugment: int = setting(0, "RandAugment operations drawn (FixMatch pool), each applied with probability 0.5", ge=0, le=14)


@dataclass(frozen=True)
class ViewsConfig:
    """What the teacher and the student see."""

    weak: ViewConfig = setting(
        ViewConfig(), "the teacher's view; of methods with two equal views the first; supervised: the only one"
    )
    strong: ViewConfig = setting(ViewConfig(), "the student's views; of methods with two equal views the second")
    crops: tuple[tuple[int, float, float], ...] = setting(
        (), "student crops as [size, min scale, max scale], one view each; empty: one view as `strong` says", gt=0, le=2048
    )
    channels: int = setting(3, "channels of the images that the networks see: 3, or 1, which turns all views grey", ge=1, le=3)
    enlarge: bool = setting(False, "let views be larger than the images of a set in memory, which blows them up")
    mean: tuple[float, float, float] | None = setting(None, "channel means in 0..1; null: those of the data set", ge=0, le=1)
    margin: float | None = setting(
        None,
        "plain view: shorter side before the centre crop, in sizes; null: 1 for sets in memory, 256/224 for files",
        ge=1,
        le=4,
    )
    interpolation: str = setting(
        "bilinear", "plain view: how images are scaled, with antialiasing either way", choices=("bilinear", "bicubic")
    )
    std: tuple[float, float, float] | None = setting(None, "channel deviations in 0..1; null: those of the data set", gt=0, le=1)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Means and deviations of the channels that the networks see, in 0..1, once the data has filled them in.

        Those of grey views are weighted as grey is made; of the deviation that is exact where the three channels vary together,
        as in grey images, and a little too large elsewhere.
        """
        assert self.mean is not None and self.std is not None
        if self.channels == 3:
            return self.mean, self.std
        mean, std = (sum(w * value for w, value in zip(LUMA, values, strict=True)) for values in (self.mean, self.std))
        return (mean,), (std,)


@dataclass(frozen=True)
class EncoderConfig:
    """The network around the backbone."""

    stem: str = setting(
        "standard",
        "first layers: the backbone's own, or a 3x3 convolution of stride 1 without or with the max-pool; small-wide: without, "
        "and padded by 2, as solo-learn's CIFAR networks are",
        choices=("standard", "small", "small-pool", "small-wide"),
    )
    projector_hidden: int = setting(2048, "hidden width of the projector", ge=1, le=65536)
    dim: int = setting(128, "dimension D of the embeddings", ge=2, le=65536)
    projector_layers: int = setting(2, "linear layers of the projector", ge=1, le=8)
    projector_norm: str = setting("none", "normalisation of the projector's hidden layers", choices=("none", "batch"))
    projector_output_norm: str = setting(
        "none",
        "normalisation of the projector's output: none, batch, or plain, which is batch without scale and shift",
        choices=("none", "batch", "plain"),
    )
    predictor: str = setting(
        "none",
        "the student's asymmetric head (TPAMI): none (NIPS), mlp, or residual, which starts as the identity",
        choices=("none", "mlp", "residual"),
    )
    predictor_hidden: int = setting(512, "hidden width of the predictor", ge=1, le=65536)
    predictor_norm: str = setting("batch", "normalisation of the predictor's hidden layer", choices=("none", "batch"))
    batch_norm_splits: int = setting(
        1,
        "parts of the whole batch that the backbone's batch norms treat apart at least; devices and accumulated parts count as "
        "such (the papers: 8)",
        ge=1,
        le=1024,
    )


@dataclass(frozen=True)
class MethodConfig:
    """ReSSL itself, and what it is compared with."""

    name: str = setting("ressl", "; ".join(f"{name}: {traits.about}" for name, traits in METHODS.items()), choices=tuple(METHODS))
    symmetric: bool = setting(
        False, "moco, sce: teacher and student see both views, each is matched to the other, and the first one's keys are kept"
    )
    shuffle: bool = setting(False, "the teacher's batch is shuffled over parts and ranks, so that batch norm tells it nothing")
    positive_share: float = setting(
        0.5, "sce: the positive's share of the target, the teacher's relation has the rest", ge=0, le=1
    )
    allow_unsharpened: bool = setting(False, "let the teacher's temperature reach the student's, for ablations: it collapses")
    memory_size: int = setting(4096, "past teacher embeddings K that relations are taken to", ge=2, le=1 << 24)
    student_temperature: float = setting(0.1, "softmax temperature of the student's relation", gt=0, le=10)
    teacher_temperature: float = setting(0.04, "softmax temperature of the teacher's relation; lower is sharper", gt=0, le=10)
    teacher_temperature_start: float | None = setting(None, "teacher temperature at step 0, null: constant", gt=0, le=10)
    teacher_temperature_epochs: float = setting(0.0, "epochs from the start temperature to the final one, linearly", ge=0)
    teacher_momentum: float = setting(0.99, "momentum m of the teacher's moving average", ge=0, le=1)
    teacher_momentum_end: float | None = setting(
        None, "momentum at the last step, reached on a cosine; null: constant", ge=0, le=1
    )
    warmup: str = setting(
        "none", "how InfoNCE's part of the loss falls from 1 to 0", choices=("none", "hard", "linear", "cosine")
    )
    warmup_share: float = setting(0.2, "share of the run over which InfoNCE's part falls", ge=0, le=1)
    loss_form: str = setting(
        "auto",
        "how the loss is computed, always the same number: plain; tiled, in less memory and time; triton, tiled with a GPU "
        "kernel; auto: tiled, on CUDA the faster of tiled and triton, on MPS plain",
        choices=("auto", "plain", "tiled", "triton"),
    )
    info_nce_temperature: float = setting(0.1, "temperature of the InfoNCE loss (moco and simclr: of their loss)", gt=0, le=10)


@dataclass(frozen=True)
class OptimizerConfig:
    """A linear warm-up and a cosine to zero, per step."""

    name: str = setting("sgd", "sgd, lars (large batches; timm's) or adamw (transformers)", choices=("sgd", "lars", "adamw"))
    lr: float = setting(0.06, "learning rate at its peak, for the whole batch as it is", gt=0, le=1000)
    lr_start: float = setting(0.0, "learning rate at the first step", ge=0, le=1000)
    predictor_lr: float = setting(1.0, "the predictor's learning rate, in times the others'", gt=0, le=1000)
    predictor_schedule: str = setting(
        "same",
        "same: the predictor's learning rate falls as the others'; constant: it stays (SimSiam)",
        choices=("same", "constant"),
    )
    momentum: float = setting(0.9, "momentum of sgd and lars", ge=0, lt=1)
    betas: tuple[float, float] = setting((0.9, 0.999), "decay rates of adamw's two moments", ge=0, lt=1)
    weight_decay: float = setting(5e-4, "weight decay", ge=0, le=1)
    decay: str = setting(
        "all",
        "what decays: all parameters (the papers' small sets), weights (all but norms and biases, by module type), "
        "or official (the ImageNet code's rule by name, which lets downsampling norms decay)",
        choices=("all", "weights", "official"),
    )
    warmup_epochs: float = setting(5.0, "epochs over which the learning rate rises from lr_start to lr", ge=0)
    clip: float | None = setting(None, "largest gradient norm; null: no clipping", gt=0)


@dataclass(frozen=True)
class EngineConfig:
    """Devices and precision."""

    device: str = setting("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    devices: int = setting(1, "processes on this machine, one a device; the batch is shared out among them", ge=1, le=1024)
    nodes: int = setting(1, "machines", ge=1, le=4096)
    precision: str = setting("auto", "auto: bf16 where the hardware is fast at it, else fp32", choices=("auto", "fp32", "bf16"))
    threads: int | None = setting(None, "CPU threads a process; null: all cores shared out", ge=1, le=1024)
    deterministic: bool = setting(False, "refuse GPU kernels whose result varies from run to run")
    timeout: float = setting(600.0, "seconds a rank waits for the others", gt=0)


@dataclass(frozen=True)
class LoaderConfig:
    """How images reach the networks."""

    path: str = setting(
        "auto",
        "resident: uint8 images on the device, views made in batches; files: decoded and viewed in workers",
        choices=("auto", "resident", "files"),
    )
    views_ahead: int | None = setting(
        None,
        "resident path: steps whose views are made in one go; null: up to 8 on GPUs, which start many small tasks slowly, else 1",
        ge=1,
        le=1024,
    )
    workers: int | None = setting(
        None, "loader processes of the files path; null: measured in the run's first steps, views never change", ge=0, le=1024
    )
    prefetch: int | None = setting(None, "batches each worker prepares ahead; null: measured, 2 or 4", ge=1, le=64)
    reduced_decode: bool = setting(
        True, "files path: decode a JPEG at 1/2, 1/4 or 1/8 of its size where each view keeps its resolution"
    )
    decoder: str = setting(
        "pillow",
        "files path: pillow decodes in workers; torchvision decodes JPEGs on the device (nvJPEG on CUDA), workers only read them",
        choices=("pillow", "torchvision"),
    )
    resize: str = setting(
        "torch",
        "files path: who scales crops in workers; torch is faster, and a level off Pillow at most",
        choices=("torch", "pillow"),
    )
    photometric: str = setting(
        "auto",
        "files path: jitter, grey, blur, solarize and RandAugment in workers, or in batches on the device; auto: there on CUDA",
        choices=("auto", "worker", "device"),
    )
    index: bool = setting(True, "keep what a scan of a folder found, and take it at the next start if no folder has changed")
    cache: int | None = setting(
        None,
        "files path: decode all images once, shrink their shorter sides to this many pixels and train on those; null: on the files",
        ge=16,
        le=8192,
    )
    cache_folder: str | None = setting(
        None, "where shrunk images are kept; null: `shrunk` in $RELSSL_CACHE, else in ~/.cache/relssl"
    )
    max_bad_fraction: float = setting(0.1, "stop when more than this share of the images cannot be read", ge=0, le=1)
    max_pixels: int = setting(89_000_000, "images with more pixels than this are skipped", ge=1)


@dataclass(frozen=True)
class LogConfig:
    """What is measured while training."""

    every: int = setting(10, "steps between rows of metrics.jsonl", ge=1)
    knn_every: int = setting(10, "epochs between online kNN evaluations, when labels exist; 0: never", ge=0)
    knn: tuple[int, float] = setting((200, 0.1), "neighbours k and temperature of the online kNN", gt=0)
    knn_images: tuple[int, int] | None = setting(
        None, "at most this many labelled training and test images in the online kNN; null: all", ge=1
    )
    tensorboard: bool = setting(True, "write TensorBoard event files")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved."""

    every: int = setting(1, "epochs between checkpoints", ge=1)
    every_steps: int | None = setting(None, "steps between further checkpoints; null: none", ge=1)
    keep: int = setting(2, "newest checkpoints that are kept", ge=2, le=1000)


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


@dataclass(frozen=True)
class Derived:
    """What follows from the settings of a run.

    Attributes:
        traits: those of its method.
        views: what a loader makes of each image: the teacher's view, then the student's.
        strong: the student's views, one each; a single crop is a list of one. Supervised learning has the first view alone.
        two_way: whether student and teacher see both views.
        passes: equal parts that a batch is computed in: accumulated one after another, each shared out among the devices.
        share: images in each of these parts.
        norm_splits: parts that a batch norm splits each share into, as `encoder.batch_norm_splits` wants beyond the passes.
        networks: what is trained: a student, and with most methods a teacher.
    """

    traits: Traits
    views: tuple[ViewConfig, ...]
    strong: tuple[ViewConfig, ...]
    two_way: bool
    passes: int
    share: int
    norm_splits: int
    networks: tuple[str, ...]


def derive(config: Config) -> Derived:
    """Compute what follows from the settings of a run."""
    traits, views = METHODS[config.method.name], config.views
    strong = tuple(dataclasses.replace(views.strong, size=size, scale=(low, high)) for size, low, high in views.crops)
    strong = () if traits.labels else strong or (views.strong,)
    passes = config.accumulate * config.engine.devices * config.engine.nodes
    return Derived(
        traits=traits,
        views=(views.weak, *strong),
        strong=strong,
        two_way=config.method.symmetric if traits.two_way is None else traits.two_way,
        passes=passes,
        share=config.batch_size // passes,
        norm_splits=max(1, config.encoder.batch_norm_splits // passes),
        networks=("student", "teacher") if traits.teacher else ("student",),
    )


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
    derived = derive(config)
    traits = derived.traits
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
    if derived.two_way and config.views.crops:
        faults.append(f"views.crops: {method.name} compares two views, views.weak and views.strong; leave views.crops empty")
    if traits.predictor and config.encoder.predictor == "none":
        faults.append(f"encoder.predictor: {method.name} collapses without one; needs mlp or residual")
    if config.accumulate > 1 and traits.whole_batch:
        faults.append(f"accumulate: must be 1 with {method.name}, whose negatives are the rest of the batch")
    faults += _sharing(config, derived.passes)
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
    largest = max(view.size for view in derived.views)
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


def _sharing(config: Config, shares: int) -> list[str]:
    """The faults in how a batch is shared out."""
    size, splits = config.batch_size, config.encoder.batch_norm_splits
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
