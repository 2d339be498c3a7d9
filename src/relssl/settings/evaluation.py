"""Every setting of an evaluation, with its help, range and default; imports no torch.

The defaults are the protocols as the papers state them; `docs/evaluation.md` names the source of each.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

from pydantic.dataclasses import dataclass

from relssl.errors import ConfigError
from relssl.settings.reading import STRICT, PathText, build, flat, leaves, setting, spell
from relssl.settings.run import Count, Device, Momentum, Natural, Pixels, Positive, Precision, Probability, Share, Shares

Protocol = Literal["knn", "probe", "linear", "semi", "finetune", "lowshot", "retrieval", "transfer", "detection", "all"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)[:-1]


@dataclass(frozen=True, config=STRICT)
class Measuring:
    """Where images come from, how they are seen, and where the work is done."""

    data_root: PathText | None = setting(None, "where named sets lie; null: the run's, else $RELSSL_DATA, else ~/.cache/relssl")
    size: Pixels | None = setting(None, "side of the view in pixels; null: the one pretraining used")
    seed: Natural = setting(0, "seed of subsets, draws, classifiers, views and intervals")
    device: Device = setting("auto", "where to run")
    precision: Precision = setting("fp32", "of the network; bf16 moves figures a little; auto: bf16 where it is fast")
    workers: int | None = setting(None, "processes that read files; null: one fewer than the cores", ge=0, le=1024)


@dataclass(frozen=True, config=STRICT)
class KnnConfig:
    """Weighted k nearest neighbours; every k with every temperature."""

    k: tuple[Count, ...] = setting((10, 20, 100, 200), "neighbours", min_length=1)
    temperature: tuple[Positive, ...] = setting((0.07, 0.1), "a neighbour votes with exp(similarity / this)", min_length=1)


@dataclass(frozen=True, config=STRICT)
class ProbeConfig:
    """Logistic regression on cached features by L-BFGS."""

    strengths: tuple[Positive, ...] = setting((1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0), "L2 penalties tried", min_length=1)
    held_out: float = setting(0.2, "share of each class of the bank that the penalty is chosen on", gt=0, lt=1)
    iterations: Count = setting(1000, "L-BFGS iterations at most")


@dataclass(frozen=True, config=STRICT)
class LinearConfig:
    """A linear classifier by SGD on augmented images, the backbone frozen: the official code's for ImageNet, and for sets in memory
    what the authors advise for their second code."""

    schedule: Literal["cosine", "step"] = setting("cosine", "cosine to 0 per step, or step: a tenth at 60 % and at 80 %")
    lr: tuple[Positive, ...] = setting((), "a classifier each; empty: 30 for step, for cosine 1 up to 96 pixels, else 0.3")
    epochs: Count = setting(100, "passes over the bank")
    batch_size: Count = setting(256, "images a step at most; all batches of an epoch are alike")
    momentum: Momentum = setting(0.9, "momentum of SGD")
    nesterov: bool | None = setting(None, "Nesterov's momentum; null: the papers', on up to 96 pixels, else off")
    weight_decay: Probability = setting(0.0, "weight decay of the classifier")
    scale: Shares = setting((0.08, 1.0), "share of the area that the random crop keeps")


@dataclass(frozen=True, config=STRICT)
class FinetuneConfig:
    """The whole network trained on labels, from the pretrained backbone; a reconstruction with customary rates."""

    epochs: Count = setting(50, "passes over the labelled images")
    batch_size: int = setting(256, "images a step at most; all batches of an epoch are alike", ge=2, lt=1 << 63)
    lr: Positive = setting(0.01, "learning rate of the backbone")
    head_lr: Positive = setting(0.1, "learning rate of the classifier")
    momentum: Momentum = setting(0.9, "momentum of SGD, Nesterov's")
    weight_decay: Probability = setting(1e-4, "weight decay of all weights but norms and biases")
    scale: Shares = setting((0.08, 1.0), "share of the area that the random crop keeps")


@dataclass(frozen=True, config=STRICT)
class Tuning(FinetuneConfig, Measuring):
    """Fine-tuning for a classifier to use."""

    network: Literal["student", "teacher"] | None = setting(None, "of a run; null: student")


@dataclass(frozen=True, config=STRICT)
class SemiConfig(FinetuneConfig):
    """Fine-tuning on few labels; a reconstruction: SimCLR's optimizer and about its length, rates as of SwAV and Barlow Twins."""

    fractions: tuple[Share, ...] = setting((0.01, 0.1), "shares of the bank that are labelled, of each class alike", min_length=1)
    index: PathText | None = setting(None, "file of the labelled images instead: a name, or a place in the bank from 0, a line")
    lr: Positive = setting(0.02, "learning rate of the backbone")
    head_lr: Positive = setting(0.5, "learning rate of the classifier")
    weight_decay: Probability = setting(0.0, "weight decay of all weights but norms and biases")


