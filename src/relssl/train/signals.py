"""Requests to stop: a run finishes its step, saves, then leaves with the exit code that names the reason."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from relssl.errors import Interrupted

TIME_LIMIT = 75
REASONS = {TIME_LIMIT: "at its time limit", 130: "by SIGINT", 143: "by SIGTERM"}


class StopRequest:
    """Listens for SIGINT, SIGTERM and a limit of `minutes` while a run goes on, whose folder messages name; a second signal leaves at
    once."""

    def __init__(self, minutes: float | None, run: str | None = None) -> None:
        self.code, self.run = 0, run
        self._deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python allows handlers in the main thread only; a run started from another thread goes without.
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.code:
            os._exit(128 + number)  # checkpoints are renamed into place whole, so leaving in the middle of one harms none
        self.code = 128 + number

    def pending(self) -> int:
        """Return the exit code of a pending request, or 0."""
        if not self.code and time.monotonic() > self._deadline:
            self.code = TIME_LIMIT
        return self.code

    def interruption(self, code: int, when: str) -> Interrupted:
        """Return the error that ends a run, with the exit code on which all ranks agree."""
        return Interrupted(f"stopped {REASONS[code]} {when}; go on with `relssl resume {self.run}`", code)
