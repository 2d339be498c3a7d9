"""Checkpoints that survive bit rot, crafted files, kills and full disks, and state dicts taken apart and put together again."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import random
import resource
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
    assert meta == {"step": 7, "lr": 0.1 + 0.2}
    assert names(saved) == sorted(FILES)
    (saved / FILES[0]).write_bytes(b"")  # loaded tensors outlive the file
    assert loaded["tied"].sum() == 276
    store.save(saved.with_name("empty"), {}, {})
    assert store.load(saved.with_name("empty")) == ({}, {})


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_reads_the_hashes(saved: Path) -> None:
    result = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=saved, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["state.safetensors: OK", "state.json: OK"]


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_an_existing_target_is_refused(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "step-00000001"
    target.symlink_to(tmp_path / "nowhere") if kind == "link" else target.mkdir()
    with pytest.raises(StorageError, match="exists already"):
        store.save(target, {}, {})
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize(
    ("state", "meta", "names"),
    [
        ({"a\udc80": torch.zeros(1)}, {}, "udc80"),
        ({"m": torch.zeros(1, device="meta")}, {}, "'m'"),
        ({"s": torch.eye(2).to_sparse()}, {}, "'s'"),
    ],
)
def test_what_cannot_be_stored_is_named(tmp_path: Path, state: dict[str, Tensor], meta: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        store.save(tmp_path / "a", state, meta)
    assert not list(tmp_path.iterdir())


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

    def refused() -> None:
        with pytest.raises(CheckpointError, match=name):
            store.load(saved)
        assert store.checkpoints(saved.parent) == []

    refused()
    (saved / name).symlink_to("away")
    refused()
    (saved / name).unlink()
    os.mkfifo(saved / name)
    refused()
    with pytest.raises(CheckpointError, match="gone"):
        store.load(saved / "gone")


METAS = {
    "empty": b"", "list": b"[]", "null": b"null", "no meta": b'{"version": 1}',
    "version": b'{"version": "1", "meta": {}}', "old": b'{"version": 0, "meta": {}}', "deep": b"[" * 200_000,
    "bytes": b"\xff\xfe\0", "newer": b'{"version": 3, "meta": {}}',
    "digits": b'{"version": 1, "meta": {"a": ' + b"9" * 9999 + b"}}", "huge": b'{"a": "' + b" " * (17 << 20) + b'"}',
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
KEYS = st.one_of(
    st.text(max_size=3), st.integers(-3, 3), st.none(), st.sampled_from(["$tensor", "$dict", "a.b", "__metadata__", "0"])
)
TREES = st.recursive(
    LEAVES, lambda t: st.one_of(st.lists(t, max_size=3), st.dictionaries(KEYS, t, max_size=3), st.tuples(t, t)), max_leaves=12
)


def equal(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return len(a) == len(b) and all(map(equal, a, b)) and all(map(equal, a.values(), b.values()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b) and (not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b))


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_flatten_round_trip_is_exact(state: Any) -> None:
    flat, rest = store.flatten(state)
    rest = json.loads(json.dumps(rest, allow_nan=False))
    assert equal(store.unflatten(flat, rest), state)
    assert "__metadata__" not in flat


def test_an_optimizer_survives_a_checkpoint(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    groups: list[dict[str, Any]] = [{"params": [model.weight], "lr": 0.1 + 0.2}, {"params": [model.bias]}]
    optimizer = torch.optim.Adam(groups, betas=(0.8, 0.9))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "model": dict(model.state_dict()), "best": -math.inf}
    flat, rest = store.flatten(state | {"mean": math.nan})
    store.save(tmp_path / "a", flat, {"rest": rest})
    stored, meta = store.load(tmp_path / "a")
    assert {"optimizer.state.0.exp_avg", "model.weight"} <= stored.keys()
    back = store.unflatten(stored, meta["rest"])
    assert math.isnan(back.pop("mean")) and equal(back, state)


@pytest.mark.parametrize(
    "rest",
    [{"$tensor": "gone"}, {"$tensor": []}, {"$dict": 3}, {"$dict": [[[], 1]]}, {"$float": "x"}, {"$tuple": 1}],
)
def test_a_malformed_rest_is_refused(rest: Any) -> None:
    with pytest.raises(CheckpointError):
        store.unflatten({}, rest)


def test_what_cannot_be_flattened_is_named() -> None:
    with pytest.raises(TypeError, match=r"state\.3: a set"):
        store.flatten({"state": {3: {1}}})


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
    present = store.checkpoints(parent)
    step = int(present[-1].name[5:]) if present else 0
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
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", KILLS, str(tmp_path), "20"],
        env={**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
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


@pytest.mark.parametrize(("name", "at"), [("open", 0), ("write", 0), ("fsync", 0), ("replace", 0)])
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, at: int) -> None:
    path = tmp_path / "status.json"
    files.write_file(path, b"old")
    with monkeypatch.context() as patch:
        fail(patch, name, at, errno.ENOSPC)
        with pytest.raises(StorageError, match=r"status\.json.*3 bytes needed, \d+ bytes free"):
            files.write_file(path, b"new")
    assert (names(tmp_path), path.read_bytes()) == (["status.json"], b"old")


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
    assert names(saved.parent) == [saved.name]


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
    assert names(tmp_path) == ["a.json"]


def test_writing_json_needs_no_torch() -> None:
    code = "import sys, relssl.weights.store, relssl.files; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(Path(store.__file__).parents[2])}, check=True)


@pytest.mark.parametrize(("old", "new"), [('"step": 7', '"step": NaN'), ('"version": 1', '"version": true')])
def test_a_state_that_is_no_json_is_refused(tmp_path: Path, old: str, new: str) -> None:
    folder = store.step_folder(tmp_path, 7)
    store.save(folder, {"a": torch.ones(3)}, {"step": 7})
    text = (folder / "state.json").read_text()
    changed = text.replace(old, new).replace(old.replace(": ", ":"), new)
    assert changed != text
    (folder / "state.json").write_text(changed)
    seal(folder)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        store.load(folder)