@dataclass(frozen=True, config=STRICT)
class LowshotConfig:
    """A linear SVM a class on few images a class, drawn several times."""

    shots: tuple[Natural, ...] = setting((1, 2, 4, 8, 16), "labelled images of each class; 0 means all", min_length=1)
    draws: Count = setting(5, "independent draws, for mean and deviation")
    cost: tuple[Positive, ...] = setting((0.01, 0.1, 1.0, 10.0), "SVM costs, one is chosen by cross-validation", min_length=1)


@dataclass(frozen=True, config=STRICT)
class RetrievalConfig:
    """Finding images of the same class by cosine similarity."""

    at: tuple[Count, ...] = setting((1, 5, 10), "k of recall@k: a hit if any of the k nearest is of the class", min_length=1)
    gallery: Literal["bank", "test"] = setting("bank", "where to search: the bank, or the other test images")


@dataclass(frozen=True, config=STRICT)
class DetectionConfig:
    """torchvision's Faster R-CNN or Mask R-CNN with a feature pyramid on the backbone."""

    model: Literal["auto", "faster-rcnn", "mask-rcnn"] = setting("auto", "auto: mask where the data set has masks")
    epochs: Positive = setting(12.0, "passes over the training images; parts of one count")
    batch_size: Count = setting(2, "images a step")
    lr: Positive = setting(0.0025, "learning rate at its peak; tenths at 2/3 and 11/12 of the run")
    warmup_steps: Natural = setting(100, "steps over which the learning rate rises")
    weight_decay: Probability = setting(1e-4, "weight decay")
    min_size: int = setting(800, "shorter side of the images in pixels", ge=32, lt=1 << 31)
    max_size: int = setting(1333, "longer side at most", ge=32, lt=1 << 31)
    regions: int = setting(512, "proposed regions an image that the heads learn from; fewer are faster", ge=8, lt=1 << 31)
    frozen_stages: int = setting(2, "first stages of the backbone that stay as they are (stem and first: 2)", ge=0, le=5)
    norm: Literal["frozen", "train"] = setting("frozen", "the backbone's batch norm")
    max_images: Count | None = setting(None, "train on this many images at most, chosen by the seed")


@dataclass(frozen=True, config=STRICT)
class Evaluation(Measuring):
    """An evaluation."""

    protocol: tuple[Protocol, ...] = setting(("knn",), "one or several; all: all but detection", min_length=1)
    network: tuple[str, ...] | None = setting(None, "student, teacher or both of a run; null: all it has", min_length=1)
    images: tuple[Count, Count] | None = setting(None, "at most this many images of bank and test, chosen by the seed")
    resamples: int = setting(1000, "bootstrap resamples of the 95 % intervals", ge=100, le=100_000)
    cache: bool = setting(True, "keep features in $RELSSL_CACHE (default ~/.cache/relssl), and take them from there")
    knn: KnnConfig = KnnConfig()
    probe: ProbeConfig = ProbeConfig()
    linear: LinearConfig = LinearConfig()
    semi: SemiConfig = SemiConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    lowshot: LowshotConfig = LowshotConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    detection: DetectionConfig = DetectionConfig()


def read_settings(overrides: Mapping[str, Any], *, typed: bool = False) -> Evaluation:
    """Return checked settings of dotted or nested overrides.

    Raises:
        ConfigError: with a line for every fault; if they were typed, a setting of a protocol that is not asked for is one, too.
    """
    given = spell(flat(overrides), leaves(Evaluation))
    settings: Evaluation = build(Evaluation, given)
    settings = expand(settings)
    used = {*settings.protocol, *(("probe",) if "transfer" in settings.protocol else ())}
    if idle := [name for name in given if typed and "." in name and name.partition(".")[0] not in used]:
        asked = ", ".join(settings.protocol)
        raise ConfigError(*(f"{name}: is of a protocol that is not asked for, only {asked}; leave it out" for name in idle))
    return settings


def expand(settings: Evaluation) -> Evaluation:
    """Return the settings with the protocols that `all` stands for, each once."""
    every = [name for name in PROTOCOLS if name != "detection"]
    protocols = dict.fromkeys(one for name in settings.protocol for one in (every if name == "all" else [name]))
    return replace(settings, protocol=tuple(protocols))
