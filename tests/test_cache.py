"""The cache of shrunk images: exactly the images, made smaller beforehand, whatever happens while they are made."""

import contextlib
import dataclasses
import errno
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bad_images import SKIP
from relssl.data import decode as decoding
from relssl.data.cache import PIXELS, TABLE, Shrunk, place, shrunken
from relssl.data.images import Files, Images
from relssl.data.loader import Plan
from relssl.data.named import load
from relssl.engine import Engine
from relssl.errors import DataError, Interrupted, StorageError
from relssl.settings.reading import merge
from relssl.settings.run import LoaderConfig, resolve
from relssl.train.console import Display
from relssl.train.pretrain import resume
from relssl.train.pretrain import shrink as shrink_images
from relssl.train.run import build
from relssl.train.signals import StopRequest
from small_runs import SMALL, differing, final_state, repeatable_rows, small_run
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


def paint(path: Path, number: int) -> None:
    """Wide, tall, square, and every fourth small enough to stay as it is."""
    coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    size = [(90, 60), (50, 101), (64, 64), (40, 31)][number % 4]
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(COUNT):
        paint(tmp_path / "images" / f"{number:02}.png", number)
    return tmp_path / "images"


@pytest.fixture
def images(folder: Path) -> Images:
    return load(str(folder), None, "train")


@pytest.fixture
def options(tmp_path: Path) -> LoaderConfig:
    return LoaderConfig(workers=0, cache=SIDE, cache_folder=str(tmp_path / "kept"))


def pixels_at(shrunk: Shrunk, row: int) -> Image.Image:
    with shrunk.open(row, 0) as opened:
        return opened.rgb(1)


def pixels_of(shrunk: Shrunk) -> list[bytes]:
    return [pixels_at(shrunk, row).tobytes() for row in range(len(shrunk)) if row not in shrunk.bad]


def whole_of(images: Images, root: Path) -> list[bytes]:
    """All pixels of a cache that nothing disturbs."""
    options = LoaderConfig(workers=0, cache=SIDE, cache_folder=str(root / "whole"))
    return pixels_of(shrunken(images, options, Report()))


def by_hand(path: Path) -> Image.Image:
    image = Image.open(path).convert("RGB")
    width, height = image.size
    if min(width, height) <= SIDE:
        return image
    size = (SIDE, round(height * SIDE / width)) if width < height else (round(width * SIDE / height), SIDE)
    return image.resize(size, Image.Resampling.LANCZOS)


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
    first = shrunken(images, options, report)
    size = os.path.getsize(first.folder / PIXELS)
    assert report.steps == [8, 16, 20] and f"{size / 1e6:.1f} MB" in report.lines[-1]
    second = shrunken(images, options, again)
    assert again.steps == [] and again.lines == report.lines[-1:]
    assert pixels_of(second) == pixels_of(first) and size == second.total
    assert len(pickle.dumps(second)) < 3000  # workers are not sent the pixels
    assert pixels_of(pickle.loads(pickle.dumps(second))) == pixels_of(first)


def test_other_images_sides_and_limits_have_caches_of_their_own(folder: Path, images: Images, options: LoaderConfig) -> None:
    as_bitmap = folder.parent / "bitmaps"
    as_bitmap.mkdir()
    for file in folder.iterdir():
        Image.open(file).save(as_bitmap / f"{file.stem}.bmp")
    bitmaps = load(str(as_bitmap), None, "train")
    before = place(bitmaps, options)
    shutil.copytree(as_bitmap, folder.parent / "elsewhere")
    assert place(load(str(folder.parent / "elsewhere"), None, "train"), options) == before
    content = bytearray((as_bitmap / "03.bmp").read_bytes())
    content[-1] ^= 255
    (as_bitmap / "03.bmp").write_bytes(content)  # of the same size and name
    others = [{"cache": SIDE + 1}, {"max_pixels": 4000}, {"reduced_decode": False}]
    places = {before, place(bitmaps, options), place(images, options)}
    places |= {place(images.subset(rows), options) for rows in (range(5), [1, 0])}
    places |= {place(images, dataclasses.replace(options, **other)) for other in others}  # type: ignore[arg-type]
    assert len(places) == 8


def test_what_is_damaged_is_made_again(images: Images, options: LoaderConfig) -> None:
    first = shrunken(images, options, Report())
    whole, table, pixels = pixels_of(first), first.folder / TABLE, first.folder / PIXELS
    for path, content in (
        *((table, table.read_bytes().replace(b"\x28", b"\x29")), (table, table.read_bytes()[:50]), (table, b"something else")),
        *((pixels, pixels.read_bytes()[:-1]), (pixels, b"")),
    ):
        path.write_bytes(content)
        assert len(Shrunk.load(first.folder, first.files)) == 0
        assert pixels_of(shrunken(images, options, Report())) == whole


