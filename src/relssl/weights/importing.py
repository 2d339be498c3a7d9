"""Another program's file rewritten as one of ours: weights, settings and a card that says where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from relssl.config import Config
from relssl.errors import ConfigError
from relssl.weights.account import LoadReport
from relssl.weights.export import hand_over
from relssl.weights.foreign import load_foreign
from relssl.weights.runs import settings_of, told
from relssl.weights.written import Source


def import_weights(
    path: str | Path,
    *,
    out: str | Path | None = None,
    layout: str | None = None,
    backbone: str | None = None,
    stem: str | None = None,
    network: str | None = None,
    allow: Sequence[str] = (),
    size: int | None = None,
) -> LoadReport:
    """Write the backbone in a foreign file as OUT.safetensors, its settings as OUT.yaml and a card as OUT.md.

    It is checked as an export is, and exported like one.

    Args:
        out: ends in .safetensors; default: beside the file, under its name. An older file there is replaced only if this
            function wrote it.
        path, layout, backbone, stem, network, allow, size: as of `load_foreign`.

    Returns:
        The account of the file's names; its `out` is the file written, which `relssl.load_backbone` opens.

    Raises:
        ConfigError, CheckpointError: as `load_foreign`, and if OUT must not be written.
        StorageError: if it cannot be.
    """
    path = Path(path)
    if told(path):
        raise ConfigError(f"{path}: was written by relssl and is used as it is; there is nothing to import")
    target = Path(out) if out is not None else path.with_name(path.name.removesuffix(".tar")).with_suffix(".safetensors")
    _free(target)
    made, report = load_foreign(path, layout=layout, backbone=backbone, stem=stem, network=network, allow=allow, size=size)
    config = made.config
    assert isinstance(config, Config)
    hand_over(Source(made, config, "backbone", report.file, account=report.lines()), target, "safetensors")
    report.out = str(target)
    return report


def _free(target: Path) -> None:
    if target.suffix != ".safetensors" or target.stem == "config":
        raise ConfigError(f"out: {target} must end in .safetensors, and its settings, beside it, must not replace a config.yaml")
    taken = [file for file in (target, settings_of(target), target.with_suffix(".md")) if file.exists()]
    if taken and (told(target) or ("",))[0] != "backbone":
        raise ConfigError(f"out: {taken[0]} exists and was not written by relssl import; give another name with --out")
