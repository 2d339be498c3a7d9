"""Handing a backbone over: written in a format, loaded back by the lines that its card prints, compared with the source, then kept."""

import contextlib
import importlib.util
import io
import itertools
import math
import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import validate_repo_id
from torch import Tensor, nn

from relssl import __version__
from relssl.data.images import Images, Pixels
from relssl.data.named import load, sample
from relssl.data.plain import PlainView, Reader
from relssl.engine import usual_torch
from relssl.errors import CheckpointError, ConfigError, ExportError, StorageError
from relssl.files import storing, sweep, sync_folder, temporary, write_file
from relssl.settings.run import Config, to_yaml
from relssl.weights import store
from relssl.weights.card import card, public
from relssl.weights.foreign import LoadReport, Reading
from relssl.weights.formats import FORMATS, find_format
from relssl.weights.opening import Opened, header_of, is_exported, open_backbones, open_foreign, open_whole, settings_of
from relssl.weights.writers import WRITERS, Parity, Snippet, Written

COUNT = 16  # images compared


@dataclass(frozen=True)
class Exported:
    """A backbone that was handed over."""

    path: Path  # the file, or the folder for Hugging Face
    files: tuple[Path, ...]  # all that was written, the card among them
    format: str  # one of `formats.FORMATS`
    network: str  # student or teacher; `backbone` where a file does not say which it holds
    lines: tuple[str, ...]  # Python that loads it without relssl
    parity: Parity  # how close it is to the source
    sizes: tuple[int, ...]  # of the files, in bytes
    address: str | None = None  # where it was uploaded to


@usual_torch()
def export(
    source: str | Path,
    *,
    format: str | None = None,
    network: str | None = None,
    out: str | Path | None = None,
    images: Images | None = None,
    push: str | None = None,
    dry_run: bool = False,
) -> Exported:
    """Write a backbone and its card.

    What was written is loaded back by the code that the card prints, and its features are compared with the source's on real
    images; nothing stays on the disk unless they agree.

    Args:
        source: a run folder, or an exported, imported or fine-tuned `.safetensors` file with its settings beside it; of the last, the
            classifier is handed over too.
        format: one of `formats.FORMATS`; default: safetensors, or hf to push.
        network: student (default) or teacher, of a run; a file holds one network.
        out: target; default: in RUN/export, or beside the file.
        images: what to compare on; default: the first of the run's data if it is on this machine, else the built-in digits.
        push: ORG/NAME on the Hugging Face Hub to upload to as well, with huggingface_hub's own login; created private if there is none.
        dry_run: upload nothing and leave nothing on the disk: the result says what would be.

    Raises:
        ConfigError: for an unknown format or network, a package that is missing, a network that the format cannot hold, no login.
        CheckpointError: if weights are missing or damaged, or what was written does not agree with the source.
        StorageError: if it cannot be written or uploaded.
    """
    format, path = format or ("hf" if push else "safetensors"), Path(source)
    find_format(format)
    if dry_run and push is None:
        raise ConfigError("dry_run: is for push; give --push ORG/NAME, or leave it out")
    if push is not None:  # refused before any work
        if format != "hf":
            raise ConfigError(f"push: the Hugging Face Hub takes format hf, not {format}; leave format out")
        try:
            validate_repo_id(push)
            _, _ = push.split("/")
        except ValueError as error:
            raise ConfigError(f"push: must be ORG/NAME, of a user or organisation and plain letters, got {push!r}") from error
        if not dry_run and get_token() is None:
            raise ConfigError("push: there is no login to the Hugging Face Hub; run `hf auth login`, or set HF_TOKEN")
    if not path.is_dir() and not (path.is_file() and is_exported(path)):
        raise ConfigError(f"{path}: is no run, and no weights with settings beside them, such as `relssl import FILE` writes")
    opened = open_whole(path) if path.is_file() and network is None else open_backbones(path, Reading(network=network))
    if opened.spec.classes and format in ("torchvision", "detectron2"):
        raise ConfigError(f"format: {format} holds backbones, without a classifier; use another of {', '.join(FORMATS)}")
    beside = path.with_name(_file_name(path.stem, format))
    if out is None and path.is_dir() and opened.folder is None and opened.config is not None:
        raise ConfigError(f"out: {path} is a checkpoint, where nothing else may lie; name a file with --out")
    target = Path(out or (default_target(path, opened.header["network"], format) if path.is_dir() else beside))
    if dry_run:
        with tempfile.TemporaryDirectory() as folder:
            exported = hand_over(opened, Path(folder) / target.name, format, images, push)
            return replace(exported, path=target, files=tuple(target / file.name for file in exported.files))
    check_target(target, format, path)
    exported = hand_over(opened, target, format, images, push)
    return exported if push is None else replace(exported, address=_upload(target, push))


