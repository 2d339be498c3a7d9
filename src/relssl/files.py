"""Files that are there whole under their name, or not at all, and figures for people; imports no torch, so start-up code can use it."""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from relssl.errors import StorageError

_TOKEN = secrets.token_hex(4)  # once a container restarts, the same pid is another process
_TEMPORARY = re.compile(r"\.relssl-([0-9]{1,9})-([0-9a-f]{8})-[0-9a-f]{8}\.tmp", re.ASCII)


def temporary(folder: Path) -> Path:
    """Return a fresh name in `folder` for something unfinished; `sweep` removes it once this process is gone."""
    return folder / f".relssl-{os.getpid()}-{_TOKEN}-{secrets.token_hex(4)}.tmp"


def sweep(folder: Path) -> None:
    """Remove unfinished files and folders of ours whose process is gone."""
    for path in folder.glob(".relssl-*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        own = match and int(match[1]) == os.getpid()
        if match and not path.is_symlink() and (match[2] != _TOKEN if own else not psutil.pid_exists(int(match[1]))):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def storing(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn an OSError inside into a StorageError that names `path`, the bytes `needed` and the bytes free."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        free = shutil.disk_usage(next(folder for folder in path.absolute().parents if os.path.exists(folder))).free
        room = "" if needed is None else f"{needed} bytes needed, "
        room += f"{free} bytes free; " if full or room else ""
        advice = "free some space" if full else "check the folder"
        raise StorageError(f"{path}: cannot be written ({error.strerror or type(error).__name__}); {room}{advice}") from error


@contextlib.contextmanager
def locked(path: Path, wait: Callable[[], object] = lambda: None) -> Iterator[bool]:
    """Hold the lock that is the file at `path`, whose folder is made; it goes with this process however that ends.

    Yields False where the file system has no locks, as some network drives. `wait` is called if another process has the lock.
    """
    alone = True
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            alone = False
        yield alone


def write_all(descriptor: int, data: memoryview) -> None:
    """Write bytes of any number: one call writes at most 2 GiB, and less on a nearly full disk."""
    while data:
        data = data[os.write(descriptor, data[: 16 << 20]) :]


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems know no fsync of a folder
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path, needed: int | None = None) -> Iterator[BinaryIO]:
    """Open a binary file whose content appears at `path`, over whatever lies there, only when the block ends without an error;
    for an OSError inside raises what `storing` does."""
    unfinished = temporary(path.parent)
    with storing(path, needed):
        try:
            with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to `path`, as `replacing` does."""
    with replacing(path, len(data)) as file:
        write_all(file.fileno(), memoryview(data))


def read_arrays(path: Path) -> dict[str, Any] | None:
    """Read the arrays of an .npz file; None if it is not there or damaged. Nothing is unpickled."""
    import numpy as np  # which `relssl --help` need not wait for

    faults = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
    with contextlib.suppress(*faults), path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
    return None


def write_json(path: Path, obj: Any) -> None:
    """Write `obj` as `to_json` has it, whole or not at all."""
    write_file(path, to_json(obj))


def to_json(obj: Any, indent: int | None = 2) -> bytes:
    """Return `obj` as ASCII JSON, from which floats read back exactly: tuples become lists, keys strings, tensors and arrays numbers
    or lists, NaN and infinity null. Without `indent` it is one line."""
    finite = json.loads(json.dumps(obj, default=lambda value: value.tolist()), parse_constant=lambda _: None)
    return (json.dumps(finite, indent=indent) + "\n").encode("ascii")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file, an empty one if there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a .jsonl file; lines that hold no object, such as a last one cut short by a crash, are left out."""
    rows: list[Any] = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def duration(seconds: float) -> str:
    """Write seconds in the unit that suits them."""
    units = {"d": (86400, 172800), "h": (3600, 7200), "min": (60, 120), "s": (1, 1), "ms": (0.001, 0)}  # length, and least of it
    unit, length = next((unit, length) for unit, (length, least) in units.items() if seconds >= least)
    return f"{seconds / length:.1f} {unit}"


def size(count: int) -> str:
    """Write a number of bytes in the unit that suits it."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def plain(text: str, most: int = 600) -> str:
    """Return a line for a terminal: control characters as escapes, and without its middle where it is too long to be read."""
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 2 :]}"
