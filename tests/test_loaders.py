"""Order and views of the batches: functions of seed, epoch, sample and view, whatever the workers, ranks and parts."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image
from torch.utils.data import get_worker_info

from relssl.data.images import Images
from relssl.data.loader import FromFiles, Plan, Resident, Views, create_loader
from relssl.data.named import load
from relssl.errors import ConfigError, DataError
from relssl.settings.run import Config, ViewConfig, resolve

CPU = torch.device("cpu")


@given(
    count=st.integers(1, 400), share=st.integers(1, 9), parts=st.integers(1, 4), world=st.integers(1, 4), seed=st.integers(0, 99)
)
@settings(max_examples=200, deadline=None)
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
        late = list(one.steps(steps - 1, steps))[0]
        assert np.array_equal(late[1][0], whole[-1])


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    plan = Plan(1000, 10, seed=3)
    assert not np.array_equal(plan.order(0), plan.order(1))
    assert not np.array_equal(plan.order(0), Plan(1000, 10, seed=4).order(0))
    assert np.array_equal(plan.order(5), Plan(1000, 50, 5, 1, 2, 3).order(5))


def settings_for(tmp: dict[str, Any] | None = None) -> Config:
    config = resolve({"data": "digits", "views.strong": "contrastive", "views.weak": "weak"} | (tmp or {}))
    return dataclasses.replace(config, views=dataclasses.replace(config.views, mean=(0.5,) * 3, std=(0.25,) * 3, margin=1.0))


def picture_images(count: int = 24) -> Images:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8))
    return dataclasses.replace(load("digits", None, "test").subset(np.arange(count)), pixels=pixels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    for i in range(12):
        small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((48, 40), Image.Resampling.BICUBIC).save(tmp_path / f"{i:02}.png")
    return tmp_path


def batches(loader: Resident | FromFiles, start: int, stop: int) -> list[list[torch.Tensor]]:
    return [[b.ids, b.weak, *b.strong] for parts in loader.stream(start, stop) for b in parts]


def equal(a: list[list[torch.Tensor]], b: list[list[torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


def test_resident_stream_can_start_anywhere_and_parts_share_the_batch() -> None:
    images, config = picture_images(), settings_for({"views.crops": [[32, 0.2, 1.0], [16, 0.1, 0.5]]})
    whole = batches(Resident(images, config, Plan(24, 8), CPU), 0, 7)
    assert equal(whole[4:], batches(Resident(images, config, Plan(24, 8), CPU), 4, 7))
    parts = batches(Resident(images, config, Plan(24, 8, parts=4), CPU), 0, 7)
    for step in range(7):
        for i in range(4):
            joined = torch.cat([part[i] for part in parts[4 * step : 4 * step + 4]])
            torch.testing.assert_close(joined, whole[step][i], rtol=1e-5, atol=1e-5)
    assert whole[0][2].shape == (8, 3, 32, 32) and whole[0][3].shape == (8, 3, 16, 16)
    assert not torch.equal(whole[0][1], whole[3][1])  # another epoch


@pytest.mark.parametrize("ahead", [2, 3, 8])
def test_views_made_ahead_are_those_made_step_by_step(ahead: int) -> None:
    images, changes = picture_images(), {"views.crops": [[32, 0.2, 1.0], [16, 0.1, 0.5]], "views.strong": "strong"}
    one, many = settings_for(changes), settings_for(changes | {"loader.views_ahead": ahead})
    plan = Plan(24, 5, seed=2)  # four steps an epoch
    single, joined = (batches(Resident(images, config, plan, CPU), 0, 10) for config in (one, many))
    for a, b in zip(single, joined, strict=True):
        assert torch.equal(a[0], b[0])
        for x, y in zip(a[1:], b[1:], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-4)
    for start, stop in ((1, 10), (3, 4), (6, 9)):
        assert equal(joined[start:stop], batches(Resident(images, many, plan, CPU), start, stop))
    parts = batches(Resident(images, many, Plan(24, 6, parts=3), CPU), 0, 5)
    whole = batches(Resident(images, one, Plan(24, 6), CPU), 0, 5)
    for step in range(5):
        assert torch.equal(torch.cat([part[0] for part in parts[3 * step : 3 * step + 3]]), whole[step][0])


@pytest.mark.parametrize("options", [{}, {"loader.photometric": "device"}, {"loader.decoder": "torchvision"}])
def test_other_views_than_the_runs_can_be_asked_for(options: dict[str, Any], folder: Path) -> None:
    view, plan = ViewConfig(size=20, scale=(0.3, 0.9), flip=0.5, grey=0.5), Plan(12, 6)
    config = settings_for({"loader.workers": 0} | options)
    alone = dataclasses.replace(config, views=dataclasses.replace(config.views, weak=view))
    for file in sorted(folder.glob("*.png"))[::2]:  # one decoder is for JPEGs alone
        Image.open(file).save(file.with_suffix(".jpg"))
        file.unlink()
    for images in (picture_images(12), load(str(folder), None, "train")):
        asked = [part for (part,) in create_loader(images, config, plan, CPU, [view]).stream(0, 3)]
        own = [part for (part,) in create_loader(images, alone, plan, CPU).stream(0, 3)]
        assert all(part.strong == [] and part.weak.shape == (6, 3, 20, 20) for part in asked)
        assert all(torch.equal(one.weak, two.weak) for one, two in zip(asked, own, strict=True))


def test_files_and_resident_paths_show_the_same_views() -> None:
    images, config = picture_images(), settings_for({"loader.workers": 0})
    held = batches(Resident(images, config, Plan(24, 8), CPU), 0, 3)
    read = batches(FromFiles(images, config, Plan(24, 8), CPU), 0, 3)
    for a, b in zip(held, read, strict=True):
        assert torch.equal(a[0], b[0])
        for x, y in zip(a[1:], b[1:], strict=True):
            # Levels of 255 behind a deviation of 0.25; Pillow rounds to whole levels after every operation.
            assert (x - y).abs().mean() * 0.25 * 255 < 2.5


# The mean difference in levels of 255 that 8 bits explain; see test_single_views.
@pytest.mark.parametrize(("strong", "tolerance"), [("weak", 0.0), ("contrastive", 2.0), ("digit-strong", 1.5)])
def test_the_device_finishes_views_as_a_worker_does(folder: Path, strong: str, tolerance: float) -> None:
    (folder / "03.png").write_bytes(b"no image")  # what stands in for it has views of its own
    images, options = load(str(folder), None, "train"), {"views.strong": strong, "loader.workers": 0}
    worker, device = (settings_for(options | {"loader.photometric": where}) for where in ("worker", "device"))
    made = batches(FromFiles(images, worker, Plan(12, 6, parts=2), CPU), 1, 5)
    finished = batches(FromFiles(images, device, Plan(12, 6, parts=2), CPU), 1, 5)
    for (ids, *views), (same, *others) in zip(made, finished, strict=True):
        assert torch.equal(ids, same)
        for view, other, limit in zip(views, others, (0.0, tolerance), strict=True):
            difference = (view - other).abs() * 0.25 * 255
            assert difference.mean() <= limit + 1e-4
    seen = torch.cat([ids for ids, *_ in finished]).tolist()
    assert 3 not in seen and seen.count(4) > seen.count(5)


def test_randaugment_on_the_device_is_that_of_a_worker(folder: Path) -> None:
    # Posterize and solarize turn a level's difference into a large one, so most pixels agree rather than all.
    images, options = (
        load(str(folder), None, "train"),
        {"views.strong": {"name": "strong", "jitter": 0.0, "blur": 0.0, "grey": 0.0}},
    )
    made = [
        batches(
            FromFiles(images, settings_for(options | {"loader.workers": 0, "loader.photometric": where}), Plan(12, 12), CPU), 0, 2
        )
        for where in ("worker", "device")
    ]
    for (_, _, view), (_, _, other) in zip(*made, strict=True):
        assert ((view - other).abs() * 0.25 * 255 <= 4).float().mean() > 0.9


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_never_change_a_view(folder: Path, workers: int) -> None:
    images = load(str(folder), None, "train")
    alone, helped = (settings_for({"loader.workers": n}) for n in (0, workers))
    plan = Plan(12, 4, seed=5)
    assert equal(batches(FromFiles(images, alone, plan, CPU), 1, 6), batches(FromFiles(images, helped, plan, CPU), 1, 6))


def test_loading_draws_nothing_from_the_runs_own_randomness(folder: Path) -> None:
    images, before = load(str(folder), None, "train"), torch.get_rng_state()
    batches(FromFiles(images, settings_for({"loader.workers": 0}), Plan(12, 4), CPU), 0, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unreadable_image_is_replaced_by_the_next_and_named(folder: Path) -> None:
    bad = folder / "05.png"
    bad.write_bytes(bad.read_bytes()[:60])
    images, config = load(str(folder), None, "train"), settings_for({"loader.workers": 0})
    seen, named = [], []
    for parts in FromFiles(images, config, Plan(12, 12), CPU).stream(0, 1):
        seen, named = parts[0].ids.tolist(), parts[0].bad
    assert sorted(seen) == [0, 1, 2, 3, 4, 6, 6, 7, 8, 9, 10, 11]
    assert [Path(name).name for name, _ in named] == ["05.png"] and named[0][1]


def test_too_few_images_and_impossible_paths_are_refused(folder: Path) -> None:
    images = load(str(folder), None, "train")
    with pytest.raises(DataError, match="12 usable images, batch is 64"):
        create_loader(images, settings_for(), Plan(12, 64), CPU)
    with pytest.raises(ConfigError, match="resident is for data sets held in memory"):
        create_loader(images, settings_for({"loader.path": "resident"}), Plan(12, 4), CPU)
    for file in folder.iterdir():
        file.write_bytes(b"\x89PNG no")
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"^48 images in a row cannot be read, the last is .*; replace them"):
            batches(FromFiles(images, settings_for({"loader.workers": workers}), Plan(12, 4), CPU), 0, 1)


def test_measuring_the_workers_changes_no_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relssl.data.loader.cores", lambda config: 2)
    images, plan = load(str(folder), None, "train"), Plan(12, 4, parts=2, seed=5)
    small = {"views.weak": {"name": "weak", "size": 8}, "views.strong": {"name": "weak", "size": 8}}
    given, measured = settings_for(small | {"loader.workers": 0}), settings_for(small)
    loader = FromFiles(images, measured, plan, CPU)
    assert loader.choice is None
    assert equal(batches(FromFiles(images, given, plan, CPU), 7, 210), batches(loader, 7, 210))
    assert loader.choice is not None
    assert [(trial.workers, trial.prefetch) for trial in loader.choice.trials[:2]] == [(2, 2), (1, 2)]
    assert len(loader.choice.trials) == 3 and all(0 < trial.seconds < 60 for trial in loader.choice.trials)
    short = FromFiles(images, measured, plan, CPU)
    assert len(list(short.stream(0, 3))) == 3 and short.choice is not None and not short.choice.trials


def test_a_trial_whose_workers_die_costs_no_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relssl.data.loader.cores", lambda config: 2)
    images, plan = load(str(folder), None, "train"), Plan(12, 4, parts=2, seed=5)
    small = {"views.weak": {"name": "weak", "size": 8}, "views.strong": {"name": "weak", "size": 8}}
    expected = batches(FromFiles(images, settings_for(small | {"loader.workers": 0}), plan, CPU), 7, 210)
    sample = Views.__getitem__

    def dying(self: Views, request: Any) -> Any:
        worker = get_worker_info()
        if worker is not None and worker.id == 1 and request[0] == 3:  # steps were yielded by then
            os._exit(1)
        return sample(self, request)

    monkeypatch.setattr(Views, "__getitem__", dying)
    loader = FromFiles(images, settings_for(small), plan, CPU)
    assert equal(expected, batches(loader, 7, 210))
    assert loader.choice is not None and loader.choice.workers == 1
    assert str(loader.choice).split(": ")[1].startswith("2 x 2 failed, 1 x 2 ")
    with pytest.raises(DataError, match="a loader process died"):
        batches(FromFiles(images, settings_for(small | {"loader.workers": 2}), plan, CPU), 7, 210)
