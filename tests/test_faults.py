"""What goes wrong around a run, brought about from outside: signals, damaged files, numbers that overflow."""

import errno
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
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
from bad_images import CONTENTS, NAMES, jpeg
from relssl import cli
from relssl.data.decode import BadImage
from relssl.data.plain import PlainView
from relssl.engine import Engine
from relssl.errors import (
    STOPPING,
    CheckpointError,
    ConfigError,
    DataError,
    DistributedError,
    Interrupted,
    LockedError,
    NumericError,
    RelsslError,
    StorageError,
)
from relssl.files import plain, read_rows
from relssl.settings.reading import leaves, nest
from relssl.settings.run import Config, resolve, to_yaml
from relssl.train import checkpoint
from relssl.train.checkpoint import State
from relssl.train.loop import origin, train_step
from relssl.train.online import Online
from relssl.train.run_folder import Hooks, RunFolder, refuse_used
from relssl.weights import store
from small_runs import SMALL, equal_runs, merge, ready_run, small_run

CODES: dict[type[RelsslError], int] = {ConfigError: 2, DataError: 3, CheckpointError: 4, StorageError: 5, NumericError: 6}
CODES |= {DistributedError: 7, LockedError: 8, Interrupted: 130}
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


FILES: dict[str, Any] = {"recipe": "digits", "max_images": "null", "batch_size": 8, "epochs": 1000, "loader": {"workers": 2}}
FILES |= {"views": {"weak": {"name": "weak", "size": 32}, "strong": {"name": "contrastive", "size": 32}}}
FILES |= {"method": {"memory_size": 16}, "log": {"knn_every": 0, "every": 1}}


