"""Backbones from other programs' files, strictly: every name in the file is matched, known to be something else, or refused."""

from __future__ import annotations

import collections
import functools
import logging
import math
import re
import tarfile
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
from relssl.weights.spec import BackboneSpec
from relssl.weights.store import one_line

_DEPTHS: dict[tuple[int, ...], tuple[str | None, str | None]] = {
    (2, 2, 2, 2): ("resnet18", None),
    (3, 4, 6, 3): ("resnet34", "50"),
    (3, 4, 23, 3): (None, "101"),
    (3, 8, 36, 3): (None, "152"),
}
# By [outputs, inputs of a group] of the middle convolution in the first stage.
_WIDTHS = {
    (64, 64): "resnet{}",
    (128, 128): "wide_resnet{}_2",
    (128, 4): "resnext{}_32x4d",
    (256, 8): "resnext{}_32x8d",
    (256, 4): "resnext{}_64x4d",
}


def infer_resnet(weights: Mapping[str, Tensor]) -> str | None:
    """timm's name of a ResNet, by how many blocks its stages have and how wide they are; None if it is none of those known."""
    counts = tuple(
        len({name.split(".")[1] for name in weights if re.match(rf"layer{stage}\.\d+\.", name)}) for stage in (1, 2, 3, 4)
    )
    basic, deep = _DEPTHS.get(counts, (None, None))
    if not any(re.fullmatch(r"layer\d\.\d+\.conv3\.weight", name) for name in weights):
        return basic
    middles = {tuple(value.shape[:2]) for name, value in weights.items() if re.fullmatch(r"layer1\.\d+\.conv2\.weight", name)}
    return _WIDTHS[middle].format(deep) if deep and len(middles) == 1 and (middle := middles.pop()) in _WIDTHS else None


def named_children(weights: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, str], str | None]:
    """Give the children of a ResNet that was put into an nn.Sequential their names again.

    MoCo's CIFAR demo, which the small-set code of ReSSL follows, drops the fully connected layer or appends it, and leaves out the
    max-pool or keeps it: it has no weights, but shows as a gap in the numbers.

    Returns:
        The weights by name, {name: what it was called}, and the stem that the numbers tell, or None. Names of another
        kind stay as they are.

    Raises:
        CheckpointError: if two weights come to one name.
    """
    layers = sorted({int(name.split(".")[0]) for name in weights if re.match(r"[0-9]{1,2}\.[0-9]+\.", name)})[:4]
    if "0.weight" not in weights and not layers:
        return dict(weights), {name: name for name in weights}, None
    children = {"0": "conv1", "1": "bn1"} | {str(number): f"layer{i + 1}" for i, number in enumerate(layers)}
    names: dict[str, str] = {}
    for old in weights:
        number, _, rest = old.partition(".")
        new = f"{children.get(number, f'fc.{number}')}.{rest}" if number.isdecimal() else old
        if new in names:
            raise CheckpointError(f"{path}: {names[new]} and {old} are both {new}, two weights of one name")
        names[new] = old
    named = {name: weights[old] for name, old in names.items()}
    first = named.get("conv1.weight")
    small = layers and first is not None and first.shape[-1] == 3
    return named, names, ("small" if layers[0] == 3 else "small-pool") if small else None


@dataclass(frozen=True)
class Layout:
    """How one program names things.

    Attributes:
        student, teacher: prefixes of the two backbones' weights; of alternatives, those that occur are meant.
        default: the network that is taken where both exist: the one its authors evaluate.
        heads: what lies among the backbone's names and is no part of it.
        beside: names, or prefixes ending in a dot, of everything else the program is known to save.
        small_stem: the stem of its networks whose first convolution is 3x3.
    """

    name: str
    student: tuple[str, ...] = ("",)
    teacher: tuple[str, ...] = ()
    default: str = "student"
    heads: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    small_stem: str = "small"


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "official",
            ("encoder_q.net.", "net.net."),
            ("encoder_k.net.",),
            heads=("fc.",),
            beside=("encoder_q.head.", "encoder_k.head.", "head_q.", "head_k.", "queue", "queue_ptr"),
        ),
        Layout(
            "solo",
            ("backbone.", "encoder."),
            ("momentum_backbone.", "momentum_encoder."),
            beside=(
                *("projector.", "momentum_projector.", "predictor.", "momentum_predictor.", "head.", "momentum_head."),
                *("classifier.", "momentum_classifier.", "queue", "queue_y", "queue_ptr", "prototypes.", "dino_loss_func."),
            ),
            small_stem="small-wide",
        ),
        Layout(
            "moco",
            ("encoder_q.", "base_encoder."),
            ("encoder_k.", "momentum_encoder."),
            heads=("fc.", "head."),
            beside=("queue", "queue_ptr", "predictor."),
        ),
        Layout(
            "dino",
            ("student.backbone.",),
            ("teacher.backbone.",),
            default="teacher",
            beside=("student.head.", "teacher.head."),
        ),
        Layout("torchvision"),
        Layout("timm"),
    )
}
PLAIN = ("torchvision", "timm")


