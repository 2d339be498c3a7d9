"""The benchmarks measure what they say, and run."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

import bench
import gpu
import loss
import peers
import usage
import whole_run
from options import Options
from pictures import picture, write_folder
from processes import Failed, alone
from rounds import Contender, Work, compare, spread, times

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def noted(name: str, log: str, seconds: float) -> Work:
    """Says in a file when its turn is, and how long that took."""

    def run(count: int) -> float:
        with Path(log).open("a") as file:
            file.write(f"{name}{count} ")
        return count * seconds

    return Work(run, images=10, facts={"precision": "fp32"})


def failing(what: str) -> Work:
    def run(count: int) -> None:
        if what == "dies":
            os._exit(3)
        raise ValueError(what)

    return Work(run, images=1)


def test_contenders_take_turns_and_a_failing_one_leaves_the_others_alone(tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    contenders = [
        Contender("a", noted, {"name": "a", "log": log, "seconds": 0.5}),
        Contender("raises", failing, {"what": "no such thing"}),
        Contender("dies", failing, {"what": "dies"}),
        Contender("b", noted, {"name": "b", "log": log, "seconds": 0.25}),
    ]
    records = compare(contenders, rounds=2, units=3)
    assert Path(log).read_text().split() == ["a1", "b1", "a3", "b3", "a3", "b3"]
    assert records["a"]["images_per_second"] == [20.0, 20.0] and records["a"]["seconds_per_unit"] == [0.5, 0.5]
    assert times(records, "b", "a") == [2.0, 2.0] and times(records, "raises", "a") is None
    assert records["raises"] == {"failed": "ValueError: no such thing"}
    assert records["dies"] == {"failed": "its process died with exit code 3"}
    assert records["a"]["images"] == 10 and records["a"]["facts"] == {"precision": "fp32"}
    assert 0 < records["a"]["memory_mib"][0] <= records["a"]["memory_mib"][1]


def test_what_hangs_is_stopped() -> None:
    with pytest.raises(Failed, match="took longer than 1 s"):
        alone(time.sleep, 60, timeout=1)


def test_after_the_deadline_what_is_left_fails_and_what_is_done_stays(tmp_path: Path) -> None:
    contenders = [Contender("a", noted, {"name": "a", "log": str(tmp_path / "log"), "seconds": 0.5})]
    (record,) = compare(contenders, rounds=1, units=1, deadline=time.monotonic()).values()
    assert record == {"failed": "took longer than 0 s and was stopped"}
    (record,) = compare(contenders, rounds=1, units=1, deadline=time.monotonic() + 500).values()
    assert record["images_per_second"] == [20.0]


def session(out: Path, *, tiny: bool, minutes: float = 9) -> gpu.Session:
    return gpu.Session(out, minutes, Options(1, 1, 0, None, None, tiny), None)


def test_results_of_a_gpu_are_kept_from_rehearsals_and_other_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session(tmp_path, tiny=False).note("loss", "records", 1)
    before = (tmp_path / "gpu.json").read_text()
    session(tmp_path, tiny=True).note("loss", "records", 2)
    assert (tmp_path / "gpu.json").read_text() == before
    assert session(tmp_path, tiny=False).found["loss"] == {"records": 1}
    monkeypatch.setattr(gpu, "environment", lambda: {"processor": "another"})
    assert "loss" not in session(tmp_path, tiny=False).found


def test_a_measurement_that_hangs_leaves_time_for_others(tmp_path: Path) -> None:
    assert session(tmp_path, tiny=True, minutes=9).deadline() - time.monotonic() == pytest.approx(180, abs=5)
    assert session(tmp_path, tiny=True, minutes=1).deadline() - time.monotonic() == pytest.approx(60, abs=5)
    assert gpu.SECTIONS[-1] == "run"  # which is given all that is left


def test_a_section_that_fails_in_any_way_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("floor")

    monkeypatch.setattr(gpu, "measure_small", fail)
    monkeypatch.setattr(loss, "measure", lambda options, deadline: {"all": "well"})
    made = session(tmp_path, tiny=True)
    assert gpu.run(made, ["small", "loss"]) == 1
    assert made.found["small"]["failed"] == "KeyError: 'floor'" and made.found["loss"]["records"] == {"all": "well"}


@pytest.mark.parametrize(("found", "code"), [({"a": {"b": {"failed": "x"}}}, 1), ({"a": {"b": [1.0]}}, 0)])
def test_a_contender_that_failed_is_told_by_the_exit_code(
    found: dict[str, Any], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "measure", lambda options: found)
    assert bench.run(["loss"], Options(1, 1, 0, None, None, tiny=True), tmp_path / "out.json") == code


def set_threads(count: int) -> int:
    torch.set_num_threads(count)
    return torch.get_num_threads()


def test_settings_of_a_process_stay_there() -> None:
    before = torch.get_num_threads()
    assert alone(set_threads, before + 1) == before + 1
    assert torch.get_num_threads() == before


def test_spread_is_median_and_range() -> None:
    assert spread([3.0, 1.0, 2.0], 1) == "2.0 [1.0..3.0]" and spread(None) == "-"


def test_peak_of_memory_counts_what_was_let_go() -> None:
    usage.forget_peak()
    before = usage.memory()
    with mmap.mmap(-1, 64 << 20) as block:  # not of the heap, which hands out again what lies there freed
        block.write(bytes(64 << 20))
    assert usage.peak_memory() - before > 60 << 20


@pytest.mark.parametrize("name", loss.forms())
def test_every_form_of_the_loss_is_the_same_loss(name: str) -> None:
    error = loss.errors(name, (96, 16, 8, 2), 1)
    assert error["loss"] < 1e-5 and error["gradient"] < 1e-5


def test_an_error_of_the_loss_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = loss.form("plain")
    forms = {"plain": right, "wrong": lambda queries, keys, memory: right(queries, keys, 1.01 * memory)}
    monkeypatch.setattr(loss, "form", forms.get)
    assert loss.errors("wrong", (96, 16, 8, 1), 1)["gradient"] > 1e-3


def test_pictures_compress_like_photographs(tmp_path: Path) -> None:
    folder = Path(write_folder(tmp_path / "photos", 5, 200, 150, different=2))
    files = sorted(folder.iterdir())
    assert len(files) == 5 and files[0].read_bytes() == files[2].read_bytes() != files[1].read_bytes()
    with Image.open(files[0]) as opened:
        assert opened.size == (200, 150) and opened.mode == "RGB"
    # Photographs at this quality take 1.5 to 5 bits a pixel.
    assert 1.5 < 8 * files[0].stat().st_size / (200 * 150) < 5
    assert np.array_equal(picture(64, 48, 3), picture(64, 48, 3))


def test_nested_parts_of_a_run_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 11.0, 12.0, 15.0])
    monkeypatch.setattr(whole_run, "_now", lambda: next(clock))
    split = whole_run.Split()
    with split.time("evaluation"), split.time("evaluation"):
        pass
    with split.time("evaluation"):
        pass
    assert split.seconds["evaluation"] == 4.0 and split.first["evaluation"] == 10.0


def test_linear_classifier_equals_scikit_learns() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 600)
    features = (random.standard_normal((3, 8))[labels] + random.standard_normal((600, 8))).astype(np.float32)
    bank, test = features[:400], features[400:]
    mean, std = bank.mean(0), bank.std(0, ddof=1)
    # It adds up the losses, and has no decay on the bias either.
    reference = LogisticRegression(C=1 / (400 * 1e-3), tol=1e-6, max_iter=1000).fit((bank - mean) / std, labels[:400])
    expected = float((reference.predict((test - mean) / std) == labels[400:]).mean())
    found = whole_run.classify(*(torch.from_numpy(part) for part in (bank, labels[:400], test, labels[400:])))
    assert 0.5 < expected < 0.99 and abs(found - expected) < 1e-6


def test_without_lightly_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="make bench-peers"):
        peers.measure(Options(1, 1, 0, None, None, tiny=True))


def test_bench_runs(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    tell = script("bench.py", "--only", "files,stages,loss", "--tiny", "--workers", "1", "--threads", "1", "--out", str(out))
    found = json.loads(out.read_text())
    assert found.keys() == {"machine", "options", "files", "stages", "loss"} and not failures(found), tell
    steps = found["files"]["steps, 100 x 75"]
    assert steps["relssl"]["images_per_second"][0] > 0
    assert steps["conventional, Pillow"]["times"]["conventional, Pillow"] == [1.0]


@pytest.mark.torture
def test_all_benchmarks_run(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    tell = script("bench.py", "--only", "small,growth", "--tiny", "--workers", "1", "--threads", "1", "--out", str(out))
    tell += script("gpu.py", "--rehearse", "--out", str(tmp_path))
    assert not failures(json.loads(out.read_text())), tell
    found = json.loads((tmp_path / "gpu-rehearsal.json").read_text())
    assert not failures(found) and found["run"]["cifar10"]["seconds"]["training"] > 0, tell
    assert "compile" in found["run"]["cifar10"]
    assert "convolution" in (tmp_path / "gpu-rehearsal-profile-after.txt").read_text()


def script(name: str, *arguments: str) -> str:
    """What a benchmark prints in one turn; its exit code must be 0."""
    words = [sys.executable, str(BENCHMARKS / name), "--rounds", "1", *arguments]
    ran = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


def failures(found: Any) -> list[str]:
    """What failed anywhere in a tree of results."""
    if not isinstance(found, dict):
        return []
    here = [str(found["failed"])] if "failed" in found else []
    return here + [failure for value in found.values() for failure in failures(value)]
