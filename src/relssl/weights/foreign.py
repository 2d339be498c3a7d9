"""Backbones from other programs' files, strictly: every name of the network is matched, known to be something else, or refused."""

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
from relssl.method.backbones import TORCHVISION, create_backbone, weightless
from relssl.settings.run import ViewsConfig
from relssl.weights import layouts, store, twins
from relssl.weights.layouts import AVERAGES, HEADS, LAYOUTS, PLAIN, Layout, bare_name
from relssl.weights.spec import BackboneSpec, mismatch

_CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
_SIZES = {"standard": 224, "small": 32, "small-wide": 32, "small-pool": 64}


@dataclass(frozen=True)
class Reading:
    """Options for reading weights; all but `network` and `size` is about files of other programs.

    A max-pool has no weights and cannot be seen: say stem small-pool for networks of STL-10 and Tiny-ImageNet.
    """

    layout: str | None = None  # one of `LAYOUTS`; None: recognised by the names in the file
    backbone: str | None = None  # timm's name; None: inferred from names and shapes, for ResNets
    stem: str | None = None  # as `encoder.stem`; None: standard, or for a 3x3 first convolution that of the layout
    network: str | None = None  # student or teacher; None: all that a run has, or of a file the one its authors evaluate
    allow: Sequence[str] = ()  # names that may not match, or their beginnings ending in `.` or `*`; `untrained`: fresh weights
    prefix: str | None = None  # what stands before the network's names in the file; None: that of the layout, or recognised
    # Side of the view in pixels; None: the run's own; of a file that of its position embeddings, else 224, or 32 and 64 for small stems.
    size: int | None = None


@dataclass
class LoadReport:
    """An account of every name in a file."""

    file: str
    detected: bool  # the layout was recognised by the names rather than given
    layout: str = ""
    network: str = ""  # student, teacher, or backbone where the file holds a single one
    backbone: str = ""
    stem: str = ""
    matched: int = 0  # weights of the backbone that the file holds
    total: int = 0  # of all that it has
    left_out: dict[str, int] = field(default_factory=dict)  # tensors of no part of the network (heads, queue, optimizer), by name
    missing: list[str] = field(default_factory=list)  # names that did not match and were allowed
    unexpected: list[str] = field(default_factory=list)  # likewise
    notes: list[str] = field(default_factory=list)  # what was assumed, for people
    out: str | None = None  # where `import_weights` wrote it

    def leave_out(self, name: str) -> None:
        """Count a tensor that is no part of the network."""
        self.left_out[name] = self.left_out.get(name, 0) + 1

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


def load_foreign(path: Path, reading: Reading) -> tuple[Any, LoadReport]:
    """Load the backbone in a file that another program wrote: safetensors, or what torch.save wrote; nothing in it is run.

    Returns:
        The network as `BackboneSpec.load` gives it, in eval mode, and the report.

    Raises:
        ConfigError: for an argument that is unknown or does not fit.
        CheckpointError: if the file cannot be read safely, is of no known layout, does not match the network exactly, or
            holds weights that look untrained.
    """
    for option, values in {"stem": _SIZES, "network": ("student", "teacher"), "layout": LAYOUTS}.items():
        if (value := getattr(reading, option)) not in (None, *values):
            raise ConfigError(f"{option.replace('layout', 'from')}: must be one of {', '.join(values)}, got {value!r}")
    if reading.size is not None and reading.size < 4:
        raise ConfigError(f"size: must be 4 pixels or more, got {reading.size}")
    content, report = layouts.read(path), LoadReport(path.name, reading.layout is None)
    try:
        prefix, weights = _take(content, reading, report)
        spec, complete, fresh = _fit(weights, prefix, reading, report)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    network = spec.load(complete, path)
    if "untrained" not in reading.allow and (fault := untrained(network, fresh, spec.view)):
        raise CheckpointError(f"{path}: the {report.network} looks untrained: {fault}; --allow untrained loads it all the same")
    return network, report


