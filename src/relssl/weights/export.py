"""Handing a backbone over: written in a format, loaded back as its card says, compared with the source, and only then kept."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from relssl.data.images import Images
from relssl.errors import ConfigError
from relssl.files import storing, sweep, sync_folder, temporary, write_file
from relssl.settings.run import to_yaml
from relssl.weights.card import card, public
from relssl.weights.foreign import LoadReport, Reading, load_foreign
from relssl.weights.formats import FORMATS, find_format
from relssl.weights.opening import is_exported, open_backbones, provenance, settings_of
from relssl.weights.parity import Parity, compare, real_images
from relssl.weights.spec import BackboneSpec
from relssl.weights.writers import WRITERS, Source


@dataclass(frozen=True)
class Exported:
    """A backbone that was handed over.

    Attributes:
        path: the file, or the folder for Hugging Face.
        files: all that was written, the card among them.
        format: one of `formats.FORMATS`.
        network: student or teacher; `backbone` where a file does not say which it holds.
        lines: Python that loads it without relssl.
        parity: how close it is to the source.
    """

    path: Path
    files: tuple[Path, ...]
    format: str
    network: str
    lines: tuple[str, ...]
    parity: Parity


def export(
    source: str | Path,
    *,
    format: str = "safetensors",
    network: str | None = None,
    out: str | Path | None = None,
    images: Images | None = None,
) -> Exported:
    """Write a backbone and its card.

    What was written is loaded back by the code that the card prints, and its features are compared with the source's on real
    images; nothing stays on the disk unless they agree.

    Args:
        source: a run folder, or an exported or imported `.safetensors` file with its settings beside it.
        format: one of `formats.FORMATS`.
        network: student (default) or teacher, of a run; a file holds one network.
        out: target; default: in RUN/export, or beside the file.
        images: what to compare on; default: the first of the run's data if it is on this machine, else the built-in digits.

    Raises:
        ConfigError: for an unknown format or network, a package that is missing, a network that the format cannot hold.
        CheckpointError: if weights are missing or damaged, or what was written does not agree with the source.
        StorageError: if it cannot be written.
    """
    find_format(format)
    path = Path(source)
    if path.is_file() and not is_exported(path):
        raise ConfigError(f"{path}: has no settings beside it; `relssl import {path}` writes a file that has, to export from")
    if not path.exists():
        raise ConfigError(f"{path}: is no run folder and no file that relssl exported or imported")
    opened = open_backbones(path, Reading(network=network))
    name, backbone = opened.one()
    if opened.folder is not None:
        leaving = Source(backbone, opened.spec, name, opened.origin["checkpoint"], opened.config, opened.folder)
    else:
        leaving = Source(backbone, opened.spec, opened.origin["network"], opened.origin["origin"], opened.config)
    return hand_over(leaving, _target(path, leaving, format, out), format, images)


def hand_over(source: Source, target: Path, format: str, images: Images | None = None) -> Exported:
    """Write a backbone and its card to `target` and check them; arguments and errors are those of `export`."""
    written = WRITERS[format](source)
    with storing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    batch, what = real_images(source.spec.view, source.config, images)
    unfinished, settings = temporary(target.parent), None
    try:
        with storing(target):
            (unfinished / target.name if isinstance(written.data, dict) else unfinished).mkdir(parents=True)
        if isinstance(written.data, bytes):
            write_file(unfinished / target.name, written.data)
            beside = unfinished / target.with_suffix(".md").name
        else:
            for name, data in written.data.items():
                write_file(unfinished / target.name / name, data)
            beside = unfinished / target.name / "README.md"
        if target.suffix == ".safetensors":
            settings = settings_of(target).name
            described = to_yaml(public(source.config)) if source.config is not None else source.spec.to_yaml()
            write_file(unfinished / settings, described.encode())
        parity = compare(source.backbone, written, unfinished / target.name, batch, what)
        write_file(beside, card(source, written, parity, target.name, settings).encode())
        files = _keep(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Exported(target, files, format, source.network, tuple(written.snippets[0].lines(str(target))), parity)


def _keep(unfinished: Path, target: Path) -> tuple[Path, ...]:
    """Move all that was written to its place, over an earlier export."""
    names = sorted(entry.name for entry in unfinished.iterdir())
    with storing(target):
        if (unfinished / target.name).is_dir() and target.exists():
            # Folders cannot be replaced in one go: the old one waits where it is removed with the rest.
            target.rename(unfinished / f"{target.name}.before")
        for name in names:
            (unfinished / name).replace(target.parent / name)
        sync_folder(target.parent)
    return tuple(sorted(target.iterdir() if target.is_dir() else (target.parent / name for name in names)))


def default_target(folder: Path, network: str, format: str = "safetensors") -> Path:
    """Return where a run's own export of a network lies."""
    return folder / "export" / _file_name("backbone" if network == "student" else f"backbone-{network}", format)


def _file_name(stem: str, format: str) -> str:
    suffix = FORMATS[format].suffix
    return stem + suffix if suffix == ".safetensors" else f"{stem}-{format}{suffix}"


def _target(path: Path, source: Source, format: str, out: str | Path | None) -> Path:
    """Return where to write; ConfigError for a place that does not suit the format."""
    suffix = FORMATS[format].suffix
    default = path.with_name(_file_name(path.stem, format))
    if source.folder is not None:
        default = default_target(source.folder, source.network, format)
    target = default if out is None else Path(out)
    if suffix and target.suffix != suffix:
        raise ConfigError(f"out: {target} must end in {suffix} for {format}")
    if suffix == ".safetensors" and target.stem == "config":
        raise ConfigError(f"out: {target}: its settings, beside it, would replace a config.yaml; choose another name")
    if target.exists() and source.folder is None and target.samefile(path):
        raise ConfigError(f"out: {target} is the source itself; choose another name")
    # What is in the way may be a user's own: weights and folders are replaced only by their like.
    like = target.is_file() and (suffix != ".safetensors" or provenance(target) is not None)
    if target.exists() and not (like if suffix else (target / "model.safetensors").is_file()):
        raise ConfigError(f"out: {target} is in the way and is no earlier export; choose another name")
    return target


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
        path, layout, backbone, stem, network, allow, size: as of `Reading`.

    Returns:
        The report on the file's names; its `out` is the file written, which `relssl.load_backbone` opens.

    Raises:
        ConfigError, CheckpointError: as `load_foreign`, and if OUT must not be written.
        StorageError: if it cannot be.
    """
    path = Path(path)
    if provenance(path):
        raise ConfigError(f"{path}: was written by relssl and is used as it is; there is nothing to import")
    target = Path(out) if out is not None else path.with_name(path.name.removesuffix(".tar")).with_suffix(".safetensors")
    if target.suffix != ".safetensors" or target.stem == "config":
        raise ConfigError(f"out: {target} must end in .safetensors, and its settings, beside it, must not replace a config.yaml")
    taken = [file for file in (target, settings_of(target), target.with_suffix(".md")) if file.exists()]
    if taken and (provenance(target) or ("",))[0] != "backbone":
        raise ConfigError(f"out: {taken[0]} exists and was not written by relssl import; give another name with --out")
    loaded, report = load_foreign(path, Reading(layout, backbone, stem, network, allow, size))
    spec = loaded.spec
    assert isinstance(spec, BackboneSpec)
    hand_over(Source(loaded, spec, "backbone", report.file, account=report.lines()), target, "safetensors")
    report.out = str(target)
    return report
