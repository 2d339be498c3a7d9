"""The console of a run: lines, a live bar on a terminal, and the same in plain text in RUN/run.log. Nothing that goes wrong with it ends
a run."""

from __future__ import annotations

import contextlib
import io
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from relssl.files import duration, storing
from relssl.train.signals import StopRequest

# The figures of an epoch's line.
_WORDS = {"loss": "loss {:.3f}", "images_per_second": "{:.0f} img/s"}
_WORDS |= {"data_wait": "data wait {:.0%}", "knn_top1": "kNN {:.1f} %", "knn_teacher_top1": "(teacher {:.1f} %)"}
_FRAME = 0.1  # seconds between two pictures of the bar
_FIRST, _LATER = 60.0, 600.0  # seconds without a line after which a console that is no terminal gets one, at first and later on


class Unbroken:
    """A text stream on which writing never fails: without its reader all is lost, and a character that it cannot encode is escaped."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # a lost reader or terminal, a closed stream
            code = getattr(self._stream, "encoding", None) or "utf-8"
            self._stream.write(text.encode(code, "backslashreplace").decode(code))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Display:
    """The voice of a run, from its first word to its last: on standard error if `show` says so, and in the log that `log_to` names. A
    request to `stop` ends chores."""

    def __init__(self, show: bool, stop: StopRequest | None = None) -> None:
        stream: Any = Unbroken(sys.stderr)
        console, self._stop = Console(file=stream, quiet=not show, highlight=False), stop
        self._live = console.is_terminal and show
        columns = BarColumn(bar_width=10), TextColumn("{task.fields[text]}", markup=False)
        self._progress = Progress(*columns, console=console, disable=not self._live, auto_refresh=False)
        self._steps = self._progress.add_task("steps", visible=False, text="the first step")
        self._log: IO[str] = io.StringIO()
        self._drawn, self._due = 0.0, math.inf  # when the bar was drawn last, and when a line is due where there is none
        self._loss: list[str] = []  # as the bar shows it
        self._pace: tuple[int, float] | None = None  # number and end of this session's first step

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        with contextlib.suppress(OSError):  # the same full disk
            self._log.close()

    def log_to(self, path: Path) -> None:
        """Write all lines to a file, too, those said before included; StorageError if it cannot be written."""
        with storing(path):
            buffer, self._log = self._log, path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
            self._log.write(buffer.getvalue() if isinstance(buffer, io.StringIO) else "")

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        self._progress.console.print(line, markup=False, soft_wrap=True)
        self.note(line)

    def note(self, line: str) -> None:
        """Write a line to the log alone."""
        with contextlib.suppress(OSError):  # a full disk is reported by what cannot do without
            self._log.write(f"{line}\n")

    @contextlib.contextmanager
    def chore(self, title: str, start: int, total: int) -> Iterator[Callable[[int], None]]:
        """Show work on images that comes before the steps: a bar of its own, elsewhere a line each tenth.

        What is yielded is called with how many of `total` are done; it raises Interrupted when the run is asked to stop.
        """
        task, tenth = self._progress.add_task("chore", total=total, text=title), -1

        def advance(now: int) -> None:
            nonlocal tenth
            self._draw(task, now, f"{title}: {now:,} of {total:,}")
            if not self._live and 10 * now // total > tenth:
                tenth = 10 * now // total
                self.say(f"{title}: {now} of {total}")
            if self._stop is not None and (code := self._stop.pending()):
                raise self._stop.interruption(code, "while images were shrunk")

        try:
            advance(start)
            yield advance
        finally:
            self._progress.remove_task(task)

    def begin(self, start: int, total: int, steps_per_epoch: int, batch_size: int) -> None:
        """Show the steps from `start` to `total` from now on."""
        self._total, self._length, self._batch = total, steps_per_epoch, batch_size
        self._due = time.monotonic() + _FIRST
        self._progress.update(self._steps, total=total, completed=start, visible=True, refresh=True)

    def step(self, step: int) -> None:
        """Show that a step is done: the bar on a terminal, elsewhere a line now and then where epochs are long."""
        now = time.monotonic()
        self._pace = self._pace or (step, now)
        epochs = -(-self._total // self._length)
        place = f"epoch {min(step // self._length + 1, epochs)}/{epochs}  step {step}/{self._total}"
        if self._live and (now - self._drawn >= _FRAME or step == self._total):
            self._draw(self._steps, step, place, *self._loss, *self._speed(step))
        elif not self._live and now >= self._due:
            self._due = now + _LATER
            self.say("  ".join([place, *self._speed(step)]))

    def _speed(self, step: int) -> list[str]:
        """Say how fast this session has been but for its first step, in which loaders start, and how long the rest takes at that pace."""
        first, begun = self._pace or (step, 0.0)
        if not first < step < self._total:
            return []
        each = max(time.monotonic() - begun, 1e-9) / (step - first)
        return [f"{self._batch / each:.0f} img/s", f"{duration(max(1.0, each * (self._total - step)))} left"]

    def _draw(self, task: Any, completed: int, *words: str) -> None:
        self._drawn = time.monotonic()
        self._progress.update(task, completed=completed, text="  ".join(words), refresh=True)

    def row(self, row: dict[str, Any], epoch_ended: bool, relations: str = "") -> None:
        """Show a row's main figures; at the end of an epoch on a line of their own, with its `relations` in words."""
        self._loss = [_WORDS["loss"].format(row["loss"])]
        if epoch_ended:
            words = [f"epoch {row['epoch']:>4}", *(form.format(row[name]) for name, form in _WORDS.items() if name in row)]
            words += [*self._speed(row["step"])[1:], *([f"relations: {relations}"] if relations else [])]
            self._due = time.monotonic() + _LATER
            tell = self.note if self._live and "knn_top1" not in row else self.say
            tell("  ".join(words))
