"""Data sets of one's own: what items may be, and that they train as files of the same pixels do."""

import io
import multiprocessing
import multiprocessing.context
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import relssl
from relssl.data.decode import BadImage, decode, open_image
from relssl.data.images import Images, Pixels
from relssl.data.loader import Loader, Plan
from relssl.data.named import load
from relssl.data.own import Items, open_dataset, open_item
from relssl.data.plain import PlainView, Reader
from relssl.data.subsets import identity
from relssl.errors import ConfigError, DataError, Interrupted
from relssl.evaluation.pairs import LabelledPair
from relssl.files import read_rows
from relssl.settings import parts
from relssl.settings.run import VIEWS, LoaderConfig, ViewConfig
from relssl.train.pretrain import resume
from small_runs import equal_runs, small_run

CPU = torch.device("cpu")
STATISTICS = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
VIEW = ViewConfig(**{"name": "contrastive", **VIEWS["contrastive"], "size": 20})


def pictures(count: int = 12) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (30 + row % 4, 40, 3), np.uint8) for row in range(count)]


class Own(torch.utils.data.Dataset[Any]):
    """Items of any kind, some of which raise, as dictionaries beside something else."""

    def __init__(self, items: list[Any], broken: tuple[int, ...] = ()) -> None:
        self.items, self.broken = items, broken

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> dict[str, Any]:
        if row in self.broken:
            raise KeyError("lost")
        return {"caption": "a picture", "image": self.items[row]}


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def batches(images: Images, **settings: Any) -> Iterator[torch.Tensor]:
    plan = Plan(len(images), 4, seed=3)
    loader = Loader(images, [VIEW, VIEW], plan, CPU, STATISTICS, LoaderConfig(**settings))
    for (batch,) in loader.stream(0, 2 * plan.steps_per_epoch):
        yield from (batch.weak, *batch.strong)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for row, pixels in enumerate(pictures()):
        Image.fromarray(pixels).save(folder / f"{row:02}.png")
    return folder


@pytest.mark.parametrize("kind", ["pil", "array", "tensor", "bytes", "path", "tuple", "16 bits", "floats", "workers"])
def test_items_of_any_kind_give_the_views_and_plain_views_of_files(folder: Path, kind: str) -> None:
    turn: dict[str, Any] = {
        "array": lambda pixels: pixels,
        "tensor": lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1),
        "bytes": png,
        "tuple": lambda pixels: (Image.fromarray(pixels), 3),
        "16 bits": lambda pixels: pixels.astype(np.uint16) * 257,
        "floats": lambda pixels: pixels.astype(np.float32) / 255,
    }
    items = [turn.get(kind, Image.fromarray)(pixels) for pixels in pictures()]
    if kind == "path":
        items = sorted(folder.iterdir())
    files, own = load(str(folder), None, "train"), open_dataset(items if kind in ("path", "tuple") else Own(items), "own")
    workers = 2 if kind == "workers" else 0
    assert all(map(torch.equal, batches(files), batches(own, workers=workers)))
    reader = Reader(PlainView(20, 1.1, "bilinear", *STATISTICS))
    (expected,), (read,) = list(reader.batches(files)), list(reader.batches(own))
    assert torch.equal(expected[1], read[1])


def test_a_picture_is_turned_and_flattened_as_its_file_is(tmp_path: Path) -> None:
    exif, image = Image.Exif(), Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 6, 4), np.uint8))
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    expected = decode(str(tmp_path / "a.png"), 99)
    with Image.open(tmp_path / "a.png") as unread:
        items = [unread, (tmp_path / "a.png").read_bytes(), tmp_path / "a.png"]
        for row in range(3):
            with open_dataset(items, "own").source.open(row, 99) as opened:
                assert opened.size == (6, 8) and opened.rgb(1) == expected


