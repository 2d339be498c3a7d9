"""Sets of many images: listed in little memory, and each epoch's order without a list of it."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relssl.data import lists, loader, shards
from relssl.data.draws import permuted
from relssl.data.lists import read_list
from relssl.data.loader import Plan
from relssl.data.named import load
from relssl.data.shards import read_shards


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_an_epochs_order_is_a_bijection_computed_position_by_position(count: int, seed: int, epoch: int) -> None:
    order = permuted(seed, epoch, np.arange(count), count)
    assert np.array_equal(np.sort(order), np.arange(count))
    some = np.arange(count)[:: max(1, count // 7)]
    assert np.array_equal(permuted(seed, epoch, some, count), order[some])


def test_orders_of_epochs_and_seeds_are_unrelated_and_spread_evenly() -> None:
    count = 10_007
    orders = [permuted(seed, epoch, np.arange(count), count) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (orders[first] == orders[second]).sum() < 10  # one is expected
        assert abs(np.corrcoef(orders[first], orders[second])[0, 1]) < 0.05
    for order in orders:
        assert abs(np.corrcoef(order, np.arange(count))[0, 1]) < 0.05 and abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
        counts = np.histogram(order[: count // 2], 20)[0]  # of the first half of an epoch
        assert abs(counts - counts.mean()).max() < 6 * np.sqrt(counts.mean())


def test_a_large_plan_covers_an_epoch_once_on_any_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_SORTED", 100)
    whole = [rows[0] for _, rows in Plan(1000, 50, seed=3).steps(0, 40)]
    for half in (whole[:20], whole[20:]):
        assert np.array_equal(np.sort(np.concatenate(half)), np.arange(1000))
    ranks = [[rows for _, rows in Plan(1000, 50, 5, rank, 2, seed=3).steps(7, 9)] for rank in range(2)]
    joined = [np.stack([*map(np.stack, parts)], 1).reshape(-1) for parts in zip(*ranks, strict=True)]
    assert np.array_equal(joined, whole[7:9])


def test_a_long_list_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"gone/{row}.jpg,{row % 3}\n" for row in range(300)))
    (tmp_path / "gone").mkdir()
    for row in range(100):
        (tmp_path / f"gone/{row}.jpg").write_bytes(b"x")
    assert len(read_list(str(tmp_path / "list.csv"))) == 100
    monkeypatch.setattr(lists, "LOOKED_AT", 200)
    images = read_list(str(tmp_path / "list.csv"))
    assert len(images) == 300 and images.classes == ("0", "1", "2") and "show when they are read" in images.notes[0]
    assert images.bad == [] and images.source.name(299) == f"{tmp_path}/gone/299.jpg"


COST = """
import json, sys, time
import torch, relssl
from relssl.data.loader import Plan
from relssl.data.named import load
peak = lambda: int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) / 1024  # getrusage knows the parent's
before, start = peak(), time.process_time()
images = load(sys.argv[1], None, "train")
images.fingerprint()
next(Plan(len(images), 256).steps(0, 1))
print(json.dumps([len(images), peak() - before, time.process_time() - start]))
"""


def made_up(kind: str, folder: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """A list, or a pattern of a hundred files of which the index, made here, believes that they hold so many images."""
    if kind == "list":
        with (folder / "list.txt").open("w") as file:
            for row in range(count):
                word = f"n{row * 7919 % 1000:08}"
                file.write(f"/data/images/train/{word}/{word}_{row}.JPEG\t{word}\t{100_000 + row % 5000}\n")
        return str(folder / "list.txt")
    for shard in range(100):
        (folder / f"{shard:03}.tar").write_bytes(b"a tar file, never read")
    monkeypatch.setenv("RELSSL_CACHE", str(folder / "kept"))
    with monkeypatch.context() as patch:
        members = ((f"{row:09}.jpg", f"{row}", "jpg", 1000 * row, 900) for row in itertools.count())
        patch.setattr(shards, "_members", lambda file: itertools.islice(members, count // 100))
        read_shards(str(folder), "train")
    return f"shards:{folder}"


@pytest.mark.parametrize("kind", ["list", "shards"])
def test_many_images_cost_little_memory_each(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 100_000
    data = made_up(kind, tmp_path, count, monkeypatch)
    tracemalloc.start()
    try:
        images = load(data, None, "train")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(images) == count and peak < 250 * count


@pytest.mark.torture
@pytest.mark.parametrize("kind", ["list", "shards"])
def test_ten_million_images_cost_less_than_a_gigabyte_and_half_a_minute(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images, the memory that they take at most, in MB, and the seconds of a processor until the first batch is known."""
    words = [sys.executable, "-c", COST, made_up(kind, tmp_path, 10_000_000, monkeypatch)]
    count, memory, seconds = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert count == 10_000_000 and memory < 1024 and seconds < 30
