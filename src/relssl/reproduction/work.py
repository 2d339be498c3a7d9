"""Doing one run of a plan: pretrain or go on, evaluate, and note what came of it."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from types import FrameType
from typing import Any

from relssl.atomic import write_json
from relssl.errors import Interrupted, LockedError, RelsslError, StorageError
from relssl.reproduction.plan import Run, plain, state
from relssl.train.signals import REASONS, TIME_LIMIT

# What stays of an evaluation's record; its card and which images were right are in RUN/evaluations.
_KEPT = ("protocol", "network", "data", "setting", "main", "figures", "intervals", "notes", "seconds")


class Asked(KeyboardInterrupt):
    """A signal between steps, where nothing has to be saved; no handler of errors takes it for one."""

    def __init__(self, code: int) -> None:
        self.code = code


class Watch:
    """Ends what goes on outside of training at SIGINT and SIGTERM, and knows how much time is left.

    Training listens for itself, as it saves first; its handlers take the place of these meanwhile.

    Args:
        minutes: for everything together; None: no limit.
    """

    def __init__(self, minutes: float | None) -> None:
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Watch:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @staticmethod
    def _receive(number: int, frame: FrameType | None) -> None:
        raise Asked(128 + number)

    def minutes(self) -> float:
        """What is left, infinite without a limit.

        Raises:
            Interrupted: if nothing is.
        """
        left = (self._end - time.monotonic()) / 60
        if left <= 0:
            raise Interrupted(REASONS[TIME_LIMIT], TIME_LIMIT)
        return left


def perform(run: Run, watch: Watch) -> None:
    """Bring a run to its end from wherever it stands, and write its note.

    A failure of this row alone is noted as {"error": {"kind", "message", "exit_code"}} and raised no further.

    Raises:
        Interrupted, Asked: when asked to stop; the run goes on from there the next time.
        StorageError, LockedError: which the next row would meet as well.
    """
    try:
        found = _perform(run, watch)
    except (Interrupted, StorageError, LockedError):
        raise
    except Exception as error:
        known = isinstance(error, RelsslError)
        message = str(error) if known else f"{type(error).__name__}: {error}"
        found = {
            "error": {"kind": getattr(error, "kind", "bug"), "message": message, "exit_code": getattr(error, "exit_code", 1)}
        }
    run.note.parent.mkdir(parents=True, exist_ok=True)
    write_json(run.note, {"row": run.row.name, "seed": run.seed} | found)


def _perform(run: Run, watch: Watch) -> dict[str, Any]:
    from relssl.evaluation.protocol import evaluate
    from relssl.train.pretrain import pretrain, resume

    left = watch.minutes()
    if state(run) == "new":
        # The limit is this command's, not the run's: only what is left of it is written down.
        limited = None if math.isinf(left) else left
        pretrain(settings=dataclasses.replace(run.config, time_limit=limited), quiet=True)
    else:
        resume(run.folder, quiet=True, time_limit=left)
    watch.minutes()
    found = evaluate(run.folder, settings=run.evaluation)
    results = [{name: record[name] for name in _KEPT} for record in found["results"]]
    return {"evaluation": plain(run.evaluation), "results": results}
