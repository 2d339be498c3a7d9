"""The backbones behind whatever a user points at: a run, an exported file, another program's file, a timm name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from torch import nn

from relssl.data.plain import PlainView, plain_view
from relssl.errors import CheckpointError, ConfigError
from relssl.method.backbones import feature_width, run_backbone
from relssl.settings.reading import read_yaml
from relssl.settings.recipes import public_name
from relssl.settings.run import Config, derive, from_mapping
from relssl.weights import store

NETWORKS = ("student", "teacher")


@dataclass(frozen=True)
class Run:
    """A run folder and what its config.yaml says."""

    folder: Path
    config: Config

    def checkpoint(self) -> Path:
        """The newest checkpoint.

        Raises:
            CheckpointError: if there is none, or the newest is damaged; the newest good one before it is then named.
        """
        found = store.checkpoints(self.folder / "checkpoints")
        if not found:
            raise CheckpointError(f"{self.folder}: holds no checkpoint yet")
        try:
            store.verify(found[-1])
        except CheckpointError as error:
            before = self._good(found[:-1])
            offer = (
                f"the one before is good: `relssl resume {self.folder} --checkpoint {before.name}`"
                if before
                else "no other is good"
            )
            raise CheckpointError(f"{error}; {offer}") from error
        return found[-1]

    def named(self, name: str) -> Path:
        """The checkpoint of that name; CheckpointError if there is none or it is damaged."""
        path = self.folder / "checkpoints" / name
        if path not in store.checkpoints(self.folder / "checkpoints"):
            known = ", ".join(other.name for other in store.checkpoints(self.folder / "checkpoints")) or "none"
            raise CheckpointError(f"{self.folder}: holds no checkpoint {name!r}; it holds: {known}")
        store.verify(path)
        return path

    @staticmethod
    def _good(candidates: list[Path]) -> Path | None:
        for path in reversed(candidates):
            try:
                store.verify(path)
            except CheckpointError:
                continue
            return path
        return None


def load_run(path: str | Path) -> Run:
    """The run in a folder.

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


def from_checkpoint(config: Config, checkpoint: Path, networks: Sequence[str]) -> dict[str, nn.Module]:
    """The backbones of a checkpoint by the name of their network (of those that `config.networks` says), in eval mode."""
    tensors, _ = store.load(checkpoint)
    found = {}
    for network in networks:
        prefix = f"{network}.backbone."
        weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        found[network] = build(config, weights, checkpoint)
    return found


def build(config: Config, weights: dict[str, Any], origin: Path) -> nn.Module:
    """The run's backbone with these weights, all of them and nothing else.

    Raises:
        CheckpointError: naming how many names match and which do not.
    """
    backbone = run_backbone(config)
    wanted = backbone.state_dict()
    missing, extra = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    shapes = [name for name in wanted.keys() & weights.keys() if wanted[name].shape != weights[name].shape]
    if missing or extra or shapes:
        matched = len(wanted.keys() & weights.keys()) - len(shapes)
        lists = [
            f"{kind}: {', '.join(names[:3])}"
            for kind, names in (("missing", missing), ("unexpected", extra), ("other shape", shapes))
            if names
        ]
        raise CheckpointError(f"{origin}: {matched} of {len(wanted)} weights of {config.backbone} match; {'; '.join(lists)}")
    backbone.load_state_dict(weights)
    backbone.transform, backbone.config = transform(config), config  # type: ignore[assignment]
    # timm's own figure is that before the layer which its MobileNetV3 ends with.
    backbone.num_features = feature_width(backbone, config.views.weak.size)  # type: ignore[assignment]
    return backbone.eval()


def settings_of(path: Path) -> Path:
    """Where the settings of an exported or imported file lie."""
    return path.with_suffix(".yaml")


def told(path: Path) -> tuple[str, str] | None:
    """The network that a `.safetensors` file of ours says it holds, and where it came from; None for any other file."""
    try:
        held = store.metadata(path) if path.is_file() else {}
    except CheckpointError:
        return None
    network, origin = held.get("network", ""), held.get("origin", "")
    return (network, origin) if network in (*NETWORKS, "backbone") and origin else None


def load_exported(path: Path) -> nn.Module:
    """The backbone in an exported or imported file, as the settings beside it describe it.

    Raises:
        ConfigError: if the settings cannot be used.
        CheckpointError: if weights are damaged or do not match the network exactly.
    """
    config = _settings(settings_of(path))
    # timm would open that file too, which some of its versions unpickle in full.
    if "checkpoint_path" in config.backbone_args:
        raise ConfigError(f"{settings_of(path)}: backbone_args: checkpoint_path is refused; the weights are those of {path.name}")
    return build(config, store.read(path), path)


