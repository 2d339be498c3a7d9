"""Folders and list files: every image once, whatever its name, and nothing else."""

import json
import os
import pickle
import socket
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bad_images import NAMES, jpeg
from relssl.cli import main
from relssl.data.folder import shown
from relssl.data.images import Files
from relssl.data.lists import read_list
from relssl.data.named import SETS, data_root, exists, load
from relssl.errors import DataError


def plant(root: Path, *names: str | bytes, data: bytes = b"x") -> None:
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)


def below(root: Path, files) -> list[str]:
    return [os.path.relpath(file, root) for file in files]


def scan(folder: str):
    images = load(folder, None, "train")
    return images.source, {os.path.relpath(name, folder): fault for name, fault in images.bad}, images.notes


def test_a_tree_is_listed_as_by_walking_it_in_the_order_of_bytes(tmp_path):
    rng = np.random.Generator(np.random.PCG64(0))
    for number in range(300):
        folder = "/".join("abcdeABCDE"[index] for index in rng.integers(0, 10, rng.integers(0, 5)))
        extension = ["jpg", "PNG", "Jpeg", "txt", "webp", "npy"][number % 6]
        plant(tmp_path, f"{folder or '.'}/{number}.{extension}", data=b"x" * (number + 1))
    wanted = [
        os.path.join(folder, name)
        for folder, _, names in os.walk(tmp_path)
        for name in names
        if name.lower().endswith((".jpg", ".png", ".jpeg", ".webp"))
    ]
    files, bad, _ = scan(str(tmp_path))
    assert list(files) == sorted(wanted, key=os.fsencode) and bad == {}
    assert [os.path.getsize(file) for file in files] == files.sizes.tolist()


@pytest.mark.parametrize("kind", NAMES)
def test_any_name_survives_a_scan_a_list_and_json(kind, tmp_path):
    plant(tmp_path, NAMES[kind], data=jpeg())
    files, bad, _ = scan(str(tmp_path))
    assert bad == {} and len(files) == 1
    name = files.name(0)
    assert os.fsencode(name) == os.path.join(os.fsencode(tmp_path), NAMES[kind])
    with files.open(0, 10**6) as image:
        assert image.rgb(1).mode == "RGB"
    line = json.dumps({"file": name})
    assert line.isascii() and json.loads(line)["file"] == name and shown(name).isprintable()
    if not {b"\n"[0], b"\t"[0]} & set(NAMES[kind]):
        (tmp_path / "list.txt").write_bytes(b"./" + NAMES[kind] + b"\n")
        assert os.fsencode(read_list(str(tmp_path / "list.txt")).source.name(0)).endswith(b"/./" + NAMES[kind])


def test_hidden_files_and_junk_are_passed_over(tmp_path):
    plant(
        tmp_path, ".hidden.jpg", "._a.jpg", ".git/b.jpg", "Thumbs.db", "readme.txt", "a.jpg.tmp", "jpg", "x", "..c.jpg", "a.jpg"
    )
    (tmp_path / "folder.jpg").mkdir()
    files, bad, (note,) = scan(str(tmp_path))
    assert below(tmp_path, files) == ["..c.jpg", "a.jpg"] and bad == {}
    assert "2 without ending" in note and note.endswith("3 others")  # hidden images are counted too


@pytest.fixture
def trapped(tmp_path):
    """A folder with a real image in it, and with all that only looks like one."""
    root = tmp_path / "images"
    plant(root, "real.jpg", "sub/deep.jpg", data=jpeg())
    plant(tmp_path, "outside.jpg", "images-beside/file.jpg", data=jpeg())
    plant(root, "empty.jpg", data=b"")
    for link, target in (
        ("link.jpg", "real.jpg"),
        ("chain.jpg", "link.jpg"),
        ("sub/up.jpg", "../real.jpg"),
        ("absolute.jpg", root / "real.jpg"),
        ("broken.jpg", "missing.jpg"),
        ("self.jpg", "self.jpg"),
        ("out.jpg", "../outside.jpg"),
        ("beside.jpg", "../images-beside/file.jpg"),
        ("zero.jpg", "/dev/zero"),
        ("null.jpg", "/dev/null"),
        ("loop", "."),
        ("loop.jpg", ".."),
        ("sub/loop", "../sub"),
        ("away", ".."),
    ):
        (root / link).symlink_to(target)
    os.link(root / "real.jpg", root / "hard.jpg")
    os.mkfifo(root / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "socket.jpg"))
        yield root