def test_what_was_done_to_a_picture_counts(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (8, 8), (shade,) * 3) for shade in (10, 100)]
    pages[0].save(path := tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with Image.open(path) as changed, Image.open(path) as second, Image.open(path) as unread:
        changed.paste((200, 0, 0), (0, 0, 8, 8))
        second.seek(1)
        images = open_dataset([changed, second, unread], "own")
        for row, colour in enumerate(((200, 0, 0), (100,) * 3, (10,) * 3)):
            assert np.array_equal(images.read(row, 99), np.full((8, 8, 3), colour))


def test_an_array_may_be_turned_and_a_whole_batch_unreadable() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 20, 24), np.uint8)
    source = open_dataset(pixels[::-1, ::-1], "own").source
    assert isinstance(source, Pixels) and np.array_equal(source.tensor, pixels[::-1, ::-1])
    bands = [*np.zeros((2, 5, 20, 24), np.uint8), None]
    reader = Reader(PlainView(20, 1.0, "bilinear", (0.5,) * 5, (0.25,) * 5))
    parts = list(reader.batches(open_dataset(bands, "own"), 2))
    assert [len(rows) for rows, _, _ in parts] == [2, 0] and parts[1][2][0][0] == "own/000002"


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW", "floats"])
@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_an_array_of_all_images_is_in_memory_as_its_items_are(layout: str, kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 20, 24, 3), np.uint8)
    whole: Any = {"NHWC": pixels, "NCHW": pixels.transpose(0, 3, 1, 2), "NHW": pixels[..., 0], "floats": pixels / 255}[layout]
    images = open_dataset(torch.from_numpy(whole.copy()) if kind == "tensor" else whole, "own")
    expected = pixels.transpose(0, 3, 1, 2)[:, : images.channels]
    assert images.in_memory and images.channels == (1 if layout == "NHW" else 3)
    with images.source.open(4, 999) as opened:
        bands = opened.bands if opened.bands is not None else np.asarray(opened.rgb(1)).transpose(2, 0, 1)
        assert np.array_equal(bands, expected[4])


@pytest.mark.parametrize(
    ("item", "fault"),
    [
        (np.zeros((20, 5, 17), np.uint8), "shape"),
        (np.zeros(9, np.uint8), "shape"),
        (np.full((4, 4), 1.5), "0..1"),
        (np.full((4, 4), np.nan), "0..1"),
        (np.zeros((4, 4), np.int64), "int64"),
        (np.full((4, 4), 70000, np.int32), "32-bit"),
        (Image.new("RGB", (40, 40)), "max_pixels"),
        (b"", "broken"),
        (None, "NoneType"),
        ("/no/such/file.png", "No such file"),
    ],
)
def test_what_is_no_image_is_a_bad_one_with_the_reason(item: Any, fault: str) -> None:
    with pytest.raises(BadImage, match=fault), open_item(item, 999) as opened:
        opened.whole()


@pytest.mark.parametrize("dataset", [7, "photos", iter([]), Own([1, 2]), [], {"other": [0]}, np.full((2, 3, 3), 2.0)])
def test_what_is_no_data_set_is_refused_in_one_line(dataset: Any) -> None:
    with parts.at_hand({"data": dataset}), pytest.raises(DataError) as caught:
        load(parts.name_of(dataset), None, "train")
    assert "\n" not in str(caught.value)


def test_a_run_on_a_mapping_goes_on(tmp_path: Path) -> None:
    both = {"train": (list(pictures(64)), [0, 1] * 32), "test": (list(pictures(20)), [0, 1] * 10)}
    settings: dict[str, Any] = {
        "recipe": "digits",
        "epochs": 1,
        "quiet": True,
        "batch_size": 16,
        "log.report": False,
        "threads": 1,
    }
    settings |= {"views": {"enlarge": True}, "method": {"memory_size": 32}}
    run = relssl.pretrain(both, out=tmp_path / "run", **settings)
    assert "knn_top1" in run.rows[-1] and relssl.resume(run.folder, data=both, epochs=2, quiet=True).rows[-1]["epoch"] == 2


