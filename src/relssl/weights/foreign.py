"""Backbones from other programs' files, strictly: every name in the file is matched, known to be something else, or refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from relssl.data import digits
from relssl.data.images import IMAGENET_MEAN, IMAGENET_STD
from relssl.data.plain import PlainView, plain_batch
from relssl.errors import CheckpointError, ConfigError
from relssl.method.backbones import TORCHVISION, create_backbone
from relssl.weights import store, twins
from relssl.weights.layouts import LAYOUTS, PLAIN, bare_name, find_layout, find_state, infer_resnet, name_children, read, split
from relssl.weights.spec import BackboneSpec, mismatches

_CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
_SIZES = {"standard": 224, "small": 32, "small-wide": 32, "small-pool": 64}


@dataclass(frozen=True)
class Reading:
    """Options for reading weights; all but `network` and `size` is about files of other programs.

    Attributes:
        layout: one of `LAYOUTS`; None: recognised by the names in the file.
        backbone: timm's name; None: inferred from names and shapes, for ResNets.
        stem: as `encoder.stem`; None: standard, or for a 3x3 first convolution that of the layout. A max-pool has no weights and
            cannot be seen: say small-pool for STL-10 and Tiny-ImageNet networks.
        network: student or teacher, of runs (None: all they have) and of files that hold both (None: the one their authors evaluate).
        allow: names, or beginnings of names that end in `.` or `*`, that may be missing or unexpected; `untrained` allows weights
            that look like those of a fresh network.
        size: side of the view in pixels; None: the run's own; of a file 224, 32 for small stems, 64 for small-pool.
    """

    layout: str | None = None
    backbone: str | None = None
    stem: str | None = None
    network: str | None = None
    allow: Sequence[str] = ()
    size: int | None = None


@dataclass
class LoadReport:
    """An account of every name in a file.

    Attributes:
        file, layout, network, backbone, stem: what was read as what.
        detected: whether the layout was recognised by the names rather than given.
        matched, total: weights of the backbone that the file holds, of all that it has.
        left_out: names known to be something else (heads, queue, optimizer), and the number of tensors of each.
        missing, unexpected: names that did not match and were allowed, without `module.` in front.
        notes: what was assumed, for people.
        out: where `import_weights` wrote it.
    """

    file: str
    layout: str
    detected: bool
    network: str
    backbone: str
    stem: str
    matched: int = 0
    total: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    out: str | None = None

    def gaps(self) -> tuple[str, ...]:
        """Return what was allowed and belongs beside every figure of these weights."""
        texts = {
            f"{len(self.missing)} of {self.total} weights are not in {self.file} and fresh": self.missing,
            f"{len(self.unexpected)} names in {self.file} were left out": self.unexpected,
        }
        return tuple(f"{text}, {names[0]} the first" for text, names in texts.items() if names)

    def lines(self) -> list[str]:
        """Return the report as text, a line each."""
        left = ", ".join(f"{name} ({count})" if count else name for name, count in self.left_out.items()) or "nothing"
        how = " (recognised by its names)" if self.detected else ""
        return [
            f"{self.file}: layout {self.layout}{how}, {self.network}, {self.backbone}, stem {self.stem}",
            f"matched {self.matched} of {self.total}, missing {len(self.missing)}, unexpected {len(self.unexpected)}; left out: {left}",
            *self.notes,
        ]


def _match(
    weights: Mapping[str, Tensor],
    prefix: str,
    wanted: Mapping[str, Tensor],
    heads: Sequence[str],
    allow: Sequence[str],
    report: LoadReport,
    path: Path,
) -> dict[str, Tensor]:
    """Return the backbone's weights, complete; what is left out, missing and unexpected goes into the report.

    Args:
        weights: those in the file, by their names in the backbone; `prefix` stands before them in the file.
        wanted: every weight of the network; their values stand in for those that are allowed to be missing.
        heads: prefixes among the backbone's names that are no part of it.
    """
    faults = mismatches(wanted, weights)
    for name in faults.get("unexpected", ()):
        if head := next(filter(name.startswith, heads), None):
            report.left_out[prefix + head] = report.left_out.get(prefix + head, 0) + 1
        else:
            report.unexpected.append(prefix + name)
    # Files from before PyTorch 0.4.1 have no counters, and nothing reads them here.
    counters = [name for name in faults.get("missing", ()) if name.endswith("num_batches_tracked")]
    if counters:
        report.notes.append(f"{len(counters)} counters num_batches_tracked are not in the file and start at 0")
    shapes = faults.get("other shape", [])
    usable = {name: weights[name] for name in wanted if name in weights and name not in shapes}
    report.matched, report.total = len(usable), len(wanted) - len(counters)
    report.missing = [prefix + name for name in faults.get("missing", ()) if name not in counters]
    report.unexpected.sort()
    starts = tuple(bare_name(name.removesuffix("*")) for name in allow if name.endswith((".", "*")))
    exact = {bare_name(name) for name in allow}
    lists = {
        kind: [name for name in names if bare_name(name) not in exact and not bare_name(name).startswith(starts)]
        for kind, names in (("missing", report.missing), ("unexpected", report.unexpected))
    }
    lists["other shape"] = [f"{prefix}{name} {list(weights[name].shape)} for {list(wanted[name].shape)}" for name in shapes]
    lists["unusable"] = [f"{prefix}{name} ({fault})" for name in usable if (fault := _fault(usable[name], wanted[name]))]
    if any(lists.values()):
        parts = [
            f"{kind} ({len(names)}): {', '.join(names[:3])}{' ...' * (len(names) > 3)}" for kind, names in lists.items() if names
        ]
        raise CheckpointError(
            f"{path}: {report.matched} of {report.total} weights of {report.backbone} (stem {report.stem}) match layout "
            f"{report.layout}, {report.network}; {'; '.join(parts)}"
        )
    return {name: usable.get(name, value).detach().to(value.dtype).clone() for name, value in wanted.items()}


def _fault(value: Tensor, wanted: Tensor) -> str | None:
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        return "no plain tensor"
    if value.is_floating_point() != wanted.is_floating_point() or value.is_complex():
        return f"{value.dtype} for {wanted.dtype}"
    return None if value.isfinite().all() else "not finite"


@torch.no_grad()
def untrained(backbone: nn.Module, fresh: nn.Module, view: PlainView) -> str | None:
    """Say why a backbone looks dead or like `fresh`, the same network newly initialised; None if it does not.

    It does if its features of a few digits are not finite or all the same, or if all vectors that start out constant (norms'
    weights, biases) still have that value, or all running statistics of batch norms have.
    """
    pixels = torch.from_numpy(digits.load("test")[0][[0, 360, 720, 1080]])
    features = backbone.eval()(view.normalise(plain_batch(pixels, view))).float()
    if not features.isfinite().all():
        return "its features are not finite"
    if features.std(0).max() <= 1e-6 * features.abs().max():
        return "its features are the same for all images"
    state, start = backbone.state_dict(), fresh.state_dict()
    constant = {name: old for name, old in start.items() if old.is_floating_point() and old.ndim == 1 and (old == old[0]).all()}
    for kind, statistics in (("batch-norm statistics", True), ("norms and biases", False)):
        names = [name for name in constant if ("running_" in name) == statistics]
        # Some start the last norm of a branch at 0, others at 1.
        if names and all(any((state[name] == value).all() for value in (constant[name][0], 0, 1)) for name in names):
            return f"its {kind} all have the values they start with"
    return None


def load_foreign(path: Path, reading: Reading) -> tuple[nn.Module, LoadReport]:
    """Load the backbone in a file that another program wrote: safetensors, or what torch.save wrote; nothing in it is run.

    Returns:
        The network as `BackboneSpec.load` gives it, in eval mode, and the report.

    Raises:
        ConfigError: for an argument that is unknown or does not fit.
        CheckpointError: if the file cannot be read safely, is of no known layout, does not match the network exactly, or
            holds weights that look untrained.
    """
    known = {"stem": _SIZES, "network": ("student", "teacher"), "layout": LAYOUTS}
    for option, values in known.items():
        if (value := getattr(reading, option)) not in (None, *values):
            raise ConfigError(f"{option.replace('layout', 'from')}: must be one of {', '.join(values)}, got {value!r}")
    if reading.size is not None and reading.size < 4:
        raise ConfigError(f"size: must be 4 pixels or more, got {reading.size}")
    tensors, left_out = find_state(read(path), path)
    layout = reading.layout or find_layout(tensors, reading.backbone, path)
    if layout in PLAIN and reading.network is not None:
        raise ConfigError(f"network: {path} holds one network; leave the option out")
    network, prefix, weights, unknown = split(tensors, layout, reading.network, left_out, path)
    weights, numbered_stem = name_children(weights, path)
    name = reading.backbone or infer_resnet(weights)
    if name is None:
        raise ConfigError(f"backbone: {path} is of layout {layout}, but no ResNet known here; give timm's name of its network")
    three = "conv1.weight" in weights and weights["conv1.weight"].shape[-1:] == (3,)
    stem = reading.stem or numbered_stem or (LAYOUTS[layout].small_stem if three else "standard")
    report = LoadReport(path.name, layout, reading.layout is None, network, name, stem, left_out=left_out, unexpected=unknown)
    args = {"num_heads": 12} if layout == "moco" and name.startswith("vit_small") else {}
    if args:
        report.notes.append("12 attention heads, as MoCo v3's small ViT has, where timm's has 6")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what is allowed to be missing is the same in every process
        fresh = create_backbone(name, stem, args)
    wanted, heads, convert = _target(fresh, report)
    complete = _match(weights, prefix, wanted, heads, reading.allow, report, path)
    spec = _spec(report, args, reading.size, getattr(fresh, "pretrained_cfg", {}))
    loaded = spec.load(twins.from_torchvision(complete, name) if convert else complete, path)
    if (fault := untrained(loaded, fresh, spec.view)) and "untrained" not in reading.allow:
        raise CheckpointError(f"{path}: the {network} looks untrained: {fault}; --allow untrained loads it all the same")
    return loaded, report


def _target(fresh: nn.Module, report: LoadReport) -> tuple[dict[str, Tensor], tuple[str, ...], bool]:
    """Return the weights that a file has to hold, the prefixes of heads among them, and whether they are those of torchvision's twin."""
    name, heads, twin = report.backbone, LAYOUTS[report.layout].heads, twins.TWINS.get(report.backbone)
    if report.layout == "timm":
        classifier = getattr(fresh, "pretrained_cfg", {}).get("classifier") or ()
        heads = tuple(f"{head}." for head in ((classifier,) if isinstance(classifier, str) else classifier))
    elif report.layout == "torchvision" and (twin or name.startswith(TORCHVISION)):
        other, head = twins.bare(twin or name.removeprefix(TORCHVISION))
        heads = (f"{head}.",)
        if twin and report.stem == "standard":
            return other.state_dict(), heads, True
    elif report.layout == "torchvision" and report.stem == "standard":
        raise ConfigError(f"backbone: torchvision's twin of {name!r} is not known; if the names are timm's, say --from timm")
    return fresh.state_dict(), heads, False