@dataclass(frozen=True)
class State:
    """A file's tensors under names without `module.`, each with the name it has in the file, and what was left out."""

    path: Path
    tensors: dict[str, Tensor]
    names: dict[str, str]
    left_out: dict[str, int]

    def shown(self, name: str) -> str:
        """The file's own name for a weight, or how it would be called there."""
        ddp = any(original.startswith("module.") or ".module." in original for original in self.names.values())
        side, dot, rest = name.partition(".") if name.startswith(("student.", "teacher.")) else ("", "", name)
        return self.names.get(name, f"{side}{dot}module.{rest}" if ddp else name)


@dataclass
class Found:
    """One network of a file: weights by their name in the backbone, and what else there is."""

    layout: Layout
    network: str
    prefix: str
    weights: dict[str, Tensor]
    names: dict[str, str]
    left_out: dict[str, int] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    stem: str | None = None


def opened(raw: Mapping[str, Any], path: Path) -> State:
    """The state dict within what a program saved.

    Raises:
        CheckpointError: if there is none.
    """
    sides = [side for side in ("student", "teacher") if isinstance(raw.get(side), Mapping)]
    holder = next((key for key in ("state_dict", "model") if isinstance(raw.get(key), Mapping)), None)
    holders = [(f"{side}.", raw[side]) for side in sides] or [("", raw[holder] if holder else raw)]
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    rest = {str(key): _count(value) for key, value in raw.items() if key not in (*sides, holder)} if sides or holder else {}
    for side, inner in holders:
        for key, value in inner.items():
            name = f"{side}{_bare(key)}"
            if not isinstance(value, Tensor):
                rest[f"{side}{key}"] = _count(value)
            elif value.is_nested:  # which has no shape to compare
                raise CheckpointError(f"{path}: {side}{key} is a nested tensor, which no backbone has")
            elif name in names:
                raise CheckpointError(f"{path}: holds both {names[name]} and {side}{key}, two weights of one name")
            else:
                tensors[name], names[name] = value, f"{side}{key}"
    if not tensors:
        raise CheckpointError(
            f"{path}: holds no weights under state_dict, model, student, teacher or at its top; it holds {_some(raw)}"
        )
    return State(path, tensors, names, rest)


def _bare(name: Any) -> str:
    """Without what data-parallel wrappers and torch.compile put in front."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", str(name))


def _count(value: Any) -> int:
    """The tensors in a nested state, such as an optimizer's."""
    if isinstance(value, Mapping):
        return sum(_count(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_count(item) for item in value)
    return int(isinstance(value, Tensor))


def _some(names: Any) -> str:
    listed = [str(name) for name in names]
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "") or "nothing"


def find(name: str | None, state: State) -> Layout | None:
    """The layout of that name, or the one whose prefixes occur; None for names without any known prefix: a plain file.

    Raises:
        ConfigError: for an unknown name.
        CheckpointError: if the names fit several layouts equally well.
    """
    if name is not None:
        if name not in LAYOUTS:
            raise ConfigError(
                f"from: {name!r} is unknown; the nearest is {nearest_word(name, list(LAYOUTS))} (all: {', '.join(LAYOUTS)})"
            )
        return LAYOUTS[name]
    # `encoder_q.` begins the official names as well as MoCo's: the longest prefix that occurs is meant.
    fits: dict[int, list[Layout]] = {}
    for layout in LAYOUTS.values():
        signs = layout.student + (layout.teacher if layout.name == "dino" else ())
        lengths = [len(sign) for sign in signs if sign and any(key.startswith(sign) for key in state.tensors)]
        if lengths:
            fits.setdefault(max(lengths), []).append(layout)
    if not fits:
        return None
    best = fits[max(fits)]
    if len(best) > 1:
        several = " and ".join(layout.name for layout in best)
        raise CheckpointError(f"{state.path}: its names fit {several}; say which with --from")
    return best[0]


