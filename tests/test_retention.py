"""Which folders count as checkpoints, which are deleted, and what is never touched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relssl import files
from relssl.errors import StorageError
from relssl.weights import store


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = store.step_folder(tmp_path_factory.mktemp("template"), 7)
    store.save(folder, {"a": torch.ones(3)}, {"step": 7})
    return folder


def test_look_alikes_are_neither_listed_nor_removed(template: Path, tmp_path: Path) -> None:
    look_alikes = ("step-10.tmp", "step_00000010", "step-0000010", ".step-00000010", "step-0000001x", "step-" + "\u0661" * 8)
    for name in (*look_alikes, "step-123456789", "step-00000003"):
        shutil.copytree(template, tmp_path / name)
    (tmp_path / "step-00000011").symlink_to(template)
    (tmp_path / "step-00000012").touch()
    (tmp_path / "step-00000013").mkdir()
    assert [path.name for path in store.checkpoints(tmp_path)] == ["step-00000003", "step-123456789"]
    assert store.checkpoints(tmp_path / "nowhere") == []
    for name in ("", "step-00000011", look_alikes[0]):
        with pytest.raises(ValueError, match="not a checkpoint"):
            store.remove(tmp_path / name)
    with pytest.raises(StorageError, match="step-00000014"):
        store.remove(tmp_path / "step-00000014")
    with pytest.raises(ValueError, match="at least 2"):
        store.prune(tmp_path, 1)


def test_sweep_takes_only_what_dead_processes_left(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    token = "0" * 8
    dead = [f".relssl-{gone.pid}-{token}-{token}.tmp", f".relssl-{os.getpid()}-{token}-{token}.tmp"]  # ours before a restart
    others = [
        files.temporary(tmp_path).name, f".relssl-{os.getppid()}-{token}-{token}.tmp", f".relssl-{gone.pid}-{token}.tmp",
        ".mine.tmp", f".relssl-9999999999-{token}-{token}.tmp", "a.json",
    ]  # fmt: skip
    for name in dead + others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    link = f".relssl-{gone.pid}-{token}-{'2' * 8}.tmp"
    (tmp_path / f".relssl-{gone.pid}-{token}-{'1' * 8}.tmp").touch()
    (tmp_path / link).symlink_to(tmp_path)
    files.sweep(tmp_path)
    assert _names(tmp_path) == sorted([*others, link])


def _make(folder: Path, kind: str, template: Path) -> None:
    shutil.copytree(template, folder)
    if kind == "changed":
        (folder / "state.json").write_bytes((folder / "state.json").read_bytes() + b" ")
    elif kind == "cut":
        (folder / "state.safetensors").write_bytes(b"")
    elif kind == "incomplete":
        (folder / "SHA256SUMS").unlink()
    elif kind == "visited":
        (folder / "notes.txt").write_text("mine")


KINDS = st.sampled_from(["good", "good", "good", "changed", "cut", "incomplete", "visited"])


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.integers(0, 10**9), KINDS, max_size=9), st.integers(2, 4), st.data())
def test_retention_over_random_folders(template: Path, kinds: dict[int, str], keep: int, data: st.DataObject) -> None:
    steps = sorted(kinds)
    safe = data.draw(st.lists(st.sampled_from(steps), max_size=2)) if steps else []
    with tempfile.TemporaryDirectory() as name:
        parent = Path(name)
        for step in steps:
            _make(store.step_folder(parent, step), kinds[step], template)
        (parent / "notes").mkdir()
        (parent / "step-1.tmp").touch()
        deleted = store.prune(parent, keep, [store.step_folder(parent, step) for step in safe])
        good = [step for step in steps if kinds[step] in ("good", "visited")]
        oldest = good[-keep] if len(good) >= keep else -1
        gone = [step for step in steps if step < oldest and step not in safe and kinds[step] != "incomplete"]
        assert deleted == [store.step_folder(parent, step) for step in gone]
        # What is not ours stays, in the folder of a checkpoint that goes as well.
        left = {store.step_folder(parent, step).name for step in steps if step not in gone or kinds[step] == "visited"}
        assert set(_names(parent)) == left | {"notes", "step-1.tmp"}
        assert all((store.step_folder(parent, step) / "notes.txt").exists() for step in steps if kinds[step] == "visited")
        listed = [step for step in steps if step not in gone and kinds[step] != "incomplete"]
        assert store.checkpoints(parent) == [store.step_folder(parent, step) for step in listed]
        assert store.prune(parent, keep, [store.step_folder(parent, step).name for step in safe]) == []
