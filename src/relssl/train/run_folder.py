"""The run folder: created once, never overwritten silently, written by one process at a time; and the user's hooks on what is written."""

import contextlib
import fcntl
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from shlex import quote
from typing import Any

import relssl
from relssl.errors import ConfigError, HookError, Interrupted, LockedError, StorageError
from relssl.files import read_rows, to_json, write_file, write_json
from relssl.settings.recipes import public_name
from relssl.settings.run import Config
from relssl.train.loggers import Loggers
from relssl.weights import store

EVENTS = ("on_start", "on_row", "on_evaluation", "on_checkpoint", "on_end")  # docs/own-parts.md says what each gets, and when
_PACKAGES = ("torch", "torchvision", "timm", "lightning", "numpy", "scikit-learn", "safetensors", "Pillow")


def refuse_used(folder: Path) -> None:
    """Raise ConfigError if `folder` holds anything already; this needs no torch, so it comes before start-up."""
    if (folder / "config.yaml").exists():
        raise ConfigError(f"out: {folder} holds a run; go on with `relssl resume {quote(str(folder))}` or give another --out")
    # A run that was killed before it could say what it is has left its lock and an empty folder, and nothing to lose.
    if folder.exists() and not (folder.is_dir() and all(path.name in (".lock", "checkpoints") for path in folder.rglob("*"))):
        raise ConfigError(f"out: {folder} exists and is not empty; give another --out")


def default_folder(config: Config) -> str:
    """Return runs/RECIPE-SEED, nips/cifar10 as nips-cifar10."""
    name = public_name(config.recipe) or "run"
    return f"runs/{name.removesuffix('.yaml').removesuffix('.yml').replace('/', '-')}-{config.seed}"


class Hooks:
    """The user's objects that are told what happens in a run, each with methods of `EVENTS` of one argument; ConfigError if one has none."""

    def __init__(self, hooks: Iterable[Any] = ()) -> None:
        if not isinstance(hooks, (list, tuple)):
            raise ConfigError(f"hooks: needs a list of objects, got a {type(hooks).__name__}")
        for hook in hooks:
            title = getattr(hook, "__name__", type(hook).__name__)  # of a class or function its own
            if isinstance(hook, type) or not any(callable(getattr(hook, event, None)) for event in EVENTS):
                raise ConfigError(f"hooks: {title} is no object with one of {', '.join(EVENTS)}")
        self.hooks = hooks

    def call(self, event: str, subject: Any) -> None:
        """Tell all hooks that have a method for the event, in their order; HookError if one raises, which ends the run."""
        for hook in self.hooks:
            try:
                getattr(hook, event, lambda _: None)(subject)
            except Exception as error:  # whatever a user's code raises
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise HookError(f"hooks: {type(hook).__name__}.{event} failed ({reason}); what was saved before stays") from error


