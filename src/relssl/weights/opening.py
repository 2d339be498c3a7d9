"""The backbones behind whatever a user points at: a run, an exported file, another program's file, a timm name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
from torch import nn

from relssl.data.loader import worker_count
from relssl.data.plain import Reader
from relssl.errors import CheckpointError, ConfigError
from relssl.settings.reading import read_yaml
from relssl.settings.recipes import public_name
from relssl.settings.run import Config, derive, from_mapping
from relssl.weights import store
from relssl.weights.spec import NO_DATA, BackboneSpec

NETWORKS = ("student", "teacher")


@dataclass(frozen=True)
class Run:
    """A run folder and the settings in its config.yaml."""

    folder: Path
    config: Config

    def checkpoint(self) -> Path:
        """Return the newest checkpoint.

        Raises:
            CheckpointError: if there is none, or the newest is damaged; the newest good one before it is then named.
        """
        *older, newest = [None, *store.checkpoints(self.folder / "checkpoints")]
        if newest is None:
            raise CheckpointError(f"{self.folder}: holds no checkpoint yet")
        try:
            store.verify(newest)
        except CheckpointError as error:
            good = next((path for path in reversed(older) if path is not None and store.is_whole(path)), None)
            offer = (
                f"the one before is good: `relssl resume {self.folder} --checkpoint {good.name}`" if good else "no other is good"
            )
            raise CheckpointError(f"{error}; {offer}") from error
        return newest

    def named(self, name: str) -> Path:
        """Return the checkpoint of that name.

        Raises:
            CheckpointError: if there is none or it is damaged.
        """
        names = [path.name for path in store.checkpoints(self.folder / "checkpoints")]
        if name not in names:
            raise CheckpointError(f"{self.folder}: holds no checkpoint {name!r}; it holds: {', '.join(names) or 'none'}")
        store.verify(self.folder / "checkpoints" / name)
        return self.folder / "checkpoints" / name


def load_run(path: str | Path) -> Run:
    """Return the run in a folder.

    Raises:
        ConfigError: if the folder holds no run, or settings that this version does not know, naming file and setting.
    """
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder}: is no run folder (it has no config.yaml)")
    return Run(folder, _settings(folder / "config.yaml"))


def _settings(file: Path) -> Config:
    stored = read_yaml(file)
    try:
        return from_mapping(stored)
    except ConfigError as error:  # which knows the settings' names alone
        raise ConfigError(*(f"{file}: {fault}" for fault in error.faults)) from error


def settings_of(path: Path) -> Path:
    """Return where the settings of an exported or imported file lie."""
    return path.with_suffix(".yaml")


def provenance(path: Path) -> tuple[str, str] | None:
    """Return the network that a `.safetensors` file of ours says it holds, and its origin; None for any other file."""
    try:
        header = store.metadata(path) if path.is_file() else {}
    except CheckpointError:
        return None
    network, origin = header.get("network", ""), header.get("origin", "")
    return (network, origin) if network in (*NETWORKS, "backbone") and origin else None


def is_exported(path: Path) -> bool:
    """Return whether an existing file is one of ours, with its settings beside it.

    Raises:
        ConfigError: if it is and they are missing: weights do not say what the network sees.
    """
    if path.suffix != ".safetensors":
        return False
    if settings_of(path).is_file():
        return True
    if provenance(path):
        raise ConfigError(f"{path}: its settings {settings_of(path).name}, written with it, are needed beside it")
    return False


@dataclass(frozen=True)
class Reading:
    """How to read weights; all but `network` and `size` is about files of other programs.

    Attributes:
        layout: official, solo, moco, dino, torchvision or timm; None: recognised by the names in the file.
        backbone: timm name; None: inferred from names and shapes, for ResNets.
        stem: as `encoder.stem`; None: inferred from the shapes, as far as they show it.
        network: student or teacher, of runs (None: all they have) and of files that hold both (None: the one their authors evaluate).
        allow: names of weights that may be missing or unexpected.
        size: side of the view in pixels; None: the layout's own.
    """

    layout: str | None = None
    backbone: str | None = None
    stem: str | None = None
    network: str | None = None
    allow: Sequence[str] = ()
    size: int | None = None


@dataclass(frozen=True)
class Opened:
    """Backbones in eval mode, ready to be measured.

    Attributes:
        name: what to call them in messages and results; no path of this machine.
        networks: by name: student, teacher or both of a run, as far as it has them, else one `backbone`.
        spec: what they are.
        config: settings of the run that trained them, if one of ours did.
        folder: of a run.
        origin: where the weights come from, as plain JSON.
        seen: fingerprint of the images that the run was pretrained on, if it is known.
        notes: what a reader of any figure of these weights must know, such as names that were allowed to be missing.
    """

    name: str
    networks: dict[str, nn.Module]
    spec: BackboneSpec
    config: Config | None = None
    folder: Path | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    seen: str | None = None
    notes: tuple[str, ...] = ()

    def one(self) -> tuple[str, nn.Module]:
        """Return a single network and its name: the student, where there is a choice."""
        return next(iter(self.networks.items()))

    @property
    def data(self) -> str | None:
        """The data set they were trained on, if it is known."""
        return None if self.config is None else self.config.data

    @property
    def data_root(self) -> str | None:
        """Where the run looked for named data sets, if it said so."""
        return None if self.config is None else self.config.data_root

    def reader(self, size: int | None = None, workers: int | None = None) -> Reader:
        """Return how images are read for these backbones.

        Args:
            size: another side of the view; None: their own.
            workers: processes that read files; None: as many as there are cores to spare.
        """
        config = self.config or Config()
        return Reader(
            replace(self.spec.view, size=size or self.spec.view.size),
            worker_count(workers),
            config.loader.max_pixels,
            self.config is None or config.views.weak.flip > 0,
        )


def load_backbone(source: str | Path, network: str | None = None) -> nn.Module:
    """Return a pretrained backbone, in eval mode.

    Args:
        source: a run folder; an exported or imported `.safetensors` file with its settings beside it; another program's file
            whose layout its names show; or a timm name.
        network: student or teacher, of a run (default: student) or of a file that holds both (default: the one its authors
            evaluate).

    Returns:
        The network without classifier: images [B, C, S, S] to features [B, F]. It has `.num_features` and `.transform`,
        which makes the normalised [C, S, S] tensor of a PIL image; C is 3, or 1 if it was trained on grey views.

    Raises:
        ConfigError: if `source` is none of these, or does not hold `network`.
        CheckpointError: if weights are damaged or do not match the network exactly.
    """
    return open_backbones(source, Reading(network=network)).one()[1]


def open_backbones(source: str | Path, reading: Reading | None = None) -> Opened:
    """Return the backbones that `source` names.

    Args:
        source: a run folder; a `.safetensors` file with its settings beside it; any other file of weights; or a timm name,
            such as `resnet50` or `timm:resnet50.a1_in1k`, for timm's own pretrained weights, which may be downloaded.
        reading: how to read it.

    Raises:
        ConfigError: if it is none of these, or options are given that the kind of source has no use for.
        CheckpointError: if weights are damaged, or not all of them match.
    """
    reading, path = reading or Reading(), Path(source)
    if path.is_file() and not is_exported(path):
        from relssl.weights.foreign import load_foreign

        backbone, report = load_foreign(path, **vars(reading))
        return _single(path.name, backbone, origin=report.facts(), notes=tuple(report.gaps()))
    options = {"--from": reading.layout, "--backbone": reading.backbone, "--stem": reading.stem, "--allow": reading.allow}
    if useless := [option for option, value in options.items() if value]:
        raise ConfigError(
            *(f"{option}: is for files of other programs, which {source} is not; leave it out" for option in useless)
        )
    if path.is_dir():
        return _run(path, reading.network)
    if reading.network:
        raise ConfigError(f"network: {source} holds one network; leave the option out")
    if path.is_file():
        return _exported(path)
    if timm.is_model(str(source).removeprefix("timm:").partition(".")[0]):
        from relssl.weights.foreign import load_timm

        return _single(str(source), load_timm(str(source)), origin={"kind": "timm", "name": str(source)})
    raise ConfigError(f"{source}: is no run folder, no file of weights and no timm name")


def _single(name: str, backbone: nn.Module, **more: Any) -> Opened:
    spec = backbone.spec
    assert isinstance(spec, BackboneSpec)
    return Opened(name, {"backbone": backbone}, spec, **more)


def _exported(path: Path) -> Opened:
    config = _settings(settings_of(path))
    # timm would open that file too, which some of its versions unpickle in full.
    if "checkpoint_path" in config.backbone_args:
        raise ConfigError(f"{settings_of(path)}: backbone_args: checkpoint_path is refused; the weights are those of {path.name}")
    network, origin = provenance(path) or ("backbone", path.name)
    return _single(
        path.name,
        BackboneSpec.of(config).load(store.read(path), path),
        config=None if config.data == NO_DATA else config,
        origin={"kind": "exported", "file": path.name, "network": network, "origin": origin},
    )


def _run(path: Path, network: str | None) -> Opened:
    run = load_run(path)
    networks, title = derive(run.config).networks, path.resolve().name
    if network is not None and network not in networks:
        why = "" if "teacher" in networks else f" ({run.config.method.name} has no teacher)"
        raise ConfigError(f"network: {path.name} holds {' and '.join(networks)}, not {network}{why}")
    checkpoint, spec = run.checkpoint(), BackboneSpec.of(run.config)
    tensors, _ = store.load(checkpoint)
    backbones = {}
    for name in networks if network is None else (network,):
        prefix = f"{name}.backbone."
        weights = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        backbones[name] = spec.load(weights, checkpoint)
    origin = {"kind": "run", "run": title, "checkpoint": checkpoint.name, "recipe": public_name(run.config.recipe)}
    return Opened(title, backbones, spec, run.config, path, origin, _pretrained_on(path))


def _pretrained_on(run: Path) -> str | None:
    """Return the fingerprint of the images in a run's environment.json, if it has one."""
    try:
        fingerprint = json.loads((run / "environment.json").read_text())["data"]["fingerprint"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return fingerprint if isinstance(fingerprint, str) else None
