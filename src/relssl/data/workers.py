"""Loader processes: how many, how they start, and what is said when one dies."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from relssl.config import Config
from relssl.data.tuning import untried
from relssl.engine import available_cores
from relssl.errors import DataError


def cores(config: Config) -> int:
    """CPU cores of this process's share of the machine."""
    return max(1, available_cores() // config.engine.devices)


def loader_workers(config: Config) -> int:
    """Loader processes for work too short to measure, such as an evaluation."""
    return untried(config.loader.workers, cores(config))


def reset_signals(worker: int) -> None:
    """Workers end when their loader says so: Ctrl-C is for the main process, which finishes its step and saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def watch(loader: DataLoader[Any]) -> Iterator[Any]:
    """Batches of the loader; a worker that died becomes one line."""
    try:
        yield from loader
    except (RuntimeError, ConnectionError) as error:
        died = any(sign in str(error) for sign in ("exited unexpectedly", "killed by signal", "bus error", "Bus error"))
        if not died and not isinstance(error, ConnectionError):
            raise
        raise DataError(
            f"a loader process died ({str(error).splitlines()[0]}); try loader.workers 0 or more shared memory"
        ) from error
