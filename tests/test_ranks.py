"""Two processes behave as one. Launches beyond the one that all tests here share are torture."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image

from relssl.data.loader import worker_count
from relssl.engine import Engine, cores_each
from relssl.errors import ConfigError, DataError, DistributedError
from relssl.files import read_json
from relssl.method import Encoder, ReSSL
from relssl.settings.launcher import with_launch
from relssl.settings.reading import nest
from relssl.settings.run import resolve, to_yaml
from relssl.train.checkpoint import agreed_hashes
from relssl.weights import store
from small_runs import NORMLESS, SMALL, close_runs, cut, equal_runs, merge, repeatable_rows, small_run

SETTINGS = merge(SMALL, NORMLESS) | {"backbone_args": NORMLESS["backbone_args"], "max_images": 128}
ENDLESS = {"epochs": 500, "log": {"knn_every": 0}, "checkpoint": {"every_steps": 5}}
RELSSL = [sys.executable, "-m", "relssl"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "relssl"]


def config_file(folder: Path, *more: dict[str, Any]) -> str:
    settings = SETTINGS | {"out": str(folder)}
    for each in more:
        settings = merge(settings, each)
    file = folder.with_suffix(".yaml")
    file.write_text(to_yaml(resolve(settings)))
    return str(file)


def start(*words: str) -> subprocess.Popen[str]:
    # A group of its own, so that a test can stop both ranks, and no rank outlives it.
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def start_two(folder: Path, *more: dict[str, Any]) -> subprocess.Popen[str]:
    return start(*RELSSL, "pretrain", "--config", config_file(folder, {"engine": {"devices": 2}}, *more))


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    try:
        output = process.communicate(timeout=240)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, output
    return output


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not path.exists():
        time.sleep(0.005)


def family(process: subprocess.Popen[str], count: int) -> list[psutil.Process]:
    """The processes below one that was started, once there are as many."""
    children: list[psutil.Process] = []
    while process.poll() is None and len(children) < count:
        time.sleep(0.05)
        with contextlib.suppress(psutil.Error):  # others come and go, such as git
            children = [each for each in psutil.Process(process.pid).children(recursive=True) if "-m" in each.cmdline()]
    return children


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks, whose tests only read."""
    folder = tmp_path_factory.mktemp("ranks") / "two"
    output = finish(start_two(folder, {"checkpoint": {"every_steps": 3, "keep": 9}}))
    assert output.count("reading the images") == output.count("What the backbone learned") == 1  # one rank speaks,
    assert not re.search(r"Warning|\[W|[Ll]ightning|distributed", output), output  # and no library does
    return folder


def test_two_ranks_equal_one_process(two: Path, tmp_path: Path) -> None:
    small_run(tmp_path / "one", **SETTINGS)
    _, meta = store.load(store.checkpoints(two / "checkpoints")[-1])
    assert len(meta["hashes"]) == 2 and meta["hashes"][0] == meta["hashes"][1]
    assert meta["hashes"][0].keys() == {"student", "teacher", "memory"}
    assert close_runs(tmp_path / "one", two)
    for x, y in zip(repeatable_rows(tmp_path / "one"), repeatable_rows(two), strict=True):
        assert x["step"] == y["step"] and x.get("loss", 0) == pytest.approx(y.get("loss", 0), rel=1e-4)
        assert x.get("teacher_entropy", 0) == pytest.approx(y.get("teacher_entropy", 0), rel=1e-3)


@pytest.mark.torture
def test_two_ranks_train_a_network_with_a_part_that_nothing_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = "torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2), torch.nn.ReLU())"
    (tmp_path / "spare_of_a_test.py").write_text(
        f"import torch\ndef net():\n    net = {layers}\n    net[0].fc = torch.nn.Linear(8, 5)\n    return net\n"
    )
    monkeypatch.chdir(tmp_path)
    own = {"backbone": "spare_of_a_test:net", "epochs": 1}
    settings = {name: value for name, value in SETTINGS.items() if name != "backbone_args"} | {
        "out": "run",
        "engine": {"devices": 2, "device": "cpu"},
    }
    (tmp_path / "run.yaml").write_text(to_yaml(resolve(merge(settings, own))))
    finish(start(*RELSSL, "pretrain", "--config", "run.yaml"))


@pytest.mark.torture
def test_two_ranks_resume_exactly(two: Path, tmp_path: Path) -> None:
    folder = cut(two, tmp_path / "cut", 3)
    assert "going on exactly from step 3" in finish(start(*RELSSL, "resume", str(folder)))
    assert equal_runs(two, folder)