def pictures(folder: Path) -> str:
    """Write 40 images."""
    folder.mkdir(exist_ok=True)
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (40, 40, 48, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return str(folder)


def begin(folder: Path, **overrides: Any) -> subprocess.Popen[str]:
    """Start a run on files with two loader workers in a process group of its own."""
    settings = FILES | {"data": pictures(folder.parent / "images"), "out": str(folder)}
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


# Sessions forked from one process that has imported all: a second each, of which half is the run.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "psutil", "sklearn.datasets", "timm", "lightning.fabric", "relssl.train.pretrain"])


def session(folder: Path, largest: int = -1, settings: dict[str, Any] | None = None) -> None:
    """Begin a run or go on with it, where no file can be of more bytes than `largest`; end with its exit code."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    try:
        relssl.resume(folder, quiet=True) if (folder / "config.yaml").exists() else small_run(folder, **settings or {})
    except RelsslError as error:
        os._exit(error.exit_code)


@pytest.mark.torture
def test_kills_at_random_moments_of_twenty_runs(tmp_path: Path) -> None:
    """T3, T4 and T7: each of 20 runs is killed up to ten times, and ends as one that nobody disturbed, bit for bit."""
    settings, draw, kills, losses = {"epochs": 8, "checkpoint": {"every_steps": 3}}, random.Random(0), 0, [0]
    whole, start = small_run(tmp_path / "whole", **settings).folder, time.monotonic()
    for run in range(20):
        for attempt in range(11):
            process = FORKS.Process(target=session, args=(tmp_path / str(run), -1, settings))
            process.start()
            process.join(draw.uniform(0, 3) if attempt < 10 else None)
            if process.exitcode is None:
                kills += 1
                process.kill()
                process.join()
                saved = max((int(path.name[5:]) for path in store.checkpoints(tmp_path / str(run) / "checkpoints")), default=0)
                losses += [row["step"] - saved for row in read_rows(tmp_path / str(run) / "metrics.jsonl")]
            else:
                assert process.exitcode == 0
        assert equal_runs(whole, tmp_path / str(run))
    print(f"{kills} kills, at most {max(losses)} logged steps lost, 20 of 20 runs equal, {time.monotonic() - start:.0f} s")


@pytest.mark.torture
def test_a_full_disk_at_fifty_sizes(finished: Path, cut: Path) -> None:
    """T16: no file can be larger than so many bytes, down to a row of metrics.jsonl; the last checkpoint stays good."""
    whole = (cut / "checkpoints/step-00000010/state.safetensors").stat().st_size
    for largest in [100, 1000, *np.linspace(2000, whole - 1, 48, dtype=int).tolist()]:
        process = FORKS.Process(target=session, args=(cut, largest))
        process.start()
        process.join()
        assert process.exitcode == StorageError.exit_code
        if largest > 2000:  # else it cannot be written either
            assert "bytes needed" in json.loads((cut / "status.json").read_text())["error"]["message"]
        assert [path.name for path in store.checkpoints(cut / "checkpoints")] == ["step-00000005", "step-00000010"]
        store.verify(cut / "checkpoints/step-00000010")
        assert list(cut.rglob(".relssl-*")) == []
    relssl.resume(cut, quiet=True)
    assert equal_runs(finished, cut)


def save_for_ever(folder: Path) -> None:
    """Save 16 MB after 16 MB, of which two are kept."""
    newest = max((int(path.name[5:]) for path in store.checkpoints(folder)), default=0)
    for step in itertools.count(newest + 1):
        store.save(store.step_folder(folder, step), {"a": torch.full((4_000_000,), float(step))}, {"step": step})
        store.prune(folder, 2)


@pytest.mark.torture
def test_two_hundred_kills_of_a_loop_that_saves(tmp_path: Path) -> None:
    """T1: at random moments; the newest checkpoint is whole each time, and none is lost."""
    draw, newest = random.Random(1), 0
    for _ in range(200):
        process = FORKS.Process(target=save_for_ever, args=(tmp_path,))
        process.start()
        process.join(draw.uniform(0.1, 0.7))
        process.kill()
        process.join()
        for path in store.checkpoints(tmp_path):
            tensors, facts = store.load(path)
            assert (tensors["a"] == facts["step"]).all()
        before, newest = newest, facts["step"] if store.checkpoints(tmp_path) else 0
        assert newest >= before
    print(f"200 kills, {newest} checkpoints, none lost")
    assert newest > 100


def save_and_prune(folder: Path, stop: bool = True) -> None:
    """Save a third checkpoint and remove the first, once whoever stopped this process lets it go on."""
    if stop:
        save_and_prune(folder / "warm", False)  # all that is imported at the first save
        os.kill(os.getpid(), signal.SIGSTOP)
    folder.mkdir(exist_ok=True)
    try:
        for step in [3] if stop else [1, 2, 3]:
            store.save(store.step_folder(folder, step), {"a": torch.full((1000,), float(step))}, {"step": step})
        store.prune(folder, 2)
    except (StorageError, OSError):  # of which a run makes one of the other kind
        os._exit(StorageError.exit_code)


@pytest.mark.torture
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("fault", ["signal=SIGKILL", "error=ENOSPC", "error=EIO", "error=EDQUOT"])
def test_a_fault_at_every_system_call_of_a_save(tmp_path: Path, fault: str) -> None:
    """T2: brought about by strace, at each call that makes, writes, syncs, renames or removes, in its turn."""
    points, log = 0, tmp_path / "log"
    for call in ("mkdir", "openat", "write", "fsync", "rename", "unlinkat", "rmdir"):
        for number in range(1, 100):
            folder = tmp_path / f"{call}-{number}"
            folder.mkdir()
            for step in (1, 2):
                store.save(store.step_folder(folder, step), {"a": torch.full((1000,), float(step))}, {"step": step})
            process = FORKS.Process(target=save_and_prune, args=(folder,))
            process.start()
            status = Path(f"/proc/{process.pid}/status")
            while "T (stopped)" not in status.read_text():
                time.sleep(0.002)
            words = ["strace", "-qq", "-o", str(log), "-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={number}"]
            with subprocess.Popen([*words, "-p", str(process.pid)]):
                while "TracerPid:\t0\n" in status.read_text():
                    time.sleep(0.002)
                os.kill(process.pid, signal.SIGCONT)
                process.join()
            assert process.exitcode in (0, -signal.SIGKILL if "KILL" in fault else StorageError.exit_code), (call, number)
            good = [store.load(path)[1]["step"] for path in store.checkpoints(folder)]
            assert good in ([1, 2], [1, 2, 3], [2, 3]), (call, number, good)
            assert (
                "KILL" in fault or list(folder.glob(".relssl-*")) == [] or good == [2, 3]
            )  # what is half removed goes next time
            store.prune(folder, 2)
            assert sorted(os.listdir(folder)) in (
                ["step-00000001", "step-00000002", "warm"],
                ["step-00000002", "step-00000003", "warm"],
            )
            if process.exitcode == 0 and "INJECTED" not in log.read_text():
                break
            points += 1
    print(f"{fault}: {points} points, none lost a checkpoint")
    assert points > 15


@pytest.mark.torture
@pytest.mark.parametrize("source", ["memory", "files", "files, 2 workers"])
def test_a_chain_of_twenty_sessions(finished: Path, tmp_path: Path, source: str) -> None:
    """T6: a run that is stopped after each of its steps, the first, the last but one and ends of epochs among them."""
    settings = {}
    if source != "memory":
        settings = FILES | {"data": pictures(tmp_path / "images"), "epochs": 4, "loader": {"workers": 2 * ("2" in source)}}
        finished = small_run(tmp_path / "whole", **settings).folder
    with pytest.raises(Interrupted):
        small_run(tmp_path / "cut", **settings, time_limit=1e-6)
    for _ in range(18):
        with pytest.raises(Interrupted):
            relssl.resume(tmp_path / "cut", quiet=True, time_limit=1e-6)
    relssl.resume(tmp_path / "cut", quiet=True, time_limit=math.inf)
    assert equal_runs(finished, tmp_path / "cut")


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
        Interrupted, match=f"by SIGTERM after step {step}" if step else "before its first step; go on with `relssl resume"
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
        if key in ("hashes", "neighbours", "unmeasured", "settings"):  # for other tools, or newer than the first checkpoints
            with pytest.raises(Interrupted, match="saved"):
                relssl.resume(shutil.copytree(cut, cut.with_name(key)), quiet=True, time_limit=1e-9)
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


@pytest.mark.torture
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 2)])
def test_a_folder_of_every_kind_of_image_and_name(tmp_path: Path, ranks: int, workers: int) -> None:
    """T10 and T22: what is broken is listed with its reason, all else trained on, and nothing of a name reaches a terminal or a page."""
    folder = os.fsencode(pictures(tmp_path / "images"))
    for kind, (_, extension, make) in CONTENTS.items():
        (tmp_path / f"images/{kind}.{extension}").write_bytes(make())
    for name in NAMES.values():
        os.makedirs(os.path.dirname(folder + b"/" + name), exist_ok=True)
        with open(folder + b"/" + name, "wb") as file:
            file.write(jpeg())
    bad = {kind for kind, (expected, *_) in CONTENTS.items() if expected == "skip"}
    more = {
        "epochs": 6,
        "loader": {"workers": workers, "max_bad_fraction": 1},
        "engine": {"devices": ranks},
        "log": {"report": True},
    }
    run = begin(tmp_path / "run", **more)
    output = run.communicate(timeout=400)[0]
    assert run.returncode == 0, output
    listed = read_rows(tmp_path / "run/bad_samples.jsonl")
    assert {Path(row["file"]).stem for row in listed} == bad and len(listed) == len(bad) and all(row["reason"] for row in listed)
    for text in [output, *(path.read_text() for path in (tmp_path / "run").iterdir() if path.is_file())]:
        assert "\x1b" not in text and "<script>alert" not in text


@pytest.mark.torture
def test_two_thousand_files_of_random_settings(tmp_path: Path) -> None:
    """T12: each is refused by name in lines that can be read, or taken; nothing else happens."""
    names, draw, refused, longest = [*leaves(Config), "nonsense", "optimizer", "views.strong.x"], random.Random(0), 0, 0.0
    values = [
        None,
        True,
        "",
        "x",
        "nan",
        -1,
        0,
        1,
        10**9,
        10**400,
        1e-300,
        math.inf,
        [],
        [1],
        {},
        {"a": 1},
        "٣",
        "1e3",
        "a\x1b[31m",
        "x" * 9999,
    ]
    for _ in range(2000):
        settings = nest({name: draw.choice(values) for name in sorted(draw.sample(names, 3))})
        (tmp_path / "run.yaml").write_text(json.dumps(settings))
        begun = time.process_time()
        try:
            resolve({}, tmp_path / "run.yaml")
        except ConfigError as error:
            refused += 1
            assert all(": " in line and len(plain(line)) < 610 for line in error.faults), error
        longest = max(longest, time.process_time() - begun)
    print(f"{refused} of 2000 refused, the slowest took {longest:.2f} s")
    assert refused > 1000 and longest < 2


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


def test_a_run_goes_on_from_what_another_process_saved_until_it_let_go(
    finished: Path, cut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(RunFolder):
        def __init__(self, path: Path, hooks: Hooks) -> None:
            shutil.copytree(finished / "checkpoints/step-00000015", path / "checkpoints/step-00000015")
            super().__init__(path, hooks)

    monkeypatch.setattr("relssl.train.pretrain.RunFolder", Late)
    lines: list[str] = []
    monkeypatch.setattr("relssl.train.console.Display.say", lambda display, line: lines.append(line))
    relssl.resume(cut, quiet=True)
    assert "going on exactly from step 15" in lines and equal_runs(finished, cut)


def test_a_folder_without_locks_is_used_with_a_word(cut: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("relssl.train.run_folder.fcntl.flock", flock)
    relssl.resume(cut, quiet=True)
    assert "cannot be locked (No locks available)" in (cut / "run.log").read_text() and equal_runs(finished, cut)


def test_settings_edited_in_their_file_are_named(cut: Path) -> None:
    config = (cut / "config.yaml").read_text()
    (cut / "config.yaml").write_text(config.replace("seed: 0", "seed: 7"))
    with pytest.raises(Interrupted):
        relssl.resume(cut, quiet=True, time_limit=1e-9)
    assert "not bit for bit (seed 0 -> 7, in config.yaml" in (cut / "run.log").read_text()


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("odd"), 1, "a bug: ValueError: odd"),
        (PermissionError(13, "Permission denied", "/root/x"), 5, "/root/x: cannot be read or written"),
        (OSError(28, "No space left on device"), 5, "output: cannot be read or written"),
        (KeyboardInterrupt(), 130, "interrupted"),
        *((kind("odd"), code, "relssl: odd") for kind, code in CODES.items()),
    ],
)
def test_exit_codes_are_those_of_the_contract(
    error: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setitem(cli._COMMANDS, "recipes", fail)
    assert cli.main(["recipes"]) == code and words in capsys.readouterr().err


def test_a_command_to_paste_is_quoted(tmp_path: Path) -> None:
    (folder := tmp_path / "my runs").mkdir()
    (folder / "config.yaml").touch()
    with pytest.raises(ConfigError, match=re.escape(f"`relssl resume '{folder}'`")):
        refuse_used(folder)


def test_a_narrow_image_costs_no_gigabytes() -> None:
    view = PlainView(224, 1.14, "bicubic", (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(BadImage, match="has 1 x 20000 pixels, too narrow"):
        view.pixels(Image.new("RGB", (20_000, 1)))
    with pytest.raises(BadImage, match="too narrow"):
        view.pixels(np.zeros((4, 20_000, 1), np.uint8))
    assert view.pixels(Image.new("RGB", (4000, 40))).shape == (3, 224, 224)
