"""What is found in a folder or a list file: every image once, whatever its name, and nothing else."""

import json
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bad_images import NAMES, jpeg
from relssl.data.decode import decode
from relssl.data.folder import read_list, scan, shown, split_folders
from relssl.data.images import Files
from relssl.data.named import SETS, data_root, exists
from relssl.errors import DataError


def plant(root: Path, *names: str | bytes, data: bytes = b"x") -> None:
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)


def below(root: Path, files) -> list[str]:
    return [os.path.relpath(file, root) for file in files]


def test_a_plain_tree_is_found_as_by_walking_it(tmp_path):
    rng = np.random.Generator(np.random.PCG64(0))
    for number in range(300):
        folder = "/".join("abcdeABCDE"[index] for index in rng.integers(0, 10, rng.integers(0, 5)))
        plant(
            tmp_path,
            f"{folder or '.'}/{number}.{['jpg', 'PNG', 'Jpeg', 'txt', 'webp', 'npy'][number % 6]}",
            data=b"x" * (number + 1),
        )
    wanted = [
        os.path.join(folder, name)
        for folder, _, names in os.walk(tmp_path)
        for name in names
        if name.lower().endswith((".jpg", ".png", ".jpeg", ".webp"))
    ]
    files, bad = scan(str(tmp_path))
    assert list(files) == sorted(wanted, key=os.fsencode) and bad == []
    assert [os.path.getsize(file) for file in files] == files.sizes.tolist()


def test_the_order_does_not_depend_on_when_files_were_made(tmp_path):
    for root, names in ((tmp_path / "one", "b/2 a/1 c ä Z"), (tmp_path / "two", "Z ä c a/1 b/2")):
        plant(root, *(f"{name}.png" for name in names.split()))
    one, two = scan(str(tmp_path / "one"))[0], scan(str(tmp_path / "two"))[0]
    assert list(one.names()) == list(two.names())
    assert one.fingerprint() == two.fingerprint()


@pytest.mark.parametrize("kind", NAMES)
def test_any_name_survives(kind, tmp_path):
    plant(tmp_path, NAMES[kind], data=jpeg())
    files, bad = scan(str(tmp_path))
    assert bad == [] and len(files) == 1
    assert os.fsencode(files.name(0)) == os.path.join(os.fsencode(tmp_path), NAMES[kind])
    assert decode(files.name(0), 10**6).mode == "RGB"
    line = json.dumps({"file": files.name(0), "reason": "is empty"})
    assert len(line.splitlines()) == 1 and line.isascii() and json.loads(line)["file"] == files.name(0)
    assert shown(files.name(0)).isprintable()
    if not {b"\n", b"\t"} & {NAMES[kind][at : at + 1] for at in range(len(NAMES[kind]))}:
        (tmp_path / "list.txt").write_bytes(b"./" + NAMES[kind] + b"\n")
        assert os.fsencode(read_list(str(tmp_path / "list.txt")).source.name(0)).endswith(b"/./" + NAMES[kind])


def test_hidden_files_and_junk_are_passed_over(tmp_path):
    plant(
        tmp_path,
        ".hidden.jpg",
        "._a.jpg",
        ".git/b.jpg",
        "Thumbs.db",
        "desktop.ini",
        ".DS_Store",
        "readme.txt",
        "a.jpg.tmp",
        "jpg",
        "x",
    )
    plant(tmp_path, "__MACOSX/._c.jpg", "a.jpg")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.jpg").mkdir()
    files, bad = scan(str(tmp_path))
    assert below(tmp_path, files) == ["a.jpg"] and bad == []


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


def test_traps_are_listed_with_a_reason_and_links_never_followed_away(trapped):
    files, bad = scan(str(trapped))
    assert below(trapped, files) == [
        "absolute.jpg",
        "chain.jpg",
        "hard.jpg",
        "link.jpg",
        "real.jpg",
        "sub/deep.jpg",
        "sub/up.jpg",
    ]
    reasons = {os.path.relpath(file, trapped): reason for file, reason in bad}
    assert reasons == {
        "beside.jpg": "is a link to outside the folder; copy the file, or name it in a list file",
        "broken.jpg": "is a broken link",
        "empty.jpg": "is empty",
        "null.jpg": "is a device, not a file",
        "out.jpg": "is a link to outside the folder; copy the file, or name it in a list file",
        "pipe.jpg": "is a named pipe, not a file",
        "self.jpg": "is a broken link",
        "socket.jpg": "is a socket, not a file",
        "zero.jpg": "is a device, not a file",
    }
    assert [file for file, _ in bad] == sorted(file for file, _ in bad)


