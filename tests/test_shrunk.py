"""Shrunk images: exactly the images, made smaller beforehand, whatever happens while they are made."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import pickle
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
from relssl.data import cache
from relssl.data import decode as decoding
from relssl.data.cache import PIXELS, TABLE, Shrunk, place, shrink, shrunken
from relssl.data.decode import BadImage, decode
from relssl.data.folder import cache_root
from relssl.data.images import Files, Images
from relssl.data.loader import FromFiles, Plan, Resident, create_loader
from relssl.data.named import load
from relssl.data.plain import PlainView, Reader
from relssl.engine import Engine
from relssl.errors import ConfigError, DataError, Interrupted, StorageError
from relssl.settings.reading import merge
from relssl.settings.run import Config, derive, resolve
from relssl.train.pretrain import build, resume
from relssl.train.pretrain import shrink as shrink_images
from relssl.train.run_folder import Display
from relssl.train.signals import StopRequest
from small_runs import SMALL, differing, final_state, repeatable_rows, small_run
from test_loaders import batches, equal

CPU = torch.device("cpu")
COUNT = 20
SIDE = 40


class Told:
    """What the user is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[int] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    @contextlib.contextmanager
    def chore(self, what: str, done: int, total: int) -> Iterator[Callable[[int], None]]:
        self.lines.append(f"{what}: {done} of {total}")
        yield self.steps.append


def size_of(number: int) -> tuple[int, int]:
    """Wide, tall, square, and every fourth small enough to stay as it is."""
    return [(90, 60), (50, 101), (64, 64), (40, 31)][number % 4]


def paint(path: Path, number: int, size: tuple[int, int]) -> None:
    coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(COUNT):
        paint(tmp_path / "images" / f"{number:02}.png", number, size_of(number))
    return tmp_path / "images"


@pytest.fixture
def images(folder: Path) -> Images:
    return load(str(folder), None, "train")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return settings_for(tmp_path)


def settings_for(root: Path, **more: Any) -> Config:
    given = {"loader.workers": 0, "loader.cache": SIDE, "loader.cache_folder": str(root / "kept")} | more
    config = resolve({"data": "digits", "views.strong": "contrastive", "views.weak": "weak"} | given)
    return dataclasses.replace(config, views=dataclasses.replace(config.views, mean=(0.5,) * 3, std=(0.25,) * 3, margin=1.0))


def reader(images: Images, config: Config, plan: Plan) -> Resident | FromFiles:
    return create_loader(images, derive(config).views, plan, CPU, config.views.statistics(), config.loader)


def pixels_of(shrunk: Shrunk) -> list[bytes]:
    return [shrunk.open(row, 10**6).rgb().tobytes() for row in range(len(shrunk)) if row not in shrunk.bad]


def shrunk_by_hand(path: Path) -> Image.Image:
    image = Image.open(path).convert("RGB")
    width, height = image.size
    if min(width, height) <= SIDE:
        return image
    size = (SIDE, round(height * SIDE / width)) if width < height else (round(width * SIDE / height), SIDE)
    return image.resize(size, Image.Resampling.LANCZOS)


