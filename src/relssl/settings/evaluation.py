"""Every setting of an evaluation, with its help, range and default; imports no torch.

The defaults are the protocols as the papers state them; `docs/evaluation.md` names the source of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from relssl.errors import ConfigError
from relssl.settings.reading import build, nearest_word, nest, setting

PROTOCOLS = ("knn", "probe", "linear", "semi", "finetune", "lowshot", "retrieval", "transfer", "detection")


@dataclass(frozen=True)
class KnnConfig:
    """Weighted k nearest neighbours; every k with every temperature."""

    k: tuple[int, ...] = setting((10, 20, 100, 200), "neighbours", ge=1)
    temperature: tuple[float, ...] = setting((0.07, 0.1), "a neighbour votes with exp(similarity / this)", gt=0)


@dataclass(frozen=True)
class ProbeConfig:
    """Logistic regression on cached features by L-BFGS."""

    strengths: tuple[float, ...] = setting(
        (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0), "L2 penalties tried on the held-out part of the bank", gt=0
    )
    held_out: float = setting(0.2, "share of each class of the bank that the penalty is chosen on", gt=0, lt=1)
    iterations: int = setting(1000, "L-BFGS iterations at most", ge=1)


@dataclass(frozen=True)
class LinearConfig:
    """A linear classifier by SGD on augmented images, the backbone frozen: the paper's protocol.

    Defaults: the official code (ImageNet), and for sets in memory what the authors advise for their second code.
    """

    schedule: str = setting("cosine", "cosine to 0 per step, or step: a tenth at 60 % and at 80 %", choices=("cosine", "step"))
    lr: tuple[float, ...] = setting(
        (),
        "learning rates, each a classifier of its own; empty: the paper's, 30 for step, for cosine 1 in memory and 0.3 on files",
        gt=0,
    )
    epochs: int = setting(100, "passes over the bank", ge=1)
    batch_size: int = setting(256, "images a step at most; all batches of an epoch are alike", ge=1)
    momentum: float = setting(0.9, "momentum of SGD", ge=0, lt=1)
    nesterov: bool | None = setting(None, "Nesterov's momentum; null: the paper's, on in memory and off on files")
    weight_decay: float = setting(0.0, "weight decay of the classifier", ge=0, le=1)
    scale: tuple[float, float] = setting((0.08, 1.0), "share of the area that the random crop keeps", gt=0, le=1)


@dataclass(frozen=True)
class FinetuneConfig:
    """The whole network trained on labels, from the pretrained backbone.

    A reconstruction: what the papers of this method did is not known, and the rates are customary ones.
    """

    epochs: int = setting(50, "passes over the labelled images", ge=1)
    batch_size: int = setting(256, "images a step at most; all batches of an epoch are alike", ge=2)
    lr: float = setting(0.01, "learning rate of the backbone", gt=0)
    head_lr: float = setting(0.1, "learning rate of the classifier", gt=0)
    momentum: float = setting(0.9, "momentum of SGD, Nesterov's", ge=0, lt=1)
    weight_decay: float = setting(1e-4, "weight decay of all weights but norms and biases", ge=0, le=1)
    scale: tuple[float, float] = setting((0.08, 1.0), "share of the area that the random crop keeps", gt=0, le=1)


@dataclass(frozen=True)
class SemiConfig:
    """Fine-tuning on few labels.

    A reconstruction: what the papers of this method did is not known. SimCLR's optimizer, about its length (60 and 30 epochs;
    SwAV and Barlow Twins: 20), and rates among those of SwAV (0.02, classifier 5 on 1 %; 0.01, 0.2 on 10 %) and of Barlow Twins
    (0.002, 0.5).
    """

    fractions: tuple[float, ...] = setting(
        (0.01, 0.1), "shares of the bank whose labels are used, the same of each class", gt=0, le=1
    )
    index: str | None = setting(
        None, "file with the labelled images instead, a line each: a name, or a position in the bank counted from 0"
    )
    epochs: int = setting(50, "passes over the labelled images", ge=1)
    batch_size: int = setting(256, "images a step at most; all batches of an epoch are alike", ge=2)
    lr: float = setting(0.02, "learning rate of the backbone", gt=0)
    head_lr: float = setting(0.5, "learning rate of the classifier", gt=0)
    momentum: float = setting(0.9, "momentum of SGD, Nesterov's", ge=0, lt=1)
    weight_decay: float = setting(0.0, "weight decay of all weights but norms and biases", ge=0, le=1)
    scale: tuple[float, float] = setting((0.08, 1.0), "share of the area that the random crop keeps", gt=0, le=1)


@dataclass(frozen=True)
class LowshotConfig:
    """A linear SVM a class on few images a class, drawn several times."""

    shots: tuple[int, ...] = setting((1, 2, 4, 8, 16), "labelled images of each class; 0 means all", ge=0)
    draws: int = setting(5, "independent draws, for mean and deviation", ge=1)
    cost: tuple[float, ...] = setting((0.01, 0.1, 1.0, 10.0), "SVM costs, chosen by cross-validation on the drawn images", gt=0)


@dataclass(frozen=True)
class RetrievalConfig:
    """Finding images of the same class by cosine similarity."""

    at: tuple[int, ...] = setting((1, 5, 10), "k of recall@k: a hit if any of the k nearest is of the class", ge=1)
    gallery: str = setting("bank", "where is searched: the bank, or the other test images", choices=("bank", "test"))


@dataclass(frozen=True)
class DetectionConfig:
    """torchvision's Faster R-CNN or Mask R-CNN with a feature pyramid on the backbone."""

    model: str = setting("auto", "auto: mask where the data set has masks", choices=("auto", "faster-rcnn", "mask-rcnn"))
    epochs: float = setting(12.0, "passes over the training images; parts of one count", gt=0)
    batch_size: int = setting(2, "images a step", ge=1)
    lr: float = setting(0.0025, "learning rate at its peak; tenths at 2/3 and 11/12 of the run", gt=0)
    warmup_steps: int = setting(100, "steps over which the learning rate rises", ge=0)
    weight_decay: float = setting(1e-4, "weight decay", ge=0, le=1)
    min_size: int = setting(800, "shorter side of the images in pixels", ge=32)
    max_size: int = setting(1333, "longer side at most", ge=32)
    regions: int = setting(512, "proposed regions an image that the heads learn from; fewer are faster", ge=8)
    frozen_stages: int = setting(2, "first stages of the backbone that stay as they are (stem and first: 2)", ge=0, le=5)
    norm: str = setting("frozen", "the backbone's batch norm", choices=("frozen", "train"))
    max_images: int | None = setting(None, "train on this many images at most, chosen by the seed", ge=1)