def test_traps_are_listed_with_a_reason_and_links_followed_once(trapped):
    plant(trapped.parent, "store/deep/x.jpg", "store/y.jpg")
    plant(trapped.parent, "other/z.jpg")
    for link, target in (
        ("b", "../store"),
        ("a", "../store/deep"),
        ("c", "../other"),
        ("sub/again", "../c"),
        ("gone", "nowhere"),
    ):
        (trapped / link).symlink_to(target)
    (trapped.parent / "store/back").symlink_to(trapped)
    files, bad, _ = scan(str(trapped))
    usable = ["a/x.jpg", "absolute.jpg", "b/y.jpg", "beside.jpg", "c/z.jpg", "chain.jpg", "hard.jpg", "link.jpg", "out.jpg"]
    usable += ["real.jpg", "sub/deep.jpg", "sub/up.jpg"]
    assert below(trapped, files) == usable
    around = dict.fromkeys(["away", "b/back", "b/deep", "loop", "loop.jpg", "sub/again", "sub/loop"], "leads to a folder")
    files = {"empty.jpg": "is empty"} | dict.fromkeys(["broken.jpg", "self.jpg"], "is a broken link")
    files |= dict.fromkeys(["null.jpg", "pipe.jpg", "socket.jpg", "zero.jpg"], "is not a regular file")
    assert bad.keys() == {*around, *files} and all(bad[name].startswith(reason) for name, reason in (around | files).items())
    (trapped.parent / "alias").symlink_to(trapped)  # the folder itself may be a link
    assert below(trapped.parent / "alias", scan(str(trapped.parent / "alias"))[0]) == usable


def test_list_files(trapped, tmp_path):
    plant(tmp_path, "a.jpg", "sub/b c.png", "noext", "#1.jpg")
    lines = ["\ufeff# a comment", "a.jpg\tcat", "", "  ", "sub/b c.png\tdog\r", f"{tmp_path}/a.jpg\t cat ", "noext", "./#1.jpg"]
    (tmp_path / "list.txt").write_text("\n".join([*lines, "gone.jpg\tcat", "far.jpg\tdog\t7"]), newline="")
    images = read_list(str(tmp_path / "list.txt"))
    assert below(tmp_path, images.source) == ["a.jpg", "sub/b c.png", "a.jpg", "noext", "#1.jpg", "far.jpg"]
    assert images.labels.tolist() == [0, 1, 0, -1, -1, 1] and images.classes == ("cat", "dog")
    assert images.bad == [("gone.jpg", "cannot be read: No such file or directory (line 9)")] and len(images.notes) == 1
    assert images.source.sizes.tolist() == [1, 1, 1, 1, 1, 7]  # a line with a size is believed
    # What is written down is meant, wherever a link leads; what is no image is not.
    (trapped / "list.lst").write_text("out.jpg\npipe.jpg\nsocket.jpg\nbroken.jpg\nsub\nempty.jpg\nzero.jpg\n")
    images = read_list(str(trapped / "list.lst"))
    assert below(trapped, images.source) == ["out.jpg"]
    assert [file for file, _ in images.bad] == ["pipe.jpg", "socket.jpg", "broken.jpg", "sub", "empty.jpg", "zero.jpg"]


def test_lists_without_and_with_numeric_labels(tmp_path):
    plant(tmp_path, "a.jpg")
    (tmp_path / "plain.txt").write_text("a.jpg\na.jpg\n")
    assert read_list(str(tmp_path / "plain.txt")).labels is None
    (tmp_path / "numbers.txt").write_text("a.jpg\t10\na.jpg\t9\na.jpg\t2\n")
    images = read_list(str(tmp_path / "numbers.txt"))
    assert images.classes == ("2", "9", "10") and images.labels.tolist() == [2, 1, 0]