class Named(Own):
    targets = torch.tensor([1, 0, 1])
    classes = ("cat", "dog")

    def __getitem__(self, row: int) -> dict[str, Any]:
        assert row == 0, "decoded"
        return super().__getitem__(row)


def test_labels_are_read_without_decoding() -> None:
    pixels, whole = pictures(3), np.zeros((3, 8, 8, 3), np.uint8)
    labelled = [
        (Named(pixels), [1, 0, 1], ("cat", "dog")),
        (torch.utils.data.Subset(Named(pixels), [0, 2]), [1, 1], ("cat", "dog")),
        ([{"image": pixels[0], "label": word} for word in ("b", "a", "b")], [1, 0, 1], ("a", "b")),
        ((whole, [0, 2, 1]), [0, 2, 1], None),
        (torch.utils.data.TensorDataset(torch.from_numpy(whole), torch.tensor([0, 2, 1])), [0, 2, 1], None),
        (torch.utils.data.Subset(Own(pixels), [2, 0]), None, None),
    ]
    for dataset, labels, classes in labelled:
        images = open_dataset(dataset, "own")
        assert (images.labels if images.labels is None else images.labels.tolist()) == labels
        assert images.classes == classes and len(images) == len(labels or [2, 0])


def test_both_sides_come_from_a_mapping_and_a_function_may_return_it() -> None:
    sides = {"train": (pictures(6), [0, 1] * 3), "test": (pictures(9)[6:], [0, 1, 1])}
    for dataset in (sides, lambda: sides):
        with parts.at_hand({"data": dataset}):
            pair = LabelledPair.load(parts.name_of(dataset), None)
            assert (len(pair.bank), len(pair.test), pair.classes) == (6, 3, 2) and pair.notes() == []


def test_the_fingerprint_is_that_of_the_content() -> None:
    one, same, other = (open_dataset(Own(pictures(9)), "a"), open_dataset(pictures(9), "b"), open_dataset(pictures(9)[::-1], "c"))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    assert one.subset([2, 3]).fingerprint() != one.fingerprint()


def test_caches_know_every_path_of_a_list_and_the_content_of_every_other_item(folder: Path, tmp_path: Path) -> None:
    paths = [Path(shutil.copy(file, tmp_path)) for file in sorted(folder.iterdir())] * 20
    before = identity(open_dataset(paths, "own"))
    os.utime(paths[5], (1, 1))
    assert identity(open_dataset(paths, "own")) != before
    pixels = list(pictures(200))
    before = identity(open_dataset(pixels, "own"))
    pixels[101] = 255 - pixels[101]
    assert identity(open_dataset(pixels, "own")) != before


def test_a_request_to_stop_is_no_bad_image_and_a_fault_of_the_machine_not_the_images() -> None:
    faults = iter([Interrupted("stopped", 143), OSError(5, "Input/output error"), ValueError("odd")])

    class Failing(Own):
        def __getitem__(self, row: int) -> Any:
            raise next(faults)

    items = Items(Failing([0]), np.arange(1), "own")
    with pytest.raises(Interrupted):
        items.item(0)
    lasting = []
    for _ in range(2):
        with pytest.raises(BadImage) as fault:
            items.item(0)
        lasting.append(fault.value.lasting)
    assert lasting == [False, True]

    def stop() -> bytes:
        raise Interrupted("stopped", 143)

    with pytest.raises(Interrupted), open_image(stop, 99):
        pass


def test_an_item_that_draws_at_random_stays_the_same() -> None:
    class Noisy(Own):
        def __getitem__(self, row: int) -> Any:
            return torch.rand(3, 9, 9) * np.random.rand(), 0

    images, before = open_dataset(Noisy([0] * 4), "own"), torch.get_rng_state()
    assert all(map(torch.equal, batches(images), batches(images, workers=2)))
    assert torch.equal(before, torch.get_rng_state())


