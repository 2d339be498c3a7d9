"""Folders and list files: every image once, whatever its name, and nothing else; a word on what is left out."""

import json
import os
import pickle
import socket
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bad_images import NAMES, jpeg
from relssl.cli import main
from relssl.data.folder import shown
from relssl.data.images import Files, Images
from relssl.data.lists import read_list
from relssl.data.named import SETS, data_root, exists, load, sample
from relssl.errors import DataError


def plant(root: Path, *names: str | bytes, data: bytes | str = b"an image, never decoded") -> None:
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).write_bytes(data if isinstance(data, bytes) else data.encode())


def below(root: Path | str, images: Images | Files) -> list[str]:
    source = images.source if isinstance(images, Images) else images
    return [os.path.relpath(source.name(row), root) for row in range(len(source))]


def words(images: Images) -> list[str]:
    """The class of each image; of those without one nothing."""
    if images.labels is None or images.classes is None:
        return [""] * len(images)
    return ["" if label < 0 else images.classes[label] for label in images.labels]


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "Käfer") for form in ("NFC", "NFD"))
TWO = "train/a/1=a train/b/2=b"
# What lies in a folder (JPEGs where no ending is given) | training images=class | test images | parts of the notes
FOLDERS = {
    "flat": "b a/c train/d | a/c b train/d",
    "classes": "val/ant/4 train/cat/s/2 train/dog/3 val/dog/5 train/cat/1 | train/cat/1=cat train/cat/s/2=cat train/dog/3=dog"
    " | val/ant/4=ant val/dog/5=dog | only train/ is used; val/ is its test part",
    "one class is none": "train/x/1 test/x/2 | train/x/1 | test/x/2 | test/ is its test part",
    "stray": f"train/a/1 train/b/2 train/3 val/a/4 | train/3 {TWO} | val/a/4=a"
    " | val/ & in no class folder of train/, so without a part in evaluations: 1 images",
    "deep": "train/b/y/2 train/b/x/2 train/a/1 val/a/4 | train/a/1=a train/b/x/2=b train/b/y/2=b | val/a/4=a | val/ & b (of x, y)",
    "valid": f"train/a/1 train/b/2 valid/a/3 | {TWO} | valid/a/3=a | valid/",
    "capitalised": "Train/a/1 Train/b/2 Test/a/3 | Train/a/1=a Train/b/2=b | Test/a/3=a | only Train/ is used; Test/",
    "long names": "training/1 validation/2 | training/1 | validation/2 | validation/",
    "capitals": "TRAIN/1 val/2 test/3 | TRAIN/1 | val/2 | only TRAIN/ & which is val/: test/",
    "beside": "train/1 val/2 more/4 5 l/6.txt | train/1 | val/2 | val/ & is val/: more/, images beside these folders (1)",
    "inside": "in/train/1 in/test/2 | in/test/2 in/train/1 | | all of it is used, in/test/ too",
    "unicode": f"train/{COMPOSED}/1 train/b/2 val/{DECOMPOSED}/3 | train/{COMPOSED}/1={COMPOSED} train/b/2=b"
    f" | val/{DECOMPOSED}/3={COMPOSED} | val/",
    "hidden": ".git/b Thumbs.db none. a ..c.jpg | ..c.jpg a",
    "few others": "1 2 read.me ._1.txt a.jpg.tmp | 1 2",
    "many others": "1 2 read.me 4.xyz 5.xyz 6. | 1 2 | | 2 .xyz, 1 .me, 1 without ending",
    "pictures": "1 2 3.HEIC | 1 2 | | 1 .heic",
    "companions": "1 ._1.jpg | 1 | | 1 ._* of macOS",
    "hidden pictures": "1 .2.jpg | 1 | | 1 hidden",
}


