"""The memory of a step: predicted before it is taken, refused where there is not enough, lowered where that is wanted."""

import contextlib
import dataclasses
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from relssl.cli import main
from relssl.engine import Engine
from relssl.errors import ConfigError
from relssl.settings.run import EngineConfig, resolve
from relssl.train.estimate import affordable
from relssl.train.memory import fit, free_memory, memory_used, peak_memory, step_memory
from relssl.train.run import build
from small_runs import SMALL

NETWORKS = """resnet18 resnet50 mobilenetv3_small_100 efficientnet_b0 vit_tiny_patch16_224 convnext_tiny densenet121 regnety_002
swin_tiny_patch4_window7_224 mobilenetv2_100"""
MALLOC = 256 << 20  # that malloc holds ahead while a run goes on
# Trains two steps of a batch and prints what it had said they would take, beside what it has taken.
_STEPS = """
    import sys
    import psutil, torch
    from relssl.engine import Engine
    from relssl.settings.run import resolve
    from relssl.train.run import create_run
    from relssl.train.memory import memory_used, step_memory
    from relssl.train.pretrain import pass_noise
    from relssl.train.run import complete_settings
    from relssl.data.named import load

    name, size, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    views = {side: {"size": size} for side in ("weak", "strong")} | {"enlarge": True}
    config = resolve({
        "data": "digits", "recipe": "folder", "backbone": name, "batch_size": batch, "views": views, "encoder.batch_norm_splits": 1,
        "engine": {"device": "cpu", "threads": 1, "precision": "fp32"}, "method.memory_size": max(64, batch),
    })
    engine, images = Engine(config.engine), load("digits", None, "train")
    with engine.running():
        config = complete_settings(config, images)
        before = psutil.Process().memory_info().rss
        run = create_run(config, engine, images)
        for _ in range(2):
            pass_noise(run, batch)
            run.state.optimizer.step()
            run.state.optimizer.zero_grad()
        taken = memory_used() - before
    print(step_memory(config, engine, batch), taken)
"""


