"""Weights from elsewhere: those that student and teacher begin with, and those of a frozen teacher."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from relssl.data.loader import Loader
from relssl.engine import Engine
from relssl.errors import CheckpointError, ConfigError
from relssl.evaluation.features import state_hash
from relssl.method.encoder import Encoder
from relssl.method.frozen import FrozenTeacher
from relssl.settings import recipes
from relssl.settings.run import LUMA, Config, check, derive
from relssl.weights import store
from relssl.weights.foreign import Reading, untrained
from relssl.weights.opening import Opened, is_foreign, open_backbones
from relssl.weights.spec import Backbone, mismatch

_MOST = 1 << 30  # bytes of a frozen teacher's features that are kept


@dataclass(frozen=True)
class Given:
    """The weights that a run was given, and what is known of them."""

    start: Mapping[str, Tensor] = field(default_factory=dict)  # of the backbone; empty: random ones, or those of a checkpoint
    teacher: Backbone | None = None
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)  # for environment.json, by setting

    def load(self, encoder: Encoder) -> None:
        """Let the encoder's backbone begin with the weights, all of them and nothing else; CheckpointError if they do not fit."""
        if self.start:
            if fault := mismatch(encoder.backbone.state_dict(), self.start):
                raise CheckpointError(f"start: {self.facts['start']['source']} does not fit the network: {fault}")
            encoder.backbone.load_state_dict(self.start)

    def frozen_teacher(self, config: Config) -> FrozenTeacher | None:
        """Create the teacher for a run whose data has filled in its statistics; None if none is given."""
        if self.teacher is None:
            return None
        view, channels = self.teacher.transform, config.views.channels
        # Grey images it sees as colour.
        grey = (channels, view.channels) == (1, 3) and "views.channels" not in (config.typed or ())
        if channels != view.channels and not grey:
            raise ConfigError(f"teacher: {self.facts['teacher']['source']} sees {view.channels} channels, the student {channels}")
        return FrozenTeacher(self.teacher, view.size, view.interpolation, (view.mean, view.std), config.views.statistics())

    def lines(self) -> Iterator[str]:
        """Yield a line for each source that was opened."""
        use = {"start": "loaded into student and teacher; the heads are fresh"} if self.start else {}
        for setting, manner in (use | ({"teacher": "frozen"} if self.teacher is not None else {})).items():
            fact = self.facts[setting]
            origin = f"{fact['network']} of {fact['source']} ({fact['part']}, {fact['origin']}), {fact['weights']} weights"
            yield f"{setting}: {origin}, {manner}; sha256 {fact['sha256'][:12]}"


def open_sources(config: Config, begun: bool = False, recorded: Mapping[str, Any] | None = None) -> tuple[Config, Given]:
    """Open what `start` and `teacher` name; a run that has `begun`, with a checkpoint, does not need the first again.

    Returns the settings, with the network that comes with the weights and what a frozen teacher asks for, and the weights.

    Raises:
        ConfigError: if a source is none, or does not fit what was typed; the setting comes first.
        CheckpointError: if its weights are damaged, untrained, or not those whose facts the run has `recorded` when it was started.
    """
    for recipe, setting in (("continue", "start"), ("distil", "teacher")):
        if config.recipe == recipe and getattr(config, setting) is None:
            raise ConfigError(f"{setting}: recipe {recipe} needs one: --{setting} and a run, a file of weights or a timm name")
    start, teacher = dict[str, Tensor](), None
    facts = {name: fact for name, fact in (recorded or {}).items() if name in ("start", "teacher")}
    if config.start is not None and not begun:
        named = (("backbone", config.backbone), ("encoder.stem", config.encoder.stem))  # which another program's file may not say
        backbone, stem = (value if config.typed is None or name in config.typed else None for name, value in named)
        opened, facts["start"] = _open("start", config.start, Reading(config.start_from, backbone, stem), facts.get("start"))
        start = opened.backbone.state_dict()
        if "start" not in (recorded or {}):  # else the run has the network of the weights, beside what was typed
            config = _with_network(config, opened)
    if config.teacher is not None:
        opened, facts["teacher"] = _open("teacher", config.teacher, Reading(layout=config.teacher_from), facts.get("teacher"))
        config, teacher = _with_teacher(config, opened), opened.backbone
    return config, Given(start, teacher, facts)


