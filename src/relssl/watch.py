"""What each of several processes of a run knows of the others: that they live, and at which step they are."""

from __future__ import annotations

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
        self.active, self._engine, self._children, self._limit = True, engine, children, min(SILENCE, timeout)
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
        self._others = ["0"] if engine.rank else [str(rank) for rank in range(1, engine.world)]
        self._heard, self._silent = dict.fromkeys(self._others, b""), dict.fromkeys(self._others, 0.0)
        self.start()

    def run(self) -> None:
        """Look at the others until the run is over, or until one is lost; then end this process."""
        looks, verdict, reason = 0, b"", ""
        while not reason:
            time.sleep(_PAUSE)
            looks += 1
            try:
                self._store.set(str(self._engine.rank), f"{looks} {self._engine.step}")
                verdict, *words = self._store.multi_get(["lost", *self._others])
            except RuntimeError:  # the store, and the first rank with it, has gone or answers no more
                words, self._silent["0"] = [], self._limit
            for other, word in zip(self._others, words, strict=False):
                self._silent[other] = self._silent[other] + _PAUSE if word == self._heard[other] else 0.0
                self._heard[other] = word
            self._silent |= {str(rank): self._limit for rank, child in enumerate(self._children, 1) if child.poll()}
            gone = (
                "the process that started this one has died; resume from the last checkpoint"
                if self._parent not in (None, os.getppid())
                else ""
            )
            reason = verdict.decode() or gone or (self.lost() if max(self._silent.values()) >= self._limit else "")
            if not self.active:
                return
        time.sleep(_GRACE)
        if self.active:
            error = DistributedError(reason)
            self._engine.last_words(error)  # which the first rank shows
            if self._engine.rank == 0:
                self._store.set("lost", reason)
                time.sleep(3 * _PAUSE)  # in which the others read it
            elif not verdict:
                print(f"relssl: rank {self._engine.rank}: {error}", file=sys.stderr, flush=True)
            for child in self._children:
                child.kill()
            os._exit(error.exit_code)

    def lost(self) -> str:
        """Say which other process has been silent longest, and where that and this one are."""
        other = max(self._silent, key=self._silent.__getitem__)
        step, own = (self._heard[other].decode().split() or ["", "0"])[1], self._engine
        gone = f"rank {other} has died or hangs, last heard of at its step {step}; rank {own.rank} is at step {own.step}"
        return f"{gone}; the last checkpoint is good, resume from it"

    def explain(self, fault: str) -> str:
        """Say why an exchange with the others has failed: which is lost, if one is silent for a few looks, else the `fault` itself."""
        for _ in range(8):
            if max(self._silent.values()) > 2 * _PAUSE:
                return self.lost()
            time.sleep(_PAUSE / 2)
        return f"rank {self._engine.rank} failed at step {self._engine.step}, another may be lost ({fault}); resume from the last checkpoint"
