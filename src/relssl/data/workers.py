"""Loader processes: how many, how they start, and what is said when one dies."""

from __future__ import annotations

import itertools
import math
import signal
import statistics
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from relssl.engine import available_cores
from relssl.errors import DataError
from relssl.settings.run import Config, LoaderConfig

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


Step = TypeVar("Step")

PREFETCH = 2  # batches a worker prepares ahead where nothing is given or measured
_MOST = 32  # workers that are tried; beyond, starting them and their memory cost more than they bring
_GROUPS = 3  # whose median is taken, so that one pause, such as an evaluation, does not decide
_NOISE = 1.05  # what is less than this much slower counts as equal
_SHORTEST = 200  # steps of a run that is worth measuring
_SHARE = 4  # and trials may take no more than 1 / this of it


@dataclass
class Trial:
    """One way to load, tried over some steps.

    Attributes:
        workers: loader processes.
        prefetch: batches each prepares ahead.
        parts: batches a step takes.
        seconds: a step, its computation included; infinite until measured, and if its workers failed.
    """

    workers: int
    prefetch: int
    parts: int
    seconds: float = math.inf

    @property
    def lead(self) -> int:
        """Steps before the clock starts: workers start up, and each gives its first batch at about the same time."""
        return 1 + math.ceil(self.workers / self.parts)

    @property
    def group(self) -> int:
        """Steps between two looks at the clock; all workers give a batch in them."""
        return max(4, math.ceil(self.workers / self.parts))

    @property
    def steps(self) -> int:
        """Steps of the trial. In the last ones workers have nothing left to prepare, so these are not timed."""
        return self.lead + _GROUPS * self.group + math.ceil(self.workers * self.prefetch / self.parts)

    def timed(self, steps: Iterable[Step], clock: Callable[[], float]) -> Iterator[Step]:
        """The same steps, after which `seconds` is known."""
        looks, times = range(self.lead, self.lead + _GROUPS * self.group + 1, self.group), []
        for number, step in enumerate(steps):
            if number in looks:
                times.append(clock())
            yield step
        self.seconds = statistics.median(b - a for a, b in itertools.pairwise(times)) / self.group


@dataclass(frozen=True)
class Choice:
    """How a run loads its images.

    Attributes:
        workers: loader processes.
        prefetch: batches each prepares ahead.
        trials: what was measured to find them; empty if nothing was.
    """

    workers: int
    prefetch: int
    trials: tuple[Trial, ...] = ()

    def __str__(self) -> str:
        """One line for the console."""
        times = [f"{1000 * t.seconds:.0f}" if t.seconds < math.inf else "failed" for t in self.trials]
        tried = ", ".join(f"{t.workers} x {t.prefetch} {time}" for t, time in zip(self.trials, times, strict=True))
        workers = "1 loader worker" if self.workers == 1 else f"{self.workers} loader workers"
        return f"{workers} x {self.prefetch} batches" + (f" (ms a step: {tried})" if tried else "")


class Tuning:
    """The trials of a run, and what follows from them.

    Args:
        loader: the settings; what they give is not measured.
        cores: CPU cores of this process's share of the machine.
        parts: batches a step takes.
        steps: of the run, or what is left of it; few are not worth measuring.
    """

    def __init__(self, loader: LoaderConfig, cores: int, parts: int, steps: int) -> None:
        self.workers, self.prefetch, self.parts = loader.workers, loader.prefetch, parts
        self.cores, self.steps, self.done = cores, steps, list[Trial]()

    def trials(self) -> Iterator[Trial]:
        """Trials to be run one after another: worker counts, then twice the prefetch with the best of them."""
        counts = candidates(self.cores) if self.workers is None else [self.workers]
        deeper = self.prefetch is None and counts != [0]
        if len(counts) == 1 and not deeper:
            return
        planned = [self._trial(workers, self.prefetch or PREFETCH) for workers in counts]
        most = sum(trial.steps for trial in planned) + (self._trial(max(counts), 2 * PREFETCH).steps if deeper else 0)
        if self.steps < max(_SHORTEST, _SHARE * most):
            return
        for trial in planned:
            self.done.append(trial)
            yield trial
        if deeper:
            self.done.append(self._trial(best(self.done).workers, 2 * PREFETCH))
            yield self.done[-1]

    def may_fail(self, trial: Trial) -> bool:
        """Whether the run can go on without a trial whose workers failed: there is another way, and the user asked for none."""
        fewer = trial.workers > min(candidates(self.cores))
        return self.workers is None and (fewer or any(each.seconds < math.inf for each in self.done))

    def choice(self) -> Choice:
        """The best of the trials; without any, what is given, else the cores beyond the first."""
        if self.done:
            found = best(self.done)
            return Choice(found.workers, found.prefetch, tuple(self.done))
        return Choice(untried(self.workers, self.cores), self.prefetch or PREFETCH)

    def _trial(self, workers: int, prefetch: int) -> Trial:
        return Trial(workers, prefetch, self.parts)


def untried(workers: int | None, cores: int) -> int:
    """Worker processes where nothing is measured: as many as given, else the cores beyond the first."""
    return max(1, cores - 1) if workers is None else workers


def candidates(cores: int) -> list[int]:
    """Worker counts to try, falling: as many as cores, and three, two and one quarter of that."""
    cores = min(cores, _MOST)
    return sorted({max(1, cores * quarters // 4) for quarters in (1, 2, 3, 4)}, reverse=True)


def best(trials: list[Trial]) -> Trial:
    """The fastest; among those as good as it, the one with the fewest workers and the least prefetch."""
    limit = _NOISE * min(trial.seconds for trial in trials)
    return min((trial for trial in trials if trial.seconds <= limit), key=lambda trial: (trial.workers, trial.prefetch))
