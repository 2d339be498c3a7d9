"""Files that are there whole under their name, or not at all, and figures for people; imports no torch, so start-up code can use it."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from relssl.errors import StorageError

# A temporary name carries its process and a token of its start: once a container restarts, the same pid is another process.
_TEMPORARY = re.compile(r"\.relssl-([0-9]{1,10})-([0-9a-f]{8})-[0-9a-f]{8}\.tmp", re.ASCII)
_TOKEN = secrets.token_hex(4)


def temporary(folder: Path) -> Path:
    """Return a fresh name in `folder` for something unfinished; `sweep` removes it once this process is gone."""
    return folder / f".relssl-{os.getpid()}-{_TOKEN}-{secrets.token_hex(4)}.tmp"


@contextlib.contextmanager
def storing(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn an OSError inside into a StorageError that names `path`, the bytes `needed` and the bytes free."""
    try:
        yield
    except OSError as error:
        want, free = "" if needed is None else f"{needed} bytes needed, ", "an unknown number of"
        for folder in path.absolute().parents:
            with contextlib.suppress(OSError):
                free = str(shutil.disk_usage(folder).free)
                break
        reason = error.strerror or type(error).__name__
        advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "check the folder"
        raise StorageError(f"{path}: cannot be written ({reason}): {want}{free} bytes free; {advice}") from error


def write_all(descriptor: int, data: memoryview) -> None:
    """Write bytes of any number: one call writes at most 2 GiB, and less on a nearly full disk."""
    while data:
        data = data[os.write(descriptor, data[: 16 << 20]) :]


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` outlast a power cut."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems know no fsync of a folder
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path, needed: int | None = None, mode: int = 0o644) -> Iterator[BinaryIO]:
    """Open a binary file whose content appears at `path`, over whatever lies there, only when the block ends without an error.

    Args:
        needed: bytes that will be written, for messages.
        mode: permissions of the file, less what the process's mask takes away.

    Raises:
        StorageError: for every OSError inside; the temporary file is gone then.
    """
    unfinished = temporary(path.parent)
    with storing(path, needed):
        try:
            with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all; an older file stays until the new one is safe on the disk.

    Raises:
        StorageError: naming the path, the bytes needed and the bytes free; nothing unfinished is left behind.
    """
    with replacing(path, len(data)) as file:
        write_all(file.fileno(), memoryview(data))


def write_json(path: Path, obj: Any) -> None:
    """Write `obj` as `to_json` has it, whole or not at all."""
    write_file(path, to_json(obj))


def to_json(obj: Any) -> bytes:
    """Return `obj` as ASCII JSON, from which floats read back exactly.

    Tuples become lists, keys become strings, one-element tensors and arrays become numbers; NaN and infinity, which JSON has not,
    become null.

    Raises:
        TypeError: for a value that JSON cannot hold.
    """
    return (json.dumps(_finite(obj), indent=2, allow_nan=False) + "\n").encode("ascii")


def _finite(obj: Any) -> Any:
    if isinstance(obj, Mapping):
        return {key: _finite(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_finite(value) for value in obj]
    if hasattr(obj, "item") and getattr(obj, "ndim", 0) == 0:
        obj = obj.item()
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj


def sweep(parent: Path) -> None:
    """Remove unfinished files and folders of ours whose process is gone."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(parent)):
            match = _TEMPORARY.fullmatch(entry.name)
            if not match or _alive(int(match[1]), match[2]):
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    Path(entry).unlink()


def _alive(pid: int, token: str) -> bool:
    if pid == os.getpid():
        return token == _TOKEN
    if os.name == "posix":  # elsewhere, signal 0 would end the process
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except (PermissionError, OverflowError):
            pass
    return True


def duration(seconds: float) -> str:
    """Write seconds in the unit that suits them."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * length or (unit == "s" and seconds >= 1):
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds * 1000:.1f} ms"


def size(count: int) -> str:
    """Write a number of bytes in the unit that suits it."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
