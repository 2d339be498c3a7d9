"""Requests to stop: a run finishes its step, saves, then leaves with the exit code that names the reason."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from relssl.errors import STOPPING, TIME_LIMIT, Interrupted

_SAME = 2.0  # seconds within which a signal that comes again is the same request: launchers pass on what their group gets as well


class StopRequest:
    """Listens for signals and a limit of `minutes` while a run goes on, whose folder messages name; a second signal leaves at once.

    Attributes:
        at_once: with what to say of it, a signal raises Interrupted wherever the main thread is; None, while there are steps to save:
            it is `pending`.
        heeding: a signal counts here, too, if it came when a run inside had nothing left to save, as there is more to do after it.
    """

    def __init__(self, minutes: float | None = None, run: str | None = None, at_once: str = "", heeding: bool = True) -> None:
        self.code, self.run, self.reason = 0, run, "on another rank's request"
        self.at_once: str | None = at_once
        self._deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._handlers: dict[int, Any] = {}
        self._received, self.heeding = math.inf, heeding
        self._number: int | None = None
        self._ended = False

    def __enter__(self) -> StopRequest:
        # Python allows handlers in the main thread only; a run started from another thread goes without.
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup has SIGHUP
            self._handlers = {number: signal.signal(number, self._receive) for number in heard}
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that is not Python's
        if error is not None and (cause := self.cause(error)) is not error:
            raise cause from error
        if error is None and self._number is not None:  # it came when there was nothing left to save
            outer = getattr(signal.getsignal(self._number), "__self__", None)
            if not isinstance(outer, StopRequest) or outer.heeding:
                signal.raise_signal(self._number)

    def cause(self, error: BaseException) -> BaseException:
        """Return what ends a run: libraries, and code of the user's, may have made another error of the request to end at once."""
        return error if self.at_once is None or not self.code or isinstance(error, Interrupted) else self._interrupted()

    def _interrupted(self) -> Interrupted:
        return Interrupted(f"stopped {self.reason} {self.at_once}".strip(), self.code)

    def end(self) -> None:
        """Let SIGTERM pass if a signal came before: launchers send it to the first rank, as it closes its files, once others have left."""
        self._ended = bool(self.code)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._ended and number == signal.SIGTERM:
            return
        if time.monotonic() - self._received > _SAME:
            os._exit(128 + number)  # checkpoints are renamed into place whole, so leaving in the middle of one harms none
        self._received = min(self._received, time.monotonic())
        if not self.code:
            self._number = number
            self.code, self.reason = STOPPING[signal.Signals(number)], f"by {signal.Signals(number).name}"
            if self.at_once is not None:
                raise self._interrupted()

    def pending(self) -> int:
        """Return the exit code of a pending request, or 0."""
        if not self.code and time.monotonic() > self._deadline:
            self.code, self.reason = TIME_LIMIT, "at its time limit"
        return self.code

    def interruption(self, code: int, when: str) -> Interrupted:
        """Return the error that ends a run, with the exit code on which all ranks agree."""
        return Interrupted(f"stopped {self.reason} {when}; go on with `relssl resume {self.run}`", code)
