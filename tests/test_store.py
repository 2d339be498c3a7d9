"""Checkpoints that survive bit rot, crafted files, kills and full disks, and state dicts taken apart and put together again."""

import errno
import hashlib
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from relssl import files
from relssl.errors import CheckpointError, StorageError
from relssl.weights import store

FILES = ("state.safetensors", "state.json", "SHA256SUMS")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tensors() -> dict[str, Tensor]:
    base = torch.arange(24, dtype=torch.float32)
    return {
        "layer.weight": base.view(4, 6).t(),  # not contiguous
        "shared": base[2:9],
        "tied": base,
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 5),
        "half": torch.linspace(-1, 1, 7).bfloat16(),
        "flags": torch.tensor([True, False, True]),
        "grad": torch.nn.Parameter(torch.linspace(0, 1, 3, dtype=torch.float64)),
        "größe\n\0": torch.tensor([float("nan"), -0.0, math.inf], dtype=torch.float16),
        "words": torch.tensor([2**63], dtype=torch.uint64),
    }


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    plain = tensor.detach().contiguous()
    return tensor.dtype, tensor.shape, plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def seal(folder: Path) -> None:
    """Make sizes and hashes right again, in the layout of SHA256SUMS, as whoever crafts a checkpoint would."""
    data = {name: (folder / name).read_bytes() for name in FILES[:2]}
    lines = [f"# {len(content)} {name}\n" for name, content in data.items()]
    lines += [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in data.items()]
    (folder / "SHA256SUMS").write_text("".join(lines))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = store.step_folder(tmp_path, 7)
    store.save(folder, tensors(), {"step": 7, "lr": 0.1 + 0.2})
    return folder


def test_round_trip_is_exact(saved: Path) -> None:
    loaded, meta = store.load(saved)
    assert loaded.keys() == tensors().keys() and all(bits(loaded[name]) == bits(value) for name, value in tensors().items())
    assert meta == {"step": 7, "lr": 0.1 + 0.2} and names(saved) == sorted(FILES)
    (saved / FILES[0]).write_bytes(b"")  # loaded tensors outlive the file
    assert loaded["tied"].sum() == 276
    store.save(saved.with_name("empty"), {}, {})
    assert store.load(saved.with_name("empty")) == ({}, {})


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_reads_the_hashes(saved: Path) -> None:
    result = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=saved, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["state.safetensors: OK", "state.json: OK"]


def test_what_cannot_be_stored_is_named_and_nothing_is_replaced(tmp_path: Path) -> None:
    odd = {
        "udc80": {"a\udc80": torch.zeros(1)},
        "'m'": {"m": torch.zeros(1, device="meta")},
        "'s'": {"s": torch.eye(2).to_sparse()},
    }
    for named, state in odd.items():
        with pytest.raises(ValueError, match=named):
            store.save(tmp_path / "a", state, {})
    assert not names(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "link"):
        with pytest.raises(StorageError, match="exists already"):
            store.save(tmp_path / name, {}, {})
    assert names(tmp_path) == ["folder", "link"]


def test_every_flipped_bit_and_every_cut_is_found(saved: Path) -> None:
    draw = random.Random(0)
    for trial in range(60):
        path = saved / FILES[trial % 3]
        good = path.read_bytes()
        place = draw.randrange(len(good)) if trial > 2 else 0
        for bad in (good[:place], good[:place] + bytes([good[place] ^ 1 << draw.randrange(8)]) + good[place + 1 :]):
            path.write_bytes(bad)
            with pytest.raises(CheckpointError, match=f"{saved}: "):
                store.load(saved)
        path.write_bytes(good)
    store.verify(saved)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_linked_or_odd_file_is_named(saved: Path, name: str) -> None:
    (saved / name).rename(saved / "away")
    for put in (lambda path: None, lambda path: path.symlink_to("away"), os.mkfifo):
        (saved / name).unlink(missing_ok=True)
        put(saved / name)
        with pytest.raises(CheckpointError, match=name):
            store.load(saved)
        assert store.checkpoints(saved.parent) == [saved] and not store.is_whole(saved)
    with pytest.raises(CheckpointError, match="gone"):
        store.load(saved / "gone")