def test_the_folder_itself_may_be_a_link(trapped, tmp_path):
    (tmp_path / "alias").symlink_to(trapped)
    assert len(scan(str(tmp_path / "alias"))[0]) == len(scan(str(trapped))[0])


def test_a_list_may_name_what_a_scan_leaves_out(trapped):
    (trapped / "list.lst").write_text("out.jpg\npipe.jpg\nsocket.jpg\nbroken.jpg\nsub\nempty.jpg\nzero.jpg\n")
    listing = read_list(str(trapped / "list.lst"))
    assert below(trapped, listing.source) == ["out.jpg"]
    assert [file for file, _ in listing.bad] == ["pipe.jpg", "socket.jpg", "broken.jpg", "sub", "empty.jpg", "zero.jpg"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_listed(tmp_path):
    plant(tmp_path, "a.jpg", "closed/b.jpg")
    (tmp_path / "closed").chmod(0)
    try:
        files, bad = scan(str(tmp_path))
    finally:
        (tmp_path / "closed").chmod(0o700)
    assert len(files) == 1 and bad[0][1] == "folder cannot be read: Permission denied"


def test_a_folder_deeper_than_a_path_may_be_long_is_listed(tmp_path):
    plant(tmp_path, "a.jpg")
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(25):
        os.mkdir("d" * 200, dir_fd=here)
        inner = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    files, bad = scan(str(tmp_path))
    assert len(files) == 1 and [reason for _, reason in bad] == ["folder cannot be read: File name too long"]


def test_many_files_are_found_quickly(tmp_path):
    for folder in range(20):
        (tmp_path / str(folder)).mkdir()
        plant(tmp_path, f"{folder}/first.jpg")
        for number in range(499):
            os.link(tmp_path / str(folder) / "first.jpg", tmp_path / str(folder) / f"{number}.jpg")
    begun = time.process_time()
    assert len(scan(str(tmp_path))[0]) == 10_000
    assert time.process_time() - begun < 1


def test_list_files(tmp_path):
    plant(tmp_path, "a.jpg", "sub/b c.png", "noext", "#1.jpg")
    absolute = str(tmp_path / "a.jpg")
    lines = [
        "\ufeff# a comment",
        "a.jpg\tcat",
        "",
        "  ",
        "sub/b c.png\tdog\r",
        f"{absolute}\t cat ",
        "noext",
        "./#1.jpg",
        "gone.jpg\tcat",
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines), newline="")
    found = read_list(str(tmp_path / "list.txt"))
    assert below(tmp_path, found.source) == ["a.jpg", "sub/b c.png", "a.jpg", "noext", "#1.jpg"]
    assert found.labels.tolist() == [0, 1, 0, -1, -1] and found.classes == ("cat", "dog")
    assert found.bad == [("gone.jpg", "cannot be read: No such file or directory")]


def test_lists_without_and_with_numeric_labels(tmp_path):
    plant(tmp_path, "a.jpg")
    (tmp_path / "plain.txt").write_text("a.jpg\na.jpg\n")
    assert read_list(str(tmp_path / "plain.txt")).labels is None
    (tmp_path / "numbers.txt").write_text("a.jpg\t10\na.jpg\t9\na.jpg\t2\n")
    found = read_list(str(tmp_path / "numbers.txt"))
    assert found.classes == ("2", "9", "10") and found.labels.tolist() == [2, 1, 0]


def test_a_list_of_any_bytes_is_survived(tmp_path):
    (tmp_path / "list.txt").write_bytes(bytes(range(256)) * 50 + b"x\0y\n" + b"n" * 5000)
    found = read_list(str(tmp_path / "list.txt"))
    assert len(found.source) == 0 and all(reason for _, reason in found.bad)


