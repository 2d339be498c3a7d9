"""Two processes behave as one."""

import contextlib
import json
import os
import re
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

from relssl.engine import Engine
from relssl.errors import ConfigError, DistributedError
from relssl.method import Encoder, ReSSL
from relssl.settings.launcher import with_launch
from relssl.settings.reading import merge
from relssl.settings.run import resolve, to_yaml
from relssl.train.checkpoint import agreed_hashes
from relssl.weights import store
from small_runs import NORMLESS, SMALL, close_runs, equal_runs, repeatable_rows, small_run

SETTINGS = merge(SMALL, NORMLESS) | {"backbone_args": NORMLESS["backbone_args"]}


def start(folder: Path, settings: dict[str, Any], *command: str) -> subprocess.Popen[str]:
    file = folder.with_suffix(".yaml")
    file.write_text(to_yaml(resolve(merge(settings, {"out": str(folder), "engine": {"devices": 2}}))))
    words = [sys.executable, "-m", "relssl", *(command or ("pretrain", "--config", str(file)))]
    # A group of its own, so that a test can stop both ranks, and no rank outlives it.
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    try:
        output = process.communicate(timeout=240)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, output
    return output


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks, whose tests only read."""
    folder = tmp_path_factory.mktemp("ranks") / "two"
    output = finish(start(folder, merge(SETTINGS, {"checkpoint": {"every_steps": 7, "keep": 9}})))
    assert output.count("reading the images") == output.count("What the backbone learned") == 1  # one rank speaks,
    assert not re.search(r"Warning|\[W|[Ll]ightning|distributed", output), output  # and no library does
    return folder


def test_two_ranks_equal_one_process(two: Path, tmp_path: Path) -> None:
    small_run(tmp_path / "one", **NORMLESS)
    _, meta = store.load(store.checkpoints(two / "checkpoints")[-1])
    assert len(meta["hashes"]) == 2 and meta["hashes"][0] == meta["hashes"][1]
    assert meta["hashes"][0].keys() == {"student", "teacher", "memory"}
    assert close_runs(tmp_path / "one", two)
    for x, y in zip(repeatable_rows(tmp_path / "one"), repeatable_rows(two), strict=True):
        assert x["step"] == y["step"] and x.get("loss", 0) == pytest.approx(y.get("loss", 0), rel=1e-4)
        assert x.get("teacher_entropy", 0) == pytest.approx(y.get("teacher_entropy", 0), rel=1e-3)


@pytest.mark.torture
def test_two_ranks_resume_exactly(two: Path, tmp_path: Path) -> None:
    """Another launch of two ranks: torture."""
    cut = tmp_path / "cut"
    shutil.copytree(two, cut, ignore=shutil.ignore_patterns("export", "status.json", "step-00000020"))
    output = finish(start(cut, SETTINGS, "resume", str(cut), "--checkpoint", "step-00000014"))
    assert "going on exactly from step 14" in output
    assert equal_runs(two, cut)


@pytest.mark.torture
def test_sigterm_to_one_rank_stops_both(tmp_path: Path) -> None:
    """Two more launches of two ranks: torture."""
    settings = merge(SETTINGS, {"epochs": 50, "log": {"knn_every": 0}, "checkpoint": {"every_steps": 5}})
    cut = start(tmp_path / "cut", settings)
    while cut.poll() is None and not (tmp_path / "cut/checkpoints/step-00000005").exists():
        time.sleep(0.02)
    cut.terminate()  # reaches the first rank alone
    finish(cut, 143)
    assert json.loads((tmp_path / "cut/status.json").read_text())["exit_code"] == 143
    assert "step-00000005" <= store.checkpoints(tmp_path / "cut/checkpoints")[-1].name < "step-00000500"


@pytest.mark.torture
def test_a_rank_that_dies_ends_the_run_with_a_line_and_a_status(tmp_path: Path) -> None:
    """One more launch of two ranks: torture."""
    cut = start(tmp_path / "cut", merge(SETTINGS, {"epochs": 500, "log": {"knn_every": 0}, "checkpoint": {"every_steps": 5}}))
    while cut.poll() is None and not (tmp_path / "cut/checkpoints/step-00000005").exists():
        time.sleep(0.02)
    (other,) = family(cut, 1)
    other.kill()
    assert "relssl: " in finish(cut, 7)
    status = json.loads((tmp_path / "cut/status.json").read_text())
    assert (status["state"], status["exit_code"], status["error"]["kind"]) == ("failed", 7, "distributed")


def family(process: subprocess.Popen[str], count: int) -> list[psutil.Process]:
    """The processes below one that was started, once there are as many."""
    children: list[psutil.Process] = []
    while process.poll() is None and len(children) < count:
        time.sleep(0.05)
        with contextlib.suppress(psutil.Error):  # others come and go, such as git
            children = [each for each in psutil.Process(process.pid).children(recursive=True) if "-m" in each.cmdline()]
    return children


@pytest.mark.torture
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_named_and_ends_the_run(tmp_path: Path, rank: int) -> None:
    """The first rank is stopped while it evaluates, the other one while it trains; more launches of two ranks: torture."""
    knn = {"knn_every": 1, "knn_images": [1000, 700]} if rank == 0 else {"knn_every": 0}
    settings = merge(SETTINGS, {"epochs": 500, "log": knn, "checkpoint": {"every_steps": 5}, "engine": {"timeout": 30}})
    run = start(tmp_path / "run", settings)
    (other,) = family(run, 1)
    while run.poll() is None and not (tmp_path / ("run/config.yaml" if rank == 0 else "run/checkpoints/step-00000005")).exists():
        time.sleep(0.005)
    time.sleep(0.3)
    begun = time.monotonic()
    (psutil.Process(run.pid) if rank == 0 else other).suspend()
    try:
        while time.monotonic() - begun < 60 and (other.status() != psutil.STATUS_ZOMBIE if rank == 0 else run.poll() is None):
            time.sleep(0.1)  # a stopped parent cannot reap
        seconds = time.monotonic() - begun
    finally:
        os.killpg(run.pid, signal.SIGKILL)
    output = run.communicate()[0]
    assert seconds < 60
    assert re.search(rf"rank {rank} has died or hangs, last heard of at its step \d+; rank {1 - rank} is at step \d+", output), (
        output
    )
    print(f"rank {rank} hangs: the other ended after {seconds:.1f} s")


@pytest.mark.torture
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ranks_end_with_the_torchrun_that_started_them(tmp_path: Path, number: int) -> None:
    """Two launches by torchrun: torture."""
    file, folder = tmp_path / "run.yaml", tmp_path / "run"
    settings = merge(SETTINGS, {"epochs": 500, "out": str(folder), "log": {"knn_every": 0}, "checkpoint": {"every_steps": 5}})
    file.write_text(to_yaml(resolve(settings)))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "relssl", "pretrain"]
    agent = subprocess.Popen([*words, "--config", str(file)], start_new_session=True, stderr=subprocess.PIPE, text=True)
    ranks = family(agent, 2)
    while agent.poll() is None and not (folder / "checkpoints/step-00000005").exists():
        time.sleep(0.02)
    begun = time.monotonic()
    agent.send_signal(number)
    try:
        _, alive = psutil.wait_procs(ranks, timeout=15)
        print(f"{signal.Signals(number).name} to torchrun: ranks gone after {time.monotonic() - begun:.1f} s")
        assert not alive
    finally:
        if alive or agent.poll() is None:
            os.killpg(agent.pid, signal.SIGKILL)
    assert "a bug" not in (shown := agent.communicate()[1]), shown
    status = json.loads((folder / "status.json").read_text())
    assert status["exit_code"] == (7 if number == signal.SIGKILL else 143)
    store.verify(folder / "checkpoints" / status["last_checkpoint"])


@pytest.mark.torture
def test_ranks_wait_longer_than_the_timeout_for_a_first_one_that_works(tmp_path: Path) -> None:
    """One more launch of two ranks: torture."""
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import relssl
from relssl.settings.reading import merge
from relssl.settings.run import resolve
from test_ranks import SETTINGS

class Slow:
    def on_start(self, run):
        time.sleep(40)

settings = merge(SETTINGS, {{"max_steps": 2, "out": "run", "log": {{"knn_every": 0}}, "engine": {{"devices": 2, "timeout": 30}}}})
relssl.pretrain(settings=resolve(settings), hooks=[Slow()])
"""
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(Path(__file__).parent)]))
    }
    ran = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "complete"


