"""The benchmarks measure what they say, and run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import evaluate
from contenders import Contender, Work, any_failed, compare, spread, times

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def noted(name: str, log: str, seconds: float) -> Work:
    """Writes into a file when its turn is, and how long that took; sets what must not reach another contender."""

    def run(count: int) -> float:
        with Path(log).open("a") as file:
            file.write(f"{name}{count} ")
        return count * seconds

    torch.set_num_threads(3)
    return Work(run, images=10, facts={"precision": "fp32"})


def failing(how: str) -> Work:
    def run(count: int) -> None:
        if how == "dies":
            os._exit(3)
        raise ValueError(how)

    return Work(run, images=1)


def test_contenders_take_turns_and_a_failing_one_leaves_the_others_alone(tmp_path: Path) -> None:
    log, threads = str(tmp_path / "log"), torch.get_num_threads()
    contenders = [
        Contender("a", noted, {"name": "a", "log": log, "seconds": 0.5}),
        Contender("raises", failing, {"how": "no such thing"}),
        Contender("dies", failing, {"how": "dies"}),
        Contender("b", noted, {"name": "b", "log": log, "seconds": 0.25}),
    ]
    records = compare(contenders, rounds=2, units=3)
    assert Path(log).read_text().split() == ["a1", "b1", "a3", "b3", "a3", "b3"] and torch.get_num_threads() == threads
    assert records["a"]["images_per_second"] == [20.0, 20.0] and records["a"]["seconds_per_unit"] == [0.5, 0.5]
    assert times(records, "b", "a") == [2.0, 2.0] and times(records, "raises", "a") is None
    assert records["raises"] == {"failed": "ValueError: no such thing"} and any_failed(records)
    assert records["dies"].keys() == {"failed"} and not any_failed(records["a"])
    assert records["a"]["images"] == 10 and records["a"]["facts"] == {"precision": "fp32"}
    assert 0 < records["a"]["memory_mib"][0] <= records["a"]["memory_mib"][1]
    assert spread([3.0, 1.0, 2.0], 1) == "2.0 [1.0..3.0]" and spread(None) == "-"


def test_knn_and_the_probe_label_as_scikit_learn_does(tmp_path: Path) -> None:
    threads, files = torch.get_num_threads(), (tmp_path / "bank.npz", tmp_path / "test.npz")
    bank, labels, test, truth = evaluate.blobs(300, 100, 8)
    np.savez(files[0], features=bank, labels=labels)
    np.savez(files[1], features=test, labels=truth)
    for task, source, strength in (("knn", (300, 100, 8), None), ("probe", files, 1e-2)):
        ours, theirs = (evaluate.labelling(task, name, source, threads, strength) for name in ("relssl", "scikit-learn"))
        for work in (ours, theirs):
            work.run(1)
        assert ours.facts["top1"] == theirs.facts["top1"] and 30 < ours.facts["top1"] < 100


def script(name: str, *arguments: str) -> str:
    """What a benchmark prints in one turn; its exit code must be 0."""
    words = [sys.executable, str(BENCHMARKS / name), "--rounds", "1", *arguments]
    ran = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


@pytest.mark.torture
def test_bench_runs(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    script("bench.py", "--only", "small,files,loss", "--tiny", "--workers", "1", "--threads", "1", "--out", str(out))
    results: dict[str, Any] = json.loads(out.read_text())
    steps = results["files"]["steps, 100 x 75"]
    assert steps["relssl"]["images_per_second"][0] > 0
    assert steps["conventional, Pillow"]["times"]["conventional, Pillow"] == [1.0]
    for precision in ("fp32", "bf16"):
        ratios = results["small"]["records"][f"relssl {precision}"]["times"]
        assert ratios.keys() == {f"{base} {each}" for base in ("conventional", "floor") for each in ("fp32", "bf16")}
        assert all(ratios.values())
    assert results["loss"]["64x8 B16 V2"]["tiled"]["times"].keys() == {"conventional", "plain"}


def test_everything_on_a_gpu_ends_at_the_limit(tmp_path: Path) -> None:
    words = [sys.executable, str(BENCHMARKS / "gpu.py"), "--rehearse", "--limit", "0.01", "--out", str(tmp_path / "gpu.json")]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 1 and "limit" in ran.stdout


@pytest.mark.torture
def test_the_other_scripts_run(tmp_path: Path) -> None:
    """A whole run, a detector and the networks of the GPU's script: minutes."""
    import relssl

    run = relssl.pretrain("digits", out=tmp_path / "run", quiet=True, max_images=64, epochs=1, batch_size=16)
    assert run is not None
    for name, arguments in (
        ("evaluate.py", ["--only", "knn,probe,detection", "--run", str(run.folder), "--tiny", "--threads", "1"]),
        ("gpu.py", ["--rehearse"]),
        ("studies.py", ["growth", "--tiny", "--threads", "1"]),
        ("studies.py", ["networks", "--networks", "test_resnet", "--size", "64", "--batch", "2", "--threads", "1"]),
    ):
        out = tmp_path / f"{time.monotonic_ns()}.json"
        printed = script(name, *arguments, "--out", str(out))
        assert not any_failed(json.loads(out.read_text())), printed