def jpeg_name(name: str) -> str:
    return name if "." in name else f"{name}.jpg"


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_is_listed_split_and_labelled_by_its_folders(kind: str, tmp_path: Path) -> None:
    files, train, test, notes = [*FOLDERS[kind].split("|"), "", ""][:4]
    plant(tmp_path, *(jpeg_name(name) for name in files.split()))
    expected = {
        split: [(jpeg_name(name), word) for name, _, word in (each.partition("=") for each in side.split())]
        for split, side in {"train": train, "bank": train, "test": test}.items()
    }
    classes = dict.fromkeys(word for pairs in expected.values() for _, word in pairs if word)  # those of training first
    for split in [split for split, pairs in expected.items() if pairs]:
        images = load(str(tmp_path), None, split)
        assert list(zip(below(tmp_path, images), words(images), strict=True)) == expected[split]
        assert images.classes in (None, tuple(classes))
        if split == "train":
            parts = notes.split("&") if notes else []
            assert len(images.notes) == len(parts)
            assert all(part.strip() in note for part, note in zip(parts, images.notes, strict=True))
    if not expected["test"]:
        with pytest.raises(DataError, match="has no test images"):
            load(str(tmp_path), None, "test")


def test_a_tree_is_listed_as_by_walking_it_in_the_order_of_bytes(tmp_path: Path) -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    for number in range(300):
        folder = "/".join("abcdeABCDE"[index] for index in rng.integers(0, 10, rng.integers(0, 5)))
        extension = ["jpg", "PNG", "Jpeg", "txt", "webp", "npy"][number % 6]
        plant(tmp_path, f"{folder or '.'}/{number}.{extension}", data=b"x" * (number + 1))
    walked = [os.path.relpath(os.path.join(folder, name), tmp_path) for folder, _, names in os.walk(tmp_path) for name in names]
    images = load(str(tmp_path), None, "train")
    expected = sorted((name for name in walked if name.lower().endswith((".jpg", ".png", ".jpeg", ".webp"))), key=os.fsencode)
    assert below(tmp_path, images) == expected and images.bad == []
    assert isinstance(images.source, Files)
    assert [os.path.getsize(tmp_path / name) for name in expected] == images.source.sizes.tolist()
    some = sample(str(tmp_path), None, 5)
    assert some is not None and len(some) == 5 and {*below(tmp_path, some)} < {*expected}


@pytest.mark.parametrize("kind", NAMES)
def test_any_name_survives_a_scan_a_list_and_json(kind: str, tmp_path: Path) -> None:
    plant(tmp_path, NAMES[kind], data=jpeg())
    images = load(str(tmp_path), None, "train")
    assert images.bad == [] and len(images) == 1
    name = images.source.name(0)
    assert os.fsencode(name) == os.path.join(os.fsencode(tmp_path), NAMES[kind])
    with images.source.open(0, 10**6) as image:
        assert image.rgb(1).mode == "RGB"
    line = json.dumps({"file": name})
    assert line.isascii() and json.loads(line)["file"] == name and shown(name).isprintable()
    if not {b"\n"[0], b"\t"[0]} & set(NAMES[kind]):
        (tmp_path / "list.txt").write_bytes(b"./" + NAMES[kind] + b"\n")
        assert os.fsencode(read_list(str(tmp_path / "list.txt")).source.name(0)).endswith(b"/./" + NAMES[kind])


@pytest.fixture
def trapped(tmp_path: Path) -> Iterator[Path]:
    """A folder with a few images in it, and with all that only looks like one."""
    root = tmp_path / "images"
    plant(root, "real.jpg", "sub/deep.jpg", data=jpeg())
    plant(tmp_path, "outside.jpg", "beside/file.jpg", "store/deep/x.jpg", "store/y.jpg", "other/z.jpg")
    plant(root, "empty.jpg", data=b"")
    files = "link.jpg:real.jpg chain.jpg:link.jpg sub/up.jpg:../real.jpg broken.jpg:missing.jpg self.jpg:self.jpg out.jpg:../outside.jpg"
    files += f" absolute.jpg:{root}/real.jpg beside.jpg:../beside/file.jpg zero.jpg:/dev/zero null.jpg:/dev/null gone:nowhere"
    folders = (
        "loop:. loop.jpg:.. sub/loop:../sub away:.. b:../store a:../store/deep c:../other sub/again:../c ../store/back:../images"
    )
    for link, _, target in (pair.partition(":") for pair in f"{files} {folders}".split()):
        (root / link).symlink_to(target)
    os.link(root / "real.jpg", root / "hard.jpg")
    os.mkfifo(root / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "socket.jpg"))
        yield root