class RunFolder:
    """A run's files, for the one process that writes them, with the hooks that follow them; LockedError if another one writes the folder,
    StorageError if it cannot be written."""

    def __init__(self, path: Path, hooks: Hooks | None = None) -> None:
        self.path, self.checkpoints, self.hooks, self.notes = path, path / "checkpoints", hooks or Hooks(), list[str]()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            # A lock of the operating system goes with its process, however that ends: no stale lock needs breaking.
            self._lock = (path / ".lock").open("a+")
        except OSError as error:
            raise StorageError(f"{path}: cannot be written ({error.strerror}); give another --out") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with self._lock:
                self._lock.seek(0)
                holder = self._lock.read().strip() or "another process"
            raise LockedError(f"{path}: is being written by {holder}; wait for it or stop it") from None
        except OSError as error:  # as of some network drives
            self.notes.append(f"{path}: cannot be locked ({error.strerror}); let no other process write it")
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {platform.node()}")
        self._lock.flush()
        self._listed = {row.get("file") for row in read_rows(path / "bad_samples.jsonl")}
        self._rows: Any = None
        self._loggers: Loggers | None = None

    def status(self, state: str, step: int, **facts: Any) -> None:
        """Write to status.json where the run stands; state is running, complete, interrupted or failed."""
        write_json(self.path / "status.json", {"state": state, "step": step, "exit_code": None, "error": None} | facts)

    def failed(self, step: int, error: BaseException) -> None:
        """Write to status.json why the run has ended before its last step."""
        details = {"kind": getattr(error, "kind", "bug"), "field": None, "message": str(error)}
        newest = max((path.name for path in store.checkpoints(self.checkpoints)), default=None)
        facts = {"exit_code": getattr(error, "exit_code", 1), "error": details, "last_checkpoint": newest}
        self.status("interrupted" if isinstance(error, Interrupted) else "failed", step, **facts)

    def give_up_after(self, step: int) -> None:
        """Remove checkpoints later than `step`, whole or not: going on from an older one gives their future up."""
        for path in store.checkpoints(self.checkpoints):
            if path > store.step_folder(self.checkpoints, step):
                store.remove(path)

    def mend(self) -> Iterator[str]:
        """Take lines that are no rows out of the logs, and yield what there is to say of it."""
        for name, key, kind in (("metrics.jsonl", "step", int), ("bad_samples.jsonl", "file", str)):
            path = self.path / name
            rows = [row for row in read_rows(path) if isinstance(row.get(key), kind)]
            if path.exists() and (odd := len(path.read_bytes().splitlines()) - len(rows)):
                write_file(path, b"".join(to_json(row, None) for row in rows))
                yield f"{name}: {odd} damaged {'lines are' if odd > 1 else 'line is'} left out"

    def bad_samples(self, faults: list[tuple[str, str]]) -> None:
        """List images that could not be read, each file once: one object a line with the file and the reason."""
        if new := {name: reason for name, reason in faults if name not in self._listed}:
            self._listed |= new.keys()
            with (self.path / "bad_samples.jsonl").open("ab") as file:
                file.writelines(to_json({"file": name, "reason": reason}, None) for name, reason in new.items())

    def open_rows(self, start: int, config: Config, say: Callable[[str], None]) -> None:
        """Begin to write metrics.jsonl, and what `log.to` names; `say` tells of loggers that fail.

        A resumed run drops rows after the step it starts from, as if it had never stopped.
        """
        path = self.path / "metrics.jsonl"
        rows = [row for row in read_rows(path) if start > 0 and row["step"] <= start]
        write_file(path, b"".join(to_json(row, None) for row in rows))
        self._rows = path.open("ab")
        self._loggers = Loggers(config, self.path, rows, start, say)

    def write_row(self, row: dict[str, Any]) -> None:
        """Append one row of figures; it has reached the operating system when this returns."""
        self._rows.write(to_json(row, None))
        self._rows.flush()
        if self._loggers is not None:
            self._loggers.write(row)
        self.hooks.call("on_row", dict(row))
        if "knn_top1" in row:
            self.hooks.call("on_evaluation", dict(row))

    def draw(self, show: Callable[..., None], *subjects: Any) -> None:
        """Let `show` draw its subjects in TensorBoard, see `Loggers.draw`."""
        if self._loggers is not None:
            self._loggers.draw(show, *subjects)

    def close(self) -> None:
        """Close all files, and let others write the folder."""
        for file in (self._rows, self._loggers, self._lock):
            if file is not None:
                with contextlib.suppress(OSError):  # what a full disk did not take was told when it was written
                    file.close()


def environment() -> dict[str, Any]:
    """Return versions, hardware and source revision for the run's record; no user names, paths or variables."""
    processor, source, git = platform.processor() or platform.machine(), Path(__file__).parents[3], None
    with contextlib.suppress(OSError, LookupError):  # not everywhere is there a /proc, or git
        processor = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if (source / ".git").exists():  # the package runs from its own source tree
            command = ["git", "-C", str(source), "rev-parse", "HEAD"]
            git = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    where = {"platform": platform.platform(), "processor": processor, "cores": os.cpu_count()}
    versions = {"relssl": relssl.__version__} | {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **where, "versions": versions, "git": git}