@pytest.mark.parametrize("workers", [0, 1])
def test_views_equal_those_of_images_shrunk_beforehand(workers: int, folder: Path, images: Images, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    for path in folder.iterdir():
        shrunk_by_hand(path).save(tmp_path / "small" / path.name)
    config = settings_for(tmp_path, **{"loader.workers": workers})
    plain = load(str(tmp_path / "small"), None, "train")
    cached = dataclasses.replace(images, source=shrunken(images, config, Told()))
    plan = Plan(COUNT, 10, seed=3)
    shown = batches(reader(cached, config, plan), 0, 5)
    assert equal(shown, batches(reader(plain, config, plan), 0, 5))
    assert not equal(shown, batches(reader(images, config, plan), 0, 5))


def test_small_images_are_the_originals_and_others_have_the_side_asked_for(images: Images, config: Config) -> None:
    shrunk = shrunken(images, config, Told())
    for row in range(COUNT):
        original = images.read(row, 10**6)
        made = shrunk.open(row, 10**6).rgb()
        assert made.mode == "RGB" and min(made.size) == min(SIDE, *original.size)
        assert abs(made.width / made.height - original.width / original.height) < 0.03
        if row % 4 == 3:
            assert made.size == original.size and made.tobytes() == original.tobytes()


def test_photographs_are_decoded_at_a_reduced_size_unless_that_is_off(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    paint(tmp_path / "photos/large.jpg", 0, (900, 640))
    images = load(str(tmp_path / "photos"), None, "train")
    reduced, whole = (
        shrunken(images, settings_for(tmp_path, **{"loader.reduced_decode": how}), Told()).open(0, 10**6).rgb()
        for how in (True, False)
    )
    assert whole.tobytes() == shrink(images.read(0, 10**6), SIDE).tobytes()
    assert reduced.size == whole.size == (56, SIDE)
    difference = np.abs(np.asarray(reduced, np.int16) - np.asarray(whole, np.int16))
    assert 0 < difference.mean() < 2 and difference.max() < 20


def test_a_second_run_finds_it_at_once_and_says_what_it_costs(images: Images, config: Config, monkeypatch: Any) -> None:
    told = Told()
    first = shrunken(images, config, told)
    size = os.path.getsize(first.folder / PIXELS)
    assert told.lines[0].startswith("shrinking to 40 pixels, about 0.1 MB: 0 of 20") and told.steps == [8, 16, 20]
    assert told.lines[-1] == (f"cache: 20 images in {size / 1e6:.1f} MB, {first.folder}; shorter sides are 40 pixels at most")
    monkeypatch.setattr(cache, "_make", None)
    again = shrunken(images, config, told)
    assert pixels_of(again) == pixels_of(first) and size == again.total
    assert len(pickle.dumps(again)) < 3000  # workers are not sent the pixels
    assert pixels_of(pickle.loads(pickle.dumps(again))) == pixels_of(first)


def test_other_images_sides_and_limits_have_caches_of_their_own(folder: Path, images: Images, tmp_path: Path) -> None:
    path = folder / "03.png"
    as_bitmap = folder.parent / "bitmaps"
    as_bitmap.mkdir()
    for file in folder.iterdir():
        Image.open(file).save(as_bitmap / f"{file.stem}.bmp")
    bitmaps, config = load(str(as_bitmap), None, "train"), settings_for(tmp_path)
    before = place(bitmaps, config)
    shutil.copytree(as_bitmap, tmp_path / "elsewhere")
    assert place(load(str(tmp_path / "elsewhere"), None, "train"), config) == before
    content = bytearray((as_bitmap / "03.bmp").read_bytes())
    content[-1] ^= 255
    (as_bitmap / "03.bmp").write_bytes(content)  # of the same size and name
    places = {
        before,
        place(bitmaps, config),
        place(images, config),
        place(images.subset(range(5)), config),
        place(images.subset([1, 0]), config),
        place(images, settings_for(tmp_path, **{"loader.cache": SIDE + 1})),
        place(images, settings_for(tmp_path, **{"loader.max_pixels": 4000})),
        place(images, settings_for(tmp_path, **{"loader.reduced_decode": False})),
    }
    assert len(places) == 8
    path.unlink()  # even if a file goes meanwhile
    assert place(images, config).parent == tmp_path / "kept"
    by_default = settings_for(tmp_path, data_root=str(tmp_path), **{"loader.cache_folder": None})
    assert place(images, by_default).parent == cache_root() / "shrunk"


class Killed(Exception):
    pass


@pytest.fixture
def half_made(folder: Path, images: Images, config: Config, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a build that broke off behind its second batch has left; the sixth image cannot be read."""
    read_batches = cache.read_batches
    (folder / "05.png").write_bytes(b"<html>")

    def breaking(*arguments: Any, **more: Any) -> Iterator[Any]:
        for number, batch in enumerate(read_batches(*arguments, **more)):
            if number == 2:
                raise Killed
            yield batch

    with monkeypatch.context() as patched:
        patched.setattr(cache, "_SAVE_EVERY", 0)
        patched.setattr(cache, "read_batches", breaking)
        with pytest.raises(Killed):
            shrunken(images, config, Told())
    return place(images, config)


def whole_of(images: Images, root: Path) -> list[bytes]:
    return pixels_of(shrunken(images, settings_for(root, **{"loader.cache_folder": str(root / "whole")}), Told()))


def test_a_build_that_broke_off_goes_on_where_its_table_ends(
    half_made: Path, images: Images, config: Config, tmp_path: Path
) -> None:
    assert len(Shrunk.load(half_made, images.source)) == 16
    with (half_made / PIXELS).open("ab") as file:
        file.write(b"half an image that no table names")
    told = Told()
    made = shrunken(images, config, told)
    assert ": 16 of 20" in told.lines[0] and told.steps == [20] and made.bad.keys() == {5}
    assert pixels_of(made) == whole_of(images, tmp_path)


@pytest.mark.parametrize("fault", ["table", "cut table", "pixels", "no pixels", "kind"])
def test_what_is_damaged_is_made_again(fault: str, images: Images, config: Config, tmp_path: Path) -> None:
    first = shrunken(images, config, Told())
    table, pixels = first.folder / TABLE, first.folder / PIXELS
    if fault == "table":
        table.write_bytes(table.read_bytes()[:-1] + b"\x07")
    elif fault == "cut table":
        table.write_bytes(table.read_bytes()[:50])
    elif fault == "pixels":
        os.truncate(pixels, pixels.stat().st_size - 1)
    elif fault == "no pixels":
        pixels.unlink()
    else:
        table.write_bytes(b"something else")
    assert len(Shrunk.load(first.folder, images.source)) == 0
    assert pixels_of(shrunken(images, config, Told())) == whole_of(images, tmp_path)


KILL = """
import os, signal, sys
from relssl.data import cache as shrinking
from relssl.data.named import load
import test_shrunk
shrinking._SAVE_EVERY = 0
apply, shrunk = shrinking.shrink, []
def shrink(image, side):
    shrunk.append(image)
    if len(shrunk) == 20 + 13:  # behind the sample
        os.kill(os.getpid(), signal.SIGKILL)
    return apply(image, side)
shrinking.shrink = shrink
shrinking.shrunken(load(sys.argv[1], None, "train"), test_shrunk.settings_for(test_shrunk.Path(sys.argv[2])), test_shrunk.Told())
"""


def test_a_killed_build_is_never_a_wrong_cache(folder: Path, images: Images, config: Config, tmp_path: Path) -> None:
    tests = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, "-c", KILL, str(folder), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([tests, *sys.path])},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert len(Shrunk.load(place(images, config), images.source)) == 8
    assert pixels_of(shrunken(images, config, Told())) == whole_of(images, tmp_path)


def test_unreadable_images_are_remembered_with_their_reasons(folder: Path, tmp_path: Path) -> None:
    kinds = ["html_404_jpg", "jpeg_cut_50", "random_jpg", "png_zero_size"]
    for number, kind in enumerate(kinds):
        extension, make = SKIP[kind]
        (folder / f"{number:02}-bad.{extension}").write_bytes(make())
    images, config = load(str(folder), None, "train"), settings_for(tmp_path)
    cached = dataclasses.replace(images, source=shrunken(images, config, Told()))
    assert len(cached.source.bad) == len(kinds)  # type: ignore[attr-defined]
    reopened = dataclasses.replace(images, source=shrunken(images, config, Told()))
    for row in range(len(images)):
        file = images.source.name(row)
        if "-bad" not in file:
            assert reopened.read(row, 10**6).tobytes() == shrunk_by_hand(Path(file)).tobytes()
            continue
        with pytest.raises(BadImage) as by_decoding:
            decode(file, config.loader.max_pixels)
        with pytest.raises(BadImage) as by_cache:
            reopened.read(row, config.loader.max_pixels)
        assert str(by_cache.value) == str(by_decoding.value)
    plan = Plan(len(images), len(images))
    (plain,), (seen,) = (next(reader(each, config, plan).stream(0, 1)) for each in (images, cached))
    assert torch.equal(plain.ids, seen.ids) and plain.bad == seen.bad and len(seen.bad) >= len(kinds)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), OSError(errno.EMFILE, "Too many"), MemoryError()])
def test_a_fault_that_may_pass_is_not_kept(
    workers: int, error: BaseException, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings_for(tmp_path, **{"loader.workers": workers})
    opener = decoding.open_regular

    def failing(path: str) -> Any:
        if path.endswith("13.png"):
            raise error
        return opener(path)

    with monkeypatch.context() as patched:
        patched.setattr(decoding, "open_regular", failing)
        with pytest.raises(DataError, match=r"^\S*/13.png: .*; that may pass, .* the next start goes on here"):
            shrunken(images, config, Told())
    kept = Shrunk.load(place(images, config), images.source)
    assert len(kept) == 8 and not kept.bad
    assert pixels_of(shrunken(images, config, Told())) == whole_of(images, tmp_path)


def test_a_set_without_a_readable_image_is_cached_as_that(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.png").write_bytes(b"<html>")
    images = load(str(tmp_path / "images"), None, "train")
    made = shrunken(images, settings_for(tmp_path), Told())
    assert made.total == 0 and len(made) == len(made.bad) == 3


def test_a_disk_without_room_is_told_before_anything_is_written(images: Images, config: Config, monkeypatch: Any) -> None:
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=90_000))
    with pytest.raises(
        StorageError,
        match=r"the cache needs about 0.1 MB, 0.1 MB are free; free some space, or lower loader.cache, or set loader.cache_",
    ) as told:
        shrunken(images, config, Told())
    assert told.value.exit_code == 5 and not (place(images, config) / PIXELS).exists()


def test_a_disk_that_fills_up_is_a_storage_error_and_the_build_can_go_on(
    images: Images, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all, written = cache.write_all, []

    def fill_up(descriptor: int, data: memoryview) -> None:
        written.append(data)
        if len(written) == 2:
            write_all(descriptor, data[:1000])
            raise OSError(28, "No space left on device")
        write_all(descriptor, data)

    with monkeypatch.context() as patched:
        patched.setattr(cache, "_SAVE_EVERY", 0)
        patched.setattr(cache, "write_all", fill_up)
        with pytest.raises(StorageError, match=r"pixels: cannot be written .No space left on device.: .* free some space"):
            shrunken(images, config, Told())
    assert len(Shrunk.load(place(images, config), images.source)) == 8
    assert pixels_of(shrunken(images, config, Told())) == whole_of(images, tmp_path)


def test_a_folder_that_cannot_be_made_is_a_storage_error(images: Images, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        StorageError, match=r"cannot be written .*; check the folder, or set loader.cache_folder to another place"
    ):
        shrunken(images, settings_for(tmp_path, **{"loader.cache_folder": str(tmp_path / "file/below")}), Told())


def test_a_file_system_without_locks_does(
    images: Images, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    teller = Told()
    with monkeypatch.context() as patched:
        patched.setattr("fcntl.flock", refuse)
        made = shrunken(images, config, teller)
    assert "cannot be locked" in teller.lines[0] and pixels_of(made) == whole_of(images, tmp_path)


def test_two_that_want_the_same_agree(images: Images, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    make, made, going, go = cache._make, [], threading.Event(), threading.Event()

    def slowly(*args: Any) -> Shrunk:
        made.append(args)
        going.set()
        assert go.wait(60)
        return make(*args)

    monkeypatch.setattr(cache, "_make", slowly)
    tellers = [Told(), Told()]
    threads = [threading.Thread(target=shrunken, args=(images, config, told)) for told in tellers]
    threads[0].start()
    assert going.wait(60)
    threads[1].start()
    while not tellers[1].lines and threads[1].is_alive():
        threads[1].join(0.01)
    go.set()
    for thread in threads:
        thread.join(60)
    assert len(made) == 1 and "waiting for the process that makes" in tellers[1].lines[0]
    assert [told.lines[-1][:21] for told in tellers] == ["cache: 20 images in 0"] * 2


def test_a_subset_and_evaluation_look_at_the_files(images: Images, config: Config) -> None:
    cached = dataclasses.replace(images, source=shrunken(images, config, Told()))
    assert isinstance(cached.subset([1, 2]).source, Files) and cached.fingerprint() == images.fingerprint()
    a, b = (next(Reader(PlainView.of(config.views)).batches(each))[1] for each in (images, load(images.name, None, "train")))
    assert torch.equal(a, b)


def test_settings_that_cannot_be_meant_are_refused(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"loader.cache: 31 pixels are fewer than the largest view has \(32\)"):
        settings_for(Path(), **{"loader.cache": 31})
    with pytest.raises(ConfigError, match=r"largest view has \(48\)"):
        settings_for(Path(), **{"views.crops": [[48, 0.2, 1], [16, 0.1, 0.2]]})
    with pytest.raises(ConfigError, match=r"loader.cache: is for folders and lists of files, digits is held in memory"):
        reader(load("digits", None, "test"), config, Plan(100, 10))


def test_a_run_on_shrunk_images_resumes_exactly(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {
        "data": str(folder),
        "recipe": "digits",
        "batch_size": 4,
        "max_images": 18,
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
    kept = list((tmp_path / "kept").iterdir())
    assert len(kept) == 1 and len(Shrunk.load(kept[0], Files(str(folder), [], []))) == 18
    settings["loader"] = {"workers": 1}
    small_run(tmp_path / "files", **settings)
    assert differing(whole, final_state(tmp_path / "files")) != []


class Asked(StopRequest):
    """Somebody asks to stop as soon as the first images are shrunk."""

    def asked(self) -> int:
        return 143


def test_a_build_ends_when_the_run_is_asked_to_stop_and_goes_on_later(folder: Path, tmp_path: Path) -> None:
    over = {"data": str(folder), "loader": {"cache": SIDE, "cache_folder": str(tmp_path / "kept"), "workers": 0}}
    small = {"views": {"weak": {"size": 32}, "strong": {"size": 32}}, "batch_size": 8, "encoder": {"stem": "small"}}
    made = resolve(merge(merge({k: v for k, v in SMALL.items() if k != "encoder"}, over), small | {"out": str(tmp_path / "run")}))
    run = build(made, Engine(made.engine))
    with Display(1, 0, show=False) as display:
        with pytest.raises(Interrupted, match="stopped by SIGTERM while images were shrunk; go on with `relssl resume") as caught:
            shrink_images(run, display, Asked(None))
        assert caught.value.exit_code == pickle.loads(pickle.dumps(caught.value)).exit_code == 143
        assert isinstance(run.images.source, Files)
        shrink_images(run, display, StopRequest(None))
    assert isinstance(run.images.source, Shrunk) and len(run.images) == COUNT