def test_traps_are_listed_with_a_reason_and_links_followed_once(trapped: Path) -> None:
    images = load(str(trapped), None, "train")
    usable = (
        "a/x.jpg absolute.jpg b/y.jpg beside.jpg c/z.jpg chain.jpg hard.jpg link.jpg out.jpg real.jpg sub/deep.jpg sub/up.jpg"
    )
    assert below(trapped, images) == usable.split()
    faults = {
        "leads to a folder that is read already": "away/ b/back/ b/deep/ loop/ loop.jpg/ sub/again/ sub/loop/",
        "is a broken link": "broken.jpg self.jpg",
        "is not a regular file": "null.jpg pipe.jpg socket.jpg zero.jpg",
        "is empty": "empty.jpg",
    }
    bad = {os.path.relpath(name, trapped): fault.partition(",")[0] for name, fault in images.bad}
    assert bad == {name.rstrip("/"): fault for fault, names in faults.items() for name in names.split()}
    (trapped.parent / "alias").symlink_to(trapped)  # the folder itself may be a link
    assert below(trapped.parent / "alias", load(str(trapped.parent / "alias"), None, "train")) == usable.split()


def test_list_files(trapped: Path, tmp_path: Path) -> None:
    plant(tmp_path, "a.jpg", "sub/b c.png", "noext", "#1.jpg", data=b"x")
    lines = ["\ufeff# a comment", "a.jpg\tcat", "", "  ", "sub/b c.png\tdog\r", f"{tmp_path}/a.jpg\t cat ", "noext", "./#1.jpg"]
    (tmp_path / "list.txt").write_text("\n".join([*lines, "gone.jpg\tcat", "far.jpg\tdog\t7"]), newline="")
    images = read_list(str(tmp_path / "list.txt"))
    assert below(tmp_path, images) == ["a.jpg", "sub/b c.png", "a.jpg", "noext", "#1.jpg", "far.jpg"]
    assert words(images) == ["cat", "dog", "cat", "", "", "dog"] and images.classes == ("cat", "dog")
    assert images.bad == [("gone.jpg", "cannot be read: No such file or directory (line 9)")] and len(images.notes) == 1
    assert isinstance(images.source, Files) and images.source.sizes.tolist() == [
        1,
        1,
        1,
        1,
        1,
        7,
    ]  # a line with a size is believed
    # What is written down is meant, wherever a link leads; what is no image is not.
    (trapped / "list.lst").write_text("out.jpg\npipe.jpg\nsocket.jpg\nbroken.jpg\nsub\nempty.jpg\nzero.jpg\n")
    images = read_list(str(trapped / "list.lst"))
    assert below(trapped, images) == ["out.jpg"]
    assert [file for file, _ in images.bad] == ["pipe.jpg", "socket.jpg", "broken.jpg", "sub", "empty.jpg", "zero.jpg"]


