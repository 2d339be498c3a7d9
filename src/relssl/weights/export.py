"""Handing a backbone over: written in a format, loaded back as its card says, compared with the source, and only then kept."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    if not path.is_dir() and not (path.is_file() and is_exported(path)):
        raise ConfigError(
            f"{path}: is no run folder and no weights with settings beside them, such as `relssl import FILE` writes"
        )
    opened = open_backbones(path, Reading(network=network))
    name, backbone = opened.one()
    origin, default = opened.origin, path.with_name(_file_name(path.stem, format))
    if opened.folder is not None:
        origin, default = {"network": name, "origin": origin["checkpoint"]}, default_target(path, name, format)
    leaving = Source(backbone, opened.spec, origin["network"], origin["origin"], opened.config, opened.folder)
    target, suffix = default if out is None else Path(out), FORMATS[format].suffix
    if suffix and target.suffix != suffix:
        raise ConfigError(f"out: {target} must end in {suffix} for {format}")
    if suffix == ".safetensors" and target.stem == "config":
        raise ConfigError(f"out: {target}: its settings, beside it, would replace a config.yaml; choose another name")
    # What is in the way may be a user's own: weights and folders are replaced only by their like, and never the source.
    like = target.is_file() and not target.samefile(path) and (suffix != ".safetensors" or provenance(target) is not None)
    if target.exists() and not (like if suffix else (target / "model.safetensors").is_file()):
        raise ConfigError(f"out: {target} is the source, or in the way and no earlier export; choose another name")
    return _hand_over(leaving, target, format, images)


def _hand_over(source: Source, target: Path, format: str, images: Images | None = None) -> Exported:
    """Write a backbone and its card beside `target` under a temporary name, check them, and move them to their place."""
    written, name = WRITERS[format](source, format), target.name
    batch, what = real_images(source.spec.view, source.config, images)
    folder, settings = not isinstance(written.data, bytes), None
    with storing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    unfinished = temporary(target.parent)
    try:
        with storing(target):
            (unfinished / name if folder else unfinished).mkdir(parents=True)
        files = {name: written.data} if isinstance(written.data, bytes) else {f"{name}/{k}": v for k, v in written.data.items()}
        if target.suffix == ".safetensors":
            settings = settings_of(target).name
            files[settings] = (source.spec.to_yaml() if source.config is None else to_yaml(public(source.config))).encode()
        for file, data in files.items():
            write_file(unfinished / file, data)
        parity = compare(source.backbone, written, unfinished / name, batch, what)
        beside = f"{name}/README.md" if folder else target.with_suffix(".md").name
        write_file(unfinished / beside, card(source, written, parity, name, settings).encode())
        with storing(target):
            entries = sorted(entry.name for entry in unfinished.iterdir())
            if folder and target.exists():
                # Folders cannot be replaced in one go: the old one waits where it is removed with the rest.
                target.rename(unfinished / f"{name}.before")
            for entry in entries:
                (unfinished / entry).replace(target.parent / entry)
            sync_folder(target.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    paths = tuple(sorted(target.parent / file for file in (*files, beside)))
    return Exported(target, paths, format, source.network, tuple(written.snippets[0].lines(str(target))), parity)


def default_target(folder: Path, network: str, format: str = "safetensors") -> Path:
    """Return where a run's own export of a network lies."""
    return folder / "export" / _file_name("backbone" if network == "student" else f"backbone-{network}", format)


def _file_name(stem: str, format: str) -> str:
    suffix = FORMATS[format].suffix
    return stem + suffix if suffix == ".safetensors" else f"{stem}-{format}{suffix}"


def import_weights(path: str | Path, *, out: str | Path | None = None, **reading: Any) -> LoadReport:
    """Write the backbone in a foreign file as OUT.safetensors, its settings as OUT.yaml and a card as OUT.md.

    It is checked as an export is, and exported like one.

    Args:
        out: ends in .safetensors; default: beside the file, under its name. An older file there is replaced only if this
            function wrote it.
        reading: layout, backbone, stem, network, allow, size, as of `Reading`.

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
    loaded, report = load_foreign(path, Reading(**reading))
    spec = loaded.spec
    assert isinstance(spec, BackboneSpec)
    _hand_over(Source(loaded, spec, "backbone", report.file, account=report.lines()), target, "safetensors")
    report.out = str(target)
    return report