def _take(content: Mapping[str, Any], reading: Reading, report: LoadReport) -> tuple[str, dict[str, Tensor]]:
    """Return what stands before the names of the network in the file, and its weights by their names in the backbone."""
    outer = bare_name(f"{reading.prefix.rstrip('.')}.") if reading.prefix else ""
    tensors, report.left_out = layouts.find_state(content, outer)
    report.layout = reading.layout or ("timm" if outer else layouts.find_layout(tensors))
    known, alone = LAYOUTS[report.layout], report.layout in PLAIN or bool(outer)
    if alone and reading.network is not None:
        raise ConfigError(f"network: {report.file} holds one network, or --prefix chooses it; leave the option out")
    layout = Layout((outer,)) if outer else known
    prefixes = {"student": layouts.first(layout.student, tensors), "teacher": layouts.first(layout.teacher, tensors)}
    chosen = reading.network or next((side for side in (layout.default, *prefixes) if prefixes[side] is not None), layout.default)
    if (prefix := prefixes[chosen]) is None:
        what, places = reading.network or "backbone", " or ".join(layout.student + layout.teacher)
        listed = ", ".join(list(tensors)[:4])
        raise CheckpointError(f"holds no {what} of layout {report.layout} (looked for {places}); it holds {listed}")
    if not outer:
        expected = list(weightless(reading.backbone).state_dict()) if reading.backbone else []
        prefix += layouts.inner_prefix({name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}, expected)
    weights = dict[str, Tensor]()
    for name, value in tensors.items():
        if name.startswith(prefix):
            weights[name.removeprefix(prefix)] = value
        else:
            report.leave_out("".join(name.partition(".")[:2]))
    weights, stem = layouts.name_children(weights, known.small_stem)
    own = weightless(reading.backbone).state_dict().get("conv1.weight") if reading.backbone else None
    stem = "standard" if own is not None and own.shape[-1] == 3 else stem  # which is so small by itself
    report.network, report.stem = "backbone" if alone else chosen, reading.stem or stem
    if prefix not in ("", *known.student, *known.teacher):
        report.notes.append(f"its names begin with {prefix} in the file")
    if not outer and (average := next((key for key in AVERAGES if key in content and key not in report.left_out), None)):
        report.notes.append(
            f"read from {average}, the average that its program evaluates; --prefix chooses the weights themselves"
        )
    return prefix, weights


def _fit(
    weights: dict[str, Tensor], prefix: str, reading: Reading, report: LoadReport
) -> tuple[BackboneSpec, dict[str, Tensor], nn.Module]:
    """Return the network that the weights are those of, all of its weights under its own names, and the same network fresh."""
    name = reading.backbone or layouts.infer_resnet(weights)
    if name is None:
        of_none = f"its names, such as {prefix}{next(iter(weights))}, read in layout {report.layout}, are those of no ResNet"
        advice = "give timm's name of its network with --backbone, its layout with --from, or what stands before its names with --prefix"
        fault = f"{of_none}{layouts.guess(weights)}; {advice}"
        raise CheckpointError(fault) if report.layout in PLAIN else ConfigError(f"backbone: {report.file}: {fault}")
    args = dict[str, Any]()
    if report.layout == "moco" and prefix.startswith(("base_", "momentum_")) and name.startswith("vit_small"):
        args["num_heads"] = 12
        report.notes.append("12 attention heads, as MoCo v3's small ViT has, where timm's has 6")
    (channels, fixed), standard = _images(weightless(name), weights), report.stem == "standard"
    fixed = fixed if standard else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what is allowed to be missing is the same in every process
        fresh = create_backbone(name, report.stem, args | {"in_chans": channels} if channels != 3 else args, fixed)
    own, theirs, report.backbone = fresh.state_dict(), dict[str, Tensor](), name
    if standard and report.layout in PLAIN and reading.layout != "timm" and name in twins.TWINS:
        theirs = twins.bare(twins.TWINS[name])[0].state_dict()
    renamed = bool(theirs) and (bool(reading.layout) or len(theirs.keys() & weights.keys()) > len(own.keys() & weights.keys()))
    if renamed or (report.layout in PLAIN and name.startswith(TORCHVISION)):
        report.layout = reading.layout or "torchvision"
    elif report.layout == "torchvision" and standard:
        raise ConfigError(f"backbone: torchvision's twin of {name!r} is not known; if the names are timm's, say --from timm")
    complete = _match(weights, prefix, theirs if renamed else own, reading.allow, report)
    if renamed:
        complete = twins.convert(complete, name, back=True)
    return _spec(report, args, reading.size, fixed, channels), complete, fresh