LISTS: dict[str, tuple[bytes, str, str]] = {  # as others write them: the lines, the files and the labels that are meant
    "blank": (b"a b.jpg 1\nc.jpg 0\n", "a b.jpg|c.jpg", "1|0"),
    "numbers": (b"c.jpg\t10\nc.jpg\t9\nc.jpg\t2\n", "c.jpg|c.jpg|c.jpg", "10|9|2"),
    "trailing blanks": (b"a b.jpg \nc.jpg\n\n", "a b.jpg|c.jpg", "|"),
    "windows": (b"sub\\d.jpg\r\nc.jpg\r\n", "sub/d.jpg|c.jpg", "|"),
    "utf-16": ("\ufeffc.jpg\r\nü.jpg\r\n".encode("utf-16-le"), "c.jpg|ü.jpg", "|"),
    "csv": (b'path,label\n"a b.jpg",cat\nc.jpg,"a, dog"\n', "a b.jpg|c.jpg", "cat|a, dog"),
    "columns": (b"image,width,class\nc.jpg,40,cat\nsub/d.jpg,40,dog\n", "c.jpg|sub/d.jpg", "cat|dog"),
    "columns without a head": (b"c.jpg,40,cat\nsub/d.jpg,40,dog\n", "c.jpg|sub/d.jpg", "|"),
    "semicolons": (b"c.jpg;1\nsub/d.jpg;2\n", "c.jpg|sub/d.jpg", "1|2"),
    "working folder": (b"photos/c.jpg\nphotos/sub/d.jpg\n", "c.jpg|sub/d.jpg", "|"),
    "working folder with sizes": (b"photos/c.jpg\t1\t7\nphotos/sub/d.jpg\t2\t7\n", "c.jpg|sub/d.jpg", "1|2"),
    "one is missing": (b"gone.jpg,1\nc.jpg,1\nsub/d.jpg,2\n", "c.jpg|sub/d.jpg", "1|2"),
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_as_other_programs_write_them(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, files, labels = LISTS[kind]
    plant(tmp_path, "photos/a b.jpg", "photos/c.jpg", "photos/sub/d.jpg", "photos/ü.jpg")
    plant(tmp_path, "photos/list.csv", data=lines)
    monkeypatch.chdir(tmp_path)
    for data in ("photos/list.csv", str(tmp_path / "photos/list.csv")):
        images = load(data, None, "train")
        assert below("photos", images) == files.split("|") and words(images) == labels.split("|")
        assert images.classes is None or kind != "numbers" or images.classes == ("2", "9", "10")
        assert [reason.endswith("(line 1)") for _, reason in images.bad] == [True] * (kind == "one is missing")


def test_a_list_of_any_bytes_is_refused_by_its_lines(tmp_path: Path) -> None:
    plant(tmp_path, "list.txt", data=bytes(range(256)) * 50 + b"x\0y\n" + b"n" * 200_000)
    with pytest.raises(DataError, match=r"\(line 1\)"):
        load(str(tmp_path / "list.txt"), None, "train")


def test_a_written_list_stands_for_its_folder(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, *(f"photos/{name}.jpg" for name in ("train/dog/1", "train/cat/2", "val/dog/3")), data=b"abc")
    plant(tmp_path, "photos/train/dog/a\tb.jpg", "photos/train/dog/a\nb.jpg", b"photos/train/dog/\xff.jpg")
    plant(tmp_path, "photos/train/dog/empty.jpg", data=b"")
    monkeypatch.chdir(tmp_path)
    assert main(["list", "photos"]) == 0
    written, notes = capsysbinary.readouterr()
    (tmp_path / "list.txt").write_bytes(written)
    assert b"be used: 1," in notes and b"be used: 2," in notes  # the empty file, and those whose names a list cannot hold
    listed, folder = load("list.txt", None, "train"), load("photos", None, "train").subset([0, 1, 4])
    assert below(tmp_path, listed) == below(tmp_path, folder) and listed.bad == []
    assert words(listed) == words(folder) == ["cat", "dog", "dog"] and listed.classes == folder.classes
    assert isinstance(listed.source, Files) and isinstance(folder.source, Files)
    assert listed.source.sizes.tolist() == folder.source.sizes.tolist()
    assert main(["list", "photos/val"]) == 0  # a single class folder is no label
    assert capsysbinary.readouterr().out == os.fsencode(tmp_path / "photos/val/dog/3.jpg") + b"\t\t3\n"
    assert main(["list", "photos", "--json"]) == 0
    assert json.loads(capsysbinary.readouterr().out)["images"] == 3
    assert main(["list", "missing"]) == 3


NAMES_OF_FILES = st.binary(min_size=1, max_size=20).filter(lambda name: b"/" not in name and b"\0" not in name)


@given(st.lists(NAMES_OF_FILES, max_size=30), st.randoms())
def test_files_keep_what_was_put_in(names: list[bytes], random) -> None:
    files = Files.of("/top", [(name, row) for row, name in enumerate(names)])
    expected = [os.fsdecode(b"/top/" + name) for name in names]
    rows = [random.randrange(len(names)) for _ in range(5 * bool(names))]
    for some, chosen in (
        (files, range(len(names))),
        (pickle.loads(pickle.dumps(files)), range(len(names))),
        (files.take(np.array(rows, np.int64)), rows),
    ):
        assert [some.name(row) for row in range(len(some))] == [expected[row] for row in chosen] and some.sizes.tolist() == [
            *chosen
        ]


def test_the_fingerprint_sees_names_sizes_order_and_count() -> None:
    base = Files.of("/a", [(b"one", 1), (b"two", 2)])
    assert Files.of("/elsewhere", [(b"one", 1), (b"two", 2)]).fingerprint() == base.fingerprint()
    others = [((b"one", 1), (b"twx", 2)), ((b"one", 1), (b"two", 3)), ((b"two", 2), (b"one", 1)), ((b"on", 1), (b"etwo", 2))]
    files = [base, base.take(np.arange(1)), *(Files.of("/a", entries) for entries in others)]
    assert len({each.fingerprint() for each in files}) == 6


def test_exists_accepts_what_can_be_loaded(tmp_path: Path) -> None:
    plant(tmp_path, "flat/a.jpg", "split/train/c/a.jpg", "split/val/c/b.jpg", "imagenet/train/c/a.jpg", "imagenet/val/c/b.jpg")
    plant(tmp_path, "list.txt", data="flat/a.jpg\n")
    for data in ("flat", "split", "list.txt"):
        assert exists(str(tmp_path / data), None) == str(tmp_path / data)
    for name in SETS:
        exists(name, str(tmp_path))


REFUSED = {
    **{"cifar-10": "nearest is cifar10", "digit": "nearest is digits", "FashionMNIST": "nearest is fashion-mnist"},
    **{"{}/missing": "{}/missing", "missing.txt": "missing.txt", "a\0b": "a", "line\nbreak/x": "line", "imagenet": "data_root"},
    **{"{}/empty": "{}/empty", "{}/texts": "{}/texts", "{}/broken": "cannot be used: 1", "{}/half": "half/val"},
    **{"{}/phone": "2 .heic, 1 .dcm", "{}/photos.zip": "unpack it", "{0}/half,{0}/texts": "several folders"},
    **{"{}/empty.txt": "empty.txt", "{}/image.jpg": "image.jpg", "{}/pipe.txt": "pipe.txt"},
    **{"s3://bucket/photos": "download", "{}/*.jpg": "pattern"},
}


@pytest.mark.parametrize("data", REFUSED)
def test_exists_refuses_in_one_line(data: str, tmp_path: Path) -> None:
    plant(
        tmp_path,
        "texts/a.txt",
        "image.jpg",
        "half/train/a.jpg",
        "half/val/b.txt",
        "photos.zip",
        "phone/1.HEIC",
        "phone/2.heic",
        "phone/3.dcm",
    )
    plant(tmp_path, "broken/a.jpg", "empty.txt", data=b"")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError) as caught:
        exists(data.format(tmp_path), str(tmp_path))
    assert REFUSED[data].format(tmp_path) in str(caught.value) and str(caught.value).isprintable() and caught.value.exit_code == 3


def test_the_root_of_named_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("RELSSL_DATA", raising=False)
    assert data_root(None) == "/home/me/.cache/relssl"
    monkeypatch.setenv("RELSSL_DATA", "~/sets")
    assert data_root(None) == "/home/me/sets" and data_root("/given") == "/given"