KILL = """
import os, signal, sys
import test_cache as tests
def kill(done):
    if done == 16:
        os.kill(os.getpid(), signal.SIGKILL)
options = tests.LoaderConfig(workers=0, cache=tests.SIDE, cache_folder=sys.argv[2])
tests.shrunken(tests.load(sys.argv[1], None, "train"), options, tests.Report(kill))
"""


def test_a_killed_build_is_never_a_wrong_cache(folder: Path, images: Images, options: LoaderConfig, tmp_path: Path) -> None:
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    words = [sys.executable, "-c", KILL, str(folder), str(options.cache_folder)]
    assert subprocess.run(words, env=os.environ | {"PYTHONPATH": path}, check=False).returncode == -signal.SIGKILL
    assert (place(images, options) / PIXELS).stat().st_size > 0
    assert pixels_of(shrunken(images, options, Report())) == whole_of(images, tmp_path)


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
    assert torch.equal(plain.ids, seen.ids) and plain.bad == seen.bad and len(seen.bad) >= len(kinds)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_a_fault_that_may_pass_is_not_kept_and_the_build_goes_on_there(
    workers: int, error: BaseException, images: Images, options: LoaderConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opener = decoding.open_regular

    def failing(path: str, flags: int) -> int:
        if path.endswith("13.png"):
            raise error
        return opener(path, flags)

    with monkeypatch.context() as patched:
        patched.setattr(decoding, "open_regular", failing)
        with pytest.raises(DataError, match=r"^\S*/13.png: "):
            shrunken(images, dataclasses.replace(options, workers=workers), Report())
    folder, report = place(images, options), Report()
    assert isinstance(images.source, Files) and len(Shrunk.load(folder, images.source)) == 8
    with (folder / PIXELS).open("ab") as file:
        file.write(b"half an image that no table names")
    assert pixels_of(shrunken(images, options, report)) == whole_of(images, tmp_path) and report.steps == [16, 20]


def test_a_disk_without_room_is_refused_before_anything_is_written(
    images: Images, options: LoaderConfig, monkeypatch: Any
) -> None:
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=90_000))
    with pytest.raises(StorageError, match=r"0\.1 MB, 0\.1 MB are free.* loader\.cache, or set loader\.cache_folder") as told:
        shrunken(images, options, Report())
    assert told.value.exit_code == 5 and (place(images, options) / PIXELS).stat().st_size == 0


def test_a_disk_that_fills_up_is_a_storage_error_and_the_build_can_be_repeated(
    images: Images, options: LoaderConfig, tmp_path: Path
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, limits[1]))  # bytes of a file: those of two batches and a half
    try:
        with pytest.raises(StorageError, match=r"pixels: cannot be written .* free some space.*loader\.cache_folder"):
            shrunken(images, options, Report())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert pixels_of(shrunken(images, options, Report())) == whole_of(images, tmp_path)


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
        "data": str(folder),
        "recipe": "digits",
        "batch_size": 4,
        "max_images": 18,
        "epochs": 1,
        "optimizer.warmup_epochs": 0,
        "views": {"weak": "weak", "strong": "contrastive"},
        "checkpoint.every_steps": 3,
        "checkpoint.keep": 9,
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


class Asked(StopRequest):
    """Somebody asks to stop as soon as the first images are shrunk."""

    def pending(self) -> int:
        return 143


def test_a_build_ends_when_the_run_is_asked_to_stop_and_goes_on_later(folder: Path, tmp_path: Path) -> None:
    over = {"data": str(folder), "loader": {"cache": SIDE, "cache_folder": str(tmp_path / "kept"), "workers": 0}}
    small = {"views": {"weak": {"size": 32}, "strong": {"size": 32}}, "batch_size": 8, "encoder": {"stem": "small"}}
    settings = merge(merge({k: v for k, v in SMALL.items() if k != "encoder"}, over), small | {"out": str(tmp_path / "run")})
    config = resolve(settings)
    run = build(config, Engine(config.engine))
    with Display(show=False, stop=Asked(None)) as display:
        with pytest.raises(Interrupted, match="resume") as caught:
            shrink_images(run, display)
        assert caught.value.exit_code == 143
        assert isinstance(run.images.source, Files)
    with Display(show=False) as display:
        shrink_images(run, display)
    assert isinstance(run.images.source, Shrunk) and len(run.images) == COUNT
