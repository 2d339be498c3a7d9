"""What a run tells while it goes on and at its end, to people, to batch systems and to other loggers."""

import csv
import importlib.util
import io
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import relssl
from relssl.cli import main
from relssl.data.loader import read_batches
from relssl.errors import ConfigError, ExportError, Interrupted
from relssl.files import read_json, read_rows
from relssl.report.tables import facts
from relssl.settings.run import resolve
from relssl.train.console import Display, Unbroken
from relssl.train.pretrain import Result
from relssl.train.signals import StopRequest
from relssl.weights import store
from small_runs import SMALL, small_run

SHORT: dict[str, Any] = {**SMALL, "epochs": 1, "max_images": 64, "log": SMALL["log"] | {"knn_every": 0}}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_moves_with_every_step_and_has_epoch_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = iter(range(1000))
    monkeypatch.setattr("relssl.train.console.time.monotonic", lambda: float(next(moment)))
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    for name, value in {"COLUMNS": "80", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    with Display(show=True) as display:
        display.begin(0, 200, 10, 64)
        pictures = []
        for step in range(1, 13):
            display.step(step)
            pictures.append(terminal.getvalue())
            terminal.truncate(0)
            terminal.seek(0)
    assert all(f"step {step}/200" in picture for step, picture in enumerate(pictures, start=1))
    assert "epoch 1/20" in pictures[0] and "epoch 2/20" in pictures[-1]
    assert all("img/s" in picture and " left" in picture for picture in pictures[1:])
    assert all(len(line) <= 200 for picture in pictures for line in picture.splitlines())


def test_what_is_said_stands_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    relssl.pretrain(settings=resolve(SHORT | {"epochs": 2, "out": str(tmp_path / "run")}))
    lines, log = capsys.readouterr().err.splitlines(), (tmp_path / "run/run.log").read_text().splitlines()
    assert log[: len(lines)] == lines
    assert sum(line.startswith("epoch ") for line in log) == 2


def test_neither_a_lost_reader_nor_a_name_without_a_code_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="ascii") as lost:
        monkeypatch.setattr(sys, "stderr", lost)
        assert relssl.pretrain(settings=resolve(SHORT | {"out": str(tmp_path / "läufe ☂")})).rows[-1]["step"] == 2
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)
    stream = Unbroken(io.TextIOWrapper(buffer := io.BytesIO(), encoding="cp1252"))
    stream.write("Käfer ☂\n")
    stream.flush()
    assert buffer.getvalue() == b"K\xe4fer \\u2602\n"
    (tmp_path / "☂").mkdir()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(errors := io.BytesIO(), encoding="ascii"))
    assert main(["pretrain", str(tmp_path / "☂")]) == 3
    assert b"\\u2602: " in errors.getvalue()


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 75), (signal.SIGUSR2, 75)],
)
def test_a_signal_is_a_request_with_its_code_and_comes_twice_from_launchers(number: signal.Signals, code: int) -> None:
    heard = list[int]()
    usual = signal.signal(
        number, own := lambda number, _: heard.append(number)
    )  # the tests themselves may run where it is ignored
    with StopRequest(None) as stop:
        stop.at_once = None  # there are steps to save
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.pending() == code
    error = stop.interruption(code, "after step 3")
    assert isinstance(error, Interrupted) and number.name in str(error) and error.exit_code == code
    assert heard == [number]  # handed on, as no error says that it came
    assert signal.signal(number, signal.SIG_IGN) == own
    with StopRequest(None) as stop:  # what nohup ignores stays ignored
        os.kill(os.getpid(), number)
        assert stop.pending() == 0
    signal.signal(number, usual)


def signalled(request: int) -> int:
    """Sends the worker, at the second request, what its whole group gets when a batch system stops a run."""
    if request == 1:
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            os.kill(os.getpid(), number)
    return request


def test_workers_outlive_signals_to_the_group() -> None:
    assert list(read_batches(signalled, range(3), 1)) == [0, 1, 2]