@pytest.mark.torture
def test_two_ranks_with_given_weights_and_a_frozen_teacher_behave_as_one(source: Path, tmp_path: Path) -> None:
    weights = small_run(tmp_path / "weights", **NORMLESS, epochs=1).folder
    given = {"recipe": "distil", "start": str(weights), "teacher": str(source), "optimizer.heads_first": 0.5}
    given |= {"encoder.frozen_stages": 1, "engine.precision": "fp32"}
    settings = {name: value for name, value in SMALL.items() if name != "backbone_args"}
    settings = merge(settings | {"encoder": {"projector_hidden": 32, "projector_norm": "none"}}, nest(given))
    for devices in ("1", "2"):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(settings))))
        words = ["--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / devices), "--engine.devices", devices]
        finish(start(*RELSSL, "pretrain", *words))
    assert close_runs(tmp_path / "1", tmp_path / "2")


@pytest.mark.torture
def test_sigterm_to_one_rank_stops_both(tmp_path: Path) -> None:
    run = start_two(tmp_path / "run", ENDLESS)
    wait_for(tmp_path / "run/checkpoints/step-00000005", run)
    run.terminate()  # reaches the first rank alone
    finish(run, 143)
    assert read_json(tmp_path / "run/status.json")["exit_code"] == 143
    assert "step-00000005" <= store.checkpoints(tmp_path / "run/checkpoints")[-1].name < "step-00000500"


@pytest.mark.torture
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_that_dies_ends_the_run_with_a_line_and_a_status(tmp_path: Path, ranks: int) -> None:
    run = start_two(tmp_path / "run", ENDLESS, {"engine": {"devices": ranks}})
    others = family(run, ranks - 1)
    wait_for(tmp_path / "run/checkpoints/step-00000005", run)
    begun = time.monotonic()
    others[-1].kill()
    assert "relssl: " in finish(run, 7) and psutil.wait_procs(others, timeout=10)[1] == []
    print(f"one of {ranks} ranks dies: the others ended after {time.monotonic() - begun:.1f} s")
    status = read_json(tmp_path / "run/status.json")
    assert (status["state"], status["exit_code"], status["error"]["kind"]) == ("failed", 7, "distributed")


@pytest.mark.torture
@pytest.mark.parametrize(("rank", "ranks"), [(0, 2), (1, 2), (3, 4)])
def test_a_rank_that_hangs_is_named_and_ends_the_run(tmp_path: Path, rank: int, ranks: int) -> None:
    """The first rank is stopped while it evaluates, the last one while it trains."""
    knn = {"knn_every": 1, "knn_images": [1000, 700]} if rank == 0 else {"knn_every": 0}
    run = start_two(tmp_path / "run", ENDLESS, {"log": knn, "engine": {"timeout": 120, "devices": ranks}})
    other = family(run, ranks - 1)[-1]
    wait_for(tmp_path / ("run/config.yaml" if rank == 0 else "run/checkpoints/step-00000005"), run)
    time.sleep(0.3)
    begun = time.monotonic()
    (psutil.Process(run.pid) if rank == 0 else other).suspend()
    try:
        while time.monotonic() - begun < 60 and (other.status() != psutil.STATUS_ZOMBIE if rank == 0 else run.poll() is None):
            time.sleep(0.1)  # a stopped parent cannot reap
        seconds = time.monotonic() - begun
    finally:
        os.killpg(run.pid, signal.SIGKILL)
    output, died = run.communicate()[0], rf"rank {rank} has died or hangs, last heard of at its step \d+"
    assert seconds < 60 and re.search(rf"{died}; rank {0 if rank else 1} is at step \d+", output), output
    print(f"rank {rank} of {ranks} hangs: the others ended after {seconds:.1f} s")


@pytest.mark.torture
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ranks_end_with_the_torchrun_that_started_them(tmp_path: Path, number: int) -> None:
    folder = tmp_path / "run"
    agent = start(*TORCHRUN, "pretrain", "--config", config_file(folder, ENDLESS))
    ranks = family(agent, 2)
    wait_for(folder / "checkpoints/step-00000005", agent)
    begun = time.monotonic()
    agent.send_signal(number)
    try:
        _, alive = psutil.wait_procs(ranks, timeout=15)
        print(f"{signal.Signals(number).name} to torchrun: ranks gone after {time.monotonic() - begun:.1f} s")
        assert not alive
    finally:
        if alive or agent.poll() is None:
            os.killpg(agent.pid, signal.SIGKILL)
    assert "a bug" not in (shown := agent.communicate()[0]), shown
    status = read_json(folder / "status.json")
    assert status["exit_code"] == (7 if number == signal.SIGKILL else 143)
    store.verify(folder / "checkpoints" / status["last_checkpoint"])


@pytest.mark.torture
def test_a_rank_that_waits_for_others_ends_with_what_started_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    launch = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = [f"{name}={value}" for name, value in launch.items()] + ["TORCHELASTIC_RUN_ID=x", *RELSSL, "pretrain", "--config"]
    command = shlex.join(["env", *words, config_file(tmp_path / "run", {"engine": {"devices": 2}})])
    shell = start("bash", "-c", f"{command} & wait")  # which stands for torchrun
    (rank,) = family(shell, 1)
    while rank.is_running() and not any(each.status == "LISTEN" for each in rank.net_connections()):
        time.sleep(0.05)  # until it waits for the other one
    shell.kill()
    try:
        assert psutil.wait_procs([rank], timeout=15)[1] == []
        assert "the process that started this one has died" in shell.communicate()[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)


SLOW = """
import sys, time
import relssl

class Slow:
    def on_start(self, run):
        time.sleep(40)

relssl.pretrain(config=sys.argv[1], hooks=[Slow()])
"""


@pytest.mark.torture
def test_ranks_wait_longer_than_the_timeout_for_a_first_one_that_works(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SLOW)
    more = {"max_steps": 2, "log": {"knn_every": 0}, "engine": {"devices": 2, "timeout": 30}}
    finish(start(sys.executable, str(tmp_path / "script.py"), config_file(tmp_path / "run", more)))
    assert read_json(tmp_path / "run/status.json")["state"] == "complete"


@pytest.mark.torture
def test_a_run_goes_on_with_other_numbers_of_processes(tmp_path: Path) -> None:
    """The same samples in the same order: batch norm alone makes a difference, and this network has none."""
    whole = small_run(tmp_path / "whole", **NORMLESS, checkpoint={"every_steps": 5, "keep": 9}).folder
    folder = cut(whole, tmp_path / "cut", 5)
    for before, ranks in ((1, 2), (2, 4), (4, 1)):
        words = ["resume", str(folder), "--engine.devices", str(ranks), "--time_limit", "0.000001"]
        assert f"world {before} -> {ranks}" in finish(start(*RELSSL, *words), 75)
    assert "world 1 -> 2" in finish(start(*TORCHRUN, "resume", str(folder), "--engine.devices", "2"))
    assert close_runs(whole, folder)


@pytest.mark.torture
def test_torchrun_restarts_what_was_killed(two: Path, tmp_path: Path) -> None:
    folder, words = tmp_path / "run", [*TORCHRUN[:4], "--max-restarts=3", *TORCHRUN[4:], "pretrain", "--resume", "auto"]
    agent = start(*words, "--config", config_file(folder, {"checkpoint": {"every_steps": 1, "keep": 9}}))
    for mark in ("config.yaml", "checkpoints/step-00000003"):
        ranks = family(agent, 2)
        wait_for(folder / mark, agent)
        with contextlib.suppress(psutil.NoSuchProcess):
            ranks[1].kill()
        psutil.wait_procs(ranks, timeout=60)
    finish(agent)
    assert "going on exactly from step" in (folder / "run.log").read_text() and equal_runs(two, folder)


@pytest.mark.torture
def test_an_alarm_stops_all_ranks(tmp_path: Path) -> None:
    uniform = {
        "epochs": 8,
        "method": {"teacher_temperature": 10.0, "allow_unsharpened": True},
        "log": {"knn_every": 0, "alarms": "stop"},
    }
    assert "uniform-teacher" in finish(start_two(tmp_path / "run", uniform), 6)
    status = read_json(tmp_path / "run/status.json")
    assert status["exit_code"] == 6 and status["last_checkpoint"] == f"step-{status['step']:08d}"


POISONED = """
import sys
sys.path.insert(0, sys.argv[2])
import relssl
from relssl.train import loop
from small_runs import differing, training_state

def poisoned(run, parts):
    bad, before = run.state.step % 2, training_state(run)
    if bad and run.engine.rank == run.state.step // 2 % 2:
        parts[0].strong[0][0, 0, 0, 0] = float("nan")
    figures = train_step(run, parts)
    assert bool(differing(before, training_state(run)) == []) == bool(bad) if run.state.step > 1 else not bad
    return figures

train_step, loop.train_step = loop.train_step, poisoned
relssl.pretrain(config=sys.argv[1])
"""


@pytest.mark.torture
def test_a_bad_step_of_one_rank_leaves_no_trace_on_any(tmp_path: Path) -> None:
    """NaN in an image of the first or the second rank, in every other one of 40 steps; ranks are compared at each save."""
    (tmp_path / "script.py").write_text(POISONED)
    file = config_file(tmp_path / "run", {"epochs": 10, "engine": {"devices": 2}, "checkpoint": {"every_steps": 1}})
    finish(start(sys.executable, str(tmp_path / "script.py"), file, str(Path(__file__).parent)))
    assert read_json(tmp_path / "run/status.json")["state"] == "complete"


@pytest.mark.torture
def test_ranks_read_the_shrunk_images_that_the_first_one_writes(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 50, 3), dtype=np.uint8)
    for number, each in enumerate(pixels):
        Image.fromarray(each).save(tmp_path / f"images/{number:02}.png")
    loader = {"workers": 0, "cache": 32, "cache_folder": str(tmp_path / "kept")}
    settings = {"data": str(tmp_path / "images"), "recipe": "digits", "batch_size": 8, "epochs": 1, "loader": loader}
    output = finish(start_two(tmp_path / "two", settings))
    assert output.count("shrinking to 32 pixels") == 4 and output.count("cache: 24 images in") == 1, output
    small_run(tmp_path / "one", **SETTINGS | settings)
    assert len(list((tmp_path / "kept").iterdir())) == 1
    assert close_runs(tmp_path / "one", tmp_path / "two")


