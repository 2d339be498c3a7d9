"""Embedding files: what numpy and csv read back, what a spreadsheet must not run, and what failure leaves."""

from __future__ import annotations

import csv
import errno
import os
import sys
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relssl.errors import ConfigError, DataError, NumericError, StorageError
from relssl.evaluation import embed as writers
from relssl.evaluation.embed import write_vectors

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

NAMES = [
    "a.png",
    "sub/b,c.png",
    'quo"te',
    "line\nbreak\r",
    "\udcff\udc80",
    "=cmd|'x'!A0",
    "+1",
    "-1",
    "@x",
    "\tx",
    "größe",
    "x" * 90,
]
KINDS = (".npz", ".csv", ".parquet")
Batch = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _batches(n: int = 12, d: int = 3, size: int = 5, seed: int = 0) -> Iterator[Batch]:
    draw = np.random.default_rng(seed)
    order = draw.permutation(n)
    for start in range(0, n, size):
        ids = order[start : start + size]
        yield ids, (draw.standard_normal((len(ids), d)) * 10.0 ** draw.integers(-30, 30)).astype(np.float32)


def _whole(batches: Iterator[Batch]) -> Batch:
    ids, features = zip(*batches, strict=True)
    return np.concatenate(ids), np.concatenate(features)


def test_npz_reads_back_without_pickle(tmp_path: Path) -> None:
    labels = np.arange(12) * 3 - 1
    assert write_vectors(tmp_path / "v.npz", _batches(), NAMES, labels) == 12
    ids, features = _whole(_batches())
    with np.load(tmp_path / "v.npz", allow_pickle=False) as read:
        assert sorted(read.files) == ["features", "ids", "labels", "names"]
        assert read["features"].dtype == np.float32 and read["features"].tobytes() == features.tobytes()
        assert read["ids"].dtype == np.int64 and (read["ids"] == ids).all()
        assert read["names"].tolist() == [NAMES[i] for i in ids]
        assert (read["labels"] == labels[ids]).all()
    assert _names(tmp_path) == ["v.npz"]


def test_equal_vectors_give_equal_files_and_labels_are_optional(tmp_path: Path) -> None:
    for name in ("a.npz", "B.NPZ"):
        write_vectors(tmp_path / name, _batches(), NAMES)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "B.NPZ").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert archive.testzip() is None and archive.namelist() == ["features.npy", "ids.npy", "names.npy"]


@pytest.mark.parametrize("known", [0, 1, 2])
def test_parquet_reads_back_in_row_groups(tmp_path: Path, known: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "_GROUP", 15)  # five rows of three
    labels, classes = [-1, 0, 1] * 4, ["cat", "d\udcffg"]
    given = {"labels": labels} if known else {}
    assert write_vectors(tmp_path / "v.parquet", _batches(), NAMES, **given, classes=classes if known == 2 else None) == 12
    file = parquet.ParquetFile(tmp_path / "v.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [5, 5, 2]
    read = file.read()
    file.close()
    assert read.column_names == ["id", "name", *["label", "class"][:known], "features"]
    assert read.schema.field("features").type == pa.list_(pa.float32(), 3) and read.schema.field("id").type == pa.int64()
    ids, features = _whole(_batches())
    assert read["id"].to_pylist() == ids.tolist()
    assert read["features"].combine_chunks().flatten().to_numpy().tobytes() == features.tobytes()
    assert read["name"].to_pylist() == [NAMES[i].encode("utf-8", "backslashreplace").decode() for i in ids]
    if known:
        assert read["label"].to_pylist() == [labels[i] for i in ids]
    if known == 2:
        assert read["class"].to_pylist() == [{-1: None, 0: "cat", 1: r"d\udcffg"}[labels[i]] for i in ids]
    assert _names(tmp_path) == ["v.parquet"]


def test_classes_beside_labels(tmp_path: Path) -> None:
    labels, classes = [-1, 0, 1] * 4, ("cat", "=1,d\udcffg")
    for suffix in KINDS[:2]:
        write_vectors(tmp_path / f"v{suffix}", _batches(), NAMES, labels, classes)
    with np.load(tmp_path / "v.npz", allow_pickle=False) as read:
        assert tuple(read["classes"].tolist()) == classes and "labels" in read.files
    with (tmp_path / "v.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    assert list(rows[0]) == ["id", "name", "label", "class", "f0", "f1", "f2"]
    words = {"-1": "", "0": "cat", "1": r"'=1,d\udcffg"}
    assert [row["class"] for row in rows] == [words[row["label"]] for row in rows]
    assert [int(row["label"]) for row in rows] == [labels[i] for i in _whole(_batches())[0]]


@pytest.mark.parametrize(("labels", "text"), [(None, "no labels"), ([2] * 12, "labels up to 2")])
def test_classes_that_do_not_fit_are_refused(tmp_path: Path, labels: list[int] | None, text: str) -> None:
    with pytest.raises(ValueError, match=f"2 classes do not fit {text}"):
        write_vectors(tmp_path / "v.npz", _batches(), NAMES, labels, ["a", "b"])


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet")
    with pytest.raises(ConfigError, match=r"pip install 'relssl\[parquet\]'"):
        writers.check_target(tmp_path / "v.parquet")
    writers.check_target(tmp_path / "v.npz")


@pytest.mark.parametrize("labelled", [True, False])
def test_csv_reads_back_and_runs_no_formula(tmp_path: Path, labelled: bool) -> None:
    write_vectors(tmp_path / "v.csv", _batches(), NAMES, list(range(12)) if labelled else None)
    with (tmp_path / "v.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, strict=True)
    assert header == ["id", "name", *(["label"] if labelled else []), "f0", "f1", "f2"]
    ids, features = _whole(_batches())
    assert [int(row[0]) for row in rows] == ids.tolist()
    assert np.array([row[-3:] for row in rows], dtype=np.float32).tobytes() == features.tobytes()
    for index, row in zip(ids, rows, strict=True):
        name = NAMES[index].encode("utf-8", "backslashreplace").decode()
        assert row[1] == ("'" + name if name[0] in "=+-@\t" else name)
        assert not labelled or int(row[2]) == index


@pytest.mark.parametrize("suffix", KINDS)
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "_GROUP", 1 << 17)
    rows, batches = np.ones((500, 200), np.float32), 10  # 4 MB in all

    def peak(count: int) -> int:
        tracemalloc.start()
        before = pa.default_memory_pool()
        pool = pa.proxy_memory_pool(before)  # counts what pyarrow takes by itself
        pa.set_memory_pool(pool)
        write_vectors(tmp_path / f"v{suffix}", ((np.arange(500), rows) for _ in range(count)), ["x"] * 500)
        used = tracemalloc.get_traced_memory()[1] + (pool.max_memory() or 0)
        pa.set_memory_pool(before)
        tracemalloc.stop()
        return used

    peak(1)
    assert peak(batches) < 3 << 20


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("at", range(4))
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, at: int) -> None:
    path = tmp_path / f"v{suffix}"
    path.write_bytes(b"old")
    name, nth = [("write", 0), ("write", 2), ("fsync", 0), ("replace", 0)][at]
    original, calls = getattr(os, name), iter(range(1000))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing)
        with pytest.raises(StorageError, match=rf"v\{suffix}.*No space left.*bytes needed"):
            write_vectors(path, _batches(), NAMES)
    assert (_names(tmp_path), path.read_bytes()) == ([path.name], b"old")