METAS = {
    "empty": b"", "list": b"[]", "null": b"null", "no meta": b'{"version": 1}', "version": b'{"version": "1", "meta": {}}',
    "old": b'{"version": 0, "meta": {}}', "deep": b"[" * 200_000, "bytes": b"\xff\xfe\0", "newer": b'{"version": 3, "meta": {}}',
    "nan": b'{"version": 1, "meta": {"a": NaN}}', "true": b'{"version": true, "meta": {}}',
    "digits": b'{"version": 1, "meta": {"a": ' + b"9" * 9999 + b"}}", "more than 64 MiB": b'{"a": "' + b" " * (64 << 20) + b'"}',
}  # fmt: skip


def crafted(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


TENSORS = {
    "empty": b"", "short": b"\1\2", "claims 2^63": crafted(b"{}", length=2**63), "claims 99 MB": crafted(b"{}", length=99 << 20),
    "claims more": crafted(b"{}", length=100), "not json": crafted(b"garbage!"), "not utf-8": crafted(b'{"\xff": 1}'),
    "deep": crafted(b'{"a":' * 50_000), "list": crafted(b"[]"), "negative": crafted({"a": entry(offsets=(-4, 0))}, bytes(4)),
    "beyond": crafted({"a": entry(shape=(10**6,), offsets=(0, 4 * 10**6))}, bytes(4)),
    "overlap": crafted({"a": entry(), "b": entry(shape=(2,), offsets=(0, 8))}, bytes(8)),
    "hole": crafted({"a": entry(offsets=(4, 8))}, bytes(8)), "left over": crafted({"a": entry()}, bytes(99)),
    "shape": crafted({"a": entry(shape=(2**62, 2**62))}, bytes(4)), "overflow": crafted({"a": entry(shape=(2**63, 2))}, bytes(4)),
    "dtype": crafted({"a": entry("OBJECT")}, bytes(4)), "type": crafted({"a": 3}, bytes(4)),
    "zero fits": crafted({"a": entry(shape=(0, 2**64 - 1), offsets=(0, 0))}), "pickle": b"\x80\x04cos\nsystem\n(S'touch x'\ntR.",
}  # fmt: skip


@pytest.mark.parametrize(("name", "content"), [*(("state.json", x) for x in METAS), *(("state.safetensors", x) for x in TENSORS)])
def test_crafted_files_are_refused(saved: Path, name: str, content: str) -> None:
    (saved / name).write_bytes((METAS if name == "state.json" else TENSORS)[content])
    seal(saved)
    with pytest.raises(CheckpointError, match=name):
        store.load(saved)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_garbage_raises_nothing_else(data: bytes, framed: bool) -> None:
    with tempfile.TemporaryDirectory() as parent:
        file = Path(parent) / "a.safetensors"
        file.write_bytes(crafted(data) if framed else data)
        with pytest.raises(CheckpointError):
            store.read(file)


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5),
    st.sampled_from(["$tensor", "__metadata__"]), st.builds(lambda n: torch.arange(n), st.integers(0, 3)),
)  # fmt: skip
ODD_KEYS = st.sampled_from(["$tensor", "$dict", "a.b", "__metadata__", "0"])
KEYS = st.one_of(st.text(max_size=3), st.integers(-3, 3), st.none(), ODD_KEYS)
TREES = st.recursive(
    LEAVES, lambda t: st.one_of(st.lists(t, max_size=3), st.dictionaries(KEYS, t, max_size=3), st.tuples(t, t)), max_leaves=12
)


def equal(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (dict, list, tuple)):
        values = not isinstance(a, dict) or all(map(equal, a.values(), b.values()))
        return len(a) == len(b) and all(map(equal, a, b)) and values
    return bool(a == b) and (not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b))