def prefixes() -> str:
    """What is looked for, for messages."""
    return ", ".join(f"{layout.name} ({' or '.join(layout.student)})" for layout in LAYOUTS.values() if layout.student != ("",))


def split(state: State, layout: Layout, network: str | None) -> Found:
    """Take one network out of a file and account for every other name.

    Raises:
        ConfigError: for an unknown network.
        CheckpointError: if the file does not hold it.
    """
    if network not in (None, "student", "teacher"):
        raise ConfigError(f"network: must be student or teacher, got {network!r}")
    if layout.name in PLAIN and network is not None:
        raise ConfigError(f"network: {state.path} holds one network; leave the option out")
    held = {"student": _present(state, layout.student), "teacher": _present(state, layout.teacher)}
    first = layout.default
    other = "teacher" if first == "student" else "student"
    chosen = network or (first if held[first] is not None else other)
    prefix = held[chosen]
    if prefix is None:
        sought = " or ".join(layout.student + layout.teacher) or "plain names"
        raise CheckpointError(
            f"{state.path}: holds no {network or 'backbone'} of layout {layout.name} (looked for {sought}); it holds {_some(state.names.values())}"
        )
    aside = held["teacher" if chosen == "student" else "student"]
    found = Found(layout, "backbone" if layout.name in PLAIN else chosen, prefix, {}, {}, dict(state.left_out))
    for name, value in state.tensors.items():
        group = next((part for part in layout.beside if name == part or (part.endswith(".") and name.startswith(part))), None)
        if group is None and aside is not None and name.startswith(aside):
            group = aside
        if group is not None:
            found.left_out[group] = found.left_out.get(group, 0) + 1
        elif name.startswith(prefix):
            found.weights[name.removeprefix(prefix)] = value
            found.names[name.removeprefix(prefix)] = state.names[name]
        else:
            found.unknown.append(state.names[name])
    found.weights, names, found.stem = named_children(found.weights, state.path)
    found.names = {name: found.names[old] for name, old in names.items()}
    return found


def _present(state: State, alternatives: Sequence[str]) -> str | None:
    return next((prefix for prefix in alternatives if any(name.startswith(prefix) for name in state.tensors)), None)


