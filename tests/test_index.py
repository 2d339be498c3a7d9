"""A kept index of a folder: always what a fresh scan would find, and never in the way."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bad_images import jpeg
from relssl.data import folder
from relssl.data.folder import EXTENSIONS, read_arrays, scan, write_arrays
from relssl.data.named import load
from relssl.errors import DataError
from relssl.evaluation.embed import embed
from small_runs import small_run
from test_files import plant, trapped  # noqa: F401  (a fixture)

TICK = 0.03  # seconds, well above the clock ticks of the file systems that tests run on


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """An empty cache; indexes of the smallest folders, trusted as soon as the clock has ticked, by their stamps alone."""
    monkeypatch.setenv("RELSSL_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(folder, "_SETTLED_NS", int(TICK * 0.7e9))
    monkeypatch.setattr(folder, "_SAMPLE", 0)


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that were really walked."""
    walked: list[str] = []

    def survey(folder: str, extensions: frozenset[str]) -> folder.Tree:
        walked.append(folder)
        return folder.survey(folder, extensions)

    monkeypatch.setattr(folder, "survey", survey)
    return walked


def found(folder: Path, index: bool = True) -> tuple[Any, ...]:
    files, bad = scan(str(folder), index=folder)
    return list(files), files.sizes.tolist(), files.fingerprint(), bad


def kept() -> list[Path]:
    return sorted((folder.cache_root() / "index").glob("*"))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    plant(tmp_path / "tree", "b/2.jpg", "a/1.png", "a/deep/3.jpg", "c.webp", b"caf\xe9/\xff.jpg")
    plant(tmp_path / "tree", "empty.jpg", data=b"")
    time.sleep(TICK)
    return tmp_path / "tree"


def test_a_second_scan_walks_nothing_and_finds_the_same(trapped: Path, walks: list[str]) -> None:  # noqa: F811
    plant(trapped, b"caf\xe9/\xff.jpg", "sub/b.PNG", ".hidden/c.jpg")
    plain = found(trapped, index=False)
    time.sleep(TICK)
    assert found(trapped) == plain and len(plain[3]) > 5
    assert found(trapped) == plain
    assert walks == [str(trapped)] and len(kept()) == 1


def test_an_index_gives_the_paths_as_they_were_asked_for(tree: Path, walks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found(tree)
    (tree.parent / "alias").symlink_to(tree)
    monkeypatch.chdir(tree.parent)
    for asked in (Path("tree"), tree.parent / "alias"):
        assert found(asked) == found(asked, index=False)
    assert walks == [str(tree)]


NAMES = ["a.jpg", "b.png", "x/a.jpg", "x/c.jpg", "x/y/d.jpg", "z/e.jpg", "x/.h.jpg", "z/t.txt"]
EDITS = ["write", "empty", "remove", "rename", "link", "folder", "drop", "replace"]


def edit(root: Path, kind: str, one: str, other: str) -> None:
    """One change of a tree; impossible ones do nothing."""
    path, second = root / one, root / other
    if not path.parent.is_dir() and kind != "folder":
        return
    if kind == "folder":
        path.parent.mkdir(parents=True, exist_ok=True)
    elif kind in ("write", "empty") and not path.exists() and not path.is_symlink():
        path.write_bytes(b"" if kind == "empty" else one.encode())
    elif kind == "write" and path.is_file() and path.stat().st_size == 0:
        path.write_bytes(b"no longer empty")  # where it lies: no folder's stamp shows it
    elif kind == "remove":
        path.unlink(missing_ok=True)
    elif kind == "rename" and path.exists() and second.parent.is_dir():
        path.rename(second)
    elif kind == "link" and not path.exists() and not path.is_symlink():
        path.symlink_to(os.path.relpath(second, path.parent) if other < "x/b" else root.parent / "outside.jpg")
    elif kind == "drop" and path.parent != root:
        shutil.rmtree(path.parent)
    elif kind == "replace" and path.is_file():
        plant(root.parent, "new", data=path.read_bytes() + b"+")
        (root.parent / "new").rename(path)


@given(st.lists(st.lists(st.tuples(st.sampled_from(EDITS), *[st.sampled_from(NAMES)] * 2), max_size=6), max_size=4), st.randoms())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_changes_an_index_equals_a_fresh_scan(rounds: list[list[tuple[str, str, str]]], random: Any) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place, "tree")
        plant(root, "a.jpg", "x/a.jpg", "x/y/d.jpg", "z/e.jpg")
        (root / "b.png").symlink_to("x/a.jpg")
        for edits in [[], *rounds]:
            for kind, one, other in edits:
                edit(root, kind, one, other)
            if random.random() < 0.7:
                time.sleep(TICK)  # else the folders are too fresh to be trusted
            for _ in range(2):
                assert found(root) == found(root, index=False)