def test_what_cannot_be_sent_to_a_process_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Local(Own):
        pass

    monkeypatch.setattr("multiprocessing.context._default_context._default_context", multiprocessing.get_context("spawn"))
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", None)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"^loader.workers: ") as caught:
        next(batches(open_dataset(Local(pictures()), "own"), workers=1))
    assert len(str(caught.value).splitlines()) == 1


def test_a_run_skips_what_raises_and_goes_on_exactly_with_the_set_handed_over_again(tmp_path: Path) -> None:
    dataset = {"train": Own(pictures(64), broken=(5, 6)), "test": (pictures(6), [0, 1] * 3)}
    dataset["train"].targets = [0, 1] * 32
    settings = {"data": parts.name_of(dataset), "recipe": "digits", "max_images": None, "loader.workers": 1}
    with parts.at_hand({"data": dataset}):
        whole = small_run(tmp_path / "whole", **settings).folder
        with pytest.raises(Interrupted):
            small_run(tmp_path / "cut", **settings, time_limit=1e-9)
        resume(tmp_path / "cut", quiet=True, time_limit=float("inf"))
    bad = {(Path(row["file"]).name, row["reason"]) for row in read_rows(whole / "bad_samples.jsonl")}
    assert bad == {(f"00000{n}", "raises KeyError('lost')") for n in (5, 6)}
    assert "knn_top1" in read_rows(whole / "metrics.jsonl")[-1]
    assert equal_runs(whole, tmp_path / "cut")


class Packed(torch.utils.data.Dataset[Any]):
    """Images that follow each other in one file, opened where it is first read, as authors of data sets do for loader processes."""

    def __init__(self, path: Path, count: int) -> None:
        self.path, self.count, self.file = path, count, 0
        self.change: Any = lambda pixels: pixels  # which cannot be pickled

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Any:
        self.file = self.file or os.open(self.path, os.O_RDONLY)
        os.lseek(self.file, row * 2700, os.SEEK_SET)
        return self.change(np.frombuffer(os.read(self.file, 2700), np.uint8).reshape(30, 30, 3)), 0


class Mapped(torch.utils.data.Dataset[Any]):
    def __init__(self, path: Path) -> None:
        self.mapped, self.kept = np.memmap(path, np.uint8, "r", shape=(600, 30, 30, 3)), {"a": b"x" * 9}

    def __len__(self) -> int:
        return 600

    def __getitem__(self, row: int) -> Any:
        return np.asarray(self.mapped[row])


def test_what_cannot_change_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "packed").write_bytes(bytes(600 * 2700))
    dataset = Mapped(tmp_path / "packed")
    source: Any = open_dataset(dataset, "own").source
    assert source.near is not dataset and source.near.mapped is dataset.mapped and source.near.kept["a"] is dataset.kept["a"]


def test_pictures_that_are_not_read_yet_are_read_once(folder: Path) -> None:
    class Opened(torch.utils.data.Dataset[Any]):
        def __init__(self) -> None:
            self.images = [Image.open(path) for path in sorted(folder.iterdir())]

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, row: int) -> Any:
            return self.images[row]

    images, view = open_dataset(Opened(), "own"), PlainView(20, 1.0, "bilinear", *STATISTICS)
    passes = [[(views, bad) for _, views, bad in Reader(view, workers=2).batches(images, 2)] for _ in range(2)]
    assert all(torch.equal(one, other) and not bad and not more for (one, bad), (other, more) in zip(*passes, strict=True))