def transform(config: Config) -> Any:
    """PIL image -> the normalised evaluation view [C, S, S] of a run."""
    view = PlainView.of(config.views)

    def transformed(image: Image.Image) -> torch.Tensor:
        return view.normalise(plain_view(image.convert("RGB"), view)[None])[0]

    return transformed


# What the settings of weights that no run of ours made say of their data.
NO_DATA = "imported"


@dataclass(frozen=True)
class Reading:
    """How to read weights; all but `network` is about files of other programs.

    Attributes:
        layout: official, solo, moco, dino, torchvision or timm; None: told from the names in the file.
        backbone: timm name; None: told from names and shapes, for ResNets.
        stem: as `encoder.stem`; None: told from the shapes, as far as they tell.
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

    def only_foreign(self) -> list[str]:
        """The options that were given and are about files of other programs alone."""
        options = {"--from": self.layout, "--backbone": self.backbone, "--stem": self.stem, "--allow": self.allow}
        return [name for name, value in options.items() if value]


@dataclass(frozen=True)
class Opened:
    """Backbones in eval mode, ready to be measured.

    Attributes:
        name: what to call them in messages and results; no path of this machine.
        networks: by name: student, teacher or both of a run, as far as it has them, else one `backbone`.
        config: how they were made and what they see.
        folder: of a run.
        origin: where the weights come from, as plain JSON.
        seen: fingerprint of the images that the run was pretrained on, if it is known.
        notes: what every figure of these weights has to say, such as those that were allowed to be missing.
    """

    name: str
    networks: dict[str, nn.Module]
    config: Config
    folder: Path | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    seen: str | None = None
    notes: tuple[str, ...] = ()

    def one(self) -> tuple[str, nn.Module]:
        """A single network and its name: the student, where there is a choice."""
        return next(iter(self.networks.items()))

    def sees(self, size: int | None) -> Config:
        """The settings with another side of the view, if one is asked for."""
        views = self.config.views
        if size is None or size == views.weak.size:
            return self.config
        return replace(self.config, views=replace(views, weak=replace(views.weak, size=size)))


def load_backbone(source: str | Path, network: str | None = None) -> nn.Module:
    """A pretrained backbone, in eval mode.

    Args:
        source: a run folder; an exported or imported `.safetensors` file with its settings beside it; another program's file
            whose layout can be told from its names; or a timm name.
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
    """The backbones that `source` names.

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
        return replace(_single(path.name, backbone, report.facts()), notes=tuple(report.gaps()))
    if given := reading.only_foreign():
        raise ConfigError(*(f"{option}: is for files of other programs, which {source} is not; leave it out" for option in given))
    if path.is_dir():
        return _run(path, reading.network)
    if reading.network:
        raise ConfigError(f"network: {source} holds one network; leave the option out")
    if path.is_file():
        network, origin = told(path) or ("backbone", path.name)
        facts = {"kind": "exported", "file": path.name, "network": network, "origin": origin}
        return _single(path.name, load_exported(path), facts)
    if timm.is_model(str(source).removeprefix("timm:").partition(".")[0]):
        from relssl.weights.foreign import load_timm

        return _single(str(source), load_timm(str(source)), {"kind": "timm", "name": str(source)})
    raise ConfigError(f"{source}: is no run folder, no file of weights and no timm name")


def is_exported(path: Path) -> bool:
    """Whether an existing file is one of ours, with its settings beside it.

    Raises:
        ConfigError: if it is and they are missing: what the network sees cannot be told from weights.
    """
    if path.suffix != ".safetensors":
        return False
    if settings_of(path).is_file():
        return True
    if told(path):
        raise ConfigError(f"{path}: its settings {settings_of(path).name}, written with it, are needed beside it")
    return False


def _single(name: str, backbone: nn.Module, origin: dict[str, Any]) -> Opened:
    config = backbone.config
    assert isinstance(config, Config)
    return Opened(name, {"backbone": backbone}, config, origin=origin)


def _run(path: Path, network: str | None) -> Opened:
    run = load_run(path)
    networks = derive(run.config).networks
    if network is not None and network not in networks:
        why = "" if "teacher" in networks else f" ({run.config.method.name} has no teacher)"
        raise ConfigError(f"network: {path.name} holds {' and '.join(networks)}, not {network}{why}")
    checkpoint = run.checkpoint()
    origin = {
        "kind": "run",
        "run": path.resolve().name,
        "checkpoint": checkpoint.name,
        "recipe": public_name(run.config.recipe),
    }
    found = from_checkpoint(run.config, checkpoint, networks if network is None else (network,))
    return Opened(path.resolve().name, found, run.config, path, origin, _pretrained_on(path))


def _pretrained_on(run: Path) -> str | None:
    try:
        found = json.loads((run / "environment.json").read_text())["data"]["fingerprint"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, str) else None
