"""Checkpoints that survive kills, full disks, bit rot and crafted files; and what is deleted when."""

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


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _tensors() -> dict[str, Tensor]:
    base = torch.arange(24, dtype=torch.float32)
    return {
        "layer.weight": base.view(4, 6).t(),  # not contiguous
        "shared": base[2:9],
        "tied": base,
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 5),
        "half": torch.randn(7).bfloat16(),
        "bytes": torch.arange(255, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "grad": torch.nn.Parameter(torch.randn(3, dtype=torch.float64)),
        "größe\n\0": torch.tensor([float("nan"), -0.0, math.inf], dtype=torch.float16),
        "words": torch.tensor([2**63], dtype=torch.uint64),
    }


def _bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    plain = tensor.detach().contiguous()
    return tensor.dtype, tensor.shape, plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(_bits(a[name]) == _bits(b[name]) for name in a)


def _reseal(folder: Path) -> None:
    """Make the hashes right again, as whoever crafts a checkpoint would."""
    named = [name for name in FILES[:2] if (folder / name).is_file()]
    data = {name: (folder / name).read_bytes() for name in named}
    entries = {name: (len(data[name]), hashlib.sha256(data[name]).hexdigest()) for name in named}
    (folder / "SHA256SUMS").write_bytes(store._manifest(entries))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = store.step_folder(tmp_path, 7)
    store.save(folder, _tensors(), {"step": 7, "lr": 0.1 + 0.2})
    return folder


def test_round_trip_is_exact(saved: Path) -> None:
    tensors, meta = store.load(saved)
    torch.manual_seed(0)
    again = {name: t for name, t in _tensors().items() if name not in ("half", "grad")}
    assert _same({name: t for name, t in tensors.items() if name in again}, again)
    assert meta == {"step": 7, "lr": 0.1 + 0.2}
    assert _names(saved) == sorted(FILES)
    copy = saved.with_name("step-00000008")
    store.save(copy, tensors, meta)
    assert _same(store.load(copy)[0], tensors)


def test_no_tensors_is_a_checkpoint_too(tmp_path: Path) -> None:
    store.save(tmp_path / "a", {}, {})
    assert store.load(tmp_path / "a") == ({}, {})


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_reads_the_hashes(saved: Path) -> None:
    done = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=saved, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["state.safetensors: OK", "state.json: OK"]


def test_loaded_tensors_outlive_the_files(saved: Path) -> None:
    tensors, _ = store.load(saved)
    (saved / FILES[0]).write_bytes(b"")
    assert tensors["tied"].sum() == 276