LAUNCH = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}
LAUNCH |= {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
# What a batch script of SLURM finds, and what a step of srun does besides.
BATCH = {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"}
STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[07-08]"}


@pytest.mark.parametrize(
    ("variables", "processes"),
    [
        ({}, (1, 1)),
        (LAUNCH, (2, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, (1, 2)),  # a pod each
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE: is set without RANK"),
        ({"RANK": "1"}, "RANK: is set without WORLD_SIZE"),
        ({"WORLD_SIZE": "1"}, (1, 1)),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "WORLD_SIZE: "),
        (LAUNCH | {"LOCAL_WORLD_SIZE": "0"}, "torchrun: "),
        (LAUNCH | {"MASTER_PORT": "99999"}, "torchrun: .*MASTER_PORT 99999"),
        (BATCH, (1, 1)),
        (BATCH | STEP, (2, 2)),
        (BATCH | STEP | {"SLURM_PTY_PORT": "1"}, (1, 1)),  # a shell in a step
        ({"RANK": "0", "WORLD_SIZE": "abc", "MASTER_ADDR": "a"}, "WORLD_SIZE: "),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "torchrun: "),
        (LAUNCH | {"RANK": "4"}, "torchrun: "),
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
    for name, value in LAUNCH.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"engine\.devices: .*2.*4"):
        with_launch(resolve({"engine.devices": 2}))
    assert with_launch(resolve({"engine.devices": 2}), resumed=True).engine.nodes == 2
    for name, value in (LAUNCH | {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DistributedError, match=r"did not meet at 127\.0\.0\.1:1"):
        Engine(with_launch(resolve({"engine.device": "cpu", "engine.timeout": 0.5})).engine)


def test_a_notebook_cannot_start_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(ConfigError, match=r"engine\.devices: .*notebook"):
        Engine(resolve({"engine.devices": 2, "engine.device": "cpu"}).engine)


def test_ranks_of_other_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ("0" * 16, 319)
    monkeypatch.setattr(Engine, "gather_items", lambda engine, items: [*items, other] if isinstance(items[0], tuple) else items)
    with pytest.raises(DataError, match=r"not all ranks have the same images \(320 on rank 0, 319 on rank 1\)"):
        small_run(tmp_path / "run")


def test_cores_are_shared_out_but_those_that_srun_has_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relssl.engine.available_cores", lambda: 8)
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    assert [cores_each(processes) for processes in (1, 4, 16)] == [8, 2, 1] and worker_count(None, 4) == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    for allocated, each in {"32": 8, "8": 2}.items():  # bound to its own eight, or all share these
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", allocated)
        assert cores_each(4) == each and worker_count(None, 4) == each - 1 and cores_each(2) == 4  # two share a task


def test_runs_of_other_numbers_of_processes_need_a_script_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELSSL_LAUNCHER", str(os.getppid()))
    with pytest.raises(ConfigError, match=r"engine\.devices: .* need a script each"):
        small_run(tmp_path / "run")


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
