"""Reading a run folder: its configuration, its newest good checkpoint, its backbones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from relssl.config import Config, from_mapping
from relssl.data.batch import standardise
from relssl.data.plain import plain_view
from relssl.errors import CheckpointError, ConfigError
from relssl.method.encoder import create_backbone, feature_width
from relssl.schema import read_yaml
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
        ConfigError: if the folder holds no run.
    """
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder}: is no run folder (it has no config.yaml)")
    return Run(folder, from_mapping(read_yaml(folder / "config.yaml")))


def load_backbone(source: str | Path, network: str | None = None) -> nn.Module:
    """A run's pretrained backbone, in eval mode.

    Args:
        source: a run folder, or an exported `.safetensors` file with its card beside it.
        network: student (default) or teacher, of a run; an exported file holds one network.

    Returns:
        The timm network without classifier: images [B, 3, S, S] to features [B, F]. It has `.num_features` and
        `.transform`, which makes the normalised [3, S, S] tensor of a PIL image.

    Raises:
        ConfigError: if `source` is neither, or `network` unknown.
        CheckpointError: if weights are damaged or do not match the network exactly.
    """
    exported = Path(source).suffix == ".safetensors"
    if network not in (None, *NETWORKS) or (exported and network is not None):
        wanted = "nothing, an exported file holds one network" if exported else "student or teacher"
        raise ConfigError(f"network: must be {wanted}, got {network!r}")
    if exported:
        return load_exported(Path(source))
    run = load_run(source)
    return from_checkpoint(run.config, run.checkpoint(), network or "student")


def from_checkpoint(config: Config, checkpoint: Path, network: str) -> nn.Module:
    """The backbone of one network of one checkpoint, in eval mode."""
    tensors, _ = store.load(checkpoint)
    prefix = f"{network}.backbone."
    return build(
        config, {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}, checkpoint
    )


def build(config: Config, weights: dict[str, Any], origin: Path) -> nn.Module:
    """The run's backbone with these weights, all of them and nothing else.

    Raises:
        CheckpointError: naming how many names match and which do not.
    """
    backbone = create_backbone(config.backbone, config.encoder.stem, config.backbone_args)
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


def load_exported(path: Path) -> nn.Module:
    """The backbone in an exported file, described by the card beside it."""
    card = path.with_suffix(".yaml")
    if not path.is_file() or not card.is_file():
        raise ConfigError(f"{path}: needs the exported file and its card {card.name} beside it")
    try:
        weights = load_file(path)
    except Exception as error:  # safetensors raises its own type for whatever is wrong with a file
        raise CheckpointError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
    return build(from_mapping(read_yaml(card)), weights, path)


def transform(config: Config) -> Any:
    """PIL image -> the normalised evaluation view [3, S, S] of a run."""

    def view(image: Image.Image) -> torch.Tensor:
        return standardise(plain_view(image.convert("RGB"), config.views)[None], config)[0]

    return view