def _match(
    weights: Mapping[str, Tensor], prefix: str, expected: Mapping[str, Tensor], allow: Sequence[str], report: LoadReport
) -> dict[str, Tensor]:
    """Return the backbone's weights, complete: those that may be missing as `expected`. The report gets heads and names that do not match."""
    exact, complete, counters = {bare_name(name) for name in allow}, dict[str, Tensor](), 0
    starts = tuple(bare_name(name.removesuffix("*")) for name in allow if name.endswith((".", "*")))

    def allowed(name: str) -> bool:
        return prefix + name in exact or f"{prefix}{name}".startswith(starts)

    for name, value in weights.items():
        if name not in expected and (head := next(filter(name.startswith, HEADS), None)):
            report.leave_out(prefix + head)
        elif name not in expected and allowed(name):
            report.unexpected.append(prefix + name)
        else:
            complete[name] = value
    report.matched, report.total = len(complete), len(expected)
    for name in sorted(expected.keys() - complete.keys()):
        if name.endswith("num_batches_tracked"):  # not in files from before PyTorch 0.4.1, and nothing reads them here
            complete[name], counters = expected[name], counters + 1
        elif allowed(name):
            complete[name] = expected[name]
            report.missing.append(prefix + name)
    if counters:
        report.notes.append(f"{counters} counters num_batches_tracked are not in the file and start at 0")
    if not (fault := mismatch(expected, complete)):
        for name, value in complete.items():
            if value.is_floating_point() != expected[name].is_floating_point() or value.is_complex():
                fault = f"{name} ({value.dtype} for {expected[name].dtype})"
            elif not value.isfinite().all():
                fault = f"{name} (not finite)"
    if fault:
        what = f"{report.backbone} (stem {report.stem}) in layout {report.layout}, {report.network}"
        advice = "; --allow NAME ... lets names differ ('abc.*' for many)" if expected.keys() != complete.keys() else ""
        raise CheckpointError(f"is no {what}: {fault}{advice}")
    return {name: complete[name].detach().to(value.dtype).clone() for name, value in expected.items()}


def _images(usual: nn.Module, weights: Mapping[str, Tensor]) -> tuple[int, int | None]:
    """Return the channels of the images that weights are for, and their side; None where the network, as of `usual`, takes any."""
    cfg: Any = getattr(usual, "pretrained_cfg", {})
    patches: Any = getattr(usual, "patch_embed", None)
    state = usual.state_dict()
    first = next((name for name, value in state.items() if value.ndim == 4 and value.shape[1] == 3), "")
    bands = weights[first].shape[1] if first in weights and weights[first].ndim == 4 else 3
    if bands not in (1, 3):
        raise CheckpointError(f"its network sees images of {bands} bands ({first}); relssl reads those of 3 (RGB) or 1 (grey)")
    side = cfg["input_size"][-1] if cfg.get("fixed_input_size") else None
    own, theirs, grid = state.get("pos_embed"), weights.get("pos_embed"), getattr(patches, "num_patches", None)
    if own is not None and theirs is not None and grid and own.ndim == theirs.ndim == 3:
        count = theirs.shape[1] - own.shape[1] + grid  # without those of class tokens
        across = math.isqrt(max(count, 0))
        if 0 < count == across**2 != grid:
            side = across * int(patches.patch_size[0])
    return bands, side