@settings(max_examples=100, deadline=None)
@given(TREES)
def test_flatten_round_trip_is_exact(state: Any) -> None:
    flat, rest = store.flatten(state)
    assert equal(store.unflatten(flat, json.loads(json.dumps(rest, allow_nan=False))), state)
    assert "__metadata__" not in flat


@pytest.mark.parametrize(
    "rest", [{"$tensor": "gone"}, {"$tensor": []}, {"$dict": 3}, {"$dict": [[[], 1]]}, {"$float": "x"}, {"$tuple": 1}]
)
def test_a_malformed_rest_is_refused(rest: Any) -> None:
    with pytest.raises(CheckpointError):
        store.unflatten({}, rest)


def test_what_cannot_be_flattened_is_named() -> None:
    with pytest.raises(TypeError, match=r"state\.3: a set"):
        store.flatten({"state": {3: {1}}})


KILLS = r"""
import itertools, os, signal, sys
from pathlib import Path
import safetensors.torch, torch
from relssl.weights import store

parent = Path(sys.argv[1])

def work(step, fatal):
    calls = itertools.count()
    for name in ("write", "fsync", "rename", "mkdir", "open"):
        def wrapped(*args, call=getattr(os, name), **kwargs):
            if next(calls) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        setattr(os, name, wrapped)
    for step in itertools.count(step):
        store.save(store.step_folder(parent, step), {"a": torch.full((30_000,), float(step))}, {"step": step})
        store.prune(parent, 2)

newest = 0
for fatal in range(36):
    child = os.fork()
    if not child:
        work(newest + 1, fatal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    for folder in store.checkpoints(parent):
        tensors, meta = store.load(folder)
        assert (tensors["a"] == meta["step"]).all() and int(folder.name[5:]) == meta["step"]
    assert not newest or meta["step"] >= newest
    newest = meta["step"] if store.checkpoints(parent) else 0
store.prune(parent, 2)
assert sorted(os.listdir(parent)) == [folder.name for folder in store.checkpoints(parent)]
print("survived", newest > 10)
"""


def test_the_newest_checkpoint_survives_every_kill(tmp_path: Path) -> None:
    """One at each of the first 36 system calls of a loop that saves, in processes forked from one import."""
    result = subprocess.run([sys.executable, "-W", "error", "-c", KILLS, str(tmp_path)], capture_output=True, text=True)
    assert result.stdout == "survived True\n", result.stderr


def fail(monkeypatch: pytest.MonkeyPatch, name: str, at: int, code: int) -> None:
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
        fail(patch, name, at, code)
        with pytest.raises(StorageError, match=rf"step-00000008.*{os.strerror(code)}.*\d+ bytes needed, \d+ bytes free"):
            store.save(saved.with_name("step-00000008"), {"a": torch.ones(5)}, {})
    assert names(saved.parent) == [saved.name]
    store.verify(saved)


