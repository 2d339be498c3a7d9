"""relssl estimate: figures that agree with a real run, and nothing left behind."""

import dataclasses
import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import relssl
from relssl.cli import main
from relssl.data.cache import shrunken
from relssl.engine import Engine, available_cores
from relssl.files import read_rows
from relssl.settings.reading import flat, nest
from relssl.settings.run import resolve, to_yaml
from relssl.train.console import Display
from relssl.train.estimate import Estimate, advise, step_flops
from relssl.train.run import build
from small_runs import SMALL, merge, small_run

GB = 10**9


def small(**over: Any) -> dict[str, Any]:
    return merge(SMALL, nest(over))


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(to_yaml(resolve(SMALL)))
    return file


def estimate(settings: dict[str, Any], steps: int) -> Estimate:
    return relssl.estimate(settings=resolve(settings), quiet=True, steps=steps)


def test_the_verb_prints_a_runs_cost_and_leaves_no_file(
    settings_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["estimate", "--config", str(settings_file), "--steps", "4", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures.keys() == {field.name for field in dataclasses.fields(Estimate)}
    assert [name for name, value in flat(figures).items() if value is None] == ["workers"]  # images lie in memory
    assert list(tmp_path.iterdir()) == [settings_file]
    # 320 images in batches of 32, two epochs, more steps than were timed.
    assert (figures["total_steps"], figures["steps_timed"], figures["images"]) == (20, 4, 320)
    assert figures["step_low"] <= figures["step_seconds"] <= figures["step_high"]
    assert figures["seconds"] == pytest.approx(figures["training_seconds"] + figures["evaluation_seconds"])
    assert figures["evaluations"] == 3 and figures["disk"]["checkpoints"] == 4
    assert figures["training_seconds"] == pytest.approx(20 * 32 / figures["images_per_second"])
    assert sum(figures["shares"].values()) == pytest.approx(1) and min(figures["shares"].values()) > 0
    assert figures["floor_seconds"] == pytest.approx(32 * sum(figures["flops"].values()) / figures["attainable_flops"])
    assert 0 < figures["memory"]["used"] < figures["memory"]["total"] and figures["memory"]["device_total"] == 0
    assert ("engine.threads" in {each["setting"] for each in figures["advice"]}) == (available_cores() > 1)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on fewer cores
def test_the_tables_name_what_limits_and_what_to_change_and_a_cache_is_read_but_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (12, 20, 24, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(f"photos/{number:02}.jpg")
    Path("photos/11.jpg").write_bytes(b"no image")
    views = {f"views.{side}.size": 16 for side in ("weak", "strong")}
    batch = {"data": "photos", "recipe": "folder", "batch_size": 4, "max_images": None, "loader.workers": 0, "epochs": 1}
    settings = small(**batch, **views, **{"loader.cache": 16, "loader.cache_folder": str(tmp_path / "caches")})
    config = resolve(settings)
    Path("photos.yaml").write_text(to_yaml(config))
    before = sorted(tmp_path.rglob("*"))
    assert main(["estimate", "--config", "photos.yaml", "--steps", "6"]) == 0
    out = capsys.readouterr().out
    lines = ("whole run", "what limits", "loader processes", "disk for shrunk images", "What to change")
    assert all(line in out for line in lines)
    assert "images met that cannot be read" in out  # six steps of four meet all twelve
    assert max(len(line) for line in out.splitlines() if line[0:1] in "│┌├") <= 80 and sorted(tmp_path.rglob("*")) == before
    with Display(show=False) as silent:
        shrunken(build(config, Engine(config.engine)).images, config.loader, silent)
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    complete = estimate(merge(settings, {"loader": {"workers": 2}}), steps=3)
    assert complete.disk["cache"] == 0 and complete.steps_timed == 4  # each loader process delivers as often
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == written


@pytest.mark.torture
def test_ctrl_c_is_one_line(settings_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "relssl", "estimate", "--config", str(settings_file), "--steps", "100000"]
    # A test run started in the background ignores the signal, and so would what it starts.
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hears)
    assert process.stderr is not None
    assert any(line.startswith("timing steps of resnet18") for line in process.stderr)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and errors.strip() == "relssl: stopped by SIGINT", errors
    assert list(tmp_path.iterdir()) == [settings_file]


def test_evaluations_and_checkpoints_are_those_of_training(tmp_path: Path) -> None:
    every = {"log.knn_every": 2, "checkpoint.every": 3, "checkpoint.every_steps": 3, "checkpoint.keep": 100}
    over = {"epochs": 5, "max_images": 64, "log.knn_images": [40, 40]} | every
    run = small_run(tmp_path / "run", **over).folder
    figures, checkpoints = estimate(small(**over), steps=1), list((run / "checkpoints").iterdir())
    assert figures.evaluations == sum("knn_top1" in row for row in read_rows(run / "metrics.jsonl")) and figures.disk["free"] > 0
    tensors = (max(checkpoints) / "state.safetensors").stat().st_size
    assert figures.disk["checkpoint"] == pytest.approx(tensors, rel=0.3)  # this small a network has names as long as its weights
    assert figures.disk["checkpoints"] == len(checkpoints) + 2  # the best by kNN, and a new one before the oldest goes


def test_methods_without_teacher_and_memory_have_no_share_of_them() -> None:
    over = {"recipe": "digits", "log.knn_every": 0, "method.name": "simclr", "loader.views_ahead": 4}
    run = estimate(small(**over), steps=5)
    assert run.shares["teacher"] == 0 and sum(run.shares.values()) == pytest.approx(1) and run.evaluations == 0
    assert run.steps_timed == 8  # the views of four steps are made in one go


def test_resnet18_of_the_papers_counts_as_by_hand() -> None:
    config = resolve({"recipe": "nips/cifar10", "encoder.dim": 256, "method.memory_size": 65536})
    stem, layer1 = 2 * 27 * 64 * 32**2, 4 * 2 * 9 * 64 * 64 * 32**2
    # Each later stage: one convolution that halves the size, its shortcut, and three that keep it.
    later = 3 * (2 * 9 * 64 * 128 * 16**2 + 2 * 64 * 128 * 16**2 + 3 * 2 * 9 * 128 * 128 * 16**2)
    forward = stem + layer1 + later + 2 * (512 * 2048 + 2048 * 256)
    flops = step_flops(config)
    assert flops["student"] == flops["teacher"] == forward == 1_113_980_928
    assert flops["backward"] == 2 * forward - stem  # images need no gradient
    assert flops["memory"] == 3 * 2 * 65536 * 256  # keys, queries, and the queries' gradient


def test_crops_of_several_sizes_count_by_their_pixels_and_draw_nothing() -> None:
    state = torch.get_rng_state()
    flops = step_flops(resolve(small(**{"views.weak.size": 32, "views.crops": [[32, 0.2, 1], [16, 0.1, 0.3]]})))
    assert torch.equal(torch.get_rng_state(), state)
    one = step_flops(resolve(small(**{"views.weak.size": 32})))
    assert flops["teacher"] == one["teacher"] and flops["memory"] == one["memory"] * 5 // 3
    # A quarter of the pixels costs a quarter, but for the projector.
    projector = 2 * (16 * 32 + 32 * 16)
    assert flops["student"] - one["student"] == (one["student"] - projector) / 4 + projector


SPACE = {"checkpoint": GB // 10, "checkpoints": 4, "free": 100 * GB, "cache": 0}
FULL = SPACE | {"checkpoint": GB, "free": 3 * GB}


def figures(used: float = 0.1, kind: str = "cuda", waits: float = 0.02, **changes: Any) -> Estimate:
    """A healthy run, with changes; what no advice depends on is 0."""
    rest = dict.fromkeys((field.name for field in dataclasses.fields(Estimate)), 0)
    run = {"batch_size": 256, "total_steps": 39_000, "seconds": 79_000.0, "evaluation_seconds": 900.0, "floor_multiple": 1.7}
    machine = {"kind": kind, "world": 1, "cores": 8, "threads": 8, "workers": 2, "disk": SPACE, "shares": {"data": waits}}
    machine["memory"] = {"used": GB, "total": 64 * GB, "device_used": int(used * 80 * GB), "device_total": 80 * GB}
    return Estimate(**{**rest, **run, **machine, **changes})


THREADS = {"engine.threads": 2, "engine.devices": 2}


@pytest.mark.parametrize(
    ("run", "over", "advice"),
    [
        (figures(), {}, {}),
        (figures(waits=0.5), {}, {"loader.workers": "null"}),
        (figures(waits=0.5, workers=3), {"engine.devices": 2}, {"loader.cache": "37"}),  # of eight cores each process has four
        (figures(waits=0.5, workers=7), {}, {"loader.cache": "37"}),  # all cores load already
        (figures(waits=0.5, workers=7), {"loader.cache": 37}, {"data": "a faster disk, or more cores"}),
        (figures(waits=0.5, workers=None), {}, {}),  # views of images in memory
        (figures(), {"compile": "off"}, {"compile": "auto"}),
        (figures(total_steps=1999), {"compile": "off"}, {}),
        (figures(kind="cpu", threads=2), THREADS, {"engine.threads": "null"}),
        (figures(floor_multiple=6.0), {}, {"batch_size": "512"}),
        (figures(used=0.95), {}, {"accumulate": "2"}),
        (figures(used=0.95), {"batch_size": 6, "accumulate": 3, "encoder.batch_norm_splits": 1}, {}),  # parts of one image
        (figures(used=0.15), {"accumulate": 4}, {"accumulate": "1"}),
        (figures(evaluation_seconds=50.0, seconds=400.0), {}, {}),  # under a minute
        (figures(evaluation_seconds=39_500.0), {}, {"log.knn_every": "100"}),
        (figures(disk=FULL), {}, {"out": "another disk"}),
        (figures(disk=FULL | {"free": 9 * GB, "cache": GB}, waits=0.5), {}, {}),  # of files that will be read shrunk
        (figures(kind="cpu", threads=2, disk=FULL), THREADS, {"out": "another disk", "engine.threads": "null"}),  # in this order
    ],
)
def test_one_fault_one_advice(run: Estimate, over: dict[str, Any], advice: dict[str, str]) -> None:
    config = resolve({"recipe": "cifar10", "data": "photos"} | over)
    assert [(each.setting, each.value) for each in advise(run, config)] == list(advice.items())