@pytest.mark.parametrize("kind", ["folder", "empty", "link"])
def test_an_existing_target_is_refused(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "step-00000001"
    if kind == "link":
        target.symlink_to(tmp_path / "nowhere")
    else:
        target.mkdir()
        if kind == "folder":
            (target / "mine").touch()
    with pytest.raises(StorageError, match="exists already"):
        store.save(target, {}, {})
    assert _names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize(
    ("tensors", "meta", "names"),
    [
        ({"__metadata__": torch.zeros(1)}, {}, "__metadata__"),
        ({"a\udc80": torch.zeros(1)}, {}, "udc80"),
        ({"c": torch.zeros(1, dtype=torch.complex64)}, {}, "'c'.*complex64"),
        ({"m": torch.zeros(1, device="meta")}, {}, "'m'.*meta"),
        ({"s": torch.eye(2).to_sparse()}, {}, "'s'.*sparse"),
        ({}, {"big": "x" * (17 << 20)}, "tensors"),
    ],
)
def test_what_cannot_be_stored_is_named(tmp_path: Path, tensors: dict[str, Tensor], meta: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        store.save(tmp_path / "a", tensors, meta)
    assert not _names(tmp_path)


# --- damage ---


def test_every_flipped_bit_is_found(saved: Path) -> None:
    draw = random.Random(0)
    for trial in range(60):
        path = saved / FILES[trial % 3]
        good = path.read_bytes()
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=str(saved)):
            store.load(saved)
        path.write_bytes(good)
    store.verify(saved)


def test_every_cut_is_found_and_measured(saved: Path) -> None:
    draw = random.Random(0)
    for trial in range(24):
        name = FILES[trial % 3]
        good = (saved / name).read_bytes()
        length = draw.randrange(len(good)) if trial > 2 else 0
        (saved / name).write_bytes(good[:length])
        text = f"{name} is truncated: {length} of {len(good)} bytes" if name != "SHA256SUMS" else "SHA256SUMS is damaged"
        with pytest.raises(CheckpointError, match=f"{saved}: {text}"):
            store.load(saved)
        (saved / name).write_bytes(good)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_linked_or_odd_file_is_named(saved: Path, name: str) -> None:
    (saved / name).rename(saved / "away")
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        store.load(saved)
    assert store.checkpoints(saved.parent) == []
    (saved / name).symlink_to("away")
    with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
        store.load(saved)
    assert store.checkpoints(saved.parent) == []
    (saved / name).unlink()
    os.mkfifo(saved / name)
    with pytest.raises(CheckpointError, match=f"{name} is not a regular file"):
        store.load(saved)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        store.load(tmp_path / "step-00000001")


def test_a_newer_version_is_refused(saved: Path) -> None:
    (saved / "state.json").write_text(json.dumps({"version": 3, "meta": {}}))
    _reseal(saved)
    with pytest.raises(CheckpointError, match="written by version 3, this reads up to 1"):
        store.load(saved)


METAS = {
    "empty": b"", "list": b"[]", "null": b"null", "nan": b'{"version": 1, "meta": {"a": NaN}}', "no meta": b'{"version": 1}',
    "version": b'{"version": true, "meta": {}}', "old": b'{"version": 0, "meta": {}}', "deep": b"[" * 200_000,
    "bytes": b"\xff\xfe\0",
    "digits": b'{"version": 1, "meta": {"a": ' + b"9" * 9999 + b"}}", "huge": b'{"a": "' + b" " * (17 << 20) + b'"}',
}  # fmt: skip


@pytest.mark.parametrize("name", METAS)
def test_crafted_descriptions_are_refused(saved: Path, name: str) -> None:
    (saved / "state.json").write_bytes(METAS[name])
    _reseal(saved)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        store.load(saved)


def _file(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


CRAFTED = {
    "empty": b"", "short": b"\1\2", "claims 2^63": _file(b"{}", length=2**63), "claims 99 MB": _file(b"{}", length=99 << 20),
    "claims more": _file(b"{}", length=100), "not json": _file(b"garbage!"), "not utf-8": _file(b'{"\xff": 1}'),
    "deep": _file(b'{"a":' * 50_000), "list": _file(b"[]"), "negative": _file({"a": _entry(offsets=(-4, 0))}, bytes(4)),
    "beyond": _file({"a": _entry(shape=(10**6,), offsets=(0, 4 * 10**6))}, bytes(4)),
    "backwards": _file({"a": _entry(offsets=(4, 0))}, bytes(4)),
    "overlap": _file({"a": _entry(), "b": _entry(shape=(2,), offsets=(0, 8))}, bytes(8)),
    "hole": _file({"a": _entry(offsets=(4, 8))}, bytes(8)), "left over": _file({"a": _entry()}, bytes(99)),
    "shape": _file({"a": _entry(shape=(2**62, 2**62))}, bytes(4)), "overflow": _file({"a": _entry(shape=(2**63, 2))}, bytes(4)),
    "negative shape": _file({"a": _entry(shape=(-1, -1))}, bytes(4)), "dtype": _file({"a": _entry("OBJECT")}, bytes(4)),
    "type": _file({"a": 3}, bytes(4)),
    "zero fits": _file({"a": _entry(shape=(0, 2**64 - 1), offsets=(0, 0))}), "pickle": b"\x80\x04cos\nsystem\n(S'touch x'\ntR.",
}  # fmt: skip


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_tensor_files_are_refused(saved: Path, name: str) -> None:
    (saved / "state.safetensors").write_bytes(CRAFTED[name])
    _reseal(saved)
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        store.load(saved)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_garbage_raises_nothing_else(data: bytes, framed: bool) -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "a"
        store.save(folder, {}, {})
        (folder / "state.safetensors").write_bytes(_file(data) if framed else data)
        _reseal(folder)
        with pytest.raises(CheckpointError):
            store.load(folder)
