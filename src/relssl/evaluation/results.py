"""Where the results of an evaluation go, and what they are called; checked before the work, not after it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

from relssl.data.folder import shown
from relssl.errors import ConfigError, StorageError
from relssl.files import storing
from relssl.settings.evaluation import Evaluation


def check_out(out: Path) -> None:
    """Refuse a file that could not be written at the end."""
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"out: {out.absolute().parent} is no folder")
    if out.is_dir():
        raise ConfigError(f"out: {out} is a folder; name a JSON file")
    with storing(out):
        _require_writable(out.absolute().parent)


def check_data(settings: Evaluation, data: str) -> None:
    """Several data sets are for `transfer` alone, which names its rows after them; cuts of the data are not for `detection`."""
    protocols = settings.protocol
    for name, instead in (("images", "max_images"), ("size", "min_size")):
        if "detection" in protocols and getattr(settings, name) is not None:
            raise ConfigError(f"{name}: is not for detection; use detection.{instead}")
    names = [title(one) for one in data.split(",") if one]
    for protocol in protocols:
        if protocol != "transfer" and len(names) > 1 and not Path(data).exists():
            raise ConfigError(f"protocol: {protocol} takes one data set, got {len(names)}; several are for transfer alone")
        if protocol == "transfer" and len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"transfer: {twice} names more than one data set; results are told apart by it, so rename a folder")


def results_folder(run: Path, out: str | Path | None, say: Callable[[str], None]) -> Path | None:
    """Where a run keeps its results; None if that cannot be written and they go to `out`."""
    folder = run / "evaluations"
    try:
        with storing(folder):
            folder.mkdir(exist_ok=True)
            _require_writable(folder)
    except StorageError as error:
        if out is None:
            raise StorageError(f"{error}, or give --out FILE") from error
        say(f"{folder}: cannot be written; the results go to {out} alone")
        return None
    return folder


def _require_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def unfinished(run: Path) -> list[str]:
    """A note for a run that may still be at work, or was stopped."""
    try:
        state = json.loads((run / "status.json").read_bytes())["state"]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return [] if state == "complete" else ["the run is not complete; its newest checkpoint was measured, which the card names"]


def title(data: str) -> str:
    """What to call a data set in results: a name as it is, a folder by its last part, nothing of this machine."""
    return ",".join(shown(Path(one).name or one) for one in data.split(","))


def file_name(protocol: str, data: str, settings: Evaluation) -> str:
    """The name of a protocol's results; a cut of the data, another size, or the paper's other
    schedule has one of its own, so that it replaces no full result."""
    cut = "" if settings.images is None else f"-{settings.images[0]}-{settings.images[1]}"
    size = "" if settings.size is None else f"-{settings.size}px"
    plain = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in title(data))[:100]
    schedule = "-step" if protocol == "linear" and settings.linear.schedule == "step" else ""
    return f"{protocol}-{plain}{cut}{size}{schedule}.json"
