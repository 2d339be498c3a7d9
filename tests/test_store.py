"""Checkpoints that survive bit rot and crafted files, and state dicts taken apart and put together again."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from relssl.errors import CheckpointError, StorageError
from relssl.weights import store

FILES = ("state.safetensors", "state.json", "SHA256SUMS")


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
    assert sorted(path.name for path in saved.iterdir()) == sorted(FILES)
    (saved / FILES[0]).write_bytes(b"")  # loaded tensors outlive the file
    assert loaded["tied"].sum() == 276
    store.save(saved.with_name("empty"), {}, {})
    assert store.load(saved.with_name("empty")) == ({}, {})


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_reads_the_hashes(saved: Path) -> None:
    done = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=saved, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["state.safetensors: OK", "state.json: OK"]


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_an_existing_target_is_refused(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "step-00000001"
    target.symlink_to(tmp_path / "nowhere") if kind == "link" else target.mkdir()
    with pytest.raises(StorageError, match="exists already"):
        store.save(target, {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize(
    ("state", "meta", "names"),
    [
        ({"__metadata__": torch.zeros(1)}, {}, "__metadata__"),
        ({"a\udc80": torch.zeros(1)}, {}, "udc80"),
        ({"c": torch.zeros(1, dtype=torch.complex64)}, {}, "'c'"),
        ({"m": torch.zeros(1, device="meta")}, {}, "'m'"),
        ({"s": torch.eye(2).to_sparse()}, {}, "'s'"),
        ({}, {"big": "x" * (17 << 20)}, "meta"),
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
    [{"$tensor": "gone"}, {"$tensor": []}, {"$dict": 3}, {"$dict": [[[], 1]]}, {"$float": "x"}, {"$tuple": 1}, {"$x": 1}, {1: 2}],
)
def test_a_malformed_rest_is_refused(rest: Any) -> None:
    with pytest.raises(CheckpointError):
        store.unflatten({}, rest)


def test_what_cannot_be_flattened_is_named() -> None:
    with pytest.raises(TypeError, match=r"state\.3: a set"):
        store.flatten({"state": {3: {1}}})
