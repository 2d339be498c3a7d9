"""Backbones from other programs' files, strictly: every name in the file is matched, known to be something else, or refused."""

from __future__ import annotations

import collections
import functools
import math
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
from relssl.settings.reading import nearest_word
from relssl.weights import store, twins
from relssl.weights.spec import BackboneSpec, mismatches


@dataclass(frozen=True)
class Layout:
    """The names that one program gives to weights.

    Attributes:
        student, teacher: prefixes of the two backbones' weights; of alternatives, the first that occurs.
        default: the network that is taken where both exist: the one its authors evaluate.
        heads: prefixes among the backbone's names that are no part of it.
        beside: names, or prefixes ending in a dot, of everything else the program saves.
        small_stem: the stem of its networks whose first convolution is 3x3.
        small_std: the deviations that it divides CIFAR-10 by, in 0..1; None: ImageNet's.
    """

    student: tuple[str, ...] = ("",)
    teacher: tuple[str, ...] = ()
    default: str = "student"
    heads: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    small_stem: str = "small"
    small_std: tuple[float, float, float] | None = None


_SOLO_PARTS = ("projector.", "predictor.", "head.", "classifier.")
LAYOUTS = {
    "official": Layout(
        ("encoder_q.net.", "net.net."),
        ("encoder_k.net.",),
        heads=("fc.",),
        beside=("encoder_q.head.", "encoder_k.head.", "head_q.", "head_k.", "queue", "queue_ptr"),
        small_std=(0.2023, 0.1994, 0.2010),
    ),
    "solo": Layout(
        ("backbone.", "encoder."),
        ("momentum_backbone.", "momentum_encoder."),
        beside=(
            *(side + part for part in _SOLO_PARTS for side in ("", "momentum_")),
            *("queue", "queue_y", "queue_ptr", "prototypes.", "dino_loss_func."),
        ),
        small_stem="small-wide",
        small_std=(0.2470, 0.2435, 0.2616),
    ),
    "moco": Layout(
        ("encoder_q.", "base_encoder."),
        ("encoder_k.", "momentum_encoder."),
        heads=("fc.", "head."),
        beside=("queue", "queue_ptr", "predictor."),
    ),
    "dino": Layout(("student.backbone.",), ("teacher.backbone.",), default="teacher", beside=("student.head.", "teacher.head.")),
    "torchvision": Layout(),
    "timm": Layout(),
}
PLAIN = ("torchvision", "timm")
_CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
_SIZES = {"standard": 224, "small": 32, "small-wide": 32, "small-pool": 64}


@dataclass
class LoadReport:
    """What became of every name in a file.

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
    matched: int
    total: int
    left_out: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    out: str | None = None

    def facts(self) -> dict[str, Any]:
        """Return the report as plain JSON-able values."""
        return asdict(self)

    def gaps(self) -> list[str]:
        """List what was allowed and belongs beside every figure of these weights."""
        notes = []
        if self.missing:
            notes.append(
                f"{len(self.missing)} of {self.total} weights are not in {self.file} and fresh, {self.missing[0]} the first"
            )
        if self.unexpected:
            notes.append(f"{len(self.unexpected)} names in {self.file} were left out, {self.unexpected[0]} the first")
        return notes

    def leave_out(self, name: str) -> None:
        """Count a tensor that belongs to something else."""
        self.left_out[name] = self.left_out.get(name, 0) + 1

    def lines(self) -> list[str]:
        """Return the report as text, a line each."""
        left = ", ".join(f"{name} ({count})" if count else name for name, count in self.left_out.items()) or "nothing"
        how = " (recognised by its names)" if self.detected else ""
        return [
            f"{self.file}: layout {self.layout}{how}, {self.network}, {self.backbone}, stem {self.stem}",
            f"matched {self.matched} of {self.total}, missing {len(self.missing)}, unexpected {len(self.unexpected)}; left out: {left}",
            *self.notes,
        ]


class Ignored:
    """A stand-in for objects beside the weights: takes any arguments and keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Ignored:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None: ...


def ignored_factory(*_: Any) -> collections.OrderedDict[Any, Any]:
    """A stand-in for defaultdict, whose factory is dropped."""
    return collections.OrderedDict()