def _spec(report: LoadReport, args: Mapping[str, Any], size: int | None, fixed: int | None, channels: int) -> BackboneSpec:
    """Return what the backbone is, with what the file does not say as the layout's authors have it, and note that."""
    side = size or fixed or _SIZES[report.stem]
    if fixed and side != fixed:
        args = {"img_size": fixed, **args}
    cifar = LAYOUTS[report.layout].small_std if report.stem in ("small", "small-wide") else None
    views = ViewsConfig(channels=channels, mean=_CIFAR10_MEAN if cifar else IMAGENET_MEAN, std=cifar or IMAGENET_STD)
    scaling = "bicubic" if report.layout == "dino" else "bilinear"  # as its authors' evaluations scale
    statistics = f"{'CIFAR-10' if cifar else 'ImageNet'}'s mean and deviation{' in grey' if channels == 1 else ''}"
    report.notes.append(
        f"assumed, as the file does not say: images of {side} pixels, scaled {scaling}, normalised by {statistics}"
    )
    view = PlainView(side, 256 / 224 if report.stem == "standard" else 1.0, scaling, *views.statistics())
    return BackboneSpec(report.backbone, args, report.stem, view)


@torch.no_grad()
def untrained(backbone: nn.Module, fresh: nn.Module, view: PlainView) -> str | None:
    """Say why a backbone looks dead or like `fresh`, the same network newly initialised; None if it does not.

    It does if its features of a few digits are not finite or all the same, or if all vectors that start out constant (norms'
    weights, biases) still have that value, or all running statistics of batch norms have.
    """
    pixels = torch.from_numpy(digits.load("test")[0][[0, 360, 720, 1080]])
    images = plain_batch(pixels, view)
    images = images if view.channels in (1, 3) else images[:, :1].expand(-1, view.channels, -1, -1)
    features = backbone(view.normalise(images)).float()
    if not features.std(0).max() > 1e-6 * features.abs().max():  # nor if they are NaN
        return "its features are not finite, or the same for all images"
    state, start = backbone.state_dict(), fresh.state_dict()
    constant = {name: old for name, old in start.items() if old.is_floating_point() and old.ndim == 1 and (old == old[0]).all()}
    for kind, statistics in (("batch-norm statistics", True), ("norms and biases", False)):
        names = [name for name in constant if ("running_" in name) == statistics]
        # Some start the last norm of a branch at 0, others at 1.
        if names and all(any((state[name] == value).all() for value in (constant[name][0], 0, 1)) for name in names):
            return f"its {kind} all have the values they start with"
    return None


def load_timm(name: str) -> tuple[Any, tuple[str, ...]]:
    """Load a network of timm's with the library's own pretrained weights and view, and remarks; downloads them unless they are cached.

    Args:
        name: timm's name, with or without `timm:` before it and a tag behind it, such as `resnet50.a1_in1k`.

    Raises:
        ConfigError: if timm has no such weights.
        CheckpointError: if they cannot be fetched.
    """
    name = name.removeprefix("timm:")
    if not timm.models.is_model_pretrained(name):
        raise ConfigError(f"backbone: timm has no pretrained weights {name}")
    cfg: Any = timm.get_pretrained_cfg(name)
    try:
        weights = timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # whatever the network, the hub or the file raise
        raise CheckpointError(
            f"{name}: its weights cannot be fetched ({store.one_line(error)}); without a network, copy the cache of the Hugging Face Hub "
            "(HF_HOME, else ~/.cache/huggingface) from a machine that has them, and set HF_HUB_OFFLINE=1 to skip the retries"
        ) from error
    # timm rounds down to whole pixels.
    margin = math.floor(cfg.input_size[-1] / cfg.crop_pct) / cfg.input_size[-1]
    view = PlainView(cfg.input_size[-1], margin, cfg.interpolation, tuple(cfg.mean), tuple(cfg.std))
    manner = {"squash": "squashes images to a square", "border": "pads images to a square"}.get(cfg.crop_mode)
    remarks = (f"timm's own view {manner}; here a square is cut out of their middle",) if manner else ()
    return BackboneSpec(name.partition(".")[0], {}, "standard", view).load(weights, Path(name)), remarks
