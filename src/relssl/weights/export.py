"""Handing a backbone over: a safetensors file with timm's names, and a card that says what it is and how to load it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from relssl.atomic import storing, write_file
from relssl.config import Config, to_yaml
from relssl.errors import ConfigError
from relssl.method.encoder import create_backbone
from relssl.schema import nearest_word
from relssl.weights.runs import NETWORKS, from_checkpoint, load_run

FORMATS = ("safetensors",)


def export(run: str | Path, *, format: str = "safetensors", network: str = "student", out: str | Path | None = None) -> Path:
    """Write a run's backbone and its card.

    Args:
        run: a run folder.
        format: `safetensors`, whose keys are timm's own.
        network: student or teacher.
        out: target file; default RUN/export/backbone.safetensors, for the teacher backbone-teacher.safetensors.

    Returns:
        The file written, after it has been read back and compared with the checkpoint bit for bit.

    Raises:
        ConfigError: for an unknown format or network.
        CheckpointError: if the run's newest checkpoint is missing or damaged.
        StorageError: if the file cannot be written.
    """
    if format not in FORMATS:
        raise ConfigError(f"format: {format!r} is unknown; the nearest is {nearest_word(format, FORMATS)}")
    if network not in NETWORKS:
        raise ConfigError(f"network: must be student or teacher, got {network!r}")
    loaded = load_run(run)
    checkpoint = loaded.checkpoint()
    target = Path(out) if out is not None else default_target(loaded.folder, network)
    backbone = from_checkpoint(loaded.config, checkpoint, network)
    weights = {name: value.contiguous() for name, value in backbone.state_dict().items()}
    if target.suffix != ".safetensors" or target.stem == "config":
        raise ConfigError(f"out: {target} must end in .safetensors, and its settings, beside it, must not replace a config.yaml")
    with storing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, save(weights, metadata={"format": "pt"}))
    # Paths of this machine are nobody else's business; the card keeps the rest of the configuration.
    data, recipe = (Path(value or "folder").resolve().name or "folder" for value in (loaded.config.data, loaded.config.recipe))
    settings = dataclasses.replace(loaded.config, out=None, data_root=None, data=data, recipe=recipe)
    write_file(target.with_suffix(".yaml"), to_yaml(settings).encode())
    write_file(target.with_suffix(".md"), card(settings, target, network, checkpoint.name).encode())
    back = load_file(target)
    if back.keys() != weights.keys() or not all(torch.equal(back[name], value) for name, value in weights.items()):
        raise AssertionError(f"{target}: reads back different from what was written")
    return target


def default_target(folder: Path, network: str) -> Path:
    """Where a run's own export of a network lies."""
    return folder / "export" / ("backbone.safetensors" if network == "student" else "backbone-teacher.safetensors")


def card(config: Config, target: Path, network: str, checkpoint: str) -> str:
    """What the file holds and how to load it, as Markdown."""
    return f"""# {config.backbone}, pretrained with ReSSL

{network.capitalize()} backbone of {checkpoint}, recipe `{config.recipe}`, {config.epochs} epochs on `{config.data}`, seed {config.seed}.
Input: RGB, {config.views.weak.size} x {config.views.weak.size}, mean {list(config.views.mean or ())}, std {list(config.views.std or ())}.
All settings are in `{target.with_suffix(".yaml").name}`; the weights are yours.

With relssl:

    import relssl
    backbone = relssl.load_backbone("{target.name}")

With timm alone:

{_indent(timm_lines(config, target.name))}
"""


def timm_lines(config: Config, file: str) -> list[str]:
    """Python that loads the file with timm and nothing of ours."""
    args = "".join(f", {name}={value!r}" for name, value in config.backbone_args.items())
    if config.encoder.stem == "standard":
        return [
            "import timm",
            f'backbone = timm.create_model("{config.backbone}", num_classes=0{args}, checkpoint_path="{file}")',
        ]
    # timm cannot be asked for a small stem, so the two layers that differ are put in before the weights.
    lines = ["import timm, torch", f'backbone = timm.create_model("{config.backbone}", num_classes=0{args})']
    plain = dict(create_backbone(config.backbone, "standard", config.backbone_args).named_modules())
    ours = dict(create_backbone(config.backbone, config.encoder.stem, config.backbone_args).named_modules())
    for name, module in ours.items():
        if type(module) in (torch.nn.Conv2d, torch.nn.Identity) and repr(module) != repr(plain.get(name)):
            lines.append(f'backbone.set_submodule("{name}", torch.nn.{module!r})')
    return [*lines, f'timm.models.load_checkpoint(backbone, "{file}")']


def _indent(lines: list[str]) -> str:
    return "\n".join("    " + line for line in lines)