@dataclass(frozen=True)
class Evaluation:
    """An evaluation."""

    protocol: tuple[str, ...] = setting(
        ("knn",), f"one or several of {', '.join(PROTOCOLS)}; all: every one but detection, whose data is of another kind"
    )
    network: tuple[str, ...] | None = setting(None, "which networks of a run: student, teacher or both; null: all it has")
    data_root: str | None = setting(None, "where named data sets lie; null: the run's, else $RELSSL_DATA, else ~/.cache/relssl")
    images: tuple[int, int] | None = setting(None, "at most this many images of bank and test, chosen by the seed", ge=1)
    size: int | None = setting(None, "side of the view in pixels; null: the one pretraining used", ge=4, le=2048)
    seed: int = setting(0, "seed of subsets, draws, classifiers and intervals", ge=0)
    resamples: int = setting(1000, "bootstrap resamples of the 95 % intervals", ge=100, le=100_000)
    device: str = setting("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = setting(
        "fp32",
        "of the network's arithmetic; bf16 moves figures a little; auto: bf16 where it is fast",
        choices=("auto", "fp32", "bf16"),
    )
    workers: int | None = setting(None, "processes that read files; null: by the number of cores", ge=0, le=1024)
    cache: bool = setting(True, "keep features in $RELSSL_CACHE (default ~/.cache/relssl), and take them from there")
    knn: KnnConfig = setting(KnnConfig(), "knn")
    probe: ProbeConfig = setting(ProbeConfig(), "probe")
    linear: LinearConfig = setting(LinearConfig(), "linear")
    semi: SemiConfig = setting(SemiConfig(), "semi")
    finetune: FinetuneConfig = setting(FinetuneConfig(), "finetune")
    lowshot: LowshotConfig = setting(LowshotConfig(), "lowshot")
    retrieval: RetrievalConfig = setting(RetrievalConfig(), "retrieval")
    detection: DetectionConfig = setting(DetectionConfig(), "detection")


# Lists that a protocol cannot do without.
_NEEDED = ("knn.k", "knn.temperature", "probe.strengths", "semi.fractions", "lowshot.shots", "lowshot.cost", "retrieval.at")


def read_settings(overrides: Mapping[str, Any]) -> Evaluation:
    """Checked settings of dotted or nested overrides.

    Raises:
        ConfigError: with a line for every fault, unknown protocols and networks among them.
    """
    made: Evaluation = build(Evaluation, nest(overrides))
    if made.protocol == ("all",):
        made = replace(made, protocol=tuple(name for name in PROTOCOLS if name != "detection"))
    faults = [
        f"protocol: {name!r} is unknown; the nearest is {nearest_word(name, PROTOCOLS)}"
        for name in made.protocol
        if name not in PROTOCOLS
    ]
    if not made.protocol or made.network == ():
        faults.append("protocol and network: name one at least")
    faults += [f"{name}: is empty; give at least one value" for name in _NEEDED if not attrgetter(name)(made)]
    for section in ("linear", "finetune", "semi"):
        low, high = getattr(made, section).scale
        if low > high:
            faults.append(f"{section}.scale: the first bound must not exceed the second, got {low:g},{high:g}")
    if faults:
        raise ConfigError(*faults)
    return made
