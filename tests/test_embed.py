"""Embedding: the file holds the network's own answer for each image, readable elsewhere, whole or not at all."""

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import relssl
from relssl.errors import ConfigError, DataError, NumericError, StorageError
from relssl.evaluation.embed import check_target, write_table
from small_runs import small_run

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

NAMES = ["a.png", "sub/b,c.png", 'quo"te', "line\nbreak\r", "\udcff\udc80", "=cmd|'x'!A0", "+1", "-1", "@x", "\tx", "größe"]
NAMES.append("x" * 90)
ESCAPED = [name.encode("utf-8", "backslashreplace").decode() for name in NAMES]
IDS = np.random.default_rng(0).permutation(12)
LABELS, CLASSES = np.array([-1, 0, 1] * 4), ("cat", "=1,d\udcffg")
FEATURES = (np.random.default_rng(1).standard_normal((12, 3)) * 10.0 ** np.arange(-30, 30, 5)[:, None]).astype(np.float32)
KINDS = (".npz", ".csv", ".parquet")
KNOWN: list[dict[str, Any]] = [{}, {"labels": LABELS}, {"labels": LABELS, "classes": CLASSES}]


def write(path: Path, **known: Any) -> None:
    classes = {"classes": known["classes"]} if "classes" in known else {}
    labels = {"labels": LABELS} if "labels" in known else {}
    named = {"class": [CLASSES[label] if label >= 0 else None for label in LABELS.tolist()]} if classes else {}
    columns = {"id": IDS, "name": NAMES, **({"label": LABELS} if labels else {}), **named}
    write_table(path, "features", FEATURES, {"ids": IDS, "names": NAMES, **labels, **classes}, columns)


@pytest.mark.parametrize("known", KNOWN)
def test_each_kind_reads_back_without_pickle_and_runs_no_formula(tmp_path: Path, known: dict[str, Any]) -> None:
    for name in ("a.npz", "B.NPZ", "v.parquet", "v.csv"):
        write(tmp_path / name, **known)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "B.NPZ").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as read:
        assert set(read.files) == {"features", "ids", "names", *known}
        assert read["features"].dtype == np.float32 and read["features"].tobytes() == FEATURES.tobytes()
        assert read["ids"].dtype == np.int64 and (read["ids"] == IDS).all() and read["names"].tolist() == NAMES
        for name, values in known.items():
            assert read[name].tolist() == list(values)
    columns = ["id", "name", *["label", "class"][: len(known)]]
    read = parquet.read_table(tmp_path / "v.parquet")
    assert read.column_names == [*columns, "features"]
    assert read.schema.field("features").type == pa.list_(pa.float32(), 3) and read.schema.field("id").type == pa.int64()
    assert read["id"].to_pylist() == IDS.tolist() and read["name"].to_pylist() == ESCAPED
    assert read["features"].combine_chunks().flatten().to_numpy().tobytes() == FEATURES.tobytes()
    with (tmp_path / "v.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, strict=True)
    assert header == [*columns, "f0", "f1", "f2"] and [int(row[0]) for row in rows] == IDS.tolist()
    assert np.array([row[-3:] for row in rows], dtype=np.float32).tobytes() == FEATURES.tobytes()
    assert [row[1] for row in rows] == ["'" + name if name[0] in "=+-@\t" else name for name in ESCAPED]
    if known:
        assert read["label"].to_pylist() == [int(row[2]) for row in rows] == LABELS.tolist()
    if "classes" in known:
        assert read["class"].to_pylist() == [None, "cat", r"=1,d\udcffg"] * 4
        assert [row[3] for row in rows] == ["", "cat", r"'=1,d\udcffg"] * 4


@pytest.mark.parametrize("suffix", KINDS)
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, suffix: str) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / f"v{suffix}"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(StorageError, match="File too large"):
            names = {"names": ["x"] * 100}
            write_table(path, "features", np.random.default_rng(0).random((100, 100), np.float32), names, names)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("v.feather", "v", "v.npz.gz"):
        with pytest.raises(ConfigError, match=r"use \.csv, \.npz or \.parquet"):
            relssl.embed(tmp_path / "no-run", "no-data", tmp_path / name)
    (tmp_path / "folder.npz").mkdir()
    for path in (tmp_path / "gone/v.npz", tmp_path / "folder.npz"):
        with pytest.raises(StorageError, match="folder"):
            relssl.embed(tmp_path / "no-run", "no-data", path)
    with pytest.raises(NumericError, match=r"b,c\.png"):
        write_table(tmp_path / "v.npz", "features", np.array([[0.0], [np.nan]], np.float32), {"names": NAMES[:2]}, {})
    assert not (tmp_path / "v.npz").exists()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet")
    with pytest.raises(ConfigError, match=r"relssl\[parquet\]"):
        check_target(tmp_path / "v.parquet")
    check_target(tmp_path / "v.npz")
    with pytest.raises(StorageError, match="/proc"):  # where not even root can write
        check_target(Path("/proc/v.npz"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    over = {"epochs": 1, "max_images": 96, "optimizer": {"warmup_epochs": 0}, "log": {"knn_every": 0}}
    return small_run(tmp_path_factory.mktemp("runs") / "whole", **over).folder


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_a_file_holds_what_the_network_says(network: str, finished: Path, tmp_path: Path) -> None:
    files = [tmp_path / "set" / name for name in ("train/cat/1.png", "train/dog/2.png", "val/dog/3.png", "val/cat/4.png")]
    for seed, file in enumerate(files):
        picture(file, seed)
    (tmp_path / "set/val/dog/5.png").write_bytes(b"no image")
    out, threads = tmp_path / "v.parquet", torch.get_num_threads()
    answer = relssl.embed(finished, str(tmp_path / "set"), out, split="test", network=network, device="cpu")
    assert (answer["images"], answer["dim"], [Path(name).name for name, _ in answer["bad"]]) == (2, 16, ["5.png"])
    assert torch.get_num_threads() == threads
    (tmp_path / "none").mkdir()
    (tmp_path / "none/1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of its 1 images can be read"):
        relssl.embed(finished, str(tmp_path / "none"), tmp_path / "w.npz", device="cpu")
    backbone = relssl.load_backbone(finished, network)
    with torch.no_grad():
        seen = [backbone.transform(Image.open(file).convert("RGB")) for file in (files[3], files[2])]
        expected = backbone(torch.stack(seen))
    read = parquet.read_table(out)
    assert read["name"].to_pylist() == [str(files[3]), str(files[2])]
    assert (read["label"].to_pylist(), read["class"].to_pylist()) == ([0, 1], ["cat", "dog"])
    np.testing.assert_allclose(np.array(read["features"].to_pylist(), np.float32), expected.numpy(), rtol=1e-4, atol=1e-5)
