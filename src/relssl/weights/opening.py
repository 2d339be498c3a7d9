"""The backbones behind whatever a user points at: a run, an exported file, another program's file, a timm name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
from torch import nn

from relssl.config import Config
from relssl.errors import ConfigError
from relssl.weights.runs import NETWORKS, from_checkpoint, load_exported, load_run


@dataclass(frozen=True)
class Reading:
    """How to read weights of another program; a run and an exported file need none of it.

    Attributes:
        layout: official, solo, moco, dino, torchvision or timm; None: told from the names in the file.
        backbone: timm name; None: told from names and shapes, for ResNets.
        stem: as `encoder.stem`; None: told from the shapes, as far as they tell.
        network: student or teacher, of files that hold both; None: the one its authors evaluate.
        allow: names of weights that may be missing or unexpected.
        size: side of the view in pixels; None: the layout's own.
    """

    layout: str | None = None
    backbone: str | None = None
    stem: str | None = None
    network: str | None = None
    allow: Sequence[str] = ()
    size: int | None = None

    def misplaced(self) -> list[str]:
        """The options that were given and mean nothing for a run, an exported file or a timm name."""
        options = {"--from": self.layout, "--backbone": self.backbone, "--stem": self.stem, "--allow": self.allow}
        return [name for name, value in options.items() if value]


@dataclass(frozen=True)
class Opened:
    """Backbones in eval mode, ready to be measured.

    Attributes:
        name: what to call them in messages and results; no path of this machine.
        networks: by name: student and teacher of a run, else one `backbone`.
        config: how they were made and what they see.
        folder: of a run.
        origin: where the weights come from, as plain JSON.
        seen: fingerprint of the images that the run was pretrained on, if it is known.
    """

    name: str
    networks: dict[str, nn.Module]
    config: Config
    folder: Path | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    seen: str | None = None

    def sees(self, size: int | None) -> Config:
        """The settings with another side of the view, if one is asked for."""
        views = self.config.views
        if size is None or size == views.weak.size:
            return self.config
        return replace(self.config, views=replace(views, weak=replace(views.weak, size=size)))


def open_backbones(source: str | Path, reading: Reading | None = None) -> Opened:
    """The backbones that `source` names.

    Args:
        source: a run folder; a `.safetensors` file with its card beside it; any other file of weights; or a timm name, such
            as `resnet50` or `timm:resnet50.a1_in1k`, for timm's own pretrained weights, which may be downloaded.
        reading: how to read another program's file.

    Raises:
        ConfigError: if it is none of these, or options are given that the kind of source has no use for.
        CheckpointError: if weights are damaged, or not all of them match.
    """
    reading, path = reading or Reading(), Path(source)
    if path.is_file() and not (path.suffix == ".safetensors" and path.with_suffix(".yaml").is_file()):
        from relssl.weights.foreign import load_foreign

        backbone, report = load_foreign(path, **vars(reading))
        return _single(path.name, backbone, report.facts())
    if misplaced := reading.misplaced():
        raise ConfigError(*(f"{option}: {source} is no file of another program" for option in misplaced))
    if path.is_dir():
        return _run(path)
    if path.is_file():
        return _single(path.name, load_exported(path), {"kind": "exported", "file": path.name})
    if timm.is_model(str(source).removeprefix("timm:").partition(".")[0]):
        from relssl.weights.foreign import load_timm

        return _single(str(source), load_timm(str(source)), {"kind": "timm", "name": str(source)})
    raise ConfigError(f"{source}: is no run folder, no file of weights and no timm name")


def _single(name: str, backbone: nn.Module, origin: dict[str, Any]) -> Opened:
    config = backbone.config
    assert isinstance(config, Config)
    return Opened(name, {"backbone": backbone}, config, origin=origin)


def _run(path: Path) -> Opened:
    run = load_run(path)
    checkpoint = run.checkpoint()
    networks = {name: from_checkpoint(run.config, checkpoint, name) for name in NETWORKS}
    origin = {
        "kind": "run",
        "run": path.resolve().name,
        "checkpoint": checkpoint.name,
        "recipe": Path(run.config.recipe or "").name,
    }
    return Opened(path.resolve().name, networks, run.config, path, origin, _pretrained_on(path))


def _pretrained_on(run: Path) -> str | None:
    try:
        found = json.loads((run / "environment.json").read_text())["data"]["fingerprint"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, str) else None