def test_a_run_whose_export_fails_is_complete_and_can_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no room")

    folder = tmp_path / "run"
    monkeypatch.setattr("relssl.train.pretrain.export", full)
    with pytest.raises(ExportError, match=f"no room.*relssl export {folder}") as failed:
        relssl.pretrain(settings=resolve(SHORT | {"out": str(folder)}), quiet=True)
    assert failed.value.exit_code == 1
    status = read_json(folder / "status.json")
    assert (status["state"], status["step"], status["exit_code"]) == ("complete", 2, 0)
    assert status["export"] == {"error": "no room"} and status["last_checkpoint"] == store.step_folder(folder, 2).name
    with pytest.raises(ExportError, match="relssl export"):
        relssl.resume(folder, quiet=True)
    monkeypatch.undo()
    relssl.export(folder)
    assert relssl.resume(folder, quiet=True).backbone.exists()


def test_loggers_have_every_row_once_after_a_resume_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    monkeypatch.setattr(rank_zero_only, "rank", 3)  # as Lightning reads it from a batch system's variables
    more = {"log.every": 1, "log.to": "tensorboard,csv", "max_images": 96, "log.knn_images": [40, 40]}
    with pytest.raises(Interrupted):
        small_run(folder, time_limit=1e-6, **more)
    relssl.resume(folder, quiet=True, time_limit=float("inf"))
    assert rank_zero_only.rank == 3
    rows = read_rows(folder / "metrics.jsonl")
    with (folder / "csv/metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [int(line["step"]) for line in table] == [row["step"] for row in rows]
    assert [float(line["train/loss"]) for line in table[1:]] == [row["loss"] for row in rows[1:]]
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    tags = {"train/loss", "train/lr", "relation/kl", "relation/effective_rank", "eval/knn_top1", "speed/images_per_second"}
    assert tags <= set(board.Tags()["scalars"])
    assert set(board.Tags()["images"]) == {"views/weak", "views/strong-1"}
    assert set(board.Tags()["histograms"]) == {"relation/neighbours", "relation/top_probability"}
    assert (folder / "tensorboard" / f"{rows[-1]['step']:05}" / "features" / "sprite.png").exists()  # for its projector
    assert [event.step for event in board.Scalars("train/loss")] == [row["step"] for row in rows[1:]]


def test_a_logger_that_is_not_installed_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="wandb is not installed"):
        small_run(tmp_path / "run", **{"log.to": "wandb"})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "to"),
    [
        ({"log": {"tensorboard": False}}, ()),  # as old versions had it
        ({"log.tensorboard": "true"}, ("tensorboard",)),
        ({"log.to": "none"}, ()),
        ({"log.to": []}, ()),
        ({"log.to": "csv,wandb"}, ("csv", "wandb")),
    ],
)
def test_loggers_are_named_in_several_ways(settings: dict[str, Any], to: tuple[str, ...]) -> None:
    assert resolve(settings).log.to == to


HEALTHY = {"effective_rank": 40.0, "embedding_std": 1.0, "teacher_neighbours": 9.0, "kl": 0.5, "agreement": 0.5}
BASES = {"knn_top1": 50.0, "knn_raw_pixels": 60.0}


@pytest.mark.parametrize(
    ("first", "last", "words"),
    [
        (BASES, {"knn_top1": 80.0}, "Good: +30.0 points on the untrained backbone and +20.0"),
        (BASES, {"knn_top1": 61.0}, "Little: "),
        (BASES, {"knn_top1": 55.0}, "Not good: +5.0 points on the untrained backbone and -5.0"),
        ({}, {}, "Healthy"),
        ({}, {}, "loss rose"),
        (BASES, {"knn_top1": 80.0, "embedding_std": 0.01}, "collapsed"),
        ({}, {"effective_rank": None}, "Not good"),
    ],
)
def test_the_end_says_whether_the_figure_that_counts_is_good(first: dict[str, Any], last: dict[str, Any], words: str) -> None:
    loss = {"step": 1, "loss": 3.0, "warmup_mix": 1.0}
    rows = [{"step": 0} | first, loss, {"step": 9, "loss": 4.0, "warmup_mix": 0.0} | HEALTHY | last]
    assert words in "\n".join(facts(Result(Path("run"), Path("run/b"), rows), resolve({}))["verdict"])
