"""Order and views of the batches: functions of seed, epoch, sample and view, whatever the workers, ranks and parts."""

import errno
import multiprocessing
import multiprocessing.process
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image
from torch import Tensor

from relssl.data import batched
from relssl.data.draws import draw
from relssl.data.images import Images, Pixels
from relssl.data.loader import Loader, Plan, crop, crop_reduced, read_batches
from relssl.data.named import load
from relssl.errors import ConfigError, DataError
from relssl.settings.run import VIEWS, LoaderConfig, ViewConfig

STATISTICS = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def view(name: str = "weak", **changes: Any) -> ViewConfig:
    return ViewConfig(**{"name": name, **VIEWS[name], **changes})


PAIR = (view("weak"), view("contrastive"))
CROPS = (view("weak"), view("strong"), view("strong", size=16, scale=(0.1, 0.5)))


@given(
    count=st.integers(1, 400), share=st.integers(1, 9), parts=st.integers(1, 4), world=st.integers(1, 4), seed=st.integers(0, 99)
)
@settings(max_examples=100, deadline=None)
def test_parts_and_ranks_joined_are_the_batch(count: int, share: int, parts: int, world: int, seed: int) -> None:
    batch = share * parts * world
    one = Plan(count, batch, seed=seed)
    many = [Plan(count, batch, parts, rank, world, seed) for rank in range(world)]
    steps = 2 * one.steps_per_epoch + min(one.steps_per_epoch, 1)
    whole = [rows for _, (rows,) in one.steps(0, steps)]
    cut = [list(plan.steps(0, steps)) for plan in many]
    for step, rows in enumerate(whole):
        joined = [cut[rank][step][1][part] for part in range(parts) for rank in range(world)]
        assert np.array_equal(np.concatenate(joined), rows)
    if one.steps_per_epoch:
        epoch = np.concatenate(whole[: one.steps_per_epoch])
        assert len(set(epoch.tolist())) == len(epoch) == one.steps_per_epoch * batch
        assert np.array_equal(list(one.steps(steps - 1, steps))[0][1][0], whole[-1])
        if count > 9:
            others = (one.order(1), Plan(count, batch, seed=seed + 1).order(0))
            assert not any(np.array_equal(one.order(0), other) for other in others)


PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (24, 3, 32, 32), dtype=np.uint8))
NOISE = Images("noise", Pixels(PIXELS))


