"""What a run tells while it goes on: metrics.jsonl, TensorBoard, console."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from relssl.atomic import write_file

# What differs from run to run on the same machine; everything else in a row repeats bit for bit.
TIMINGS = ("images_per_second", "data_wait")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut short by a crash is left out."""
    rows = []
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Journal:
    """Rows of figures, one a logged step.

    A resumed run first drops the rows that lie after the checkpoint it starts from, so the file reads as if the run had
    never stopped.
    """

    def __init__(self, folder: Path, start: int, tensorboard: bool) -> None:
        path = folder / "metrics.jsonl"
        kept = [row for row in read_rows(path) if start > 0 and row["step"] <= start]
        if path.exists():
            write_file(path, "".join(_line(row) for row in kept).encode())
        self._file = path.open("a")
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # a second of imports that not every run needs

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)  # type: ignore[no-untyped-call]

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; it has reached the operating system when this returns."""
        self._file.write(_line(row))
        self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, row["step"])  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Flush and close everything."""
        self._file.close()
        if self._board is not None:
            self._board.close()  # type: ignore[no-untyped-call]


def _line(row: dict[str, Any]) -> str:
    finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}
    return json.dumps(finite) + "\n"


class Display:
    """The console: a live bar on a terminal, a line an epoch elsewhere."""

    def __init__(self, total: int, start: int, show: bool) -> None:
        self._console = Console(stderr=True, quiet=not show, highlight=False)
        self._live = self._console.is_terminal and show
        self._progress = Progress(
            BarColumn(bar_width=10),  # narrow, so that 80 columns hold the figures as well
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._progress.add_task("steps", total=total, completed=start, figures="")

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def chore(self, what: str, done: int, total: int) -> Iterator[Callable[[int], None]]:
        """Show what comes before the steps: a bar in the place of theirs, elsewhere a line at its start and each tenth.

        Args:
            what: a few words for it.
            done, total: how many of how many are done already; what is yielded is called with how many are done now.
        """
        self._progress.update(self._task, visible=False)
        task = self._progress.add_task("chore", total=total, completed=done, figures=what)
        told = 10 * done // total
        if not self._live:
            self.say(f"{what}: {done} of {total}")

        def advance(now: int) -> None:
            nonlocal told
            self._progress.update(task, completed=now)
            if not self._live and 10 * now // total > told:
                told = 10 * now // total
                self.say(f"{what}: {now} of {total}")

        try:
            yield advance
        finally:
            self._progress.remove_task(task)
            self._progress.update(self._task, visible=True)

    def row(self, row: dict[str, Any], epoch_ended: bool) -> None:
        """Show a row's main figures."""
        self._progress.update(self._task, completed=row["step"], figures=_brief(row))
        if epoch_ended and (not self._live or "knn_top1" in row):
            self.say(f"epoch {row['epoch']:>4}  {_brief(row)}")


def _brief(row: dict[str, Any]) -> str:
    words = [f"loss {row['loss']:.3f}"]
    if "teacher_neighbours" in row:
        words.append(f"neighbours {row['teacher_neighbours']:.0f}")
    words += [f"{row['images_per_second']:.0f} img/s", f"data wait {row['data_wait']:.0%}"]
    if "knn_top1" in row:
        teacher = f" (teacher {row['knn_teacher_top1']:.1f} %)" if "knn_teacher_top1" in row else ""
        words.append(f"kNN {row['knn_top1']:.1f} %{teacher}")
    return "  ".join(words)
