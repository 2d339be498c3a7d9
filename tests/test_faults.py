"""What goes wrong around a run, brought about from outside: signals, damaged files, numbers that overflow."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import relssl
from relssl.engine import Engine
from relssl.errors import STOPPING, CheckpointError, Interrupted, NumericError
from relssl.files import read_rows
from relssl.settings.reading import merge
from relssl.settings.run import resolve, to_yaml
from relssl.train import checkpoint
from relssl.train.checkpoint import State
from relssl.train.loop import origin, train_step
from relssl.train.online import Online
from relssl.weights import store
from small_runs import SMALL, equal_runs, ready_run, small_run

SHORT: dict[str, Any] = {"log.knn_every": 0, "optimizer.warmup_epochs": 0}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 20 steps with a checkpoint of every fifth, which tests only read."""
    return small_run(tmp_path_factory.mktemp("runs") / "whole", checkpoint={"every_steps": 5, "keep": 20}).folder


@pytest.fixture
def cut(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run as it was at step 10."""
    left_out = shutil.ignore_patterns("export", "status.json", "step-00000015", "step-00000020")
    return Path(shutil.copytree(finished, tmp_path / "cut", ignore=left_out))


def begin(folder: Path, **overrides: Any) -> subprocess.Popen[str]:
    """Start a run on files with two loader workers in a process group of its own."""
    images = folder.parent / "images"
    images.mkdir(exist_ok=True)
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (40, 40, 48, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(images / f"{number:02}.png")
    settings = {
        "data": str(images),
        "recipe": "digits",
        "batch_size": 8,
        "epochs": 1000,
        "loader": {"workers": 2},
        "out": str(folder),
    }
    views = {"weak": {"name": "weak", "size": 32}, "strong": {"name": "contrastive", "size": 32}}
    settings |= {"max_images": "null", "views": views, "method": {"memory_size": 16}, "log": {"knn_every": 0, "every": 1}}
    file = folder.with_suffix(".yaml")
    file.write_text(to_yaml(resolve(merge(merge(SMALL, settings), overrides))))
    command = ["resume", str(folder)] if (folder / "config.yaml").exists() else ["pretrain", "--config", str(file)]
    words = [sys.executable, "-m", "relssl", *command]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def stopped(process: subprocess.Popen[str], number: int) -> tuple[str, float]:
    """Send a signal to the whole group: what was printed, and the seconds until all of it was gone."""
    family = psutil.Process(process.pid).children(recursive=True)
    start = time.monotonic()
    os.killpg(process.pid, number)
    try:
        output = process.communicate(timeout=60)[0]
        seconds, (_, alive) = time.monotonic() - start, psutil.wait_procs(family, timeout=10)
        assert not alive
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return output, seconds


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not path.exists():
        time.sleep(0.01)


def test_a_signal_to_the_whole_group_saves_and_leaves_nobody(tmp_path: Path) -> None:
    process = begin(tmp_path / "run")
    wait_for(tmp_path / "run/metrics.jsonl", process)
    while process.poll() is None and not read_rows(tmp_path / "run/metrics.jsonl"):
        time.sleep(0.01)
    output, _ = stopped(process, signal.SIGTERM)
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert process.returncode == status["exit_code"] == 143 and "Traceback" not in output, output
    assert status["last_checkpoint"] == f"step-{status['step']:08d}" and status["step"] > 0
    store.verify(tmp_path / "run/checkpoints" / status["last_checkpoint"])


@pytest.mark.torture
@pytest.mark.parametrize("ranks", [1, 2])
def test_signals_to_the_group_at_random_moments(tmp_path: Path, ranks: int) -> None:
    """SIGTERM, SIGINT and SIGUSR1 from the first tenth of a second on, start-up included, resumed each time: torture."""
    moments, kinds, longest = random.Random(ranks), [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], 0.0
    for attempt in range(20):
        process = begin(tmp_path / "run", engine={"devices": ranks})
        if attempt % 2:
            wait_for(tmp_path / "run/metrics.jsonl", process)
        time.sleep(moments.uniform(1.0, 8.0))
        number = kinds[attempt % 3]
        output, seconds = stopped(process, number)
        longest = max(longest, seconds)
        assert process.returncode == STOPPING[number] and "Traceback" not in output, (attempt, output)
        for path in store.checkpoints(tmp_path / "run/checkpoints"):
            store.verify(path)
    print(f"{ranks} ranks: 20 of 20 ended with their code, the slowest in {longest:.1f} s")
    assert longest < 20


@pytest.mark.parametrize("step", [0, 10, 20])
def test_a_signal_ends_knn_at_once(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    def endless(self: Online, state: State, engine: Engine) -> dict[str, float]:
        figures = measure(self, state, engine)
        if state.step == step:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            except Interrupted as error:
                if step == 0:  # as C++ that is being imported does
                    raise ImportError("initialization failed") from error
                raise
        return figures

    measure = Online.measure
    monkeypatch.setattr(Online, "measure", endless)
    with pytest.raises(
        Interrupted, match=f"by SIGTERM after step {step}" if step else "before its first step; start it again"
    ) as error:
        small_run(tmp_path / "run")
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (error.value.exit_code, status["exit_code"], status["step"]) == (143, 143, step)
    monkeypatch.undo()
    if step:
        relssl.resume(tmp_path / "run", quiet=True)
        assert equal_runs(finished, tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("bad_samples.jsonl", b'{"file": "a.jpg", "reason": "cut"}\n', b'{"file": "b.jpg", "rea'),
        ("bad_samples.jsonl", b'{"file": "a.jpg", "reason": "cut"}\n', b'\xff\xfe\x00\n[1]\n{"file": 3}\n'),
        ("metrics.jsonl", b"", b'{"step": 11, "lo'),
        ("metrics.jsonl", b'[1, 2]\n3\n{"loss": 1}\n\xff\xfe\n{"step": "six"}\n', b"\n" + b"[" * 100_000),
    ],
)
def test_damaged_logs_are_mended(
    finished: Path, cut: Path, capsys: pytest.CaptureFixture[str], name: str, before: bytes, after: bytes
) -> None:
    (cut / name).write_bytes(before + ((cut / name).read_bytes() if (cut / name).exists() else b"") + after)
    relssl.resume(cut)
    assert f"{name}: " in (shown := capsys.readouterr().err) and "left out" in shown
    assert equal_runs(finished, cut)
    if name == "bad_samples.jsonl":
        assert read_rows(cut / name) == [{"file": "a.jpg", "reason": "cut"}]
        assert (cut / name).read_bytes().count(b"\n") == 1


def test_a_state_without_a_part_is_refused_by_name_and_the_one_before_offered(cut: Path) -> None:
    newest = cut / "checkpoints/step-00000010"
    tensors, facts = store.load(newest)
    for key in [*facts, "tree.random", "tree.optimizer", "tree.teacher"]:
        outer, _, inner = key.partition(".")
        left = {name: value for name, value in facts.items() if name != key}
        if inner:
            left[outer] = {name: value for name, value in facts[outer].items() if name != inner}
        shutil.rmtree(newest)
        store.save(newest, tensors, left)
        if key in ("hashes", "neighbours", "unmeasured"):  # for other tools, and newer than the first checkpoints
            continue
        with pytest.raises(
            CheckpointError, match=rf"step-00000010: .*'{inner or outer}' is missing; a good one: .*--checkpoint step-00000005`"
        ):
            relssl.resume(cut, quiet=True)


@pytest.mark.parametrize("what", ["empty", "without a file"])
def test_an_incomplete_step_folder_is_refused_by_name(finished: Path, cut: Path, what: str) -> None:
    later = cut / "checkpoints/step-00000013"
    if what == "empty":
        later.mkdir()
    else:
        shutil.copytree(cut / "checkpoints/step-00000010", later)
        (later / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000013: .*is missing.* a good one: .*--checkpoint step-00000010`"):
        relssl.resume(cut, quiet=True)
    relssl.resume(cut, checkpoint="step-00000010", quiet=True)
    assert equal_runs(finished, cut)


@pytest.mark.parametrize("status", [b"[3]", b"\xff", b'{"state": "complete", "step": "x"}', b"{"])
def test_a_status_that_cannot_be_read_ends_no_run(cut: Path, status: bytes) -> None:
    (cut / "status.json").write_bytes(status)
    with pytest.raises(Interrupted):
        relssl.resume(cut, quiet=True, time_limit=1e-6)


@pytest.mark.parametrize("deviation", [1e-37, 1e-25])
def test_a_run_without_one_finite_step_is_not_complete(tmp_path: Path, deviation: float) -> None:
    """Inputs of 1e37 make the loss NaN; those of 1e25 overflow batch norm's variances alone, and the loss stays finite."""
    with pytest.raises(NumericError, match=r"not finite 3 steps in a row"):
        small_run(tmp_path / "run", max_steps=3, **SHORT, **{"views.std": [deviation] * 3})
    assert json.loads((tmp_path / "run/status.json").read_text())["error"]["kind"] == "numeric"
    assert store.checkpoints(tmp_path / "run/checkpoints") == []


def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    run = ready_run(tmp_path)
    run.networks[0].backbone.register_buffer("mask", torch.tensor([0.0, -math.inf]))  # such constants are nobody's fault
    run.state.infinite = {"student.backbone.mask"}
    parts = next(run.loader.stream(0, 1))
    train_step(run, parts)
    assert checkpoint.save(tmp_path, run.state, run.engine, origin(run)) == tmp_path / "step-00000001"
    train_step(run, parts)
    moments = next(iter(run.state.optimizer.state.values()))["momentum_buffer"]
    moments[(0,) * moments.dim()] = math.inf
    with pytest.raises(NumericError, match=r"step 2: optimizer\.state\.0\.momentum_buffer .* not saved"):
        checkpoint.save(tmp_path, run.state, run.engine, origin(run))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
