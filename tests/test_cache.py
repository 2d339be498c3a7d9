"""The cache of shrunk images: exactly the images, made smaller beforehand, whatever happens while they are made."""

import contextlib
import dataclasses
import errno
import os
import pickle
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bad_images import SKIP
from relssl.data import decode as decoding
from relssl.data.cache import PIXELS, TABLE, Shrunk, place, shrunken
from relssl.data.images import Files, Images
from relssl.data.loader import Plan
from relssl.data.named import load
from relssl.errors import DataError, Interrupted, StorageError
from relssl.settings.run import LoaderConfig
from relssl.train.console import Display
from relssl.train.pretrain import resume
from relssl.train.signals import StopRequest
from small_runs import differing, final_state, repeatable_rows, small_run
from test_loaders import batches, equal, loader_of

COUNT, SIDE = 20, 40


class Report:
    """What is reported; `during` is called with how many images are done."""

    def __init__(self, during: Callable[[int], object] = id) -> None:
        self.lines: list[str] = []
        self.steps: list[int] = []
        self.during = during

    def say(self, line: str) -> None:
        self.lines.append(line)

    @contextlib.contextmanager
    def chore(self, what: str, done: int, total: int) -> Iterator[Callable[[int], None]]:
        self.lines.append(f"{what}: {done} of {total}")

        def advance(done: int) -> None:
            self.steps.append(done)
            self.during(done)

        yield advance


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Wide, tall, square, and every fourth small enough to stay as it is."""
    (tmp_path / "images").mkdir()
    for number in range(COUNT):
        coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        size = [(90, 60), (50, 101), (64, 64), (40, 31)][number % 4]
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(tmp_path / f"images/{number:02}.png")
    return tmp_path / "images"


@pytest.fixture
def images(folder: Path) -> Images:
    return load(str(folder), None, "train")


@pytest.fixture
def options(tmp_path: Path) -> LoaderConfig:
    return LoaderConfig(workers=0, cache=SIDE, cache_folder=str(tmp_path / "kept"))


def by_hand(path: Path) -> Image.Image:
    image = Image.open(path).convert("RGB")
    width, height = image.size
    if min(width, height) <= SIDE:
        return image
    size = (SIDE, round(height * SIDE / width)) if width < height else (round(width * SIDE / height), SIDE)
    return image.resize(size, Image.Resampling.LANCZOS)


def check(images: Images, options: LoaderConfig, report: Report | None = None) -> Shrunk:
    """The cache, once it is made; all its pixels are those of images shrunk by hand."""
    shrunk = shrunken(images, options, report or Report())
    for row in range(len(images)):
        with shrunk.open(row, 0) as opened:
            assert opened.rgb(1).tobytes() == by_hand(Path(images.source.name(row))).tobytes()
    return shrunk


@pytest.mark.parametrize("workers", [0, 1])
def test_views_equal_those_of_images_shrunk_beforehand(workers: int, folder: Path, images: Images, options: LoaderConfig) -> None:
    small = folder.parent / "small"
    small.mkdir()
    for path in folder.iterdir():
        by_hand(path).save(small / path.name)
    shrunk = shrunken(images, dataclasses.replace(options, workers=workers), Report())
    plan, cached = Plan(COUNT, 10, seed=3), dataclasses.replace(images, source=shrunk)
    seen = batches(loader_of(cached, plan, workers=workers), 0, 5)
    assert equal(seen, batches(loader_of(load(str(small), None, "train"), plan), 0, 5))
    assert not equal(seen, batches(loader_of(images, plan), 0, 5))
    assert isinstance(cached.subset([1, 2]).source, Files) and cached.fingerprint() == images.fingerprint()


def test_a_second_run_uses_it_and_both_report_what_it_costs(images: Images, options: LoaderConfig) -> None:
    report, again = Report(), Report()
    first = check(images, options, report)
    size = os.path.getsize(first.folder / PIXELS)
    assert report.steps == [8, 16, 20] and f"{size / 1e6:.1f} MB" in report.lines[-1]
    second = check(images, options, again)
    assert again.steps == [] and again.lines == report.lines[-1:] and size == second.total
    copy = pickle.dumps(second)
    assert len(copy) < 3000  # workers are not sent the pixels
    with pickle.loads(copy).open(3, 0) as opened, first.open(3, 0) as other:
        assert opened.rgb(1).tobytes() == other.rgb(1).tobytes()


def test_other_images_sides_and_limits_have_caches_of_their_own(folder: Path, images: Images, options: LoaderConfig) -> None:
    bitmaps, elsewhere = folder.parent / "bitmaps", folder.parent / "elsewhere"
    bitmaps.mkdir()
    for file in folder.iterdir():
        Image.open(file).save(bitmaps / f"{file.stem}.bmp")
    shutil.copytree(bitmaps, elsewhere)
    before, copied = (place(load(str(each), None, "train"), options) for each in (bitmaps, elsewhere))
    assert copied == before
    content = bytearray((bitmaps / "03.bmp").read_bytes())
    content[-1] ^= 255
    (bitmaps / "03.bmp").write_bytes(content)  # of the same size and name
    others: list[dict[str, Any]] = [{}, {"cache": SIDE + 1}, {"max_pixels": 4000}, {"reduced_decode": False}]
    places = {before, place(load(str(bitmaps), None, "train"), options)}
    places |= {place(images.subset(rows), options) for rows in (range(5), [1, 0])}
    places |= {place(images, dataclasses.replace(options, **other)) for other in others}
    assert len(places) == 8


def test_what_is_damaged_is_made_again(images: Images, options: LoaderConfig) -> None:
    first = check(images, options)
    table, pixels = first.folder / TABLE, first.folder / PIXELS
    for path, content in (
        *((table, table.read_bytes().replace(b"\x28", b"\x29")), (table, table.read_bytes()[:50]), (table, b"something else")),
        *((pixels, pixels.read_bytes()[:-1]), (pixels, b"")),
    ):
        path.write_bytes(content)
        assert len(Shrunk.load(first.folder, first.files)) == 0
        check(images, options)


def test_a_killed_build_is_never_a_wrong_cache(images: Images, options: LoaderConfig) -> None:
    def kill(done: int) -> None:
        if done == 16:
            os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        try:
            shrunken(images, options, Report(kill))
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert (place(images, options) / PIXELS).stat().st_size > 0
    check(images, options)


def test_unreadable_images_are_remembered_with_their_reasons(folder: Path, options: LoaderConfig) -> None:
    kinds = ["html_404_jpg", "jpeg_cut_50", "random_jpg", "png_zero_size"]
    for number, kind in enumerate(kinds):
        extension, make = SKIP[kind]
        (folder / f"{number:02}-bad.{extension}").write_bytes(make())
    images = load(str(folder), None, "train")
    assert len(shrunken(images, options, Report()).bad) == len(kinds)
    reopened = dataclasses.replace(images, source=shrunken(images, options, Report()))
    plan = Plan(len(images), len(images))
    (plain,), (seen,) = (next(loader_of(each, plan).stream(0, 1)) for each in (images, reopened))
    assert plain.ids.tolist() == seen.ids.tolist() and plain.bad == seen.bad and len(seen.bad) >= len(kinds)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_a_fault_that_may_pass_is_not_kept_and_the_build_goes_on_there(
    workers: int, error: BaseException, images: Images, options: LoaderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    opener, opened = decoding.open_regular, set[str]()  # the first time for the sample that tells how much room is needed

    def failing(path: str, flags: int) -> int:
        if path.endswith("13.png") and path in opened:
            raise error
        opened.add(path)
        return opener(path, flags)

    with monkeypatch.context() as patched:
        patched.setattr(decoding, "open_regular", failing)
        with pytest.raises(DataError, match=r"^\S*/13.png: "):
            shrunken(images, dataclasses.replace(options, workers=workers), Report())
    folder, report = place(images, options), Report()
    assert len(Shrunk.load(folder, images.source)) == 8
    with (folder / PIXELS).open("ab") as file:
        file.write(b"half an image that no table names")
    check(images, options, report)
    assert report.steps == [16, 20]


def test_a_build_that_is_asked_to_stop_goes_on_later(images: Images, options: LoaderConfig) -> None:
    class Asked(StopRequest):
        """Somebody asks when the first images are shrunk."""

        answers = iter([0, 143])

        def pending(self) -> int:
            return next(self.answers)

    with Display(show=False, stop=Asked(None)) as display, pytest.raises(Interrupted, match="resume") as caught:
        shrunken(images, options, display)
    assert caught.value.exit_code == 143
    report = Report()
    check(images, options, report)
    assert report.steps == [16, 20]


def test_a_disk_without_room_is_refused_before_anything_is_written(
    images: Images, options: LoaderConfig, monkeypatch: Any
) -> None:
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=90_000))
    with pytest.raises(StorageError, match=r"0\.1 MB, 0\.1 MB are free.* loader\.cache, or set loader\.cache_folder") as caught:
        shrunken(images, options, Report())
    assert caught.value.exit_code == 5 and (place(images, options) / PIXELS).stat().st_size == 0


def test_a_disk_that_fills_up_is_a_storage_error_and_the_build_can_be_repeated(images: Images, options: LoaderConfig) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, limits[1]))  # bytes of a file: those of two batches and a half
    try:
        with pytest.raises(StorageError, match=r"pixels: cannot be written .* free some space.*loader\.cache_folder"):
            shrunken(images, options, Report())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check(images, options)


def test_two_that_want_the_same_agree(images: Images, options: LoaderConfig) -> None:
    going, go = threading.Event(), threading.Event()

    def slowly(done: int) -> None:
        going.set()
        assert go.wait(60)

    reports = [Report(slowly), Report()]
    threads = [threading.Thread(target=shrunken, args=(images, options, report)) for report in reports]
    threads[0].start()
    assert going.wait(60)
    threads[1].start()
    while not reports[1].lines and threads[1].is_alive():
        threads[1].join(0.01)
    go.set()
    for thread in threads:
        thread.join(60)
    assert reports[0].steps == [8, 16, 20] and reports[1].steps == [] and len(reports[1].lines) == 2


def test_a_run_on_shrunk_images_resumes_exactly(folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        **{"data": str(folder), "recipe": "digits", "batch_size": 4, "max_images": 18, "epochs": 1, "optimizer.warmup_epochs": 0},
        "views": {"weak": "weak", "strong": "contrastive"},
        **{"checkpoint.every_steps": 3, "checkpoint.keep": 9, "log.knn_every": 0},
        "loader": {"workers": 1, "cache": SIDE, "cache_folder": str(tmp_path / "kept")},
    }
    small_run(tmp_path / "whole", **settings)
    whole, rows = final_state(tmp_path / "whole"), repeatable_rows(tmp_path / "whole")
    shutil.rmtree(tmp_path / "kept")
    (tmp_path / "whole/status.json").unlink()
    resume(tmp_path / "whole", checkpoint="step-00000003", quiet=True)
    assert differing(whole, final_state(tmp_path / "whole")) == [] and rows == repeatable_rows(tmp_path / "whole")
    (kept,) = (tmp_path / "kept").iterdir()
    assert len(Shrunk.load(kept, Files.of(str(folder), []))) == 18