def test_links_are_judged_anew(tree: Path, walks: list[str]) -> None:
    """The folder that holds the link does not change when the file it points to does."""
    (tree / "link.jpg").symlink_to("b/hop")
    (tree / "b/hop").symlink_to("2.jpg")
    time.sleep(TICK)
    first = found(tree)
    (tree / "b/2.jpg").write_bytes(b"longer than before")
    assert found(tree) == found(tree, index=False) != first and len(walks) == 2


def test_times_that_are_set_back_hide_nothing(tree: Path) -> None:
    """Archive programs give a folder its old modification time back after they have put files into it."""
    found(tree)
    before = (tree / "a").stat()
    plant(tree, "a/new.jpg")
    os.utime(tree / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert str(tree / "a/new.jpg") in found(tree)[0]


def test_a_folder_that_has_just_changed_is_not_trusted(tree: Path, walks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "_SETTLED_NS", 3600 * 10**9)
    found(tree), found(tree)
    assert kept() == [] and len(walks) == 2


def test_files_written_over_are_noticed_in_a_sample(tree: Path, walks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "_SAMPLE", 3)  # of five: the first, the middle and the last
    first = found(tree)
    assert found(tree) == first and len(walks) == 1
    (tree / "a/deep/3.jpg").write_bytes(b"another size")
    assert found(tree) == first and len(walks) == 1
    (tree / "b/2.jpg").write_bytes(b"another size")
    assert found(tree) == found(tree, index=False) != first
    monkeypatch.setattr(folder, "_SAMPLE", 5)
    shutil.rmtree(folder.cache_root() / "index")
    found(tree)
    assert kept() == []  # so small a folder is scanned as fast as checked


@pytest.mark.parametrize("position", [0, 20, 50, 100, 200, -1])
def test_a_damaged_index_is_scanned_again(position: int, tree: Path, walks: list[str]) -> None:
    first = found(tree)
    data = bytearray(kept()[0].read_bytes())
    data[position] ^= 1
    kept()[0].write_bytes(data)
    assert found(tree) == first and len(walks) == 2
    assert found(tree) == first and len(walks) == 2  # the damaged one was replaced


@pytest.mark.parametrize("content", [b"", b"relssl arrays 1\n", b"\x80\x04\x95 a pickle", None, ...])
def test_a_cut_or_foreign_index_is_scanned_again(content: Any, tree: Path, walks: list[str]) -> None:
    first = found(tree)
    path = kept()[0]
    if content is None:
        write_arrays(path, "another 7", {}, {"files.names": np.zeros(3)})
    elif content is ...:
        path.write_bytes(path.read_bytes()[:-3])
    else:
        path.write_bytes(content)
    assert found(tree) == first and len(walks) == 2


def test_another_folder_at_the_same_place_is_scanned_again(tree: Path) -> None:
    found(tree)
    tree.rename(tree.parent / "old")
    shutil.copytree(tree.parent / "old", tree)
    (tree / "c.webp").rename(tree / "d.webp")
    assert found(tree) == found(tree, index=False)


def test_extensions_have_indexes_of_their_own(tree: Path) -> None:
    assert len(scan(str(tree), EXTENSIONS, index=True)[0]) == 5
    assert len(scan(str(tree), frozenset({"png"}), index=True)[0]) == 1
    assert len(kept()) == 2


def test_without_a_place_to_write_it_there_is_none(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = found(tree, index=False)
    for place in (tmp_path / "file", Path("/proc/nowhere")):
        (tmp_path / "file").write_bytes(b"")
        monkeypatch.setenv("RELSSL_CACHE", str(place))
        assert found(tree) == plain and found(tree) == plain


def test_a_write_that_fails_leaves_nothing_behind(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = found(tree, index=False)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("relssl.data.folder.write_all", full)
    assert found(tree) == plain and kept() == []


def test_a_missing_folder_is_told_as_ever(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        scan(str(tmp_path / "gone"), index=True)


def test_it_is_private_and_can_be_switched_off(tree: Path, walks: list[str]) -> None:
    load(str(tree), None, "train", index=False)
    assert kept() == [] and walks == []
    load(str(tree), None, "train")
    load(str(tree), None, "train")
    assert len(walks) == 1
    assert stat.S_IMODE(kept()[0].stat().st_mode) == 0o600 and stat.S_IMODE(kept()[0].parent.stat().st_mode) == 0o700


def test_runs_and_embeddings_use_it_unless_told_not_to(tmp_path: Path, walks: list[str]) -> None:
    rng = np.random.default_rng(0)
    for number in range(8):
        plant(tmp_path / "images", f"{number}.jpg", data=jpeg(Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))))
    time.sleep(TICK)
    settings = {"data": str(tmp_path / "images"), "recipe": "digits", "batch_size": 4, "epochs": 1, "log.knn_every": 0}
    small_run(tmp_path / "plain", **settings, **{"loader": {"index": False, "workers": 0}})
    embed(tmp_path / "plain", settings["data"], tmp_path / "plain.npz")
    assert kept() == [] and walks == []
    small_run(tmp_path / "indexed", **settings, **{"loader": {"workers": 0}})
    embed(tmp_path / "indexed", settings["data"], tmp_path / "indexed.npz")
    assert len(kept()) == 1 and walks == [settings["data"]]


def test_only_the_indexes_used_last_are_kept(tmp_path: Path, walks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "_KEPT", 3)
    for number in range(3):
        plant(tmp_path / str(number), "a.jpg")
    time.sleep(TICK)
    for number in (0, 1, 2, 0):
        found(tmp_path / str(number))
        time.sleep(TICK)
    plant(tmp_path / "3", "a.jpg")
    time.sleep(TICK)
    found(tmp_path / "3")
    assert len(kept()) == 3
    walks.clear()
    for number in (0, 2, 3):
        found(tmp_path / str(number))
    assert walks == []
    found(tmp_path / "1")
    assert walks == [str(tmp_path / "1")]


def shapes() -> Iterator[tuple[str, np.ndarray]]:
    yield "nothing", np.zeros((0,), np.uint8)
    yield "stamps", np.arange(8, dtype=np.uint64).reshape(2, 4) + (1 << 63)
    yield "turned", np.arange(6, dtype=">i4").reshape(2, 3).T


def test_arrays_are_read_as_they_were_written(tmp_path: Path) -> None:
    arrays = dict(shapes())
    write_arrays(tmp_path / "a", "kind 1", {"reasons": ["ä\n", None]}, arrays)
    facts, read = read_arrays(tmp_path / "a", "kind 1") or ({}, {})
    assert facts == {"reasons": ["ä\n", None]} and read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].shape == array.shape
    assert read_arrays(tmp_path / "a", "kind 2") is None and read_arrays(tmp_path / "b", "kind 1") is None
    assert json.loads((tmp_path / "a").read_bytes()[56:].split(b"}}")[0] + b"}}")["kind"] == "kind 1"


def test_what_makes_views_knows_nothing_of_weights() -> None:
    code = "import sys, relssl.data.loaders, relssl.data.shrinking; print(*(name for name in sys.modules if 'relssl.weights' in name))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