_IGNORED = (
    "argparse.Namespace",  # MoCo v3's and DINO's arguments
    *("numpy.dtype", "numpy.ndarray"),  # DINO's optimizer keeps learning rates as numpy scalars
    *(f"numpy.{module}.multiarray.{name}" for module in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float64", "Float32", "Int64", "Int32", "Bool")),
    *(f"pathlib.{kind}" for kind in ("Path", "PosixPath", "WindowsPath", "PurePosixPath")),
    *("typing.Any", "builtins.dict", "builtins.list", "builtins.int", "builtins.float", "builtins.str"),
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),  # settings of solo-learn
    *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "omegaconf.nodes.AnyNode"),
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",  # old versions key the state of callbacks by their class
)
# Hyper-parameters of Lightning's checkpoints; the unpickler fills only dictionaries of Python's own.
_DICTIONARIES = tuple(
    f"{module}.AttributeDict"
    for module in ("lightning.fabric.utilities.data", "lightning_fabric.utilities.data", "pytorch_lightning.utilities.parsing")
)
_CONVERT = "open it with the program that wrote it and save model.state_dict() as safetensors"


def read(path: Path) -> Mapping[str, Any]:
    """Read the top level of a file of weights: safetensors, or whatever torch.save wrote. No code in it is ever run.

    Returns:
        Names to tensors, to nested mappings of them, or to anything else that was saved beside them. Tensors may lie in a
        memory map of the file and claim more elements than the file holds: check shapes before copying them.

    Raises:
        CheckpointError: naming the file and why it is not read: damaged, of a format that only full unpickling opens,
            holding an object that is not known to be harmless, or no mapping.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: is no file")
    if path.suffix == ".safetensors":
        return store.read(path)
    harmless: list[Any] = [(Ignored, name) for name in _IGNORED] + [(ignored_factory, "collections.defaultdict")]
    harmless += [(collections.OrderedDict, name) for name in _DICTIONARIES]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(harmless):
            warnings.simplefilter("ignore")  # torch's remarks on pickle protocols
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises KeyError, RuntimeError, EOFError ... over files that are none of its own
        reason = store.one_line(error)[:120] if isinstance(error, RuntimeError) else "it is damaged or of another kind"
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"it holds a {refused[1]}, which is refused, as making one could run code of the file"
        raise CheckpointError(f"{path}: is not read as weights: {reason}; {_CONVERT}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not names and weights; {_CONVERT}")
    return content


def find_state(content: Mapping[str, Any], path: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Take the state dict out of what a program saved: under student and teacher, state_dict, model, or at the top.

    Returns:
        The tensors by name, without what data-parallel wrappers and torch.compile put in front, and the number of tensors in
        whatever else there is.

    Raises:
        CheckpointError: if there are no tensors, or two of one name.
    """
    keys = [key for key in ("student", "teacher", "state_dict", "model") if isinstance(content.get(key), Mapping)]
    sides = [key for key in keys if key in ("student", "teacher")]
    holders = sides or keys[:1]
    rest = {str(key): _count(value) for key, value in content.items() if holders and key not in holders}
    tensors: dict[str, Tensor] = {}
    for prefix, weights in [(f"{key}." if sides else "", content[key]) for key in holders] or [("", content)]:
        for key, value in weights.items():
            name = prefix + _bare(str(key))
            if not isinstance(value, Tensor) or value.is_nested:  # those have no shape to compare
                rest[name] = _count(value)
            elif name in tensors:
                raise CheckpointError(f"{path}: holds two weights of one name, {name}, with and without `module.`")
            else:
                tensors[name] = value
    if not tensors:
        keys = list(map(str, content))[:4] or ["nothing"]
        raise CheckpointError(
            f"{path}: holds no weights under state_dict, model, student, teacher or at its top; it holds {', '.join(keys)}"
        )
    return tensors, rest


def _bare(name: str) -> str:
    return re.sub(r"^((module|_orig_mod)\.)+", "", name)


def _count(value: Any) -> int:
    """Count the tensors in a nested state, such as an optimizer's."""
    if isinstance(value, (Mapping, list, tuple)):
        return sum(map(_count, value.values() if isinstance(value, Mapping) else value))
    return int(isinstance(value, Tensor))


def _occurs(prefix: str, names: Iterable[str]) -> bool:
    return any(name.startswith(prefix) for name in names)