def _open(setting: str, source: str, reading: Reading, recorded: dict[str, Any] | None) -> tuple[Opened, dict[str, Any]]:
    """Return the backbone that a setting names, and the facts about it."""
    path, foreign = Path(source), False
    try:
        foreign = is_foreign(path)
        if not foreign:  # the others say themselves what they are
            reading = replace(reading, backbone=None, stem=None)
        opened = open_backbones(source, reading)
    except (ConfigError, CheckpointError) as error:
        faults = [*str(error).splitlines()]
        if foreign:  # whose options are those of `relssl import`
            again = (
                f"; `relssl import {quote(source)} --backbone NAME` has options for other programs' files: give what it writes"
            )
            faults = [re.split("; (?:give timm's name|--allow NAME)", fault)[0] + again for fault in faults]
        raise type(error)(*(f"{setting}: {fault}" for fault in faults)) from error
    backbone, spec = opened.backbone, opened.spec
    if opened.report is None and (fault := untrained(backbone, spec.create(), spec.view)):  # others' files have been looked at
        raise CheckpointError(f"{setting}: {source} looks untrained: {fault}; give weights that were trained")
    places = (path, path / store.TENSORS, path / "checkpoints" / opened.header["origin"] / store.TENSORS)
    file = next(filter(Path.is_file, places), path)
    digest = state_hash(backbone)  # of weights that timm keeps
    if file.is_file():
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
    if recorded and recorded["sha256"] != digest:
        was = f"the run was started with {recorded['sha256'][:12]}; put these back"
        raise CheckpointError(f"{setting}: {source} holds other weights, of sha256 {digest[:12]}; {was}")
    facts = {"source": opened.name, "network": spec.name, "part": opened.header["network"], "origin": opened.header["origin"]}
    return opened, facts | {"sha256": digest, "weights": len(backbone.state_dict())}


def _with_network(config: Config, opened: Opened) -> Config:
    """Return the settings with the network of the weights, and with the images it has seen where nobody says otherwise."""
    spec, typed, views = opened.spec, config.typed or frozenset[str](), config.views
    theirs = {"backbone": spec.name, "encoder.stem": spec.stem, "views.channels": spec.view.channels}
    faults = [
        f"start: {opened.name} has {name} {value}, not {attrgetter(name)(config)}; leave that out, or give other weights"
        for name, value in theirs.items()
        if name in typed and attrgetter(name)(config) != value
    ]
    if faults:
        raise ConfigError(*faults)
    # Of data that no recipe of ours is made for, the size is as good as unknown.
    unknown = config.recipe in recipes.NAMES and recipes.for_run(config.data, config.method.name).endswith("folder")
    for name in ("weak", "strong"):
        if unknown and f"views.{name}.size" not in typed:
            views = replace(views, **{name: replace(getattr(views, name), size=spec.view.size)})
    args, own = dict(spec.arguments), spec.all_arguments()
    if "img_size" in own and views.weak.size != own["img_size"]:  # its position embeddings stay, and are resampled as images come
        args |= {name: value for name, value in own.items() if name != "in_chans"}
    given = {name.split(".")[1] for name in typed if name.startswith("backbone_args.")}  # and not the recipe's
    args |= {name: value for name, value in config.backbone_args.items() if name in given}
    statistics: dict[str, Any] = {
        name: (values[0] / sum(LUMA),) * 3 if len(values) == 1 else values  # settings hold those of three channels
        for name, values in (("mean", spec.view.mean), ("std", spec.view.std))
        if f"views.{name}" not in typed
    }
    views = replace(views, channels=spec.view.channels, **statistics)
    stem: Any = spec.stem
    return check(replace(config, backbone=spec.name, backbone_args=args, encoder=replace(config.encoder, stem=stem), views=views))


def _with_teacher(config: Config, opened: Opened) -> Config:
    """Return the settings with embeddings as wide as the teacher's features, and its batch as it comes."""
    width = opened.backbone.num_features
    if config.encoder.dim != width and "encoder.dim" in (config.typed or ()):
        raise ConfigError(f"encoder.dim: {config.encoder.dim} is not the {width} features of the teacher; leave it out")
    encoder, method = replace(config.encoder, dim=width), replace(config.method, shuffle=False)
    return check(replace(config, encoder=encoder, method=method))


def teacher_features(teacher: nn.Module | None, config: Config, loader: Loader, engine: Engine) -> Tensor | None:
    """Compute a frozen teacher's features [N, D] of all images, once, on the device; None where there is none, where its view of an image
    changes or the student sees it too, where images do not lie in memory, or where features would take too much of it."""
    view, count = config.views.weak, loader.plan.count
    if teacher is None or not view.fixed or derive(config).two_way:
        return None
    if loader.workers is not None or count * config.encoder.dim * 4 > _MOST:
        return None
    with engine.autocast():
        parts = (np.arange(first, min(first + loader.plan.share, count)) for first in range(0, count, loader.plan.share))
        return torch.cat([teacher([engine.place(loader.weak(rows))])[0] for rows in parts])