@pytest.mark.torture
def test_a_run_of_one_process_goes_on_with_two_and_back(tmp_path: Path) -> None:
    """The same samples in the same order: batch norm alone makes a difference, and this network has none; two launches: torture."""
    whole = small_run(tmp_path / "whole", **NORMLESS, checkpoint={"every_steps": 5, "keep": 9}).folder
    cut = tmp_path / "cut"
    shutil.copytree(
        whole, cut, ignore=shutil.ignore_patterns("export", "status.json", "step-00000010", "step-00000015", "step-00000020")
    )
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "relssl",
        "resume",
        str(cut),
    ]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0 and "world 1 -> 2" in ran.stderr, ran.stderr
    assert close_runs(whole, cut)


@pytest.mark.torture
def test_ranks_read_the_shrunk_images_that_the_first_one_writes(tmp_path: Path) -> None:
    """One more launch of two ranks: torture."""
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 50, 3), dtype=np.uint8)
    for number, each in enumerate(pixels):
        Image.fromarray(each).save(tmp_path / f"images/{number:02}.png")
    loader = {"workers": 0, "cache": 32, "cache_folder": str(tmp_path / "kept")}
    settings = SETTINGS | {"data": str(tmp_path / "images"), "recipe": "digits", "batch_size": 8, "epochs": 1, "loader": loader}
    output = finish(start(tmp_path / "two", settings))
    assert output.count("shrinking to 32 pixels") == 4 and output.count("cache: 24 images in") == 1, output
    small_run(tmp_path / "one", **settings)
    assert len(list((tmp_path / "kept").iterdir())) == 1
    assert close_runs(tmp_path / "one", tmp_path / "two")


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}
TORCHRUN |= {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
# What a batch script of SLURM finds, and what a step of srun does besides.
BATCH = {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"}
STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[07-08]"}


@pytest.mark.parametrize(
    ("variables", "processes"),
    [
        ({}, (1, 1)),
        (TORCHRUN, (2, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, (1, 2)),  # a pod each
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE: is set without RANK"),
        ({"RANK": "1"}, "RANK: is set without WORLD_SIZE"),
        ({"WORLD_SIZE": "1"}, (1, 1)),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "WORLD_SIZE: "),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "0"}, "torchrun: "),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "torchrun: .*MASTER_PORT 99999"),
        (BATCH, (1, 1)),
        (BATCH | STEP, (2, 2)),
        (BATCH | STEP | {"SLURM_PTY_PORT": "1"}, (1, 1)),  # a shell in a step
        ({"RANK": "0", "WORLD_SIZE": "abc", "MASTER_ADDR": "a"}, "WORLD_SIZE: "),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "torchrun: "),
        (TORCHRUN | {"RANK": "4"}, "torchrun: "),
        (BATCH | STEP | {"SLURM_STEP_NUM_TASKS": "5"}, "srun: "),
    ],
)
def test_a_launchers_processes_are_counted_and_others_variables_are_not(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], processes: tuple[int, int] | str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = resolve({"batch_size": 64})
    if isinstance(processes, str):
        with pytest.raises(ConfigError, match=processes):
            with_launch(config)
    else:
        engine = with_launch(config).engine
        assert (engine.devices, engine.nodes) == processes


