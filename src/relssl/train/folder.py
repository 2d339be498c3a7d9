"""The run folder: made once, never overwritten silently, written by one process at a time."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from relssl.atomic import write_file, write_json
from relssl.config import Config, to_yaml
from relssl.errors import ConfigError, LockedError, StorageError
from relssl.recipes import spoken
from relssl.weights import store

_PACKAGES = ("relssl", "torch", "torchvision", "timm", "lightning", "numpy", "scikit-learn", "safetensors", "Pillow")


def refuse_used(folder: Path) -> None:
    """ConfigError if `folder` holds anything already; needs no torch, so it is asked before start-up."""
    if (folder / "config.yaml").exists():
        raise ConfigError(f"out: {folder} holds a run; go on with `relssl resume {folder}` or give another --out")
    # A run that was killed before it could say what it is has left its lock and an empty folder, and nothing to lose.
    if folder.exists() and not (folder.is_dir() and all(_is_blank(entry) for entry in folder.iterdir())):
        raise ConfigError(f"out: {folder} exists and is not empty; give another --out")


def _is_blank(entry: Path) -> bool:
    return entry.name == ".lock" or (entry.name == "checkpoints" and entry.is_dir() and not any(entry.iterdir()))


def default_folder(config: Config) -> str:
    """runs/RECIPE-SEED, nips/cifar10 as nips-cifar10."""
    name = spoken(config.recipe) or "run"
    return f"runs/{name.removesuffix('.yaml').removesuffix('.yml').replace('/', '-')}-{config.seed}"


class RunFolder:
    """A run's files, for the one process that writes them.

    Raises:
        LockedError: if another process holds the folder.
        StorageError: if it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._listed: set[str] | None = None
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(path / ".lock")
        except OSError as error:
            raise StorageError(f"{path}: cannot be written ({error.strerror}); give another --out") from error

    def describe(self, config: Config, facts: dict[str, Any]) -> None:
        """Write what the run is: its whole configuration and where it runs."""
        write_file(self.path / "config.yaml", to_yaml(config).encode())
        write_json(self.path / "environment.json", environment() | facts)

    def status(self, state: str, step: int, **facts: Any) -> None:
        """Say in status.json where the run stands; state is running, complete, interrupted or failed."""
        write_json(self.path / "status.json", {"state": state, "step": step, "exit_code": None, "error": None} | facts)

    def give_up_after(self, step: int) -> None:
        """Remove checkpoints later than `step`: going on from an older one gives their future up."""
        for path in store.checkpoints(self.checkpoints):
            if path.name > store.step_folder(self.checkpoints, step).name:
                store.remove(path)

    def bad_samples(self, faults: list[tuple[str, str]]) -> None:
        """List images that could not be read, each file once: one object a line with the file and the reason."""
        path = self.path / "bad_samples.jsonl"
        if self._listed is None:
            lines = path.read_text().splitlines() if path.exists() else []
            self._listed = {json.loads(line)["file"] for line in lines}
        new = {name: reason for name, reason in faults if name not in self._listed}
        if new:
            self._listed |= new.keys()
            with path.open("a") as file:
                file.writelines(json.dumps({"file": name, "reason": reason}) + "\n" for name, reason in new.items())

    def close(self) -> None:
        """Let others write the folder."""
        self._lock.close()


def _lock(path: Path) -> IO[str]:
    # A lock of the operating system goes with its process, however that ends: no stale lock needs breaking.
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise LockedError(f"{path.parent}: is being written by {holder}; wait for it or stop it") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def environment() -> dict[str, Any]:
    """Versions, hardware and source revision, for the run's record; no user names, paths or variables."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "versions": versions,
        "git": _revision(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _revision() -> str | None:
    """The commit of the package's own source tree, when it is run from one."""
    source = Path(__file__).resolve().parents[3]
    if not (source / ".git").exists():
        return None
    asked = subprocess.run(["git", "-C", str(source), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None
