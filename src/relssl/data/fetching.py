"""Data sets that torchvision reads: as they lie on the disk, else downloaded once."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from relssl.data.paths import shown
from relssl.errors import DataError

T = TypeVar("T")


def fetch(name: str, root: str, read: Callable[[bool], T], place: str, source: str) -> T:
    """What `read(False)` gives, or where that fails, `read(True)`, which downloads first.

    Args:
        name: of the data set.
        root: where named data sets lie.
        read: makes torchvision's data set, given whether it may download; torchvision checks what it downloads by its hash.
        place: where below `root` the files belong.
        source: where they can be had.

    Raises:
        DataError: if the files are not complete and cannot be downloaded.
    """
    try:
        return read(False)
    except MemoryError:
        raise
    except Exception:  # missing and damaged files make the readers raise all sorts of errors
        pass
    try:
        with _one_at_a_time(root, name):
            return read(True)
    except MemoryError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{name}: not complete in {shown(place)} and cannot be downloaded ({reason}); "
            f"put the files of {source} there, or set data_root to where they are"
        ) from error


@contextlib.contextmanager
def _one_at_a_time(root: str, name: str) -> Iterator[None]:
    """Let one process of this machine download while the others wait, then find it done; and never wait for a dead server."""
    Path(root).mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    with Path(root, f".{name}.lock").open("w") as lock:
        with contextlib.suppress(ImportError, OSError):  # not on Windows, not on every network drive
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        socket.setdefaulttimeout(30)
        try:
            yield
        finally:
            socket.setdefaulttimeout(timeout)
