"""Backbones from other programs' files, strictly: every name in the file is matched, known to be something else, or refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from relssl.config import Config, from_mapping
from relssl.data.sources import IMAGENET_MEAN, IMAGENET_STD
from relssl.errors import CheckpointError, ConfigError
from relssl.method.encoder import create_backbone, feature_width
from relssl.weights import layouts, pickles, twins
from relssl.weights.layouts import Found, State
from relssl.weights.probe import dead, untrained
from relssl.weights.runs import build

# What the code that trains small-stem networks of these layouts normalises CIFAR-10 by.
_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_SIZES = {"standard": 224, "small": 32, "small-wide": 32, "small-pool": 64}


@dataclass
class LoadReport:
    """How a file's names were accounted for.

    Attributes:
        file, layout, network, backbone, stem: what was read as what.
        detected: whether the layout was found from the names rather than given.
        matched, total: weights of the backbone that the file gave, of all it has.
        left_out: names known to be something else (heads, queue, optimizer), and how many tensors each stands for.
        missing, unexpected: names that did not match and were allowed.
        notes: what was assumed, for people.
    """

    file: str
    layout: str
    detected: bool
    network: str
    backbone: str
    stem: str
    matched: int
    total: int
    left_out: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """As plain JSON-able values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        left = ", ".join(f"{name} ({count})" for name, count in self.left_out.items()) or "nothing"
        found = " (found from its names)" if self.detected else ""
        return [
            f"{self.file}: layout {self.layout}{found}, {self.network}, {self.backbone}, stem {self.stem}",
            f"matched {self.matched} of {self.total}, missing {len(self.missing)}, unexpected {len(self.unexpected)}; left out: {left}",
            *self.notes,
        ]


def load_foreign(
    path: str | Path,
    *,
    layout: str | None = None,
    backbone: str | None = None,
    stem: str | None = None,
    network: str | None = None,
    allow: Sequence[str] = (),
    size: int | None = None,
) -> tuple[nn.Module, LoadReport]:
    """The backbone in a file that another program wrote, in eval mode.

    Args:
        path: safetensors, or what torch.save wrote; nothing in it is run.
        layout: one of `layouts.LAYOUTS`; None: found from the names.
        backbone: timm's name; None: inferred, for ResNets.
        stem: a choice of `encoder.stem`; None: standard, or for a 3x3 first convolution that of the layout. A max-pool has no
            weights and cannot be seen: say small-pool for STL-10 and Tiny-ImageNet networks.
        network: student or teacher, where the file holds both; None: the one its authors evaluate.
        allow: names, or beginnings of names that end in `.` or `*`, that may be missing or unexpected; `untrained` allows
            weights that look like those of a fresh network.
        size: pixels of its images; None: 224, 32 for small stems, 64 for small-pool.

    Returns:
        The network as `load_backbone` gives it, with `.num_features`, `.transform` and `.config`, and the account.

    Raises:
        ConfigError: for an argument that is unknown or does not fit.
        CheckpointError: if the file cannot be read safely, is of no known layout, does not match the network exactly, or
            holds weights that look untrained.
    """
    state = layouts.opened(pickles.read(Path(path)), Path(path))
    chosen = layouts.find(layout, state) or _plain(state, backbone)
    found = layouts.split(state, chosen, network)
    name = backbone or layouts.infer_resnet(found.weights)
    if name is None:
        raise ConfigError(
            f"backbone: {path} is of layout {chosen.name}, but no ResNet known here; give timm's name of its network"
        )
    args = {"num_heads": 12} if chosen.name == "moco" and name.startswith("vit_small") else {}
    stem = stem or _stem(found)
    report = LoadReport(Path(path).name, chosen.name, layout is None, found.network, name, stem, 0, 0, found.left_out)
    if args:
        report.notes.append("12 attention heads, as MoCo v3's small ViT has, where timm's has 6")
    with torch.random.fork_rng(devices=[]):
        fresh = create_backbone(name, stem, args)
    weights = _account(state, found, _wanted(chosen.name, name, stem, fresh), allow, report)
    if chosen.name == "torchvision" and stem == "standard":
        weights = twins.from_torchvision(weights, name)
    config = _config(report, args, size, getattr(fresh, "pretrained_cfg", {}))
    made = build(config, weights, Path(path))
    feature_width(made, config.views.weak.size)
    fault = dead(made, config) or untrained(made, fresh)
    if fault and "untrained" not in allow:
        raise CheckpointError(f"{path}: the {report.network} looks untrained: {fault}; --allow untrained loads it all the same")
    return made, report


def _plain(state: State, backbone: str | None) -> layouts.Layout:
    """timm's or torchvision's own names: whichever share more with the network; of ResNets they are the same.

    Raises:
        CheckpointError: if the names are neither's.
    """
    name = backbone or layouts.infer_resnet(state.tensors)
    sought = f"its names fit no known layout: looked for {layouts.prefixes()}, and for the bare names of "
    if name is None:
        raise CheckpointError(
            f"{state.path}: {sought}a ResNet; they begin {', '.join(list(state.names.values())[:3])}; "
            "for another network with its own names give timm's name with --backbone"
        )
    ours = len(create_backbone(name).state_dict().keys() & state.tensors.keys())
    theirs = len(twins.bare(twins.TWINS[name])[0].state_dict().keys() & state.tensors.keys()) if name in twins.TWINS else 0
    if not ours and not theirs:
        raise CheckpointError(f"{state.path}: {sought}{name}; they begin {', '.join(list(state.names.values())[:3])}")
    return layouts.LAYOUTS["timm" if ours >= theirs else "torchvision"]


