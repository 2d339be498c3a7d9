"""The examples run as they are written, on little data."""

from __future__ import annotations

import json
import os
import re
import runpy
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import relssl
import relssl.train.pretrain
from relssl.data.named import load
from small_runs import close_runs

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
FEW = {"NUMBA_DISABLE_JIT": "1"}  # to compile UMAP takes 10 s, which few images do not earn


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of programs that the scripts call: `relssl`, and stand-ins for SLURM's."""
    folder = tmp_path_factory.mktemp("programs")
    relssl = f'exec "{sys.executable}" -m relssl "$@"'
    torchrun = f'exec "{sys.executable}" -m torch.distributed.run "$@"'
    srun = """
    export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=$SLURM_NTASKS SLURM_STEP_NUM_NODES=1 SLURM_STEP_NODELIST=localhost
    pids=() code=0
    while [[ $1 == --* ]]; do shift; done
    for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
        SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 "$@" & pids+=($!)
    done
    until [ -s run/metrics.jsonl ]; do sleep 0.1; done
    kill -USR1 "${pids[@]}"
    for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
    exit $code"""
    for name, body in {"relssl": relssl, "torchrun": torchrun, "srun": srun, "scontrol": 'echo "scontrol $*"'}.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    return folder


def run(cwd: Path, *words: str, programs: Path | None = None, **environment: str) -> str:
    """What a command prints, notes included; it must not fail."""
    path = f"{programs}:{os.environ['PATH']}" if programs else os.environ["PATH"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    env = inherited | {"PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1", "PATH": path, **environment}
    ran = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def example(cwd: Path, name: str, words: str, **environment: str) -> str:
    """What an example prints, run with these words."""
    return run(cwd, sys.executable, str(EXAMPLES / f"{name}.py"), *words.split(), **environment)


def inside(monkeypatch: pytest.MonkeyPatch, name: str, *words: str, **few: Any) -> None:
    """Run an example in this process, with few images measured while it trains; test_report writes pages."""
    few |= {"log.knn_images": (100, 100), "threads": 1}

    def pretrain(*args: Any, **settings: Any) -> Any:
        return relssl.train.pretrain.pretrain(*args, **settings, **few)

    monkeypatch.setattr(relssl, "pretrain", pretrain, raising=False)
    monkeypatch.setattr(relssl, "write_report", lambda run: None, raising=False)
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def state(folder: Path) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return answer


def photos(folder: Path, split: str, count: int) -> Path:
    """A folder of digits as files, CLASS/NUMBER.png."""
    images = load("digits", None, split)
    assert images.labels is not None
    for number in range(0, len(images), len(images) // count)[:count]:
        pixels = images.source.tensor[number].permute(1, 2, 0).numpy()
        place = folder / str(images.labels[number])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


def test_own_photos(tmp_path: Path) -> None:
    photos(tmp_path / "photos", "train", 24)
    words = "photos --image_size 32 --epochs 1 --backbone resnet10t --out run"
    shown = example(tmp_path, "own_photos", words, **FEW)
    assert re.search(r"^-?[01]\.\d+ +\S+\.png +\S+\.png$", shown, re.MULTILINE)
    with np.load(tmp_path / "run/features.npz") as stored:
        assert stored["features"].shape == (24, 512)
    with Image.open(tmp_path / "run/alike.jpg") as sheet:
        assert sheet.width > sheet.height / 8 * 6


def test_finetune_and_deploy(source: Path, tmp_path: Path) -> None:
    for part, split, count in (("train", "train", 60), ("val", "test", 20)):
        photos(tmp_path / "labelled" / part, split, count)
    shown = example(tmp_path, "finetune_and_deploy", f"{source} labelled --epochs 1 --batch_size 16")
    assert "agree on 20 of 20 images" in shown
    assert {path.suffix for path in (tmp_path / "model").iterdir()} == {".safetensors", ".yaml", ".md", ".csv", ".onnx"}


def test_compare_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few = partial(relssl.evaluate, images=(200, 100))
    monkeypatch.setattr(relssl, "evaluate", few, raising=False)
    words = f"--methods ressl,moco --seeds 1 --epochs 1 --max_images 128 --out {tmp_path}/runs"
    inside(monkeypatch, "compare_methods", *words.split())
    shown = capsys.readouterr().out
    assert re.search(r"^ressl +\d+\.\d \+- \d\.\d +\d+\.\d \+- \d\.\d$", shown, re.MULTILINE)
    assert re.search(r"^moco +[+-]\d+\.\d \[[+-]\d+\.\d\.\.[+-]\d+\.\d\]$", shown, re.MULTILINE)


LINES = {"own_module": "features [2, 32]", "own_view": "loss ", "own_dataset": "features [1, 512]", "own_method": "loss 0."}


@pytest.mark.parametrize(("name", "line"), [*LINES.items(), ("hook", "best kNN ")])
def test_parts_of_ones_own(
    name: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inside(monkeypatch, name, str(tmp_path / "run"))
    assert line in capsys.readouterr().out and state(tmp_path / "run")["state"] == "complete"


TINY = ("--device", "cpu", "--max_images", "256", "--log.knn_every", "0", "--log.report", "false")


def test_a_table_of_the_datasets_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets", reason="pip install 'relssl[hf]'")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "kept")
    few = {"log.report": False, "backbone": "resnet10t", "loader.workers": 0}
    inside(monkeypatch, "hf_folder", "--epochs", "1", "--out", str(tmp_path / "runs/hf"), **few)
    assert re.search(r"^kNN of the test split: \d+\.\d %$", capsys.readouterr().out, re.MULTILINE)


def test_neighbours_of_a_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(source), "digits", str(tmp_path / "picture.png"), "--rows", "3", "--neighbours", "5", "--side", "20"]
    inside(monkeypatch, "neighbours", *words)
    assert re.search(r"^of the 5 nearest, \d+\.\d% are of the same class$", capsys.readouterr().out, re.MULTILINE)
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (6 * 24 + 8, 3 * 24)


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path / "photos", "train", 24)
    monkeypatch.chdir(tmp_path)
    words = "photos packed --each 10 --image_size 32 --epochs 1 --backbone resnet10t --out run"
    inside(monkeypatch, "shards", *words.split(), **{"log.report": False})
    assert len(list((tmp_path / "packed").glob("*.tar"))) == 3 and state(tmp_path / "run")["state"] == "complete"
    assert len(load(f"shards:{tmp_path}/packed/train-{{00000..00002}}.tar", None, "train")) == 24


@pytest.mark.torture
def test_two_nodes_equal_one_process(tmp_path: Path, programs: Path) -> None:
    """Two agents of torchrun, a process each, which meet on the loopback."""
    more = "--epochs 1 --backbone convnext_atto --encoder.projector_norm none --precision fp32"
    words = ("digits", *TINY, *more.split())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"

    def node(number: int) -> str:
        command = (str(EXAMPLES / "torchrun.sh"), *words, "--out", str(tmp_path / "two"))
        return run(tmp_path, *command, programs=programs, NODES="2", PROCESSES="1", HOST=host, GLOO_SOCKET_IFNAME="lo")

    with ThreadPoolExecutor() as both:
        shown = "".join(both.map(node, range(2)))
    assert "2 ranks" in shown
    run(tmp_path, sys.executable, "-m", "relssl", "pretrain", *words, "--out", "one")
    assert close_runs(tmp_path / "one", tmp_path / "two")


@pytest.mark.torture
def test_torchrun_starts_two_processes(tmp_path: Path, programs: Path) -> None:
    shown = run(tmp_path, str(EXAMPLES / "torchrun.sh"), "digits", *TINY, "--epochs", "1", "--out", "run", programs=programs)
    assert "2 ranks" in shown and state(tmp_path / "run")["state"] == "complete"


def test_a_slurm_job_stops_in_time_asks_for_its_place_in_the_queue_and_goes_on(tmp_path: Path, programs: Path) -> None:
    job = {"JOB_ID": "4711", "JOB_NAME": "relssl", "NNODES": "1", "JOB_NUM_NODES": "1", "NODELIST": "localhost"}
    job |= {"JOB_NODELIST": "localhost", "NTASKS": "2", "NTASKS_PER_NODE": "2"}
    environment = {f"SLURM_{name}": value for name, value in job.items()}
    words = ("bash", str(EXAMPLES / "slurm.sbatch"), "digits", "run", *TINY, "--epochs", "1000", "--log.every", "1")
    shown = run(tmp_path, *words, programs=programs, **environment)
    assert "2 ranks" in shown and "scontrol requeue 4711" in shown
    assert state(tmp_path / "run")["exit_code"] == 75