@usual_torch()
def import_weights(path: str | Path, *, out: str | Path | None = None, **reading: Any) -> LoadReport:
    """Write the backbone in a foreign file as OUT.safetensors, its settings as OUT.yaml and a card as OUT.md.

    It is checked as an export is, and exported like one.

    Args:
        out: ends in .safetensors; default: beside the file, under its name. An older file there is replaced only if relssl wrote it.
        reading: layout, backbone, stem, network, prefix, allow, size, as of `Reading`.

    Returns:
        The report on the file's names; its `out` is the file written, which `relssl.load_backbone` opens.

    Raises:
        ConfigError, CheckpointError: as `load_foreign`, and if OUT must not be written.
        StorageError: if it cannot be.
    """
    path = Path(path)
    store.peek(path)
    if header_of(path) and settings_of(path).exists():
        raise ConfigError(f"{path}: was written by relssl and is used as it is; there is nothing to import")
    target = path.with_name(path.name.removesuffix(".tar")).with_suffix(".safetensors") if out is None else Path(out)
    check_target(target, "safetensors", path)
    opened = open_foreign(path, Reading(**reading))
    hand_over(opened, target, "safetensors")
    assert opened.report is not None
    opened.report.out = str(target)
    return opened.report


def _upload(folder: Path, name: str) -> str:
    """Upload a folder as a repository of models, and return its address."""
    try:
        hub = HfApi()
        address = hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Uploaded by relssl {__version__}")
    except Exception as error:  # whatever the hub and the network raise
        reason = f"the upload failed ({store.one_line(error)}); {folder} is whole, so push again"
        raise StorageError(f"push: {name}: {reason}") from error
    return str(address)


def default_target(folder: Path, network: str, format: str = "safetensors") -> Path:
    """Return where a run's own export of a network lies."""
    return folder / "export" / _file_name("backbone" if network == "student" else f"backbone-{network}", format)


def unexported(run: Path, reason: str) -> ExportError:
    """Return the error of a complete run without its export."""
    again = f"try again with `relssl export {quote(str(run))}`"
    return ExportError(f"{run}: the run is complete, its export failed ({reason}); {again}")


def _file_name(stem: str, format: str) -> str:
    suffix = FORMATS[format].suffix
    return stem + suffix if suffix == ".safetensors" else f"{stem}-{format}{suffix}"


def _card_of(target: Path, format: str) -> Path:
    return target.with_suffix(".md") if FORMATS[format].suffix else target / "README.md"


def check_target(target: Path, format: str, source: Path) -> None:
    """Refuse to replace what may be a user's own: only an earlier export or import goes, and never the source."""
    suffix, card = FORMATS[format].suffix, _card_of(target, format)
    if suffix and target.suffix != suffix:
        raise ConfigError(f"out: {target} must end in {suffix} for {format}")
    if suffix == ".safetensors" and target.stem == "config":
        raise ConfigError(f"out: {target}: its settings, beside it, would replace a config.yaml; choose another name")
    if suffix in (".safetensors", ""):
        earlier = bool(header_of(target if suffix else target / "model.safetensors"))
    else:  # whose card names it
        earlier = target.is_file() and card.is_file() and repr(target.name) in card.read_text(errors="replace")
    there = os.listdir(target) if not suffix and target.is_dir() else []
    if others := sorted({*there} - {"README.md", "config.json", "model.safetensors"}):
        raise ConfigError(f"out: {target} holds {others[0]}, which an export would remove; choose another folder with --out")
    beside = [target, card, *([settings_of(target)] if suffix == ".safetensors" else [])]
    if (taken := next(filter(Path.exists, beside), None)) and not (earlier and target.resolve() != source.resolve()):
        raise ConfigError(f"out: {taken} is the source, or in the way and not written by relssl; choose another name with --out")