class Forgotten:
    """Stands for an object that is no weight; takes whatever it is given and keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Forgotten:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None: ...


def empty(*_: Any) -> collections.OrderedDict[Any, Any]:
    """Stands for a defaultdict, whose factory is forgotten."""
    return collections.OrderedDict()


_NUMPY = ("core.multiarray", "_core.multiarray")
_FORGOTTEN = (
    "argparse.Namespace",  # MoCo v3's and DINO's arguments
    "numpy.dtype",  # DINO's optimizer keeps learning rates as numpy scalars
    "numpy.ndarray",
    *(f"numpy.{module}.{name}" for module in _NUMPY for name in ("scalar", "_reconstruct")),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float64", "Float32", "Int64", "Int32", "Bool")),
    *(f"pathlib.{kind}" for kind in ("Path", "PosixPath", "WindowsPath", "PurePosixPath")),
    *("typing.Any", "builtins.dict", "builtins.list", "builtins.int", "builtins.float", "builtins.str"),
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),  # settings of solo-learn
    *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "omegaconf.nodes.AnyNode"),
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",  # old versions key the state of callbacks by their class
)
# The unpickler fills only dictionaries of Python's own.
_DICTIONARIES = (
    "lightning.fabric.utilities.data.AttributeDict",  # hyper-parameters of Lightning's checkpoints
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)


def read(path: Path) -> Mapping[str, Any]:
    """The top level of a file of weights: safetensors, or whatever torch.save wrote.

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
    try:
        old = not zipfile.is_zipfile(path) and tarfile.is_tarfile(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if old:
        raise CheckpointError(f"{path}: is in torch's tar format of before 2018, which cannot be read safely; {_CONVERT}")
    raw = _unpickle(path)
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{path}: holds a {type(raw).__name__}, not names and weights; {_CONVERT}")
    return raw


_CONVERT = "open it with the program that wrote it and save model.state_dict() as safetensors"


def _unpickle(path: Path) -> Any:
    harmless: list[Any] = [(Forgotten, name) for name in _FORGOTTEN]
    harmless += [(collections.OrderedDict, name) for name in _DICTIONARIES] + [(empty, "collections.defaultdict")]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(harmless):
            warnings.simplefilter("ignore")  # torch's remarks on pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises KeyError, RuntimeError, EOFError ... over files that are none of its own
        text = str(error)
        refused = re.search(r"GLOBAL ([\w.]+)", text)
        if refused:
            raise CheckpointError(
                f"{path}: holds a {refused[1]}, which is refused, as making one could run code of the file; {_CONVERT}"
            ) from error
        if "TorchScript" in text:
            raise CheckpointError(f"{path}: is a TorchScript program, not weights; {_CONVERT}") from error
        reason = one_line(error) if isinstance(error, RuntimeError) else "it is damaged or of another kind"
        raise CheckpointError(f"{path}: is not a file of weights ({reason[:120]})") from error


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
        """As plain JSON-able values."""
        return asdict(self)

    def gaps(self) -> list[str]:
        """What was allowed and every figure of these weights has to say."""
        found = []
        if self.missing:
            found.append(
                f"{len(self.missing)} of {self.total} weights are not in {self.file} and fresh, {self.missing[0]} the first"
            )
        if self.unexpected:
            found.append(f"{len(self.unexpected)} names in {self.file} were left out, {self.unexpected[0]} the first")
        return found

    def lines(self) -> list[str]:
        """For people."""
        left = ", ".join(f"{name} ({count})" if count else name for name, count in self.left_out.items()) or "nothing"
        found = " (found from its names)" if self.detected else ""
        return [
            f"{self.file}: layout {self.layout}{found}, {self.network}, {self.backbone}, stem {self.stem}",
            f"matched {self.matched} of {self.total}, missing {len(self.missing)}, unexpected {len(self.unexpected)}; left out: {left}",
            *self.notes,
        ]


def account(
    state: State,
    found: Found,
    wanted: Mapping[str, Tensor],
    heads: Sequence[str],
    allow: Sequence[str],
    report: LoadReport,
) -> dict[str, Tensor]:
    """The backbone's weights, complete; what is left out, missing and unexpected goes into the report.

    Args:
        wanted: every weight of the network; their values stand in for those that are allowed to be missing.
        heads: what may lie among the backbone's names without being part of it.
        allow: names, or beginnings of names that end in `.` or `*`.

    Raises:
        CheckpointError: naming what does not match and is not allowed.
    """
    extra = []
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
    broken = [f"{found.names[name]} ({fault})" for name, value in given.items() if (fault := _fault(value, wanted[name]))]
    if broken:
        raise CheckpointError(f"{state.path}: {len(broken)} weights cannot be used: {', '.join(broken[:3])}")
    return {name: given.get(name, value).detach().to(value.dtype).clone() for name, value in wanted.items()}


def _fault(value: Tensor, wanted: Tensor) -> str | None:
    if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_nested:
        return "no plain tensor"
    if value.is_floating_point() != wanted.is_floating_point() or value.is_complex():
        return f"{value.dtype} for {wanted.dtype}"
    return None if value.isfinite().all() else "not finite"


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


ROWS = (0, 360, 720, 1080)  # drawings of different digits
DEVIATIONS = 5.0  # a sample's spread lies this many standard errors from its expected value once in millions


def untrained(backbone: nn.Module, fresh: nn.Module) -> str | None:
    """Why a backbone looks like a fresh one, or None.

    Args:
        backbone, fresh: the same network, `fresh` newly initialised.

    It does if all weights that start out constant (norms' weights, biases) still have that value, or all running
    statistics of batch norms have, or every larger tensor is spread as in a fresh network, within the sampling error.
    """
    pairs = [
        (name, value, fresh.state_dict()[name]) for name, value in backbone.state_dict().items() if value.is_floating_point()
    ]
    for what, statistics in (("batch-norm statistics", True), ("norms and biases", False)):
        chosen = [(value, old) for name, value, old in pairs if old.ndim == 1 and ("running_" in name) == statistics]
        start = [(value, old) for value, old in chosen if bool((old == old[0]).all())]
        if start and all(_unmoved(value, old) for value, old in start):
            return f"its {what} all have the values they start with"
    large = [(value, old) for _, value, old in pairs if old.ndim > 1 and old.numel() >= 4096]
    if large and all(_alike(value, old) for value, old in large):
        return f"its {len(large)} large weights are all spread as in a fresh network"
    return None


def _unmoved(value: Tensor, fresh: Tensor) -> bool:
    # Some start the last norm of a branch at 0, others at 1.
    return torch.equal(value, fresh) or any(torch.equal(value, torch.full_like(value, start)) for start in (0.0, 1.0))


def _alike(value: Tensor, fresh: Tensor) -> bool:
    expected = fresh.std()
    error = expected / (2 * value.numel()) ** 0.5
    # The fresh sample has an error of its own.
    return bool((value.std() - expected).abs() <= DEVIATIONS * 2**0.5 * error) and bool(
        (value.mean() - fresh.mean()).abs() <= DEVIATIONS * 2 * error
    )


@functools.lru_cache
def _images() -> Tensor:
    return torch.from_numpy(digits.load("test")[0][list(ROWS)])


@torch.no_grad()
def dead(backbone: nn.Module, view: PlainView) -> str | None:
    """What is wrong with the features of a few images (the embedded digits), or None: not finite, or the same for all."""
    features = backbone.eval()(view.normalise(plain_batch(_images(), view))).float()
    if not bool(features.isfinite().all()):
        return "its features are not finite"
    if bool(features.std(0).max() <= 1e-6 * features.abs().max()):
        return "its features are the same for all images"
    return None


# What the code that trains small-stem networks of these layouts normalises CIFAR-10 by.
_CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
_CIFAR10_STD = {"official": (0.2023, 0.1994, 0.2010), "solo": (0.2470, 0.2435, 0.2616)}
_SIZES = {"standard": 224, "small": 32, "small-wide": 32, "small-pool": 64}


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
        The network as `load_backbone` gives it, with `.num_features`, `.transform` and `.spec`, and the account.

    Raises:
        ConfigError: for an argument that is unknown or does not fit.
        CheckpointError: if the file cannot be read safely, is of no known layout, does not match the network exactly, or
            holds weights that look untrained.
    """
    if stem not in (None, *_SIZES):
        raise ConfigError(f"stem: must be one of {', '.join(_SIZES)}, got {stem!r}")
    if size is not None and size < 4:
        raise ConfigError(f"size: must be 4 pixels or more, got {size}")
    state = opened(read(Path(path)), Path(path))
    chosen = find(layout, state) or _plain(state, backbone)
    found = split(state, chosen, network)
    name = backbone or infer_resnet(found.weights)
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
        torch.manual_seed(0)  # what is allowed to be missing is the same in every process
        fresh = create_backbone(name, stem, args)
    weights = account(state, found, _wanted(chosen.name, name, stem, fresh), _heads(found, name, fresh), allow, report)
    if chosen.name == "torchvision" and stem == "standard" and not name.startswith(TORCHVISION):
        weights = twins.from_torchvision(weights, name)
    spec = _spec(report, args, size, getattr(fresh, "pretrained_cfg", {}))
    made = spec.load(weights, Path(path))
    fault = dead(made, spec.view) or untrained(made, fresh)
    if fault and "untrained" not in allow:
        raise CheckpointError(f"{path}: the {report.network} looks untrained: {fault}; --allow untrained loads it all the same")
    return made, report


def _plain(state: State, backbone: str | None) -> Layout:
    """timm's or torchvision's own names: whichever share more with the network; of ResNets they are the same.

    Raises:
        CheckpointError: if the names are neither's.
    """
    name = backbone or infer_resnet(state.tensors)
    sought = f"its names fit no known layout: looked for {prefixes()}, and for the bare names of "
    if name is None:
        raise CheckpointError(
            f"{state.path}: {sought}a ResNet; they begin {', '.join(list(state.names.values())[:3])}; "
            "for another network with its own names give timm's name with --backbone"
        )
    if name.startswith(TORCHVISION):
        return LAYOUTS["torchvision"]
    ours = len(create_backbone(name).state_dict().keys() & state.tensors.keys())
    theirs = len(twins.bare(twins.TWINS[name])[0].state_dict().keys() & state.tensors.keys()) if name in twins.TWINS else 0
    if not ours and not theirs:
        raise CheckpointError(f"{state.path}: {sought}{name}; they begin {', '.join(list(state.names.values())[:3])}")
    return LAYOUTS["timm" if ours >= theirs else "torchvision"]


def _stem(found: Found) -> str:
    first = found.weights.get("conv1.weight")
    return found.stem or (found.layout.small_stem if first is not None and first.shape[-1] == 3 else "standard")


def _wanted(layout: str, name: str, stem: str, fresh: nn.Module) -> dict[str, Tensor]:
    """The weights a file has to give, under the layout's names."""
    if layout == "torchvision" and stem == "standard" and not name.startswith(TORCHVISION):
        if name not in twins.TWINS:
            raise ConfigError(f"backbone: torchvision's twin of {name!r} is not known; if the names are timm's, say --from timm")
        return twins.bare(twins.TWINS[name])[0].state_dict()
    return fresh.state_dict()


def _heads(found: Found, name: str, fresh: nn.Module) -> tuple[str, ...]:
    """The classifier's prefix under plain names; the layout's own heads otherwise."""
    theirs = name.removeprefix(TORCHVISION) if name.startswith(TORCHVISION) else twins.TWINS.get(name)
    if found.layout.name == "torchvision" and theirs is not None:
        return (twins.bare(theirs)[1] + ".",)
    if found.layout.name == "timm":
        classifier = getattr(fresh, "pretrained_cfg", {}).get("classifier") or ()
        return tuple(f"{part}." for part in ((classifier,) if isinstance(classifier, str) else classifier))
    return found.layout.heads


def _spec(report: LoadReport, args: Mapping[str, Any], size: int | None, cfg: Mapping[str, Any]) -> BackboneSpec:
    """How the backbone is built and what it sees."""
    fixed = cfg["input_size"][-1] if cfg.get("fixed_input_size") else None
    side = size if size is not None else fixed if fixed and report.stem == "standard" else _SIZES[report.stem]
    if fixed and side != fixed:
        args = {"img_size": fixed, **args}  # the file's position embeddings are those of the network's own size
    small = report.stem != "standard"
    cifar = report.stem in ("small", "small-wide") and report.layout in _CIFAR10_STD
    mean, std = (_CIFAR10_MEAN, _CIFAR10_STD[report.layout]) if cifar else (IMAGENET_MEAN, IMAGENET_STD)
    scaling = "bicubic" if report.layout == "dino" else "bilinear"  # as its authors' evaluations scale
    report.notes.append(
        f"assumed, as the file does not say: images of {side} pixels, scaled {scaling}, normalised by "
        f"{'CIFAR-10' if cifar else 'ImageNet'}'s mean and deviation"
    )
    view = PlainView(side, 1.0 if small else 256 / 224, scaling, mean, std)
    return BackboneSpec(report.backbone, args, report.stem, view)


def load_timm(name: str) -> nn.Module:
    """A network of timm's with the library's own pretrained weights, in eval mode; downloads them unless they are cached.

    Args:
        name: timm's name, with or without `timm:` before it and a tag behind it, such as `resnet50.a1_in1k`.

    Returns:
        The network as `load_backbone` gives it; size, mean, deviation, margin and interpolation are those timm states.

    Raises:
        ConfigError: if timm does not know the name, or has no weights for it.
        CheckpointError: if they cannot be fetched.
    """
    name = name.removeprefix("timm:")
    bare = name.partition(".")[0]
    fresh = create_backbone(bare)  # an unknown name is told before anything is fetched
    try:
        cfg = timm.get_pretrained_cfg(name)
    except Exception as error:  # timm's own types, for a tag it does not know
        raise ConfigError(f"backbone: timm knows no weights {name!r} ({one_line(error)})") from error
    if cfg is None or not cfg.has_weights:
        raise ConfigError(f"backbone: timm has no pretrained weights for {name}")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # which tells of each retry
    try:
        network = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # whatever the network, the hub or the file raise
        raise CheckpointError(f"{name}: its weights cannot be fetched ({one_line(error)}); is there a network?") from error
    size = cfg.input_size[-1]
    margin = math.floor(size / cfg.crop_pct) / size  # timm rounds down to whole pixels
    view = PlainView(size, margin, cfg.interpolation, tuple(cfg.mean), tuple(cfg.std))
    made = BackboneSpec(bare, {}, "standard", view).load(network.state_dict(), Path(name))
    fault = dead(made, view) or untrained(made, fresh)
    if fault:
        raise CheckpointError(f"{name}: looks untrained: {fault}")
    return made
