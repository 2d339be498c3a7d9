"""Reading a run folder: its configuration, its newest good checkpoint, its backbones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from relssl.config import Config, from_mapping
from relssl.data.batch import standardise
from relssl.data.plain import plain_view
from relssl.errors import CheckpointError, ConfigError
from relssl.method.backbones import feature_width, run_backbone
from relssl.schema import read_yaml
from relssl.weights import store, tensorfile

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
        held = tensorfile.metadata(path) if path.is_file() else {}
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
    return build(config, tensorfile.read(path), path)


def transform(config: Config) -> Any:
    """PIL image -> the normalised evaluation view [C, S, S] of a run."""

    def view(image: Image.Image) -> torch.Tensor:
        return standardise(plain_view(image.convert("RGB"), config.views)[None], config)[0]

    return view
