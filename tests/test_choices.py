"""What a run finds out about its machine: compiling and the form of the loss change nothing but the time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from relssl.data.named import load
from relssl.engine import Engine
from relssl.method.base import unwrapped
from relssl.settings.reading import merge, nest
from relssl.settings.run import resolve
from relssl.train.loop import Trainer
from relssl.train.pretrain import complete_settings
from small_runs import SMALL, differing


def trainer(out: Path, **settings: Any) -> Trainer:
    images = load("digits", None, "train").subset(range(96))
    over = {"out": str(out), "engine.precision": "fp32", "optimizer.warmup_epochs": 0} | settings  # the first step moves all
    config = complete_settings(resolve(merge(SMALL, nest(over))), images)
    made = Trainer(config, Engine(config.engine), images, None)
    made.compile()
    return made


def state(made: Trainer) -> dict[str, torch.Tensor]:
    moments = {f"momentum.{i}": s["momentum_buffer"].clone() for i, s in made.optimizer.state_dict()["state"].items()}
    return {name: value.clone() for name, value in made.model.state_dict().items()} | moments | {"torch": torch.get_rng_state()}


def test_a_compiler_that_fails_is_told_in_one_line_and_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler\nmany\nlines")

    plain = trainer(tmp_path / "a")
    monkeypatch.setattr(torch, "compile", fail)
    without = trainer(tmp_path / "b", compile="on")
    assert without.compiled == "compile: not possible here (no compiler); going on without"
    assert differing(state(plain), state(without)) == []
    for made in (plain, without):
        made.train_step(next(made.loader.stream(0, 1)))
    assert differing(state(plain), state(without)) == []
    assert unwrapped(without.model.student).compiled_heads is None


def test_auto_does_not_compile_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    assert trainer(tmp_path).compiled is None


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what is not ours
def test_compiled_networks_make_the_same_step(tmp_path: Path) -> None:
    plain, compiled = trainer(tmp_path / "a"), trainer(tmp_path / "b", compile="on")
    assert compiled.compiled is not None and "of the time without" in compiled.compiled
    assert unwrapped(compiled.model.student).compiled_heads is not None
    assert differing(state(plain), state(compiled)) == []  # trying it out has left no trace
    for made in (plain, compiled):
        made.train_step(next(made.loader.stream(0, 1)))
    a, b = state(plain), state(compiled)
    assert max(float(value.abs().max()) for name, value in a.items() if name.startswith("momentum")) > 0.01
    for name in a:  # the sharp relations of an untrained network magnify what fp32 rounds off
        if a[name].is_floating_point():
            assert float((a[name] - b[name]).norm()) <= 2e-3 * float(a[name].norm()), name


def test_what_a_stopwatch_decided_is_saved_and_a_change_is_told(tmp_path: Path) -> None:
    from relssl.train.run_folder import RunFolder

    made = trainer(tmp_path / "a", **{"method.loss_form": "plain"})
    made.folder = RunFolder(tmp_path / "a")
    made.train_step(next(made.loader.stream(0, 1)))
    made.save()
    made.folder.close()
    saved = next((tmp_path / "a/checkpoints").glob("step-*"))
    again = trainer(tmp_path / "b")
    assert again.restore(saved) == []
    assert again.redecided() == ["loss form plain -> tiled"]


def test_the_loss_is_tiled_on_a_cpu_(tmp_path: Path) -> None:
    forms = {form: trainer(tmp_path / form, **{"method.loss_form": form}) for form in ("auto", "tiled", "plain")}
    assert forms["auto"].model.objective is forms["tiled"].model.objective is not forms["plain"].model.objective
    for made in forms.values():
        made.train_step(next(made.loader.stream(0, 1)))
    for name, value in state(forms["plain"]).items():
        torch.testing.assert_close(state(forms["tiled"])[name], value, rtol=1e-4, atol=1e-5)
