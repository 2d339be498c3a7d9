"""relssl estimate as a whole: what it says of a run, and that it leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import relssl
from relssl.cli import main
from relssl.data.cache import shrunken
from relssl.engine import Engine, available_cores
from relssl.errors import ConfigError, RelsslError
from relssl.evaluation.pairs import choose
from relssl.settings.reading import merge, nest
from relssl.settings.run import resolve, to_yaml
from relssl.train import estimate
from relssl.train import estimate as estimating
from relssl.train.estimate import Estimate
from relssl.train.loop import knn_due, save_due, train_step
from relssl.train.pretrain import build
from relssl.train.run_folder import Display
from small_runs import SMALL, small_run
from test_stages import files, folder, train, trainer

__all__ = ["folder"]  # the fixture


def words(**over: Any) -> list[str]:
    """A small run's settings as a command line."""
    given = flat(merge(SMALL, nest(over)))
    return [given.pop("data"), *(word for key, value in given.items() for word in (f"--{key}", spelled(value)))]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    named: dict[str, Any] = {}
    for key, value in tree.items():
        section = isinstance(value, dict) and key != "backbone_args"
        named |= flat(value, f"{prefix}{key}.") if section else {f"{prefix}{key}": value}
    return named


def spelled(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def finite(node: Any) -> bool:
    if isinstance(node, dict):
        return all(finite(value) for value in node.values())
    if isinstance(node, list):
        return all(finite(value) for value in node)
    return not isinstance(node, float) or math.isfinite(node)


def test_the_verb_tells_a_runs_cost_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["estimate", *words(), "--steps", "4", "--json"]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found.keys() == {field.name for field in dataclasses.fields(Estimate)} and finite(found)
    assert list(tmp_path.iterdir()) == []
    # 320 images in batches of 32, two epochs, more steps than were timed.
    assert (found["total_steps"], found["steps_timed"], found["images"]) == (20, 4, 320)
    assert found["step_low"] <= found["step_seconds"] <= found["step_high"]
    assert found["seconds"] == pytest.approx(found["training_seconds"] + found["evaluation_seconds"] + found["saving_seconds"])
    assert found["extras"]["evaluations"] == 3 and found["extras"]["saves"] == 2
    assert found["training_seconds"] == pytest.approx(20 * 32 / found["images_per_second"])
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert found["floor_seconds"] == pytest.approx(32 * sum(found["flops"].values()) / found["attainable_flops"])
    assert 0 < found["memory"]["used"] < found["memory"]["total"] and found["memory"]["device_total"] == 0


def test_the_table_names_what_limits_and_what_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"data": str(folder), "batch_size": 4, "max_images": None, "loader.workers": 0, "epochs": 1}
    views = {f"views.{side}.size": 16 for side in ("weak", "strong")}
    before = sorted(folder.iterdir())
    assert main(["estimate", *words(**options, **views), "--steps", "6"]) == 0
    told = capsys.readouterr()
    for line in ("What the run would take", "step, median of 6", "loader processes: 0", "what limits", "What to change"):
        assert line in told.out
    # One of the twelve is no image; six steps of four meet all.
    assert "images met that cannot be read" in told.out
    assert sorted(folder.iterdir()) == before and "Traceback" not in told.err


def test_from_python() -> None:
    found = relssl.estimate(**SMALL, steps=3, quiet=True)
    assert isinstance(found, Estimate) and found.threads == 1 and found.device.startswith("CPU")
    assert ("engine.threads" in {advice.setting for advice in found.advice}) == (available_cores() > 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.seconds = 0.0  # type: ignore[misc]
    with pytest.raises(ConfigError, match="steps: must be at least 1"):
        relssl.estimate("digits", steps=0)


@pytest.mark.parametrize(
    ("over", "code", "line"),
    [
        ({"data": "nowhere/"}, 3, "nowhere/: no such folder or list file"),
        ({"batch_size": 512, "method.memory_size": 512}, 3, "320 usable images, batch is 512"),
        ({"optimizer.lr": -1}, 2, "optimizer.lr: "),
        ({"backbone": "resnot18"}, 2, "backbone: timm knows no 'resnot18'"),
    ],
)
def test_what_cannot_run_is_one_line(over: dict[str, Any], code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *words(**over)]) == code
    told = capsys.readouterr().err.strip()
    assert line in told and len(told.splitlines()) == 1


def test_a_batch_beyond_the_memory_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("relssl.train.estimate.train_step", full)
    with pytest.raises(RelsslError, match="batch_size: 32 does not fit the device's memory"):
        relssl.estimate(**SMALL, quiet=True)


def test_what_is_refused_early_imports_no_torch(tmp_path: Path) -> None:
    code = "import sys; from relssl.cli import main; print(main(['estimate', 'nowhere/']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["3", "False"]


