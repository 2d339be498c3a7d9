"""The benchmarks measure what they say, and run."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import evaluate
from contenders import Work, any_failed, compare, spread, times

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
    contenders = {
        "a": partial(noted, "a", log, 0.5),
        "raises": partial(failing, "no such thing"),
        "dies": partial(failing, "dies"),
    }
    records = compare(contenders | {"b": partial(noted, "b", log, 0.25)}, rounds=2, units=3)
    assert Path(log).read_text().split() == ["a1", "b1", "a3", "b3", "a3", "b3"] and torch.get_num_threads() == threads
    assert records["a"]["images_per_second"] == [20.0, 20.0] and records["a"]["seconds_per_unit"] == [0.5, 0.5]
    assert times(records, "b", "a") == [2.0, 2.0] and times(records, "raises", "a") is None
    assert records["raises"] == {"failed": "ValueError: no such thing"} and any_failed(records)
    assert records["dies"].keys() == {"failed"} and not any_failed(records["a"])
    assert records["a"]["images"] == 10 and records["a"]["facts"] == {"precision": "fp32"}
    assert 0 < records["a"]["memory_mib"][0] <= records["a"]["memory_mib"][1]
    assert spread([3.0, 1.0, 2.0], 1) == "2.0 [1.0..3.0]" and spread(None) == "-"


def test_knn_and_the_probe_label_as_scikit_learn_does() -> None:
    threads = torch.get_num_threads()
    for task, rivals in evaluate.TASKS.items():
        works = [evaluate.labelling(task, name, (300, 100, 8), threads, 1e-2) for name in rivals]
        for work in works:
            work.run(1)
        ours, theirs = (work.facts["top1"] for work in works)
        assert ours == pytest.approx(theirs) and 30 < ours < 100


def script(name: str, out: Path, *arguments: str) -> dict[str, Any]:
    """What a benchmark writes in one turn; its exit code must be 0, and nothing may fail."""
    words = [sys.executable, str(BENCHMARKS / name), "--rounds", "1", "--threads", "1", "--out", str(out), *arguments]
    ran = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stdout
    results: dict[str, Any] = json.loads(out.read_text())
    assert not any_failed(results), ran.stdout
    return results


@pytest.mark.torture
def test_every_script_runs(tmp_path: Path) -> None:
    """A whole run, a detector and the networks of the GPU's script: minutes."""
    out = tmp_path / "results.json"
    results = script("bench.py", out, "--only", "small,files,loss,networks", "--tiny", "--workers", "1")
    steps = results["files"]["steps, 100 x 75"]
    assert steps["relssl"]["images_per_second"][0] > 0
    assert steps["conventional, Pillow"]["times"]["conventional, Pillow"] == [1.0]
    for precision in ("fp32", "bf16"):
        ratios = results["small"]["records"][f"relssl {precision}"]["times"]
        assert ratios.keys() == {f"{base} {each}" for base in ("conventional", "floor") for each in ("fp32", "bf16")}
        assert all(ratios.values())
    assert results["loss"]["64x8 B16 V2"]["tiled"]["times"].keys() == {"conventional", "plain"}
    script("evaluate.py", out, "--only", "knn,probe,detection", "--tiny")
    script("gpu.py", out, "--tiny")


def test_everything_on_a_gpu_ends_at_the_limit(tmp_path: Path) -> None:
    words = [sys.executable, str(BENCHMARKS / "gpu.py"), "--tiny", "--limit", "0.01", "--out", str(tmp_path / "gpu.json")]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 1 and "limit" in ran.stdout
