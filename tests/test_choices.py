"""Compiling and the form of the loss change nothing but the time, and a compiler that fails is done without."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from relssl.train import checkpoint
from relssl.train.loop import Run, origin, save, train_step
from relssl.train.pretrain import compile_networks
from relssl.train.run_folder import RunFolder
from small_runs import differing, ready_run, training_state


def run_of(out: Path, **settings: Any) -> Run:
    # The first step moves all.
    return ready_run(out, images=96, **{"engine.precision": "fp32", "optimizer.warmup_epochs": 0} | settings)


def step(run: Run) -> dict[str, torch.Tensor]:
    train_step(run, next(run.loader.stream(0, 1)))
    return training_state(run)


def test_a_compiler_that_fails_is_one_line_and_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(images: torch.Tensor) -> Any:
        raise RuntimeError("no compiler\nmany\nlines")

    plain = run_of(tmp_path / "a")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    without = run_of(tmp_path / "b", compile="on")
    before = training_state(without)
    line = compile_networks(without)
    assert line is not None and line.startswith("compile: not possible here (no compiler)") and "\n" not in line
    assert differing(before, training_state(without)) == []
    assert differing(step(plain), step(without)) == []


def test_auto_does_not_compile_on_a_cpu(tmp_path: Path) -> None:
    run = run_of(tmp_path, epochs=1000)
    assert run.total_steps > 2000 and compile_networks(run) is None and run.networks[0].compiled_heads is None


@pytest.mark.torture
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what is not ours
def test_compiled_networks_make_the_same_step(tmp_path: Path) -> None:
    """A minute of compiling: torture."""
    plain, compiled = run_of(tmp_path / "a"), run_of(tmp_path / "b", compile="on")
    before = training_state(compiled)
    assert compile_networks(compiled) == "compile: the networks are compiled"
    assert compiled.networks[0].compiled_heads is not None
    assert differing(before, training_state(compiled)) == []  # trying it out has left no trace
    a, b = step(plain), step(compiled)
    assert max(float(value.abs().max()) for name, value in a.items() if name.startswith("momentum")) > 0.01
    for name in a:  # the sharp relations of an untrained network magnify what fp32 rounds off
        if a[name].is_floating_point():
            assert float((a[name] - b[name]).norm()) <= 2e-3 * float(a[name].norm()), name


def test_what_rounds_otherwise_is_saved_and_a_change_is_reported(tmp_path: Path) -> None:
    run = run_of(tmp_path / "a", **{"method.loss_form": "plain"})
    run.folder = RunFolder(tmp_path / "a")
    step(run)
    save(run)
    run.folder.close()
    again = run_of(tmp_path / "b")
    saved = next((tmp_path / "a/checkpoints").glob("step-*"))
    assert checkpoint.restore(saved, again.state, again.engine, origin(again)) == ["loss form plain -> tiled"]
    assert again.state.step == 1


def test_the_loss_is_tiled_unless_the_settings_say_plain(tmp_path: Path) -> None:
    auto, tiled, plain = (run_of(tmp_path / form, **{"method.loss_form": form}) for form in ("auto", "tiled", "plain"))
    assert (auto.loss_form, tiled.loss_form, plain.loss_form) == ("tiled", "tiled", "plain")
    expected, equal = step(plain), step(tiled)
    for name, value in expected.items():
        torch.testing.assert_close(equal[name], value, rtol=1e-4, atol=1e-5)
