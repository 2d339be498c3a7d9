"""Loader processes: how many, how they start, and what is said when one dies."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from relssl.config import Config
from relssl.cores import available_cores
from relssl.data.tuning import untried
from relssl.errors import DataError

# What errors say when a worker is gone, and when /dev/shm or memory is full.
_DIED = ("exited unexpectedly", "killed by signal", "bus error")
_FULL = ("unable to", "no space left", "cannot allocate", "can't allocate")


class WorkerError(DataError):
    """A loader process that died or has no memory."""


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


def hand_over(collate: Callable[[Any], Any], samples: Any) -> Any:
    """The samples joined, their tensors already in shared memory if this is a worker.

    Else the queue's own thread would move them, and where it fails it drops the batch: the main process would wait for ever.
    """
    joined = collate(samples)
    if get_worker_info() is not None:
        _share(joined)
    return joined


def _share(joined: Any) -> None:
    if isinstance(joined, Tensor):
        joined.share_memory_()  # type: ignore[no-untyped-call]
    elif isinstance(joined, (list, tuple)):
        for part in joined:
            _share(part)
    elif isinstance(joined, dict):
        for part in joined.values():
            _share(part)


def watch(loader: DataLoader[Any]) -> Iterator[Any]:
    """Batches of the loader.

    Raises:
        WorkerError: if a worker died, or found no shared or other memory.
    """
    batches = iter(loader)
    try:
        yield from batches
    except (RuntimeError, ConnectionError, OSError) as error:
        _dismiss(batches)
        reason = (str(error).strip() or type(error).__name__).splitlines()
        if loader.num_workers and any(sign in str(error).lower() for sign in _FULL):
            raise WorkerError(
                f"a loader process has no memory left ({reason[-1]}); try loader.workers 0, or fewer, or more shared memory"
            ) from error
        if not isinstance(error, ConnectionError) and not any(sign in str(error).lower() for sign in _DIED):
            raise
        raise WorkerError(f"a loader process died ({reason[0]}); try loader.workers 0 or more shared memory") from error


def _dismiss(batches: Any) -> None:
    """End the workers that are left. Until they are forgotten, torch raises the death of one anew, in whatever the main thread is
    doing, whenever another child ends."""
    end, child = getattr(batches, "_shutdown_workers", None), getattr(signal, "SIGCHLD", None)
    if end is None or child is None or threading.current_thread() is not threading.main_thread():
        return
    before = signal.signal(child, signal.SIG_DFL)
    try:
        end()
    finally:
        signal.signal(child, before)
