"""What is advised, from figures alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from relssl.files import duration, size
from relssl.report.tables import advice_lines
from relssl.settings.run import resolve
from relssl.train.estimate import Advice, Disk, Estimate, Extras, Memory, Timing, advise, limit, shares

GB = 10**9
SHARES = {
    **{"data": 0.02, "transfer": 0.01, "teacher": 0.22, "student": 0.22, "loss": 0.05, "backward": 0.44},
    **{"health": 0.01, "update": 0.01, "rest": 0.02},
}


def figures(**changes: Any) -> Estimate:
    """A healthy run on a CPU, with changes."""
    about = {"data": "photos", "images": 50_000, "backbone": "resnet18", "batch_size": 256, "epochs": 200, "total_steps": 39_000}
    machine = {"device": "CPU, 8 threads, bf16", "kind": "cpu", "world": 1, "cores": 8, "threads": 8, "workers": 2}
    speed = {
        "steps_timed": 20,
        "step_seconds": 2.0,
        "step_low": 1.9,
        "step_high": 2.2,
        "step_mean": 2.0,
        "images_per_second": 127.0,
    }
    length = {"seconds": 79_000.0, "training_seconds": 78_000.0, "evaluation_seconds": 900.0, "saving_seconds": 100.0}
    space = {
        "memory": Memory(4 * GB, 64 * GB, 0, 0),
        "disk": Disk(GB // 10, 4, GB // 10, 10**7, 100 * GB, 0, 90 * GB),
        "extras": Extras(21, 43.0, 200, 0.5),
    }
    floor = {"flops": {"student": GB}, "attainable_flops": 1e12, "bf16_gain": None, "floor_seconds": 1.2, "floor_multiple": 1.7}
    pieces = {"load": 1.0, "transfer": 0.02, "layout": 0.0, "health": 0.2}
    rest = {"stages": pieces, "shares": SHARES, "limit": "networks", "unreadable": 0}
    return Estimate(**{**about, **machine, **speed, **length, **space, **floor, **rest, **changes})


def settings(**over: Any) -> Any:
    return resolve({"recipe": "cifar10", "data": "photos"} | over)


def gpu(used: float, **changes: Any) -> Estimate:
    memory = Memory(4 * GB, 64 * GB, int(used * 80 * GB), 80 * GB)
    return figures(kind="cuda", memory=memory, **changes)


def waiting(share: float) -> dict[str, float]:
    scale = (1 - share) / (1 - SHARES["data"])
    return {name: value * scale for name, value in SHARES.items()} | {"data": share}


def test_nothing_is_advised_where_nothing_is_to_gain() -> None:
    assert advise(figures(), settings()) == ()
    assert advice_lines(()) == ["nothing: no setting stands in the way"]


CASES: list[tuple[Estimate, dict[str, Any], str, str, float | None]] = [
    # Half of a second's step is computing; four processes make a batch of 2 core seconds in that.
    (gpu(0.5, step_mean=1.0, shares=waiting(0.5), stages={"load": 2.0, "health": 0.0}), {}, "loader.workers", "4", 2.0),
    # On a CPU the same cores do both: (0.5 s x 8 threads + 2 core seconds) on 8 cores are 0.75 s.
    (figures(step_mean=1.0, shares=waiting(0.5), stages={"load": 2.0, "health": 0.0}), {}, "loader.workers", "4", 4 / 3),
    # Each of two processes has four of the cores: three beside itself, which need 2/3 s for a batch.
    (
        gpu(0.5, step_mean=1.0, shares=waiting(0.5), stages={"load": 2.0, "health": 0.0}),
        *({"engine.devices": 2}, "loader.workers", "3", 1.5),
    ),
    # All cores load already.
    (gpu(0.5, shares=waiting(0.5), workers=7, stages={"load": 40.0, "health": 0.0}), {}, "loader.cache", "37", 2.0),
    # 0.88 of the step at twice the speed.
    (figures(bf16_gain=2.0), {"engine.precision": "fp32"}, "engine.precision", "bf16", 1 / 0.56),
    (gpu(0.5), {"compile": "off"}, "compile", "auto", None),
    (figures(threads=2), {"engine.threads": 2}, "engine.threads", "null", 4.0),
    (figures(threads=2), {"engine.threads": 2, "engine.devices": 2}, "engine.threads", "null", 2.0),
    (gpu(0.1, floor_multiple=6.0), {}, "batch_size", "512", None),
    (figures(shares=SHARES | {"loss": 0.4}), {"method.memory_size": 65536}, "method.memory_size", "32768", 1.25),
    (gpu(0.95), {}, "accumulate", "2", None),
    (figures(memory=Memory(15 * GB, 16 * GB, 0, 0)), {"accumulate": 4}, "accumulate", "8", None),
    (gpu(0.15), {"accumulate": 4}, "accumulate", "1", None),
    (figures(stages={"load": 1.0, "health": 2.0}), {"log.every": 5}, "log.every", "50", 1 / (1 - 0.2 * 0.9)),
    (figures(saving_seconds=7900.0), {}, "checkpoint.every", "5", 1 / (1 - 0.1 * 0.8)),
    (figures(saving_seconds=7900.0), {"checkpoint.every_steps": 10}, "checkpoint.every_steps", "null", None),
    (figures(evaluation_seconds=39_500.0), {}, "log.knn_every", "100", 1 / (1 - 0.5 * 0.9)),
    (figures(disk=Disk(GB, 4, 0, 0, 3 * GB, 0, 0)), {}, "out", "another disk", None),
    (figures(disk=Disk(GB, 4, 0, 0, 9 * GB, 6 * GB, 5 * GB)), {}, "loader.cache_folder", "another disk", None),
]


@pytest.mark.parametrize(("found", "over", "setting", "value", "gain"), CASES)
def test_one_fault_one_advice(found: Estimate, over: dict[str, Any], setting: str, value: str, gain: float | None) -> None:
    (advice,) = advise(found, settings(**over))
    assert (advice.setting, advice.value) == (setting, value)
    assert advice.gain == (None if gain is None else pytest.approx(gain))
    assert advice_lines((advice,))[0].startswith(f"{setting}: {value}  (")


@pytest.mark.parametrize(
    ("found", "over"),
    [
        (figures(shares=waiting(0.5), workers=None), {}),  # views of images in memory
        (gpu(0.1, floor_multiple=3.0), {}),
        (gpu(0.5), {"compile": "auto"}),
        (gpu(0.5, total_steps=1999), {"compile": "off"}),
        (figures(), {"compile": "off"}),
        (gpu(0.6, floor_multiple=6.0), {}),
        (figures(floor_multiple=6.0), {}),  # of a CPU no batch is too small
        (figures(bf16_gain=1.1), {"engine.precision": "fp32"}),
        (figures(shares=SHARES | {"loss": 0.4}), {"method.memory_size": 300}),  # half would be less than a batch
        (gpu(0.95), {"batch_size": 6, "accumulate": 3, "encoder.batch_norm_splits": 1}),  # parts of one image
        (gpu(0.3), {"accumulate": 4}),
        (figures(saving_seconds=50.0, evaluation_seconds=50.0, seconds=400.0), {}),  # under a minute
        (figures(evaluation_seconds=39_500.0), {"log.knn_every": 200}),
        (gpu(0.5, threads=2), {"engine.threads": 2}),
    ],
)
def test_no_advice_that_gives_nothing(found: Estimate, over: dict[str, Any]) -> None:
    assert advise(found, settings(**over)) == ()


@pytest.mark.parametrize(("free", "over"), [(GB // 10, {}), (90 * GB, {"loader.cache": 37})])
def test_no_cache_is_advised_that_does_not_fit_or_is_refused(free: int, over: dict[str, Any]) -> None:
    disk = Disk(GB // 10, 4, GB // 10, 10**7, 100 * GB, 0, free)  # 50,000 images of 37 x 49 pixels are 0.27 GB
    found = gpu(0.5, shares=waiting(0.5), workers=7, stages={"load": 40.0, "health": 0.0}, disk=disk)
    assert [advice.setting for advice in advise(found, settings(**over))] == ["data"]


def test_several_come_with_the_largest_gain_first() -> None:
    found = figures(threads=2, bf16_gain=2.0, disk=Disk(GB, 4, 0, 0, GB, 0, 0))
    given = advise(found, settings(**{"engine.threads": 2, "engine.precision": "fp32"}))
    assert [advice.setting for advice in given] == ["engine.threads", "engine.precision", "out"]
    assert advice_lines((Advice("a.b", "1", "because", 1.5),)) == ["a.b: 1  (because; up to 1.50 x the speed)"]


def test_shares_come_to_a_whole_step() -> None:
    names = ("layout", "teacher", "student", "loss", "backward", "health", "optimizer", "push", "follow")
    pieces = dict.fromkeys(names, 0.1) | {"transfer": 0.2}
    found = shares(Timing([1.9, 2.1], [0.4, 0.6]), pieces, log_every=10)
    assert found["data"] == pytest.approx(0.15)  # the wait less the transfer it ends with
    assert found["transfer"] == pytest.approx(0.15) and found["health"] == pytest.approx(0.005)
    assert found["update"] == pytest.approx(0.15) and sum(found.values()) == pytest.approx(1)
    assert found["rest"] == pytest.approx(1 - 0.15 - 0.15 - 0.2 - 0.005 - 0.15)
    # Alone the stages took longer than together: no share is negative, and they still come to one.
    found = shares(Timing([0.5], [0.1]), pieces, log_every=10)
    assert found["rest"] == pytest.approx(0) and found["data"] == 0 and sum(found.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, "networks"), ({"data": 1.0}, "data"), ({"loss": 1.0}, "loss"), ({"update": 0.5, "rest": 0.5}, "rest")],
)
def test_the_largest_part_limits(changes: dict[str, float], expected: str) -> None:
    parts = SHARES | changes
    assert limit({name: value / sum(parts.values()) for name, value in parts.items()}) == expected


def test_figures_in_the_unit_that_suits_them() -> None:
    assert [duration(seconds) for seconds in (0.0123, 1.5, 119, 7199, 7200, 172_800)] == [
        *("12.3 ms", "1.5 s", "119.0 s", "120.0 min", "2.0 h", "2.0 d"),
    ]
    assert [size(count) for count in (1_200_000, 2_340_000_000)] == ["1.2 MB", "2.3 GB"]
    assert dataclasses.asdict(figures())["memory"]["used"] == 4 * GB
