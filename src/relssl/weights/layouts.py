"""The layouts in which other programs save a backbone: which names are its weights, which belong to something else.

Each is as its own repository writes it:
    official    mingkai-zheng/ReSSL, ressl.py: {model: module.encoder_q.net.*, module.encoder_q.head.*, module.encoder_k.*, queue}; the
                small-set code derived from MoCo's CIFAR demo: net.net.N.*, encoder_k.net.N.* with children by number
    solo        vturrisi/solo-learn, methods/base.py: {state_dict: backbone.*, momentum_backbone.*, projector.*, classifier.*};
                before 2022 encoder.* and momentum_encoder.*
    moco        facebookresearch/moco: {state_dict: module.encoder_q.*, module.encoder_k.*, queue}, the head under fc;
                moco-v3: module.base_encoder.*, module.momentum_encoder.*, predictor.*, the head under fc or head
    dino        facebookresearch/dino, main_dino.py: {student: module.backbone.*, module.head.*, teacher: backbone.* ...}
    torchvision, timm   the network's own names, bare or under state_dict or model
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from relssl.errors import CheckpointError, ConfigError
from relssl.schema import nearest_word
from relssl.weights import resnets


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
    found.weights, names, found.stem = resnets.named_children(found.weights, state.path)
    found.names = {name: found.names[old] for name, old in names.items()}
    return found


def _present(state: State, alternatives: Sequence[str]) -> str | None:
    return next((prefix for prefix in alternatives if any(name.startswith(prefix) for name in state.tensors)), None)
