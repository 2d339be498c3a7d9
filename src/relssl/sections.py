"""The sections of a run's settings, each setting with its help, range and default; part of `config`, imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from relssl.methods import METHODS
from relssl.schema import setting


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