def _stem(found: Found) -> str:
    first = found.weights.get("conv1.weight")
    return found.stem or (found.layout.small_stem if first is not None and first.shape[-1] == 3 else "standard")


def _wanted(layout: str, name: str, stem: str, fresh: nn.Module) -> dict[str, Tensor]:
    """The weights a file has to give, under the layout's names."""
    if layout == "torchvision" and stem == "standard":
        if name not in twins.TWINS:
            raise ConfigError(f"backbone: torchvision's twin of {name!r} is not known; if the names are timm's, say --from timm")
        return twins.bare(twins.TWINS[name])[0].state_dict()
    return fresh.state_dict()


def _heads(found: Found, name: str) -> tuple[str, ...]:
    """The classifier's prefix under plain names; the layout's own heads otherwise."""
    if found.layout.name == "torchvision":
        return (twins.bare(twins.TWINS[name])[1] + ".",)
    if found.layout.name == "timm":
        classifier = create_backbone(name).pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
        return tuple(f"{part}." for part in ((classifier,) if isinstance(classifier, str) else classifier))
    return found.layout.heads


def _account(
    state: State, found: Found, wanted: Mapping[str, Tensor], allow: Sequence[str], report: LoadReport
) -> dict[str, Tensor]:
    """The backbone's weights, complete; what is left out, missing and unexpected goes into the report.

    Raises:
        CheckpointError: naming what does not match and is not allowed.
    """
    heads, extra = _heads(found, report.backbone), []
    for name in found.weights.keys() - wanted.keys():
        head = next((part for part in heads if name.startswith(part)), None)
        if head is None:
            extra.append(found.names[name])
        else:
            report.left_out[found.prefix + head] = report.left_out.get(found.prefix + head, 0) + 1
    absent = wanted.keys() - found.weights.keys()
    # Files of before PyTorch 0.4.1 have no counters, and nothing reads them here.
    counters = {name for name in absent if name.endswith("num_batches_tracked")}
    if counters:
        report.notes.append(f"{len(counters)} counters num_batches_tracked are not in the file and start at 0")
    given = {name: value for name, value in found.weights.items() if name in wanted}
    shapes = [
        f"{found.names[name]} {list(value.shape)} for {list(wanted[name].shape)}"
        for name, value in given.items()
        if value.shape != wanted[name].shape
    ]
    missing = {name: state.shown(found.prefix + name) for name in absent - counters}
    unexpected = sorted(extra + found.unknown)
    report.matched, report.total = len(given) - len(shapes), len(wanted) - len(counters)
    report.missing, report.unexpected = sorted(missing.values()), unexpected
    _refuse(state.path, report, shapes, allow)
    broken = [found.names[name] for name, value in given.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise CheckpointError(f"{state.path}: {len(broken)} weights hold values that are not finite: {', '.join(broken[:3])}")
    return {name: given.get(name, value).to(value.dtype).clone() for name, value in wanted.items()}


def _refuse(path: Path, report: LoadReport, shapes: Sequence[str], allow: Sequence[str]) -> None:
    missing, unexpected = (_forbidden(names, allow) for names in (report.missing, report.unexpected))
    lists = [
        f"{kind} ({len(names)}): {', '.join(list(names)[:3])}{' ...' if len(names) > 3 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("other shape", sorted(shapes)))
        if names
    ]
    if lists:
        raise CheckpointError(
            f"{path}: {report.matched} of {report.total} weights of {report.backbone} (stem {report.stem}) match layout "
            f"{report.layout}, {report.network}; {'; '.join(lists)}"
        )


def _forbidden(names: Iterable[str], allow: Sequence[str]) -> list[str]:
    starts = tuple(part.removesuffix("*") for part in allow if part.endswith((".", "*")))
    return [name for name in names if name not in allow and not (starts and name.startswith(starts))]


def _config(report: LoadReport, args: Mapping[str, Any], size: int | None, cfg: Mapping[str, Any]) -> Config:
    """A configuration that says how the backbone is built and what it sees; of training it says nothing."""
    fixed = cfg["input_size"][-1] if cfg.get("fixed_input_size") else None
    side = size or (fixed if fixed and report.stem == "standard" else _SIZES[report.stem])
    small = report.stem != "standard"
    cifar = report.stem in ("small", "small-wide") and report.layout in ("official", "solo")
    mean, std = _CIFAR10 if cifar else (IMAGENET_MEAN, IMAGENET_STD)
    report.notes.append(
        f"assumed: images of {side} pixels, normalised by {'CIFAR-10' if cifar else 'ImageNet'}'s mean and deviation, as the file does not say"
    )
    return neutral(report.backbone, args, report.stem, side, 1.0 if small else 256 / 224, mean, std)


def neutral(
    backbone: str, args: Mapping[str, Any], stem: str, size: int, margin: float, mean: Sequence[float], std: Sequence[float]
) -> Config:
    """The configuration of a backbone that no run of ours made."""
    views = {"weak": {"name": "weak", "size": size}, "strong": {"name": "contrastive", "size": size}}
    return from_mapping(
        {
            "data": "imported",
            "recipe": "imported",
            "backbone": backbone,
            "backbone_args": dict(args),
            "encoder": {"stem": stem},
            "views": {**views, "margin": margin, "mean": list(mean), "std": list(std)},
        }
    )
