"""Images inside tar files: the same images as from a folder, whatever the shards hold besides, and a word on what is not used."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bad_images import jpeg
from relssl.cli import main
from relssl.data.cache import shrunken
from relssl.data.named import exists, load
from relssl.data.subsets import from_index, identity, shared
from relssl.errors import DataError
from relssl.files import read_rows
from relssl.settings.run import LoaderConfig
from small_runs import differing, final_state, small_run
from test_cache import Report

Members = list[tuple[str, bytes]]


def write(path: Path, members: Members, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELSSL_CACHE", str(tmp_path / "kept"))


def photo(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return jpeg(Image.fromarray(pixels))


def samples(numbers: range, labels: bool = True) -> Members:
    members = [(f"{number:04}.jpg", photo(number)) for number in numbers]
    return sorted(members + [(f"{number:04}.cls", str(number % 3).encode()) for number in numbers if labels])


def plant_all(folder: Path, contents: Members) -> None:
    folder.mkdir()
    for name, content in contents:
        (folder / name).write_bytes(content)


def bad_file_of_equal_runs(root: Path, data: str) -> str:
    """Train on the files in photos/, and with loader processes on DATA with the same images; the name of its one unreadable image."""
    for name, each, workers in (("files", str(root / "photos"), 0), ("other", data, 2)):
        small_run(root / name, data=each, loader={"workers": workers}, recipe="digits", batch_size=8, epochs=1, max_images=24)
    assert differing(final_state(root / "files"), final_state(root / "other")) == []
    (bad,) = read_rows(root / "other/bad_samples.jsonl")
    return str(bad["file"])


@pytest.fixture
def shards(tmp_path: Path) -> str:
    for part in range(3):
        write(tmp_path / f"set/part-{part:02}.tar", samples(range(10 * part, 10 * part + 10)))
    return f"shards:{tmp_path}/set"


def test_shards_hold_the_images_and_labels_of_webdatasets_layout(shards: str) -> None:
    images = load(shards, None, "train")
    assert len(images) == 30 and images.classes == ("0", "1", "2") and images.labels is not None
    assert images.labels.tolist() == [number % 3 for number in range(30)] and images.notes == ()
    for row in (29, 0, 13):
        with Image.open(io.BytesIO(photo(row))) as wanted, images.source.open(row, 10**6) as opened:
            assert opened.rgb(1).tobytes() == wanted.convert("RGB").tobytes()
    assert images.source.name(13) == shards.removeprefix("shards:") + "/part-01.tar/0013.jpg"
    part = images.subset([7, 22])
    assert part.labels is not None and part.labels.tolist() == [1, 1] and part.source.beginning(1) == photo(22)
    assert part.fingerprint() != images.fingerprint() == load(shards, None, "bank").fingerprint()
    assert pickle.loads(pickle.dumps(images.source)).beginning(3) == photo(3)
    for pattern in ("*.tar", "part-{00..02}.tar", "part-0?.tar"):
        assert load(f"{shards}/{pattern}", None, "train").fingerprint() == images.fingerprint()
    assert len(load(f"{shards}/part-{{01..02}}.tar", None, "train")) == 20


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


def test_a_run_on_shards_equals_one_on_the_same_files(tmp_path: Path) -> None:
    contents = [(f"{number:04}.jpg", photo(number) if number != 5 else b"broken") for number in range(24)]
    plant_all(tmp_path / "photos", contents)
    for part in range(2):
        write(tmp_path / f"{part}.tar", contents[12 * part : 12 * part + 12])
    assert bad_file_of_equal_runs(tmp_path, f"shards:{tmp_path}/*.tar") == f"{tmp_path}/0.tar/0005.jpg"


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
    }
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
    (tmp_path / "index.txt").write_text("0013.jpg\npart-02.tar/0020.jpg\n")
    assert from_index("index.txt", images).tolist() == [13, 20]
    shrunk = shrunken(images, LoaderConfig(workers=0, cache=16, cache_folder=str(tmp_path / "small")), Report())
    assert len(shrunk) == 30 and shrunk.sizes.tolist() == [[12, 16]] * 30
