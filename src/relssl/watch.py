"""What each of several processes of a run knows of the others: that they live, and at which step they are."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from relssl.errors import DistributedError
from relssl.settings.launcher import MARK

if TYPE_CHECKING:
    from relssl.engine import Engine

SILENCE = 45.0  # seconds, at most, after which a process that gives no sign of life is given up
_PAUSE = 1.0  # seconds between two looks at the others
_GRACE = 6.0  # seconds in which a process notices by itself that another one has died


class Watch(threading.Thread):
    """A thread that ends this process once another of its run has died or hangs, or the launcher above it has died.

    Each rank counts its looks in a store of the first one's, whatever its main thread does; the first looks at all, the others at it.
    Silence is measured in looks, so that a job that was suspended as a whole goes on. `active` is false once the run is over.
    """

    def __init__(self, engine: Engine, timeout: float, children: list[Any]) -> None:
        """Meet the other ranks; `children` are those that this process has started."""
        super().__init__(daemon=True)
        self.active, self._engine, self._children, self._reason = True, engine, children, ""
        self._limit = min(SILENCE, timeout)
        options: Any = {"wait_for_workers": False, "timeout": timedelta(seconds=max(1.0, self._limit))}
        meet: Any = partial(dist.TCPStore, os.environ["MASTER_ADDR"], **options)  # type: ignore[attr-defined]
        store: Any = None if engine.rank else meet(0, is_master=True)
        for key in ("lost", *map(str, range(engine.world))) if store else ():
            store.set(key, "")
        port = engine.gather_items([store and store.port])[0]
        self._store = store or meet(port, is_master=False)
        # A shell that started a single rank may leave; torchrun, and the first process, stay as long as their ranks.
        started = "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get(MARK) == str(os.getppid())
        self._parent = os.getppid() if started else None
        self.start()

    def run(self) -> None:
        """Look at the others until the run is over, or until one is lost; then end this process."""
        own, looks, verdict, words, orphaned = self._engine, 0, b"", list[bytes](), False
        others = ["0"] if own.rank else [str(rank) for rank in range(1, own.world)]
        heard, silent = dict.fromkeys(others, b""), dict.fromkeys(others, 0.0)
        while not self._reason:
            time.sleep(_PAUSE)
            looks += 1
            try:
                self._store.set(str(own.rank), f"{looks} {own.step}")
                verdict, *words = self._store.multi_get(["lost", *others])
                silent = {
                    rank: silent[rank] + _PAUSE if word == heard[rank] else 0.0 for rank, word in zip(others, words, strict=True)
                }
                heard = dict(zip(others, words, strict=True))
            except RuntimeError:  # the store, and the first rank with it, has gone or answers no more
                silent["0"] = math.inf
            silent |= {str(rank): math.inf for rank, child in enumerate(self._children, 1) if child.poll()}
            if not self.active:
                return
            lost, orphaned = max(silent, key=silent.__getitem__), self._parent not in (None, os.getppid())
            if verdict or orphaned:
                self._reason = verdict.decode() or "the process that started this one has died; resume from the last checkpoint"
            elif silent[lost] >= self._limit:
                place = f"last heard of at its step {heard[lost].decode().partition(' ')[2] or 0}; rank {own.rank} is at step {own.step}"
                self._reason = f"rank {lost} has died or hangs, {place}; the last checkpoint is good, resume from it"
        time.sleep(0 if orphaned else _GRACE)
        if self.active:
            error = DistributedError(self._reason)
            own.last_words(error)  # which the first rank shows
            if own.rank and not (verdict or orphaned):
                print(f"relssl: rank {own.rank}: {error}", file=sys.stderr, flush=True)
            if own.rank == 0 and not orphaned:
                self._store.set("lost", self._reason)
                time.sleep(3 * _PAUSE)  # in which the others read it
            for child in self._children:
                child.kill()
            os._exit(error.exit_code)

    def explain(self, fault: str) -> str:
        """Say why an exchange with the others has failed: which is lost, if one is silent for a few looks, else the `fault` itself."""
        self._limit = 3 * _PAUSE
        for _ in range(8):
            if not self._reason:
                time.sleep(_PAUSE / 2)
        own = self._engine
        return self._reason or f"rank {own.rank} failed at step {own.step} ({fault}); resume from the last checkpoint"