def textured(height: int, width: int, seed: int) -> Image.Image:
    """Noise in octaves, finer ones fainter, as in photographs: the amplitude falls with the frequency."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for octave in range(2, 9):
        noise = rng.normal(size=(2**octave, 2**octave, 3)) * 2.0**-octave
        channels = [Image.fromarray(noise[..., c].astype(np.float32)).resize((width, height)) for c in range(3)]
        total += np.stack([np.asarray(channel) for channel in channels], -1)
    return Image.fromarray(((total - total.min()) / np.ptp(total) * 255).astype(np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, pixels in enumerate(PIXELS[:12].repeat(1, 1, 2, 2)):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()[:40, :48].copy()).save(tmp_path / f"{number:02}.png")
    return tmp_path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Images:
    """Large, small and turned JPEGs, and one PNG."""
    path = tmp_path_factory.mktemp("photos")
    for number, (height, width) in enumerate([(300, 420), (303, 421), (30, 41)]):
        textured(height, width, number).save(path / f"{number}.jpg", quality=90)
    for turn in (3, 6):
        exif = Image.Exif()
        exif[0x0112] = turn
        textured(304, 416, turn).save(path / f"turned{turn}.jpg", quality=90, exif=exif)
    textured(300, 420, 9).save(path / "whole.png")
    return load(str(path), None, "train")


def loader_of(images: Images, plan: Plan, views: Any = PAIR, **options: Any) -> Loader:
    return Loader(images, views, plan, torch.device("cpu"), STATISTICS, LoaderConfig(**({"workers": 0} | options)))


def batches(loader: Loader, start: int, stop: int) -> list[list[Tensor]]:
    return [[b.ids, b.weak, *b.strong] for parts in loader.stream(start, stop) for b in parts]


def equal(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


def close(a: list[list[Tensor]], b: list[list[Tensor]]) -> None:
    for p, q in zip(a, b, strict=True):
        assert torch.equal(p[0], q[0])
        for x, y in zip(p[1:], q[1:], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("ahead", [1, 3, 8])
def test_parts_and_views_made_ahead_are_those_of_whole_steps_and_a_stream_can_start_anywhere(ahead: int) -> None:
    plan = Plan(24, 5, seed=2)  # four steps an epoch
    whole, seen = (batches(loader_of(NOISE, plan, CROPS, views_ahead=steps), 0, 10) for steps in (1, ahead))
    close(seen, whole)
    for start, stop in ((1, 10), (3, 4), (6, 9)):
        assert equal(seen[start:stop], batches(loader_of(NOISE, plan, CROPS, views_ahead=ahead), start, stop))
    assert seen[0][2].shape == (5, 3, 32, 32) and seen[0][3].shape == (5, 3, 16, 16)
    parts = batches(loader_of(NOISE, Plan(24, 6, parts=3), CROPS, views_ahead=ahead), 0, 5)
    joined = [[torch.cat(each) for each in zip(*parts[first : first + 3], strict=True)] for first in range(0, 15, 3)]
    close(joined, batches(loader_of(NOISE, Plan(24, 6), CROPS), 0, 5))


@pytest.mark.parametrize("name", ["weak", "contrastive", "strong", "digit-strong", "byol-second"])
def test_files_and_resident_paths_show_the_same_views(name: str) -> None:
    resident, files = (batches(loader_of(NOISE, Plan(24, 8), [view(name)], path=path), 0, 3) for path in ("auto", "files"))
    for (ids, one), (same, other) in zip(resident, files, strict=True):
        assert torch.equal(ids, same)
        difference = (one - other).abs() * 0.25 * 255
        # Crops are rounded to whole levels on their way. Equalize and posterize can turn one level into many.
        assert (difference.mean() < 0.5) if name != "strong" else (difference <= 4).float().mean() > 0.9


def test_files_are_cropped_and_everything_else_follows_in_the_batch(folder: Path) -> None:
    """The batch equals `batched.apply` on the crops, bit for bit; what stands in for a bad file has its own draws."""
    (folder / "03.png").write_bytes(b"no image")
    images, config = load(str(folder), None, "train"), view("digit-strong", scale=(0.3, 1.0), flip=0.5, size=20)
    loader, random = loader_of(images, Plan(12, 6, parts=2, seed=4), [config]), torch.get_rng_state()
    for number, parts in enumerate(loader.stream(1, 5), start=1):
        for part in parts:
            rows = part.ids.numpy()
            draws = draw(config, 4, number // 2, rows, 0, (40, 48))
            (crops,) = loader.read((number // 2, rows)).pixels
            moved = batched.apply(crops, view("digit-strong", scale=None, flip=0.5, size=20), draws)
            assert torch.equal(part.weak, batched.normalise(moved, *STATISTICS))
            assert 3 not in rows
    assert torch.equal(torch.get_rng_state(), random)  # loading draws nothing from the run's own randomness


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_never_change_a_view_and_resume_is_exact(folder: Path, workers: int) -> None:
    images, plan = load(str(folder), None, "train"), Plan(12, 4, seed=5)
    alone = batches(loader_of(images, plan, CROPS), 0, 6)
    assert equal(alone[1:], batches(loader_of(images, plan, CROPS, workers=workers), 1, 6))


def test_an_unreadable_image_is_replaced_by_the_next_and_named(folder: Path) -> None:
    bad = folder / "05.png"
    bad.write_bytes(bad.read_bytes()[:60])
    ((part,),) = loader_of(load(str(folder), None, "train"), Plan(12, 12)).stream(0, 1)
    assert sorted(part.ids.tolist()) == [0, 1, 2, 3, 4, 6, 6, 7, 8, 9, 10, 11]
    assert [Path(name).name for name, _ in part.bad] == ["05.png"] and part.bad[0][1]


def test_too_few_images_and_impossible_paths_are_refused(folder: Path) -> None:
    images = load(str(folder), None, "train")
    with pytest.raises(DataError, match="lower batch_size to 12 or less"):
        loader_of(images, Plan(12, 64))
    with pytest.raises(ConfigError, match=r"loader\.path"):
        loader_of(images, Plan(12, 4), path="resident")
    with pytest.raises(ConfigError, match=r"loader\.cache"):
        loader_of(NOISE, Plan(12, 4), cache=40)
    for file in folder.iterdir():
        file.write_bytes(b"\x89PNG no")
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"^12 images in a row cannot be read, the last is .*; replace them") as caught:
            batches(loader_of(images, Plan(12, 4), workers=workers), 0, 1)
        assert len(caught.value.faults) == 12  # type: ignore[attr-defined]


def crops_of(images: Images, reduce: bool) -> list[list[np.ndarray]]:
    loader = loader_of(images, Plan(len(images), 2), reduced_decode=reduce)
    crops = [loader.read((epoch, np.array([row]))).pixels for epoch in range(2) for row in range(len(images))]
    return [[each[0].numpy().astype(int) for each in pixels] for pixels in crops]


def test_crops_of_reduced_images_differ_by_what_decoders_round(photos: Images) -> None:
    whole, reduced = crops_of(photos, reduce=False), crops_of(photos, reduce=True)
    differences = [
        np.mean([np.abs(a - b).mean() for a, b in zip(x, y, strict=True)]) for x, y in zip(whole, reduced, strict=True)
    ]
    for number, difference in enumerate(differences):
        name = Path(photos.source.name(number % len(photos))).name
        # Too small a picture, or one that is no JPEG, is decoded whole.
        assert (difference == 0) == (name in ("2.jpg", "whole.png")), name
    assert np.mean(differences) < 1 and max(differences) < 3


@pytest.mark.parametrize(("sizes", "reduction"), [((32, 16), 8), ((150, 16), 2), ((151, 16), 1)])
def test_an_image_is_decoded_as_small_as_its_largest_view_allows(photos: Images, sizes: Any, reduction: int) -> None:
    """The 300 x 420 photograph, of which each view shows all."""
    with photos.source.open(0, 10**6) as opened:
        image = opened.rgb(reduction)
    seen = loader_of(photos, Plan(len(photos), 2), [ViewConfig(size=size) for size in sizes]).read((0, np.array([0]))).pixels
    for size, (other,) in zip(sizes, seen, strict=True):
        by_hand = crop_reduced(image, np.array([0, 0, 300, 420]) / reduction, size)
        assert (by_hand.int() - other.int()).abs().max() <= 1  # torch and Pillow round apart


@pytest.mark.parametrize("source", [(32, 32), (50, 37), (301, 403), (9, 11)])
def test_crops_are_pillows(source: tuple[int, int]) -> None:
    image = textured(*source, seed=0)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for box in draw(view("weak"), 0, 0, np.arange(30), 0, source).crop:
        one, other = crop(tensor, box, 32).int(), crop_reduced(image, box, 32).int()
        assert one.shape == (3, 32, 32) and (one - other).abs().max() <= 1 and (one - other).abs().float().mean() < 0.5


def failing(how: str, row: int) -> Tensor:
    """A tensor whose reading ends a worker, or runs out of its shared memory, which is a file."""
    if how == "dies" and row == 2:
        os._exit(1)
    if how == "no memory":
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    return torch.zeros(8)


# torch tells of the dead worker by an error raised wherever Python is, at times where it can only be ignored; it looks again itself.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["dies", "no memory"])
def test_a_worker_that_cannot_go_on_is_one_line_that_names_the_setting(how: str) -> None:
    signal.alarm(120)  # rather than wait for ever
    with pytest.raises(DataError, match=r"loader\.workers") as caught:
        list(read_batches(partial(failing, how), range(4), 1))
    signal.alarm(0)
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)


def test_a_worker_that_is_killed_is_no_fault_of_what_the_main_process_does(tmp_path: Path) -> None:
    batches = read_batches(abs, range(100), 1)
    assert next(batches) == 0
    (worker,) = multiprocessing.active_children()
    worker.kill()
    worker.join()
    time.sleep(0.2)  # a step
    with pytest.raises(DataError, match="a loader process died"):
        list(batches)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's own loader is left half made
def test_processes_that_cannot_be_started_are_one_line_and_leave_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(process: Any, begin: Any = multiprocessing.Process.start) -> None:
        if multiprocessing.active_children():
            raise OSError(errno.EMFILE, "Too many open files")
        begin(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start)
    with pytest.raises(DataError, match=r"2 loader processes cannot be started \(Too many open files\); lower loader\.workers"):
        next(read_batches(abs, range(9), 2))
    for child in multiprocessing.active_children():
        child.join(10)
    assert not multiprocessing.active_children()


SCRIPT = """
import sys
from relssl.data.loader import read_batches
if __name__ == "__main__":
    batches = read_batches(abs, range(100), 1)
    next(batches)
    raise ValueError("mine")
"""


def test_a_script_that_fails_while_workers_read_ends(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    ended = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and ended.stderr.strip().endswith("ValueError: mine")


def test_where_no_temporary_file_can_be_loader_processes_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (deep := tmp_path / ("long" * 25)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    monkeypatch.setitem(multiprocessing.process.current_process()._config, "tempdir", None)  # type: ignore[attr-defined]
    assert next(read_batches(abs, range(9), 0)) == 0
    with pytest.raises(DataError, match=r"^loader processes need a folder for temporary files \(AF_UNIX path too long"):
        next(read_batches(abs, range(9), 1))