def find_layout(tensors: Mapping[str, Tensor], backbone: str | None, path: Path) -> str:
    """Recognise the layout by the longest prefix that occurs; of bare names, by whether timm or torchvision shares more of them.

    Raises:
        CheckpointError: if the names fit several layouts equally well, or none.
    """
    # `encoder_q.` begins the official names as well as MoCo's.
    signs = {name: layout.student + layout.teacher * (name == "dino") for name, layout in LAYOUTS.items() if name not in PLAIN}
    lengths = {name: max((len(sign) for sign in them if _occurs(sign, tensors)), default=0) for name, them in signs.items()}
    best = [name for name, length in lengths.items() if length and length == max(lengths.values())]
    if len(best) > 1:
        raise CheckpointError(f"{path}: its names fit {' and '.join(best)}; say which with --from")
    if best:
        return best[0]
    network = backbone or infer_resnet(tensors)
    if network is not None and network.startswith(TORCHVISION):
        return "torchvision"
    ours = len(create_backbone(network).state_dict().keys() & tensors.keys()) if network else 0
    theirs = len(twins.bare(twins.TWINS[network])[0].state_dict().keys() & tensors.keys()) if network in twins.TWINS else 0
    if not ours and not theirs:
        sought = ", ".join(f"{name} ({' or '.join(LAYOUTS[name].student)})" for name in signs)
        raise CheckpointError(
            f"{path}: its names fit no known layout: looked for {sought}, and for the bare names of {network or 'a ResNet'}; they "
            f"begin {', '.join(list(tensors)[:3])}; for another network with its own names give timm's name with --backbone"
        )
    return "timm" if ours >= theirs else "torchvision"


def split(tensors: Mapping[str, Tensor], report: LoadReport, network: str | None, path: Path) -> tuple[dict[str, Tensor], str]:
    """Take one network out of a file; every other name goes into the report.

    Returns:
        Its weights by their names in the backbone, and their prefix in the file.

    Raises:
        CheckpointError: if the file does not hold it.
    """
    layout = LAYOUTS[report.layout]
    signs = {"student": layout.student, "teacher": layout.teacher}
    prefixes = {side: next((sign for sign in those if _occurs(sign, tensors)), None) for side, those in signs.items()}
    others = {"student": "teacher", "teacher": "student"}
    chosen = network or (layout.default if prefixes[layout.default] is not None else others[layout.default])
    prefix, aside = prefixes[chosen], prefixes[others[chosen]]
    if prefix is None:
        raise CheckpointError(
            f"{path}: holds no {network or 'backbone'} of layout {report.layout} (looked for "
            f"{' or '.join(layout.student + layout.teacher)}); it holds {', '.join(list(tensors)[:4])}"
        )
    report.network = "backbone" if report.layout in PLAIN else chosen
    weights: dict[str, Tensor] = {}
    for name, value in tensors.items():
        beside = (sign for sign in layout.beside if name == sign or (sign.endswith(".") and name.startswith(sign)))
        group = next(beside, aside if aside is not None and name.startswith(aside) else None)
        if group is not None:
            report.leave_out(group)
        elif name.startswith(prefix):
            weights[name.removeprefix(prefix)] = value
        else:
            report.unexpected.append(name)
    return weights, prefix