def test_ctrl_c_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "relssl", "estimate", *words(), "--steps", "100000"]
    # A test run started in the background ignores the signal, and so would what it starts.
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hears)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("timing 100000 steps")
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130 and told.strip() == "relssl: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_two_ranks_tell_once(tmp_path: Path) -> None:
    settings = tmp_path / "two.yaml"
    settings.write_text(to_yaml(resolve(merge(SMALL, {"engine": {"devices": 2}}))))
    command = [sys.executable, "-m", "relssl", "estimate", "--config", str(settings), "--steps", "3", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert found["world"] == 2 and found["extras"]["evaluations"] == 3
    assert found["floor_seconds"] == pytest.approx(16 * sum(found["flops"].values()) / found["attainable_flops"])


@pytest.mark.parametrize(
    "over",
    [
        {"epochs": 7, "log.knn_every": 0, "checkpoint.every": 3},
        {"epochs": 7, "log.knn_every": 2, "checkpoint.every": 3},
        {"epochs": 3, "log.knn_every": 5, "checkpoint.every": 7, "checkpoint.every_steps": 4},
        {"epochs": 4, "log.knn_every": 3, "checkpoint.every": 1, "checkpoint.every_steps": 10},
    ],
)
def test_saves_and_evaluations_are_those_of_training(over: dict[str, Any]) -> None:
    run = trainer(**over)
    expected = {"saves": 0, "evaluations": 1}  # the one before the first step
    for step in range(1, run.total_steps + 1):
        run.state.step = step
        expected["saves"] += save_due(run)
        expected["evaluations"] += knn_due(run)
    assert estimate.saves(run.config, run.plan.steps_per_epoch) == expected["saves"]
    found = estimate.measure_extras(run, 0.25)
    assert (found.saves, found.save_seconds) == (expected["saves"], 0.25)
    assert found.evaluations == (expected["evaluations"] if run.online else 0)


def test_the_disk_a_run_needs_is_what_it_takes(tmp_path: Path) -> None:
    made = small_run(tmp_path / "run", **{"checkpoint.every": 1}).folder
    config = resolve(merge(SMALL, {"checkpoint": {"every": 1}}))
    run = build(config, Engine(config.engine))
    for parts in run.loader.stream(0, 1):
        train_step(run, parts)
    disk, _ = estimate.measure_saving(run)
    newest = made / "checkpoints" / "step-00000020"
    assert disk.checkpoint == pytest.approx(sum(file.stat().st_size for file in newest.iterdir()), rel=0.05)
    exported = sum(file.stat().st_size for file in (made / "export").glob("*.safetensors"))
    assert disk.exports == pytest.approx(exported, rel=0.2)  # this small a network has names as long as its weights
    assert 0.5 < disk.logs / (made / "metrics.jsonl").stat().st_size < 2
    assert disk.checkpoints == 4 and disk.total > 4 * disk.checkpoint and disk.free > 0


def test_an_evaluation_of_files_counts_their_reading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where reading an image takes days, all else vanishes: both sides are read for both networks."""
    run = files(folder)
    pair = type("Pair", (), {"bank": run.images, "test": choose(run.images, 5, 0)})
    run.online = type("Online", (), {"pair": pair})  # type: ignore[assignment]
    monkeypatch.setattr(estimate, "_search", lambda *_: 0.0)
    monkeypatch.setattr(estimate, "_reading", lambda *_: 1e6)
    # 12 + 5 images, two networks, no process beside this one.
    assert estimate._evaluation(run) == pytest.approx(2 * 17 * 1e6, rel=0.01)


def test_reading_skips_what_cannot_be_read(folder: Path) -> None:
    run = files(folder)
    assert estimate._reading(run.images, run.config) > 0


def test_a_cache_is_not_made_for_an_estimate(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_SAMPLE", 4)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    caches = tmp_path / "caches"
    run = files(folder, **{"loader.cache": 16, "loader.cache_folder": str(caches)})
    before = sorted(tmp_path.iterdir())
    with estimate.stand_in(run) as needed:
        train(run, 3)  # reads all the positions
        assert isinstance(run.images.source, estimate.Repeated) and len(run.images.source) == 12
        few = run.images.source.total
        assert 0 < few <= 4 * 3 * 16 * 20 and needed == few * 12 // 4
    assert sorted(tmp_path.iterdir()) == before
    disk, _ = estimate.measure_saving(run, needed)
    assert disk.cache == needed and 0 < disk.cache_free < disk.free + 1


def test_a_cache_that_is_there_is_read_as_it_is(folder: Path, tmp_path: Path) -> None:
    caches = tmp_path / "caches"
    run = files(folder, **{"loader.cache": 16, "loader.cache_folder": str(caches)})
    with Display(1, 0, show=False) as silent:
        made = shrunken(run.images, run.config, silent)
    before = {file: file.stat().st_mtime_ns for file in caches.rglob("*")}
    with estimate.stand_in(run) as needed:
        train(run, 1)
        assert needed == 0 and run.images.source.folder == made.folder
    assert {file: file.stat().st_mtime_ns for file in caches.rglob("*")} == before


def test_ranks_repeat_the_stages_as_often_as_the_first_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()

    def stages(run: Any, repeats: int) -> dict[str, float]:
        asked.append(repeats)
        raise ConfigError("seen")

    monkeypatch.setattr(Engine, "broadcast", lambda self, value: 4)
    monkeypatch.setattr(estimating, "stages", stages)
    with pytest.raises(ConfigError, match="seen"):
        relssl.estimate(**SMALL, steps=1, quiet=True)
    assert asked == [4]


def test_memory_of_a_gpu_is_what_is_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 72)
    here: Any = SimpleNamespace(device=torch.device("cpu"))
    there: Any = SimpleNamespace(device=torch.device("cuda"))
    small = torch.zeros(1 << 24).add_(1)  # 64 MiB that are really there
    found = estimate.peak_memory(there, 2)
    assert (found.device_used, found.device_total, found.share) == (72, 80, 0.9)
    found = estimate.peak_memory(here, 1)
    assert found.device_total == 0 and small.nbytes < found.used < found.total and found.share == found.used / found.total


def test_memory_of_the_machine_is_that_of_all_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "host_memory", lambda field: 7 if field == "VmHWM" else 0)
    here: Any = SimpleNamespace(device=torch.device("cpu"))
    assert estimate.peak_memory(here, 4).used == 28


def test_a_process_does_not_inherit_its_parents_peak() -> None:
    block = b"\1" * (256 << 20)
    code = "from relssl.train.memory import host_memory; print(host_memory('VmRSS'), host_memory('VmHWM'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    held, most = map(int, done.stdout.split())
    assert held <= most < held + len(block) // 2