def predicted_and_taken(name: str, size: int, batch: int) -> tuple[int, int]:
    command = [sys.executable, "-c", textwrap.dedent(_STEPS), name, str(size), str(batch)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    predicted, taken = map(int, output.split())
    return predicted, taken


def test_what_a_step_takes_is_known_before_it_is_made() -> None:
    predicted, taken = predicted_and_taken("resnet18", 64, 64)
    assert 0.4 < taken / (1.25 * predicted + MALLOC) < 1  # with the margins of `fit`


@pytest.mark.torture
@pytest.mark.parametrize("size", [128, 224])
@pytest.mark.parametrize("name", NETWORKS.split())
def test_what_a_step_of_any_network_takes_is_known(name: str, size: int) -> None:
    """Ten networks, two sizes: what is refused is what would not fit, with the margin that `fit` takes."""
    predicted, taken = predicted_and_taken(name, size, 16)
    print(f"{name} {size}: predicted {predicted / 1e6:.0f} MB, taken {taken / 1e6:.0f} MB, {taken / predicted:.2f}")
    assert 0.4 < taken / (1.25 * predicted + MALLOC) < 1


def test_memory_grows_with_the_images_of_a_part_and_with_the_processes() -> None:
    engine, config = Engine(EngineConfig(device="cpu")), resolve(SMALL)
    few, some, more = (step_memory(config, engine, share) for share in (4, 8, 16))
    assert few < some < more and 2 * (some - few) == pytest.approx(more - some, rel=0.05)
    block = torch.zeros(1 << 24).add_(1)  # 64 MiB that are really there
    one, four = peak_memory(engine, 1), peak_memory(engine, 4)
    assert block.nbytes < one["used"] < one["total"] and one["device_total"] == 0
    assert four["used"] == pytest.approx(4 * one["used"], rel=0.05)


def test_what_fits_is_taken_where_that_is_wanted() -> None:
    """The largest batch of a power of two that fits, its learning rate in proportion, else a refusal that names one."""
    config = resolve(SMALL | {"batch_size": 256, "method.memory_size": 512})
    engine = Engine(EngineConfig(device="cpu"))
    free = MALLOC + 2 * step_memory(config, engine, 64)
    fitting = fit(dataclasses.replace(config, fit_batch=True), engine, 0, free=free)
    accumulated = dataclasses.replace(config, accumulate=256 // fitting.batch_size)
    assert fit(fitting, engine, 0, free=free) == fitting and fit(accumulated, engine, 0, free=free) == accumulated
    assert fitting.optimizer.lr / config.optimizer.lr == fitting.batch_size / 256 < 1
    with pytest.raises(ConfigError, match=r"0.0 MB are free; set loader\.path files"):
        fit(config, engine, 0, free=free, resident=free + 1)
    with pytest.raises(ConfigError, match=f"batch_size.* {fitting.batch_size}, .*accumulate {256 // fitting.batch_size}"):
        fit(config, engine, 0, free=free)
    assert MALLOC + 1.25 * step_memory(config, engine, 2 * fitting.batch_size) > free
    larger = dataclasses.replace(config, batch_size=2 * fitting.batch_size - 16)
    with pytest.raises(ConfigError, match=f"batch_size {fitting.batch_size}, .*accumulate 2"):
        fit(larger, engine, 0, free=free)


def test_on_a_gpu_bf16_takes_as_much_as_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    config, engine = resolve(SMALL | {"batch_size": 64}), Engine(EngineConfig(device="cpu", precision="bf16"))
    expected = step_memory(config, engine, 64)
    assert expected < 0.8 * step_memory(config, Engine(EngineConfig(device="cpu", precision="fp32")), 64)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    engine.device = torch.device("cuda")
    assert step_memory(config, engine, 64) == expected


def test_what_does_not_fit_is_refused_before_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("relssl.train.memory.free_memory", lambda device: 4 * 10**8)
    used = memory_used()
    command = "estimate digits --batch_size 512 --encoder.stem small --engine.device cpu --engine.precision fp32"
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    takes = re.search(
        r"^relssl: batch_size: .* takes about ([\d.]+) GB of memory, 400.0 MB .*accumulate \d+$", error, re.MULTILINE
    )
    assert takes is not None and memory_used() - used < float(takes[1]) * 10**9 / 2, error
    assert not list(tmp_path.iterdir())


@pytest.mark.torture
def test_the_limit_of_a_process_is_minded(tmp_path: Path) -> None:
    """Where a process may map 2 GB more than torch's libraries are; a fresh process: torture."""
    script = """
        import resource, sys, psutil, torch, timm, relssl.train.estimate, relssl.report.tables
        most = psutil.Process().memory_info().vms + 2 * 10**9
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        from relssl.cli import main
        words = "estimate digits --backbone resnet50 --batch_size 256 --views.enlarge true --views.weak.size 224"
        sys.exit(main([*words.split(), *"--views.strong.size 224 --engine.device cpu --engine.precision fp32".split()]))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if "batch_size" in line]
    assert "accumulate" in line and "GB" in line


def test_steps_that_take_minutes_are_timed_on_fewer_images() -> None:
    run = build(resolve(SMALL), Engine(EngineConfig(device="cpu")))
    assert affordable(run) is run
    smaller = affordable(run, seconds=0)
    assert smaller.plan.share < run.plan.share
    assert smaller.config.batch_size == smaller.plan.share * run.plan.parts


def test_what_a_container_has_read_from_files_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relssl.train.memory._CGROUPS", tmp_path)
    files = {
        "memory.max": "3000000",
        "memory.current": "2900000",
        "memory.stat": "anon 900000\ninactive_file 500000\nactive_file 1500000",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert free_memory(torch.device("cpu")) == 2_100_000