def hand_over(source: Opened, target: Path, format: str, images: Images | None = None, hub: str | None = None) -> Exported:
    """Write a network and its card beside `target` under a temporary name, check them, and move them to their place."""
    written, name, settings = WRITERS[format](source, format), target.name, None
    batch, what = real_images(source.spec.view, source.config, images)
    files, text = {str(Path(name, file)): data for file, data in written.data.items()}, str(_card_of(Path(name), format))
    if target.suffix == ".safetensors":
        settings = settings_of(target).name
        files[settings] = (source.spec.to_yaml() if source.config is None else to_yaml(public(source.config))).encode()
    entries = dict.fromkeys(Path(file).parts[0] for file in (*files, text))  # the weights first, by which ours are recognised
    unfinished = temporary(target.parent)
    with storing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent)
        try:
            (unfinished / text).parent.mkdir(parents=True)
            for file, data in files.items():
                write_file(unfinished / file, data)
            parity = compare(source.backbone, written, unfinished / name, batch, what)
            write_file(unfinished / text, card(source, written, parity, name, settings, hub).encode("utf-8", "backslashreplace"))
            if target.is_dir():  # folders cannot be replaced in one go: the old one waits where it is removed with the rest
                target.rename(unfinished / f"{name}.before")
            for entry in entries:
                (unfinished / entry).replace(target.parent / entry)
            sync_folder(target.parent)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    paths = tuple(sorted(target.parent / file for file in (*files, text)))
    lines, sizes = tuple(written.snippets[0].lines(str(target), hub)), tuple(path.stat().st_size for path in paths)
    return Exported(target, paths, format, source.header["network"], lines, parity, sizes)


def compare(network: nn.Module, written: Written, file: Path, images: Tensor, what: str) -> Parity:
    """Load `file` by each of its snippets and compare the outputs for `images` [N, C, S, S] with the network's.

    Raises:
        CheckpointError: if it does not load, or an output differs by more than the format's tolerance.
    """
    with torch.no_grad():
        expected = torch.cat([network(images), network(images[:1])])
    largest, worst = float(expected.abs().max()), 0.0
    if not math.isfinite(largest):
        raise CheckpointError(f"{file.name}: the backbone's own features are not finite on {what}, so nothing is kept")
    snippets = [snippet for snippet in written.snippets if snippet.needs is None or importlib.util.find_spec(snippet.needs)]
    for snippet in snippets:
        loaded, outputs = _run(snippet, file, images)
        difference = float((outputs - expected).abs().max()) if outputs.shape == expected.shape else math.nan
        # Bit for bit, in order: outputs alone would miss a weight that these images do not use.
        ours, theirs = ([*each.state_dict().values()] if written.exact else [] for each in (network, loaded))
        equal = len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
        if not equal or not difference <= snippet.tolerance * largest:  # NaN is refused too
            figures = f"by {difference:.2g}, where {snippet.tolerance:g} of the largest, {largest:.2g}, is allowed"
            fault = f"loaded with {snippet.title} its weights or features differ {figures}; it is not kept"
            raise CheckpointError(f"{file.name}: {fault}")
        worst = max(worst, difference)
    return Parity(worst, worst / largest if largest else 0.0, what, tuple(snippet.title for snippet in snippets))


def _run(snippet: Snippet, file: Path, images: Tensor) -> tuple[Any, Tensor]:
    """Return what the snippet's own code loads, and its outputs [N+1, F] for all images and for the first alone."""
    scope, outputs = dict(snippet.given), []
    try:
        # What other libraries warn of while they load, and their progress bars, are not about the file.
        with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            exec("\n".join(snippet.lines(str(file))), scope)
            for scope["images"] in (images, images[:1]):
                exec(snippet.use, scope)
                outputs.append(torch.as_tensor(np.asarray(scope["outputs"])))
    except Exception as error:  # whatever a library raises over a file that it cannot use
        reason = store.one_line(error) or type(error).__name__
        raise CheckpointError(f"{file.name}: does not load with {snippet.title}: {reason}") from error
    return scope.get("model"), torch.cat(outputs)


def real_images(view: PlainView, config: Config | None = None, images: Images | None = None) -> tuple[Tensor, str]:
    """Return up to 16 images through the plain view as [N, C, S, S], and which they are in words.

    They are of `images`, or else the first of the data of the run with that `config` if they lie on this machine, else drawn digits.
    """
    if images is None and config is not None:
        images = sample(config.data, config.data_root, 4 * COUNT)
    reader, digits = Reader(view, max_pixels=(config or Config()).loader.max_pixels), load("digits", None, "test")
    assert isinstance(digits.source, Pixels)
    grey = Pixels(digits.source.tensor[:, :1].expand(-1, view.channels, -1, -1))
    for source in filter(None, (images, replace(digits, source=grey, name="the built-in digits"))):
        batches = reader.batches(source.subset(range(min(len(source), 4 * COUNT))), COUNT)  # as some files cannot be read
        if views := list(itertools.islice((one for _, batch, _ in batches for one in batch), COUNT)):
            break
    return torch.stack(views), f"{len(views)} images of {Path(source.name).name}"
