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
_GRACE = 8.0  # seconds in which a process notices by itself that another one has died


class Watch(threading.Thread):
    """A thread that ends this process once another of its run has died or hangs, or the launcher that started it has died.

    Every rank counts its looks in a store of the first one's, however long its main thread computes; the first looks at all, the others
    at the first. Silence is measured in looks, so that a job that was suspended as a whole goes on.

    Attributes:
        active: false once the run is over; then nothing is ended.
    """

    active = True

    def __init__(self, engine: Engine, timeout: float, children: list[Any]) -> None:
        """Meet the other ranks; `children` are those that this process has started."""
        super().__init__(daemon=True)
        self._engine, self._children, self._silence = engine, children, min(SILENCE, timeout)
        options: Any = {"wait_for_workers": False, "timeout": timedelta(seconds=max(1.0, self._silence))}
        meet: Any = partial(dist.TCPStore, os.environ["MASTER_ADDR"], **options)  # type: ignore[attr-defined]
        if engine.rank == 0:
            self._store = meet(0, is_master=True)
            for key in ("lost", *map(str, range(engine.world))):
                self._store.set(key, "")
        port = engine.gather_items([0 if engine.rank else self._store.port])[0]
        if engine.rank:
            self._store = meet(port, is_master=False)
        # A shell that started a single rank may leave; torchrun, and the first process, stay as long as their ranks.
        started = "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get(MARK) == str(os.getppid())
        self._parent = os.getppid() if started else None
        self._others = ["0"] if engine.rank else [str(other) for other in range(1, engine.world)]
        self._heard, self._silent = dict.fromkeys(self._others, b""), dict.fromkeys(self._others, 0.0)
        self.start()

    def run(self) -> None:
        """Look at the others until the run is over, or until one is lost."""
        looks = 0
        while self.active:
            time.sleep(_PAUSE)
            looks += 1
            if self._parent not in (None, os.getppid()):
                return self._end("the process that started this one has died", grace=0)
            try:
                self._store.set(str(self._engine.rank), f"{looks} {self._engine.step}")
                verdict, *heard = self._store.multi_get(["lost", *self._others])
            except RuntimeError:  # the store, and the first rank with it, has gone or answers no more
                verdict, heard = b"", []
                self._silent["0"] = self._silence
            for other, word in zip(self._others, heard, strict=False):
                self._silent[other] = self._silent[other] + _PAUSE if word == self._heard[other] else 0.0
                self._heard[other] = word
            self._silent |= {str(rank): self._silence for rank, child in enumerate(self._children, 1) if child.poll()}
            if verdict or max(self._silent.values()) >= self._silence:
                return self._end(verdict.decode() or self.lost(), silent=bool(verdict))
        return None

    def lost(self) -> str:
        """Say which other process has been silent longest, and for more than a look; an empty string if none has."""
        other = max(self._silent, key=self._silent.__getitem__)
        step, own = (self._heard[other].decode().split() or ["", "0"])[1], self._engine
        gone = f"rank {other} has died or hangs, last heard of at its step {step}; rank {own.rank} is at step {own.step}"
        return gone if self._silent[other] > 2 * _PAUSE else ""

    def explain(self, fault: str) -> str:
        """Say why an exchange with the others has failed: which is lost, if that shows within a few looks, else the `fault` itself."""
        for _ in range(7):
            if not self.lost():
                time.sleep(_PAUSE / 2)
        return self.lost() or f"rank {self._engine.rank} failed at step {self._engine.step}, another may have been lost: {fault}"

    def _end(self, reason: str, grace: float = _GRACE, silent: bool = False) -> None:
        time.sleep(grace)
        if not self.active:
            return
        error = DistributedError(f"{reason}; the last checkpoint is good, resume from it")
        self._engine.last_words(error)  # which the first rank shows
        if self._engine.rank and not silent:
            print(f"relssl: rank {self._engine.rank}: {error}", file=sys.stderr, flush=True)
        if self._engine.rank == 0:
            self._store.set("lost", reason)
            time.sleep(3 * _PAUSE)  # in which the others read it
        for child in self._children:
            child.kill()
        os._exit(error.exit_code)