@pytest.mark.parametrize("suffix", KINDS)
def test_a_size_limit_in_the_archive_leaves_nothing(tmp_path: Path, suffix: str) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_100, limits[1]))  # the features fit, the archive around them does not
    try:
        with pytest.raises(StorageError, match="File too large"):
            write_vectors(tmp_path / f"v{suffix}", [(np.arange(100), np.random.default_rng(0).random((100, 100)))], ["x"] * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not _names(tmp_path)


def test_an_error_of_the_source_is_its_own_and_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[Batch]:
        yield from _batches(5)
        raise OSError("the camera is gone")

    with pytest.raises(OSError, match="camera") as caught:
        write_vectors(tmp_path / "v.csv", broken(), NAMES)
    assert not isinstance(caught.value, StorageError) and not _names(tmp_path)


@pytest.mark.parametrize(
    ("vectors", "labels", "error", "text"),
    [
        ([], None, DataError, "no vectors"),
        ([([], np.zeros((0, 3)))], None, DataError, "no vectors"),
        ([([0, 12], np.zeros((2, 3)))], None, ValueError, r"0\.\.11"),
        ([([-1], np.zeros((1, 3)))], None, ValueError, r"0\.\.11"),
        ([([0], np.zeros((2, 3)))], None, ValueError, r"\[b,D\]"),
        ([([0.5], np.zeros((1, 3)))], None, ValueError, "ids"),
        ([([0], np.zeros(3))], None, ValueError, r"\[b,D\]"),
        ([([0], np.zeros((1, 3))), ([1], np.zeros((1, 4)))], None, ValueError, "4 after 3"),
        ([([0, 1], np.array([[0, 1], [np.nan, 0]]))], None, NumericError, "sub/b,c.png"),
        ([([0], np.array([[1e300]]))], None, NumericError, r"a\.png"),
        ([([0], np.zeros((1, 3)))], [1, 2], ValueError, "12 integers"),
        ([([0], np.zeros((1, 3)))], [0.5] * 12, ValueError, "integers"),
    ],
)
def test_refusals_leave_nothing(tmp_path: Path, vectors: Any, labels: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        write_vectors(tmp_path / "v.npz", vectors, NAMES, labels)
    assert not _names(tmp_path)


@pytest.mark.parametrize("name", ["v.feather", "v", "v.npz.gz"])
def test_other_formats_are_refused_before_any_work(tmp_path: Path, name: str) -> None:
    def never() -> Iterator[Batch]:
        raise AssertionError
        yield

    with pytest.raises(ConfigError, match=r"known: \.csv, \.npz, \.parquet"):
        write_vectors(tmp_path / name, never(), NAMES)
    (tmp_path / "folder.npz").mkdir()
    for path in (tmp_path / "gone" / "v.npz", tmp_path / "folder.npz"):
        with pytest.raises(StorageError, match="folder"):
            write_vectors(path, never(), NAMES)
