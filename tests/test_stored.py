"""Images inside tar files and in tables of `datasets`: the same as from files, whatever lies there besides, and a word on what is not used."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bad_images import jpeg
from relssl.cli import main
from relssl.data.cache import shrunken
from relssl.data.named import at_hand, exists, load
from relssl.data.subsets import from_index, identity, shared
from relssl.errors import ConfigError, DataError
from relssl.files import read_rows
from relssl.settings.run import LoaderConfig
from small_runs import differing, final_state, small_run
from test_cache import Report

datasets: Any = pytest.importorskip("datasets")
Members = list[tuple[str, bytes]]


def write(path: Path, members: Members, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def table(numbers: range, **columns: Any) -> Any:
    """A table as others write it: bytes of images and classes; further columns with their features."""
    columns |= {"image": (datasets.Image(), [{"bytes": photo(number), "path": f"{number}.jpg"} for number in numbers])}
    columns |= {"label": (datasets.ClassLabel(names=["0", "1", "2"]), [number % 3 for number in numbers])}
    features, rows = ({name: column[place] for name, column in columns.items()} for place in (0, 1))
    return datasets.Dataset.from_dict(rows, datasets.Features(features))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELSSL_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "kept")
    datasets.disable_progress_bars()


def photo(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return jpeg(Image.fromarray(pixels))


def samples(numbers: range) -> Members:
    members = [(f"{number:04}.jpg", photo(number)) for number in numbers]
    return sorted(members + [(f"{number:04}.cls", str(number % 3).encode()) for number in numbers])


@pytest.fixture
def shards(tmp_path: Path) -> str:
    for part in range(3):
        write(tmp_path / f"set/part-{part:02}.tar", samples(range(10 * part, 10 * part + 10)))
    return f"shards:{tmp_path}/set"


@pytest.mark.parametrize("kind", ["shards", "hf:{}/parquet", "hf:{}/saved", "hf:{}/parts"])
def test_images_and_labels_are_those_of_the_files(kind: str, shards: str, tmp_path: Path) -> None:
    if kind == "hf:{}/parquet":
        table(range(30)).to_parquet(tmp_path / "parquet/train.parquet")
    elif kind != "shards":
        tables = table(range(30)), datasets.DatasetDict(train=table(range(30)), test=table(range(3)))
        tables[kind == "hf:{}/parts"].save_to_disk(kind.format(tmp_path).removeprefix("hf:"))
    data = shards if kind == "shards" else kind.format(tmp_path)
    images = load(data, None, "train")
    assert len(images) == 30 and images.classes == ("0", "1", "2") and images.notes == ()
    assert images.labels is not None and images.labels.tolist() == [number % 3 for number in range(30)]
    for row in (29, 0, 13):
        with Image.open(io.BytesIO(photo(row))) as expected, images.source.open(row, 10**6) as opened:
            assert opened.rgb(1).tobytes() == expected.convert("RGB").tobytes()
    part = pickle.loads(pickle.dumps(images.subset([7, 22])))
    assert part.labels.tolist() == [1, 1] and [part.source.beginning(row) for row in (0, 1)] == [photo(7), photo(22)]
    names = (f"{tmp_path}/set/part-02.tar/0022.jpg", f"{kind.format(tmp_path)}:train/000022")
    assert part.source.name(1) == names[kind != "shards"]
    assert part.fingerprint() != images.fingerprint() == load(data, None, "bank").fingerprint()
    assert identity(part) != identity(images) and shared(images, part) == 2


def test_runs_on_shards_and_tables_equal_one_on_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [(f"{number:04}.jpg", photo(number) if number != 5 else b"broken") for number in range(24)]
    (tmp_path / "photos").mkdir()
    for name, content in contents:
        (tmp_path / "photos" / name).write_bytes(content)
    for part in range(2):
        write(tmp_path / f"{part}.tar", contents[12 * part : 12 * part + 12])
    rows = {"image": [{"bytes": content, "path": None} for _, content in contents]}
    datasets.Dataset.from_dict(rows, datasets.Features(image=datasets.Image())).save_to_disk(tmp_path / "table")
    monkeypatch.chdir(tmp_path)
    for name, data in {"files": "photos", "shards": "shards:*.tar", "hub": "hf:table"}.items():
        workers = 0 if name == "files" else 2
        small_run(tmp_path / name, data=data, loader={"workers": workers}, recipe="digits", batch_size=8, epochs=1, max_images=24)
        assert differing(final_state(tmp_path / "files"), final_state(tmp_path / name)) == []
    bad = {
        "files": f"{tmp_path}/photos/0005.jpg",
        "shards": f"{tmp_path}/0.tar/0005.jpg",
        "hub": f"hf:{tmp_path}/table:train/000005",
    }
    assert {name: row["file"] for name in bad for row in read_rows(tmp_path / name / "bad_samples.jsonl")} == bad
    assert f"hf:{tmp_path}/table" in (tmp_path / "hub/config.yaml").read_text()


# Shards


def test_labels_of_json_long_names_and_members_that_are_no_images(tmp_path: Path) -> None:
    long = "folder/" * 30 + "x" * 120
    members: Members = [(f"{long}.jpg", photo(1)), (f"{long}.json", json.dumps({"label": "cat"}).encode())]
    members += [("a/b.c/2.JPEG", photo(2)), ("a/b.c/2.json", b"[1"), ("a/b.c/2.seg.png", photo(3)), ("3.txt", b"text")]
    members += [("._4.jpg", b"x"), ("5.jpg", photo(5)), ("5.json", b'{"label": 7}')]
    members += [("ü.png", photo(6)), ("ü.cls", b" big cat\n")]
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        write(tmp_path / "one.tar", members, format=kind)
        images = load(f"shards:{tmp_path}/one.tar", None, "train")
        names = [images.source.name(row).partition(".tar/")[2] for row in range(len(images))]
        assert names == [f"{long}.jpg", "a/b.c/2.JPEG", "5.jpg", "ü.png"] and images.source.beginning(3) == photo(6)
        assert images.labels is not None and images.classes == ("7", "big cat", "cat") and images.labels.tolist() == [2, -1, 0, 1]
        assert "1 .seg.png" in images.notes[0]


def test_train_and_val_in_the_names_of_shards_are_its_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, numbers in (("train/0", range(9)), ("train/1", range(9, 18)), ("val/0", range(18, 24)), ("test/0", range(24, 26))):
        write(tmp_path / f"{name}.tar", samples(numbers))
    pattern = f"shards:{tmp_path}/**/*.tar"
    train, bank, test = (load(pattern, None, split) for split in ("train", "bank", "test"))
    assert (len(train), len(bank), len(test)) == (18, 18, 6) and "those of val are the test part" in train.notes[0]
    assert bank.classes == test.classes and shared(bank, test) == 0 and shared(bank, bank) == 18
    assert main(["validate", pattern, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["test"] == 6
    with pytest.raises(DataError, match="no test images"):
        load(f"shards:{tmp_path}/train", None, "test")


def test_what_cannot_be_used_is_refused_or_told(shards: str, tmp_path: Path) -> None:
    whole = (tmp_path / "set/part-00.tar").read_bytes()
    files = {"squeezed.tar": gzip.compress(whole), "text.tar": b"no tar file" * 100, "cut.tar": whole[:4000], "none.tar": b""}
    for name, content in (files | {"early.tar": whole[:300]}).items():
        (tmp_path / name).write_bytes(content)
    write(tmp_path / "texts.tar", [("a.txt", b"text")])
    reasons = {
        **dict.fromkeys(("squeezed.tar", "text.tar", "early.tar"), "needs an uncompressed tar file"),
        **{"none.tar": "is empty", "gone-{0..1}.tar": "gone-0.tar: no such shard", "set/gone*.tar": "no such shard"},
        "texts.tar": "no usable image",
        "gone-{3..1}.tar": "no such shard",
        "link*.tar": "no such shard",
    }
    (tmp_path / "link-0.tar").symlink_to(tmp_path / "nowhere.tar")
    for name, reason in reasons.items():
        with pytest.raises(DataError, match=reason) as caught:
            load(f"shards:{tmp_path}/{name}", None, "train")
        assert str(caught.value).isprintable()
    cut = load(f"shards:{tmp_path}/cut.tar", None, "train")
    assert 0 < len(cut) < 10 and f"the {len(cut)} images that are whole are used" in cut.notes[0]
    assert [cut.source.beginning(row) for row in range(len(cut))] == [photo(number) for number in range(len(cut))]


def test_the_index_is_made_once_and_never_stale(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(shards, None, "train")
    (index,) = (tmp_path / "kept/shards").glob("*.npz")
    monkeypatch.setattr(tarfile, "open", None)  # from here on no header is read
    assert load(shards, None, "train").fingerprint() == first.fingerprint()
    monkeypatch.undo()
    monkeypatch.setenv("RELSSL_CACHE", str(tmp_path / "kept"))
    index.write_bytes(index.read_bytes()[:-100])
    assert load(shards, None, "train").fingerprint() == first.fingerprint()
    changed = Path(shards.removeprefix("shards:")) / "part-01.tar"
    write(changed, samples(range(40, 52)))
    second = load(shards, None, "train")
    assert len(second) == 32 and second.fingerprint() != first.fingerprint() and identity(second) != identity(first)
    assert second.source.beginning(10) == photo(40)
    assert b"unreadable" in first.subset([12]).source.beginning(0)  # of a run that goes on while the shards change
    monkeypatch.setenv("RELSSL_CACHE", "/dev/null/nowhere")
    assert "is not kept" in load(shards, None, "train").notes[0]


def test_shards_are_named_from_the_root_on_shrunk_and_chosen_from_by_name(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exists("shards:set/part-{00..02}.tar", None) == f"{shards}/part-{{00..02}}.tar"
    images = load("shards:set", None, "train")
    for pattern in ("*.tar", "part-{00..02}.tar", "part-0?.tar"):
        assert load(f"{shards}/{pattern}", None, "train").fingerprint() == images.fingerprint()
    assert len(load(f"{shards}/part-{{01..02}}.tar", None, "train")) == 20
    (tmp_path / "index.txt").write_text("0013.jpg\npart-02.tar/0020.jpg\n")
    assert from_index("index.txt", images).tolist() == [13, 20]
    shrunk = shrunken(images, LoaderConfig(workers=0, cache=16, cache_folder=str(tmp_path / "small")), Report())
    assert len(shrunk) == 30 and shrunk.sizes.tolist() == [[12, 16]] * 30


# Tables


def test_splits_of_tables(tmp_path: Path) -> None:
    table(range(9)).save_to_disk(tmp_path / "saved")
    others = {"validation": table(range(9, 13)), "test": table(range(13, 15))}
    datasets.DatasetDict(train=table(range(9)), **others).save_to_disk(tmp_path / "parts")
    # As of folders, val comes before test.
    for name, split, count in (("parts", "test", 4), ("parts:validation", "bank", 4), ("parts:validation", "test", 2)):
        assert len(load(f"hf:{tmp_path}/{name}", None, split)) == count
    for name in ("saved", "parts:unlabeled"):
        with pytest.raises(DataError, match="has no split"):
            load(f"hf:{tmp_path}/{name}", None, "test")


def test_a_folder_of_images(tmp_path: Path) -> None:
    for number in range(9):
        path = tmp_path / "photos/train" / ["cat", "dog", "owl"][number // 3] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(number))
    images = load(f"hf:{tmp_path}/photos", None, "train")
    assert images.labels is not None and images.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert [images.source.beginning(row) for row in range(9)] == [photo(number) for number in range(9)]
    before = images.fingerprint(), identity(images)
    os.utime(tmp_path / "photos/train/cat/1.jpg", (1, 1))
    again = load(f"hf:{tmp_path}/photos", None, "train")
    assert (
        again.fingerprint() == before[0] and identity(again) != before[1] and identity(again.subset(range(9))) == identity(again)
    )


def test_columns_are_found_by_their_kind_and_named_where_there_are_several(tmp_path: Path) -> None:
    masks = (datasets.Image(), [{"bytes": photo(50 + n), "path": None} for n in range(4)])
    coarse = (datasets.ClassLabel(names=["a", "b"]), [0, 1, None, -1])
    table(range(4), mask=masks, coarse=coarse).save_to_disk(tmp_path / "many")
    for columns in ("", "#coarse", "#image,x"):
        with pytest.raises(DataError, match=r"one column of images .*mask \(Image\)"):
            load(f"hf:{tmp_path}/many{columns}", None, "train")
    images = load(f"hf:{tmp_path}/many#mask,coarse", None, "train")
    assert images.source.beginning(1) == photo(51) and images.labels is not None and images.labels.tolist() == [0, 1, -1, -1]
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "texts")
    with pytest.raises(DataError, match="one column of images"):
        load(f"hf:{tmp_path}/texts", None, "train")


def test_names_that_cannot_be_loaded_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ConnectionError("Couldn't reach the hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert exists("hf:cifar10:test#img", None) is None and not at_hand("hf:cifar10", None) and at_hand(f"hf:{tmp_path}", None)
    with pytest.raises(DataError, match=r"hf:cifar10: cannot be loaded \(Couldn't reach the hub at all\)"):
        load("hf:cifar10", None, "train")
    for data in ("hf:./nowhere", "hf:/nowhere:train", "hf:"):
        with pytest.raises(DataError, match="no such folder"):
            exists(data, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"relssl\[hf\]"):
        exists("hf:cifar10", None)


def test_of_several_splits_one_has_to_be_train_or_named(tmp_path: Path) -> None:
    datasets.DatasetDict(validation=table(range(4)), test=table(range(2))).save_to_disk(tmp_path / "parts")
    with pytest.raises(DataError, match="has no split train, only validation, test; name one"):
        load(f"hf:{tmp_path}/parts", None, "train")
    assert len(load(f"hf:{tmp_path}/parts:validation", None, "train")) == 4