def test_loader_processes_share_no_file_that_a_data_set_opens_as_it_is_read(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (600, 30, 30, 3), np.uint8)
    (tmp_path / "packed").write_bytes(pixels.tobytes())
    images = open_dataset(torch.utils.data.Subset(Packed(tmp_path / "packed", 600), range(600)), "own")
    images.fingerprint()  # reads it here
    assert isinstance(images.source, Items) and images.source.near.dataset.file and not images.source.dataset.dataset.file
    assert pickle.loads(pickle.dumps(open_dataset(Mapped(tmp_path / "packed"), "own").source)).near is None
    view = PlainView(30, 1.0, "bilinear", *STATISTICS)
    for rows, views, bad in Reader(view, workers=3).batches(images, 50):
        expected = torch.from_numpy(pixels[rows]).permute(0, 3, 1, 2)
        assert not bad and torch.equal(views, view.normalise(expected))


def test_a_data_set_is_read_by_its_own_access_and_labels_are_its_own() -> None:
    class Darker(torch.utils.data.TensorDataset):
        def __getitem__(self, row: int) -> Any:
            return self.tensors[0][row] // 2

    class Wrapped(Own):
        dataset, indices, targets = Own(pictures(6)), [0, 2, 4], [7, 7, 7]

    pixels = torch.from_numpy(np.stack([each[:30] for each in pictures(8)]))
    darker = open_dataset(Darker(pixels, torch.arange(8)), "own")
    assert np.array_equal(np.asarray(darker.read(3, 10**6)), pixels[3] // 2)
    three = open_dataset(torch.utils.data.TensorDataset(pixels, torch.arange(8), torch.zeros(8)), "own")
    assert len(three) == 8 and three.labels is not None and three.labels.tolist() == [*range(8)]
    soft = open_dataset(torch.utils.data.TensorDataset(pixels, torch.rand(8, 10)), "own")
    assert len(soft) == 8 and soft.labels is None
    wrapped = open_dataset(Wrapped(pictures(3)), "own")
    assert wrapped.labels is not None and wrapped.labels.tolist() == [7, 7, 7]


def test_both_parts_of_a_mapping_number_their_classes_alike() -> None:
    sides = {"train": (pictures(6), ["cat", "bird", "dog"] * 2), "test": (pictures(9)[6:], ["dog", "cat", "fox"])}
    named = {
        part: [images.classes[label] for label in images.labels.tolist()]
        for part in ("train", "test")
        if (images := open_dataset(sides, "own", part)).classes and images.labels is not None
    }
    assert named == {part: labels for part, (_, labels) in sides.items()}
    assert open_dataset(sides, "own", "train").classes == open_dataset(sides, "own", "test").classes
    for other in (None, Own, iter([])):  # which is no set, and a fault of the test part alone
        assert len(open_dataset(sides | {"test": other}, "own", "train")) == 6


@pytest.mark.parametrize("labels", [[True, False, True], [1.0, 0.0, 1.0]])
def test_labels_may_be_truth_values_or_whole_numbers_of_a_table(labels: list[Any]) -> None:
    images = open_dataset((pictures(3), np.array(labels)), "own")
    assert images.labels is not None and images.labels.tolist() == [1, 0, 1]


def test_numbers_that_are_no_classes_are_refused_before_votes_are_counted() -> None:
    sides = {"train": (pictures(6), [10_000_000, 20_000_000] * 3), "test": (pictures(9)[6:], [10_000_000] * 3)}
    with (
        parts.at_hand({"data": sides}),
        pytest.raises(DataError, match="2 classes have numbers up to 20000000; number them"),
    ):
        LabelledPair.load(parts.name_of(sides), None)
    one_named = {"train": Named(pictures(3)), "test": (pictures(9)[6:], [50_000_000, 1, 0])}
    with parts.at_hand({"data": one_named}), pytest.raises(DataError, match="numbers up to 50000000"):
        LabelledPair.load(parts.name_of(one_named), None)
    many = {
        part: (np.zeros((20_000, 4, 4), np.uint8), list(range(20_000))) for part in ("train", "test")
    }  # all in use, and few of them measured
    with parts.at_hand({"data": many}):
        assert LabelledPair.load(parts.name_of(many), None, (50, 20)).classes > 10_000