def _spec(report: LoadReport, args: Mapping[str, Any], size: int | None, cfg: Mapping[str, Any]) -> BackboneSpec:
    """Return what the backbone is, with what the file does not say as the layout's authors have it, and note that."""
    stem, layout = report.stem, LAYOUTS[report.layout]
    fixed = cfg["input_size"][-1] if cfg.get("fixed_input_size") else None
    side = size if size is not None else fixed if fixed and stem == "standard" else _SIZES[stem]
    if fixed and side != fixed:
        args = {"img_size": fixed, **args}  # the file's position embeddings are those of the network's own size
    cifar = layout.small_std if stem in ("small", "small-wide") else None
    mean, std = (_CIFAR10_MEAN, cifar) if cifar else (IMAGENET_MEAN, IMAGENET_STD)
    scaling = "bicubic" if report.layout == "dino" else "bilinear"  # as its authors' evaluations scale
    report.notes.append(
        f"assumed, as the file does not say: images of {side} pixels, scaled {scaling}, normalised by "
        f"{'CIFAR-10' if cifar else 'ImageNet'}'s mean and deviation"
    )
    view = PlainView(side, 256 / 224 if stem == "standard" else 1.0, scaling, mean, std)
    return BackboneSpec(report.backbone, args, stem, view)


def load_timm(name: str) -> nn.Module:
    """Load a network of timm's with the library's own pretrained weights and view; downloads them unless they are cached.

    Args:
        name: timm's name, with or without `timm:` before it and a tag behind it, such as `resnet50.a1_in1k`.

    Raises:
        ConfigError: if timm does not know the name, or has no weights for it.
        CheckpointError: if they cannot be fetched.
    """
    name = name.removeprefix("timm:")
    bare = name.partition(".")[0]
    fresh = create_backbone(bare)  # an unknown name is refused before anything is fetched
    if not timm.models.is_model_pretrained(name):
        raise ConfigError(f"backbone: timm has no pretrained weights {name}")
    cfg: Any = timm.get_pretrained_cfg(name)
    try:
        network = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # whatever the network, the hub or the file raise
        raise CheckpointError(f"{name}: its weights cannot be fetched ({store.one_line(error)}); is there a network?") from error
    size = cfg.input_size[-1]
    margin = math.floor(size / cfg.crop_pct) / size  # timm rounds down to whole pixels
    view = PlainView(size, margin, cfg.interpolation, tuple(cfg.mean), tuple(cfg.std))
    loaded = BackboneSpec(bare, {}, "standard", view).load(network.state_dict(), Path(name))
    if fault := untrained(loaded, fresh, view):
        raise CheckpointError(f"{name}: looks untrained: {fault}")
    return loaded