@given(
    st.lists(st.binary(min_size=1, max_size=20).filter(lambda name: b"/" not in name and b"\0" not in name), max_size=30),
    st.randoms(),
)
def test_paths_are_a_sequence_of_what_was_put_in(names, random):
    paths = Files("/top", names, range(len(names)))
    wanted = [os.fsdecode(b"/top/" + name) for name in names]
    assert list(paths) == wanted and len(paths) == len(names)
    rows = [random.randrange(len(names)) for _ in range(5 * bool(names))]
    assert list(paths.take(np.array(rows, np.int64))) == [wanted[row] for row in rows]
    assert paths.take(np.array(rows, np.int64)).sizes.tolist() == rows
    assert list(pickle.loads(pickle.dumps(paths))) == wanted


def test_the_fingerprint_sees_names_sizes_order_and_count():
    base = Files("/a", [b"one", b"two"], [1, 2])
    assert Files("/elsewhere", [b"one", b"two"], [1, 2]).fingerprint() == base.fingerprint()
    others = [
        Files("/a", [b"one", b"twx"], [1, 2]),
        Files("/a", [b"one", b"two"], [1, 3]),
        Files("/a", [b"two", b"one"], [2, 1]),
        Files("/a", [b"on", b"etwo"], [1, 2]),
        base.take(np.arange(1)),
    ]
    assert len({paths.fingerprint() for paths in [base, *others]}) == 6


def test_exists_accepts_what_can_be_loaded(tmp_path):
    plant(tmp_path, "flat/a.jpg", "split/train/c/a.jpg", "split/val/c/b.jpg", "imagenet/train/c/a.jpg", "imagenet/val/c/b.jpg")
    (tmp_path / "list.txt").write_text("flat/a.jpg\n")
    for data in ("flat", "split", "list.txt"):
        exists(str(tmp_path / data), None)
    for name in SETS:
        exists(name, str(tmp_path))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("cifar-10", "nearest is cifar10"),
        ("digit", "nearest is digits"),
        ("FashionMNIST", "nearest is fashion-mnist"),
        ("{}/missing", "no such folder or list file"),
        ("missing.txt", "no such folder or list file"),
        ("{}/empty", "holds no images"),
        ("{}/texts", "holds no images"),
        ("{}/broken", r"holds no images \(1 cannot be used; .*a.jpg is empty\)"),
        ("{}/half", "half/val: holds no images"),
        ("{}/empty.txt", "is an empty list"),
        ("{}/image.jpg", "neither a folder of images nor a list"),
        ("{}/pipe.txt", "neither a folder of images nor a list"),
        ("a\0b", "neither a folder nor a known data set"),
        ("line\nbreak/x", "no such folder"),
        ("imagenet", r"put train/CLASS/ and val/CLASS/ below .*imagenet"),
    ],
)
def test_exists_refuses_in_one_line(data, message, tmp_path):
    (tmp_path / "empty").mkdir()
    plant(tmp_path, "texts/a.txt", "image.jpg", "half/train/a.jpg", "half/val/b.txt")
    plant(tmp_path, "broken/a.jpg", "empty.txt", data=b"")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match=message) as caught:
        exists(data.format(tmp_path), str(tmp_path))
    assert str(caught.value).isprintable()


def test_split_folders_need_both_sides_and_prefer_val(tmp_path):
    plant(tmp_path, "train/a.jpg")
    assert split_folders(str(tmp_path)) is None
    plant(tmp_path, "test/a.jpg")
    assert split_folders(str(tmp_path))["test"].endswith("/test")
    plant(tmp_path, "val/a.jpg")
    assert split_folders(str(tmp_path))["test"].endswith("/val")


def test_the_root_of_named_sets(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("RELSSL_DATA", raising=False)
    assert data_root(None) == "/home/me/.cache/relssl"
    monkeypatch.setenv("RELSSL_DATA", "~/sets")
    assert data_root(None) == "/home/me/sets" and data_root("/given") == "/given"


def test_checking_imports_no_torch():
    code = "import sys; from relssl.data.named import exists; exists('digits', None); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