def name_children(weights: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Give the children of a ResNet that was put into an nn.Sequential their names again.

    MoCo's CIFAR demo, which the small-set code of ReSSL follows, drops the fully connected layer or appends it, and leaves out the
    max-pool or keeps it: it has no weights, but shows as a gap in the numbers.

    Returns:
        The weights by name, and the stem that the numbers show, or None; weights with other names as they are.

    Raises:
        CheckpointError: if two weights come to one name.
    """
    layers = sorted({int(name.split(".")[0]) for name in weights if re.match(r"[0-9]{1,2}\.[0-9]+\.", name)})[:4]
    if "0.weight" not in weights and not layers:
        return dict(weights), None
    children = {"0": "conv1", "1": "bn1"} | {str(number): f"layer{i + 1}" for i, number in enumerate(layers)}
    named: dict[str, Tensor] = {}
    for name, value in weights.items():
        number, _, rest = name.partition(".")
        new = f"{children.get(number, f'fc.{number}')}.{rest}" if number.isdecimal() else name
        if new in named:
            raise CheckpointError(f"{path}: {name} is a second {new}, two weights of one name")
        named[new] = value
    small = bool(layers) and "conv1.weight" in named and named["conv1.weight"].shape[-1:] == (3,)
    return named, ("small" if layers[0] == 3 else "small-pool") if small else None


_RESNETS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"),
    *("resnext50_32x4d", "resnext101_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
)


def infer_resnet(weights: Mapping[str, Tensor]) -> str | None:
    """Return timm's name of the ResNet whose blocks have these convolutions; None if it is none of those known."""
    blocks = _convolutions(weights)
    for name in _RESNETS if blocks else ():
        known = _resnet(name)
        # A few may be missing: that is reported by their names later.
        if len(known.items() & blocks.items()) >= 0.8 * max(len(known), len(blocks)):
            return name
    return None


@functools.lru_cache
def _resnet(name: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return _convolutions(timm.create_model(name).state_dict())


def _convolutions(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in weights.items() if re.fullmatch(r"layer\d\.\d+\.conv\d\.weight", name)}


def match(
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
        allow: names, or beginnings of names that end in `.` or `*`.

    Raises:
        CheckpointError: listing what does not match and is not allowed.
    """
    faults = mismatches(wanted, weights)
    for name in faults.get("unexpected", ()):
        head = next(filter(name.startswith, heads), None)
        report.unexpected.append(prefix + name) if head is None else report.leave_out(prefix + head)
    absent = faults.get("missing", [])
    # Files from before PyTorch 0.4.1 have no counters, and nothing reads them here.
    counters = [name for name in absent if name.endswith("num_batches_tracked")]
    if counters:
        report.notes.append(f"{len(counters)} counters num_batches_tracked are not in the file and start at 0")
    shapes = faults.get("other shape", [])
    usable = {name: weights[name] for name in wanted if name in weights and name not in shapes}
    report.matched, report.total = len(usable), len(wanted) - len(counters)
    report.missing = [prefix + name for name in absent if name not in counters]
    report.unexpected.sort()
    lists = {
        "missing": _forbidden(report.missing, allow),
        "unexpected": _forbidden(report.unexpected, allow),
        "other shape": [f"{prefix}{name} {list(weights[name].shape)} for {list(wanted[name].shape)}" for name in shapes],
        "unusable": [f"{prefix}{name} ({fault})" for name, value in usable.items() if (fault := _fault(value, wanted[name]))],
    }
    if any(lists.values()):
        parts = [
            f"{kind} ({len(names)}): {', '.join(names[:3])}{' ...' * (len(names) > 3)}" for kind, names in lists.items() if names
        ]
        raise CheckpointError(
            f"{path}: {report.matched} of {report.total} weights of {report.backbone} (stem {report.stem}) match layout "
            f"{report.layout}, {report.network}; {'; '.join(parts)}"
        )
    return {name: usable.get(name, value).detach().to(value.dtype).clone() for name, value in wanted.items()}


def _forbidden(names: Sequence[str], allow: Sequence[str]) -> list[str]:
    starts = tuple(_bare(part.removesuffix("*")) for part in allow if part.endswith((".", "*")))
    exact = {_bare(part) for part in allow}
    return [name for name in names if _bare(name) not in exact and not (starts and _bare(name).startswith(starts))]


def _fault(value: Tensor, wanted: Tensor) -> str | None:
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        return "no plain tensor"
    if value.is_floating_point() != wanted.is_floating_point() or value.is_complex():
        return f"{value.dtype} for {wanted.dtype}"
    return None if value.isfinite().all() else "not finite"


@torch.no_grad()
def untrained(backbone: nn.Module, fresh: nn.Module, view: PlainView) -> str | None:
    """Say why a backbone looks like a fresh one, or like a dead one; None if it does not.

    Args:
        backbone, fresh: the same network, `fresh` newly initialised.
        view: what it sees.

    It does if its features of a few digits are not finite or all the same, or if all weights that start out constant (norms'
    weights, biases) still have that value, or all running statistics of batch norms have.
    """
    pixels = torch.from_numpy(digits.load("test")[0][[0, 360, 720, 1080]])
    features = backbone.eval()(view.normalise(plain_batch(pixels, view))).float()
    if not bool(features.isfinite().all()):
        return "its features are not finite"
    if bool(features.std(0).max() <= 1e-6 * features.abs().max()):
        return "its features are the same for all images"
    state = fresh.state_dict()
    pairs = [(name, value, state[name]) for name, value in backbone.state_dict().items() if value.is_floating_point()]
    for kind, statistics in (("batch-norm statistics", True), ("norms and biases", False)):
        small = [(value, old) for name, value, old in pairs if old.ndim == 1 and ("running_" in name) == statistics]
        constant = [(value, old) for value, old in small if bool((old == old[0]).all())]
        # Some start the last norm of a branch at 0, others at 1.
        if constant and all(any(bool((value == start).all()) for start in (float(old[0]), 0.0, 1.0)) for value, old in constant):
            return f"its {kind} all have the values they start with"
    return None


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
    """Load the backbone in a file that another program wrote.

    Args:
        path: safetensors, or what torch.save wrote; nothing in it is run.
        layout: one of `LAYOUTS`; None: recognised by the names.
        backbone: timm's name; None: inferred, for ResNets.
        stem: a choice of `encoder.stem`; None: standard, or for a 3x3 first convolution that of the layout. A max-pool has no
            weights and cannot be seen: say small-pool for STL-10 and Tiny-ImageNet networks.
        network: student or teacher, where the file holds both; None: the one its authors evaluate.
        allow: names, or beginnings of names that end in `.` or `*`, that may be missing or unexpected; `untrained` allows
            weights that look like those of a fresh network.
        size: pixels of its images; None: 224, 32 for small stems, 64 for small-pool.

    Returns:
        The network as `BackboneSpec.load` gives it, in eval mode, and the report.

    Raises:
        ConfigError: for an argument that is unknown or does not fit.
        CheckpointError: if the file cannot be read safely, is of no known layout, does not match the network exactly, or
            holds weights that look untrained.
    """
    path = Path(path)
    if stem not in (None, *_SIZES):
        raise ConfigError(f"stem: must be one of {', '.join(_SIZES)}, got {stem!r}")
    if size is not None and size < 4:
        raise ConfigError(f"size: must be 4 pixels or more, got {size}")
    if network not in (None, "student", "teacher"):
        raise ConfigError(f"network: must be student or teacher, got {network!r}")
    if layout not in (None, *LAYOUTS):
        near = nearest_word(str(layout), LAYOUTS)
        raise ConfigError(f"from: {layout!r} is unknown; the nearest is {near} (all: {', '.join(LAYOUTS)})")
    tensors, left_out = find_state(read(path), path)
    chosen = layout or find_layout(tensors, backbone, path)
    if chosen in PLAIN and network is not None:
        raise ConfigError(f"network: {path} holds one network; leave the option out")
    report = LoadReport(path.name, chosen, layout is None, "backbone", "", "standard", 0, 0, left_out)
    weights, prefix = split(tensors, report, network, path)
    weights, numbered_stem = name_children(weights, path)
    name = backbone or infer_resnet(weights)
    if name is None:
        raise ConfigError(f"backbone: {path} is of layout {chosen}, but no ResNet known here; give timm's name of its network")
    three = "conv1.weight" in weights and weights["conv1.weight"].shape[-1:] == (3,)
    report.backbone = name
    report.stem = stem or numbered_stem or (LAYOUTS[chosen].small_stem if three else "standard")
    args = {"num_heads": 12} if chosen == "moco" and name.startswith("vit_small") else {}
    if args:
        report.notes.append("12 attention heads, as MoCo v3's small ViT has, where timm's has 6")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what is allowed to be missing is the same in every process
        fresh = create_backbone(name, report.stem, args)
    wanted, heads, convert = _target(fresh, report)
    complete = match(weights, prefix, wanted, heads, allow, report, path)
    spec = _spec(report, args, size, getattr(fresh, "pretrained_cfg", {}))
    loaded = spec.load(twins.from_torchvision(complete, name) if convert else complete, path)
    fault = untrained(loaded, fresh, spec.view)
    if fault and "untrained" not in allow:
        raise CheckpointError(f"{path}: the {report.network} looks untrained: {fault}; --allow untrained loads it all the same")
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
    return BackboneSpec(
        report.backbone, args, stem, PlainView(side, 256 / 224 if stem == "standard" else 1.0, scaling, mean, std)
    )


def load_timm(name: str) -> nn.Module:
    """Load a network of timm's with the library's own pretrained weights; downloads them unless they are cached.

    Args:
        name: timm's name, with or without `timm:` before it and a tag behind it, such as `resnet50.a1_in1k`.

    Returns:
        The network as `BackboneSpec.load` gives it, with the size, mean, deviation, margin and interpolation that timm states.

    Raises:
        ConfigError: if timm does not know the name, or has no weights for it.
        CheckpointError: if they cannot be fetched.
    """
    name = name.removeprefix("timm:")
    bare = name.partition(".")[0]
    fresh = create_backbone(bare)  # an unknown name is refused before anything is fetched
    try:
        cfg = timm.get_pretrained_cfg(name)
    except Exception as error:  # timm's own types, for a tag it does not know
        raise ConfigError(f"backbone: timm knows no weights {name!r} ({store.one_line(error)})") from error
    if cfg is None or not cfg.has_weights:
        raise ConfigError(f"backbone: timm has no pretrained weights for {name}")
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
