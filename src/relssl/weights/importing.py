"""Another program's file rewritten as one of ours: weights, settings and a card that says where they come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from relssl.atomic import storing, write_file
from relssl.config import Config, to_yaml
from relssl.errors import ConfigError
from relssl.weights import tensorfile
from relssl.weights.account import LoadReport
from relssl.weights.foreign import load_foreign

_MARK = {"format": "pt", "written_by": "relssl import"}


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
    target = Path(out) if out is not None else Path(path).with_suffix(".safetensors")
    _free(target)
    made, report = load_foreign(path, layout=layout, backbone=backbone, stem=stem, network=network, allow=allow, size=size)
    config = made.config
    assert isinstance(config, Config)
    weights = {name: value.contiguous() for name, value in made.state_dict().items()}
    with storing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, save(weights, metadata=_MARK))
    write_file(target.with_suffix(".yaml"), to_yaml(config).encode())
    write_file(target.with_suffix(".md"), _card(config, target, report).encode())
    back = tensorfile.read(target)
    if back.keys() != weights.keys() or not all(torch.equal(back[name], value) for name, value in weights.items()):
        raise AssertionError(f"{target}: reads back different from what was written")
    report.out = str(target)
    return report


def _free(target: Path) -> None:
    if target.suffix != ".safetensors" or target.stem == "config":
        raise ConfigError(f"out: {target} must end in .safetensors, and its settings, beside it, must not replace a config.yaml")
    taken = [file for file in (target, target.with_suffix(".yaml"), target.with_suffix(".md")) if file.exists()]
    if taken and not _ours(target):
        raise ConfigError(f"out: {taken[0]} exists and was not written by relssl import; give another name with --out")


def _ours(target: Path) -> bool:
    """Whether this command wrote the file, by the mark in its header."""
    if not target.is_file():
        return False
    with target.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        head = file.read(min(length, tensorfile.MAX_JSON))
    try:
        return bool(json.loads(head).get("__metadata__", {}).get("written_by") == _MARK["written_by"])
    except (ValueError, AttributeError):
        return False


def _card(config: Config, target: Path, report: LoadReport) -> str:
    views = config.views
    account = "\n".join(f"- {line}" for line in report.lines())
    return f"""# {config.backbone}, imported

The {report.network} backbone of `{report.file}`, a file of layout `{report.layout}`. How it was trained is not known to this
file; its licence is that of its source.
Input: RGB, {views.weak.size} x {views.weak.size}, mean {list(views.mean or ())}, std {list(views.std or ())}.
Where the original used others, correct them in `{target.with_suffix(".yaml").name}`.

{account}

With relssl:

    import relssl
    backbone = relssl.load_backbone("{target.name}")
"""
