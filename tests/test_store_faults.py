"""Saving under kills and full disks: the newest complete checkpoint loads, and nothing unfinished stays."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from relssl import files
from relssl.errors import StorageError
from relssl.weights import store


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = store.step_folder(tmp_path, 7)
    store.save(folder, {"a": torch.ones(5)}, {"step": 7})
    return folder


KILLS = r"""
import itertools, os, random, signal, sys, time
from pathlib import Path
import torch
from relssl import files
from relssl.weights import store

parent, kills = Path(sys.argv[1]), int(sys.argv[2])
draw = random.Random(0)

def work(fatal):
    calls = itertools.count()
    for name in ("write", "fsync", "rename", "mkdir", "open"):
        def wrapped(*args, call=getattr(os, name), **kwargs):
            if next(calls) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        setattr(os, name, wrapped)
    found = store.checkpoints(parent)
    step = int(found[-1].name[5:]) if found else 0
    while True:
        step += 1
        state = {"a": torch.full((30_000,), float(step)), "b": torch.tensor(step)}
        store.save(store.step_folder(parent, step), state, {"step": step})
        store.prune(parent, 2)
        os.write(pipe, b".")

finished = 0
for trial in range(kills + 40):
    read, pipe = os.pipe()
    child = os.fork()
    if not child:
        work(trial - kills if trial >= kills else -1)
    if trial < kills:
        os.read(read, 1)
        time.sleep(draw.random() * 0.02)
        os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    os.close(read), os.close(pipe)
    left = store.checkpoints(parent)
    if trial >= 1:
        tensors, meta = store.load(left[-1])
        assert meta["step"] == int(tensors["b"]) == int(left[-1].name[5:]) >= finished
        assert (tensors["a"] == meta["step"]).all()
        finished = meta["step"]
        for folder in left:
            store.verify(folder)
store.prune(parent, 2)
assert sorted(os.listdir(parent)) == [folder.name for folder in store.checkpoints(parent)]
print("survived", finished > 20)
"""


def test_the_newest_checkpoint_survives_every_kill(tmp_path: Path) -> None:
    """20 kills at random and one at each of the first 40 system calls of a save loop, in processes forked from one import."""
    source = Path(store.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", KILLS, str(tmp_path), "20"],
        env={**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "survived True\n", done.stderr


def _fail(monkeypatch: pytest.MonkeyPatch, name: str, at: int, code: int) -> None:
    original: Callable[..., Any] = getattr(os, name)
    calls = iter(range(10**6))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise OSError(code, os.strerror(code))
        return original(*args, **kwargs)

    monkeypatch.setattr(os, name, failing)


@pytest.mark.parametrize(
    ("name", "at", "code"),
    [
        *(("mkdir", 0, errno.EROFS), ("open", 0, errno.EIO), ("write", 0, errno.ENOSPC), ("write", 2, errno.EDQUOT)),
        *(("fsync", 1, errno.EIO), ("fsync", 3, errno.EIO), ("rename", 0, errno.EIO)),
    ],
)
def test_a_failed_save_leaves_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch, name: str, at: int, code: int) -> None:
    with monkeypatch.context() as patch:
        _fail(patch, name, at, code)
        with pytest.raises(StorageError, match=rf"step-00000008.*{os.strerror(code)}.*\d+ bytes needed, \d+ bytes free"):
            store.save(saved.with_name("step-00000008"), {"a": torch.ones(5), "b": torch.ones(9)}, {})
    assert _names(saved.parent) == [saved.name]
    store.verify(saved)


@pytest.mark.parametrize(("name", "at"), [("open", 0), ("write", 0), ("fsync", 0), ("replace", 0)])
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, at: int) -> None:
    path = tmp_path / "status.json"
    files.write_file(path, b"old")
    with monkeypatch.context() as patch:
        _fail(patch, name, at, errno.ENOSPC)
        with pytest.raises(StorageError, match=r"status\.json.*3 bytes needed, \d+ bytes free"):
            files.write_file(path, b"new")
    assert (_names(tmp_path), path.read_bytes()) == (["status.json"], b"old")


def test_a_size_limit_is_a_full_disk(saved: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"File too large.*free some space"):
            store.save(saved.with_name("step-00000008"), {"a": torch.zeros(50_000)}, {})
        with pytest.raises(StorageError, match="80000 bytes needed"):
            files.write_file(saved.parent / "big", bytes(80_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert _names(saved.parent) == [saved.name]


def test_a_vanished_folder_is_named(tmp_path: Path) -> None:
    for write in (lambda path: files.write_file(path, b""), lambda path: store.save(path, {}, {})):
        with pytest.raises(StorageError, match=r"gone/x.*No such file"):
            write(tmp_path / "gone" / "x")


def test_written_files_follow_the_umask_and_replace_links(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"safe")
    (tmp_path / "a").symlink_to(tmp_path / "victim")
    before = os.umask(0o027)
    try:
        files.write_file(tmp_path / "a", b"x" * 3)
    finally:
        os.umask(before)
    assert (tmp_path / "a").lstat().st_mode & 0o177777 == 0o100640
    assert (tmp_path / "victim").read_bytes() == b"safe"


def test_json_floats_are_exact_and_nan_is_null(tmp_path: Path) -> None:
    values = [0.1, 1e-320, 1.7976931348623157e308, -0.0, 2**200, "ü\udc80\n", True, None, {"1": ()}]
    files.write_json(tmp_path / "a.json", {"v": values, "t": torch.tensor(2), "n": [math.nan, -math.inf, torch.tensor(math.nan)]})
    read = json.loads((tmp_path / "a.json").read_bytes())
    assert read == {"v": [*values[:-1], {"1": []}], "t": 2, "n": [None, None, None]}
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "b.json", {"a": {1}})
    assert _names(tmp_path) == ["a.json"]


def test_writing_json_needs_no_torch() -> None:
    code = "import sys, relssl.weights.store, relssl.files; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(Path(store.__file__).parents[2])}, check=True)