@pytest.mark.parametrize("name", ["open", "write", "fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tmp_path / "status.json"
    files.write_file(path, b"old")
    with monkeypatch.context() as patch:
        fail(patch, name, 0, errno.ENOSPC)
        with pytest.raises(StorageError, match=r"status\.json.*3 bytes needed, \d+ bytes free"):
            files.write_file(path, b"new")
    assert (names(tmp_path), path.read_bytes()) == (["status.json"], b"old")


def test_written_files_follow_the_umask_replace_links_and_name_a_vanished_folder(tmp_path: Path) -> None:
    for write in (lambda path: files.write_file(path, b""), lambda path: store.save(path, {}, {})):
        with pytest.raises(StorageError, match=r"gone/x.*No such file"):
            write(tmp_path / "gone" / "x")
    (tmp_path / "victim").write_bytes(b"safe")
    (tmp_path / "a").symlink_to(tmp_path / "victim")
    before = os.umask(0o027)
    try:
        files.write_file(tmp_path / "a", b"x" * 3)
    finally:
        os.umask(before)
    assert (tmp_path / "a").lstat().st_mode & 0o177777 == 0o100640 and (tmp_path / "victim").read_bytes() == b"safe"


@pytest.mark.parametrize("length", [int.from_bytes(b" <"), 0x3C20, 0x3C])  # each begins as a web page may
def test_a_header_of_any_length_is_read(length: int, tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, separators=(",", ":")).ljust(length)
    (path := tmp_path / "weights.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"abcd")
    assert bytes(store.read(path)["a"].tolist()) == b"abcd"


def test_json_floats_are_exact_and_nan_is_null(tmp_path: Path) -> None:
    values = [0.1, 1e-320, 1.7976931348623157e308, -0.0, 2**200, "ü\udc80\n", True, None, {"1": ()}]
    files.write_json(tmp_path / "a.json", {"v": values, "t": torch.tensor(2), "n": [math.nan, -math.inf, torch.tensor(math.nan)]})
    read = json.loads((tmp_path / "a.json").read_bytes())
    assert read == {"v": [*values[:-1], {"1": []}], "t": 2, "n": [None, None, None]}
    with pytest.raises(AttributeError):
        files.write_json(tmp_path / "b.json", {"a": {1}})
    assert names(tmp_path) == ["a.json"]


# Which folders count as checkpoints, which are deleted, and what is never touched


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
    assert [path.name for path in store.checkpoints(tmp_path)] == ["step-00000003", "step-00000013", "step-123456789"]
    assert store.checkpoints(tmp_path / "nowhere") == []
    for name in ("", "step-00000011", look_alikes[0]):
        with pytest.raises(ValueError, match="not a checkpoint"):
            store.remove(tmp_path / name)
    with pytest.raises(StorageError, match="step-00000014"):
        store.remove(tmp_path / "step-00000014")
    with pytest.raises(ValueError, match="at least 2"):
        store.prune(tmp_path, 1)


def test_sweep_takes_only_what_dead_processes_left(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
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
    assert names(tmp_path) == sorted([*others, link])


SPOIL: dict[str, Callable[[Path], object]] = {
    "good": lambda folder: None,
    "changed": lambda folder: (folder / "state.json").write_bytes((folder / "state.json").read_bytes() + b" "),
    "cut": lambda folder: (folder / "state.safetensors").write_bytes(b""),
    "incomplete": lambda folder: (folder / "SHA256SUMS").unlink(),
    "visited": lambda folder: (folder / "notes.txt").write_text("mine"),
}
KINDS = st.sampled_from(["good", "good", *SPOIL])


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.integers(0, 10**9), KINDS, max_size=9), st.integers(2, 4), st.data())
def test_retention_over_random_folders(template: Path, kinds: dict[int, str], keep: int, data: st.DataObject) -> None:
    steps = sorted(kinds)
    safe = data.draw(st.lists(st.sampled_from(steps), max_size=2)) if steps else []
    with tempfile.TemporaryDirectory() as name:
        parent = Path(name)
        folders = {step: store.step_folder(parent, step) for step in steps}
        for step, folder in folders.items():
            shutil.copytree(template, folder)
            SPOIL[kinds[step]](folder)
        (parent / "notes").mkdir()
        (parent / "step-1.tmp").touch()
        kept, oldest = 0, -1
        for step in reversed(steps) if steps else ():
            kept += kept >= 2 or kinds[step] in ("good", "visited")  # two that verify, and the others as they are
            oldest = step if kept == keep and oldest < 0 else oldest
        gone = [step for step in steps if step < oldest and step not in safe]
        assert store.prune(parent, keep, [folders[step] for step in safe]) == [folders[step] for step in gone]
        # What is not ours stays, in the folder of a checkpoint that goes as well.
        left = {folders[step].name for step in steps if step not in gone or kinds[step] == "visited"}
        assert set(names(parent)) == left | {"notes", "step-1.tmp"}
        assert all((folders[step] / "notes.txt").exists() for step in steps if kinds[step] == "visited")
        assert store.checkpoints(parent) == [folders[step] for step in steps if step not in gone]
        assert store.prune(parent, keep, [folders[step].name for step in safe]) == []