def test_settings_that_no_launcher_meets_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"engine\.nodes: .*torchrun"):
        with_launch(resolve({"engine.nodes": 2}))
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"engine\.devices: .*2.*4"):
        with_launch(resolve({"engine.devices": 2}))
    assert with_launch(resolve({"engine.devices": 2}), resumed=True).engine.nodes == 2


def test_processes_that_do_not_meet_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (TORCHRUN | {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DistributedError, match=r"did not meet at 127\.0\.0\.1:1"):
        Engine(with_launch(resolve({"engine.device": "cpu", "engine.timeout": 0.5})).engine)


def test_a_notebook_cannot_start_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(ConfigError, match=r"engine\.devices: .*notebook"):
        Engine(resolve({"engine.devices": 2, "engine.device": "cpu"}).engine)


def test_ranks_that_drifted_apart_are_not_saved() -> None:
    class TwoRanks(Engine):
        """An engine whose other rank has another memory."""

        def __init__(self) -> None:
            self.rank, self.world = 0, 2

        def gather_items(self, items: list[Any]) -> list[Any]:
            return [*items, items[0] | {"memory": "another"}]

    model = ReSSL(Encoder(torch.nn.Flatten(), 12, projector_hidden=8, dim=4), memory_size=16, dim=4)
    with pytest.raises(DistributedError, match="the ranks' memory differ"):
        agreed_hashes(model, TwoRanks())