LISTS: dict[
    str, tuple[bytes, list[str], list[str]]
] = {  # as others write them: the lines, the files and the labels that are meant
    "blank": (b"a b.jpg 1\nc.jpg 0\n", ["a b.jpg", "c.jpg"], ["1", "0"]),
    "trailing blanks": (b"a b.jpg \nc.jpg\n\n", ["a b.jpg", "c.jpg"], []),
    "windows": (b"sub\\d.jpg\r\nc.jpg\r\n", ["sub/d.jpg", "c.jpg"], []),
    "utf-16": ("\ufeffc.jpg\r\nü.jpg\r\n".encode("utf-16-le"), ["c.jpg", "ü.jpg"], []),
    "csv": (b'path,label\n"a b.jpg",cat\nc.jpg,"a, dog"\n', ["a b.jpg", "c.jpg"], ["cat", "a, dog"]),
    "columns": (b"image,width,class\nc.jpg,40,cat\nsub/d.jpg,40,dog\n", ["c.jpg", "sub/d.jpg"], ["cat", "dog"]),
    "columns without a head": (b"c.jpg,40,cat\nsub/d.jpg,40,dog\n", ["c.jpg", "sub/d.jpg"], []),
    "semicolons": (b"c.jpg;1\nsub/d.jpg;2\n", ["c.jpg", "sub/d.jpg"], ["1", "2"]),
    "working folder": (b"photos/c.jpg\nphotos/sub/d.jpg\n", ["c.jpg", "sub/d.jpg"], []),
    "one is missing": (b"gone.jpg,1\nc.jpg,1\nsub/d.jpg,2\n", ["c.jpg", "sub/d.jpg"], ["1", "2"]),
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_as_other_programs_write_them(kind, tmp_path, monkeypatch):
    lines, files, labels = LISTS[kind]
    plant(tmp_path, "photos/a b.jpg", "photos/c.jpg", "photos/sub/d.jpg", "photos/ü.jpg")
    plant(tmp_path, "photos/list.csv", data=lines)
    monkeypatch.chdir(tmp_path)
    for data in ("photos/list.csv", str(tmp_path / "photos/list.csv")):
        images = load(data, None, "train")
        assert [os.path.relpath(file, "photos") for file in images.source] == files
        assert [images.classes[label] for label in images.labels] == labels if labels else images.labels is None
        assert [reason.endswith("(line 1)") for _, reason in images.bad] == [True] * (kind == "one is missing")


def test_a_list_of_any_bytes_is_refused_by_its_lines(tmp_path):
    plant(tmp_path, "list.txt", data=bytes(range(256)) * 50 + b"x\0y\n" + b"n" * 200_000)
    with pytest.raises(DataError, match=r"\(line 1\)"):
        load(str(tmp_path / "list.txt"), None, "train")


def test_a_written_list_stands_for_its_folder(tmp_path, capsysbinary, monkeypatch):
    plant(tmp_path, *(f"photos/{name}.jpg" for name in ("train/dog/1", "train/cat/2", "val/dog/3")), data=b"abc")
    plant(tmp_path, "photos/train/dog/a\tb.jpg", "photos/train/dog/a\nb.jpg", b"photos/train/dog/\xff.jpg")
    plant(tmp_path, "photos/train/dog/empty.jpg", data=b"")
    monkeypatch.chdir(tmp_path)
    assert main(["list", "photos"]) == 0
    written, notes = capsysbinary.readouterr()
    (tmp_path / "list.txt").write_bytes(written)
    assert b"be used: 1," in notes and b"be used: 2," in notes  # the empty file, and those whose names a list cannot hold
    listed, folder = load("list.txt", None, "train"), load("photos", None, "train").subset([0, 1, 4])
    assert [os.path.abspath(file) for file in folder.source] == list(listed.source)
    assert listed.classes == ("cat", "dog") == folder.classes and listed.labels.tolist() == folder.labels.tolist() == [0, 1, 1]
    assert listed.source.sizes.tolist() == folder.source.sizes.tolist() and listed.bad == []
    assert main(["list", "photos/val"]) == 0  # a single class folder is no label
    assert capsysbinary.readouterr().out == os.fsencode(tmp_path / "photos/val/dog/3.jpg") + b"\t\t3\n"
    assert main(["list", "photos", "--json"]) == 0
    assert json.loads(capsysbinary.readouterr().out)["images"] == 3
    assert main(["list", "missing"]) == 3


@given(
    st.lists(st.binary(min_size=1, max_size=20).filter(lambda name: b"/" not in name and b"\0" not in name), max_size=30),
    st.randoms(),
)
def test_files_keep_what_was_put_in(names, random):
    files = Files.of("/top", [(name, row) for row, name in enumerate(names)])
    wanted = [os.fsdecode(b"/top/" + name) for name in names]
    assert list(files) == wanted and len(files) == len(names)
    rows = [random.randrange(len(names)) for _ in range(5 * bool(names))]
    part = files.take(np.array(rows, np.int64))
    assert list(part) == [wanted[row] for row in rows] and part.sizes.tolist() == rows
    assert list(pickle.loads(pickle.dumps(files))) == wanted


def test_the_fingerprint_sees_names_sizes_order_and_count():
    base = Files.of("/a", [(b"one", 1), (b"two", 2)])
    assert Files.of("/elsewhere", [(b"one", 1), (b"two", 2)]).fingerprint() == base.fingerprint()
    others = [((b"one", 1), (b"twx", 2)), ((b"one", 1), (b"two", 3)), ((b"two", 2), (b"one", 1)), ((b"on", 1), (b"etwo", 2))]
    files = [base, base.take(np.arange(1)), *(Files.of("/a", entries) for entries in others)]
    assert len({each.fingerprint() for each in files}) == 6


def test_exists_accepts_what_can_be_loaded(tmp_path):
    plant(tmp_path, "flat/a.jpg", "split/train/c/a.jpg", "split/val/c/b.jpg", "imagenet/train/c/a.jpg", "imagenet/val/c/b.jpg")
    (tmp_path / "list.txt").write_text("flat/a.jpg\n")
    for data in ("flat", "split", "list.txt"):
        assert exists(str(tmp_path / data), None) is not None
    for name in SETS:
        exists(name, str(tmp_path))


@pytest.mark.parametrize(
    ("data", "part"),
    [
        *(("cifar-10", "nearest is cifar10"), ("digit", "nearest is digits"), ("FashionMNIST", "nearest is fashion-mnist")),
        *(("{}/missing", "{}/missing"), ("missing.txt", "missing.txt"), ("a\0b", "a"), ("line\nbreak/x", "line")),
        *(("{}/empty", "{}/empty"), ("{}/texts", "{}/texts"), ("{}/broken", "cannot be used: 1"), ("{}/half", "half/val")),
        *(("{}/empty.txt", "empty.txt"), ("{}/image.jpg", "image.jpg"), ("{}/pipe.txt", "pipe.txt"), ("imagenet", "data_root")),
        *(
            ("{}/phone", "2 .heic, 1 .dcm"),
            ("{}/photos.zip", "unpack it"),
            ("s3://bucket/photos", "download"),
            ("{}/*.jpg", "pattern"),
        ),
        ("{0}/half,{0}/texts", "several folders"),
    ],
)
def test_exists_refuses_in_one_line(data, part, tmp_path):
    (tmp_path / "empty").mkdir()
    plant(tmp_path, "texts/a.txt", "image.jpg", "half/train/a.jpg", "half/val/b.txt", "photos.zip")
    plant(tmp_path, "phone/1.HEIC", "phone/2.heic", "phone/3.dcm")
    plant(tmp_path, "broken/a.jpg", "empty.txt", data=b"")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError) as caught:
        exists(data.format(tmp_path), str(tmp_path))
    assert part.format(tmp_path) in str(caught.value) and str(caught.value).isprintable() and caught.value.exit_code == 3


def test_the_root_of_named_sets(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("RELSSL_DATA", raising=False)
    assert data_root(None) == "/home/me/.cache/relssl"
    monkeypatch.setenv("RELSSL_DATA", "~/sets")
    assert data_root(None) == "/home/me/sets" and data_root("/given") == "/given"
