"""A run as a whole: what it leaves, that it learns without a trace of accident, and that it repeats bit for bit."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import relssl
from relssl.cli import main
from relssl.data.loader import Batch
from relssl.data.named import load
from relssl.engine import Engine
from relssl.errors import CheckpointError, ConfigError, DataError, Interrupted, LockedError, NumericError, StorageError
from relssl.method.base import unwrapped
from relssl.method.optim import PLAIN
from relssl.settings.reading import merge, nest
from relssl.settings.run import resolve
from relssl.train.loop import Trainer
from relssl.train.pretrain import complete_settings
from relssl.train.run_folder import Display, RunFolder
from relssl.weights import store
from small_runs import NORMLESS, SMALL, differing, final_state, repeatable_rows, small_run

HEALTH = {"teacher_entropy", "teacher_neighbours", "kl", "agreement", "embedding_std", "effective_rank"}
SHOWN = {
    "step",
    "epoch",
    "samples",
    "loss",
    "lr",
    "teacher_momentum",
    "warmup_mix",
    "images_per_second",
    "data_wait",
    "grad_norm",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that tests only read."""
    return small_run(tmp_path_factory.mktemp("runs") / "whole").folder


def test_the_run_folder_holds_what_is_promised(finished: Path) -> None:
    for name in (
        "config.yaml",
        "environment.json",
        "status.json",
        "metrics.jsonl",
        "export/backbone.safetensors",
        "export/backbone.md",
    ):
        assert (finished / name).stat().st_size > 0
    status = json.loads((finished / "status.json").read_text())
    assert status["state"] == "complete" and status["exit_code"] == 0 and status["step"] == 20
    assert status["last_checkpoint"] == "step-00000020"
    assert {path.name for path in (finished / "checkpoints" / "step-00000020").iterdir()} == {
        "state.safetensors",
        "state.json",
        "SHA256SUMS",
    }
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 3, 6, 9, 10, 12, 15, 18, 20]
    assert rows[0].keys() == {"step", "epoch", "samples", "knn_top1", "knn_teacher_top1", "knn_raw_pixels"}
    for row in rows[1:]:
        assert row.keys() >= HEALTH | SHOWN
        assert all(value is not None and math.isfinite(value) for value in row.values())
        assert row["images_per_second"] > 0 and 0 <= row["data_wait"] < 1
    assert [row["step"] for row in rows if "knn_top1" in row] == [0, 10, 20]
    assert relssl.load_run(finished).config.views.mean == load("digits", None, "train").mean


def test_the_same_command_twice_gives_the_same_bits(finished: Path, tmp_path: Path) -> None:
    again = small_run(tmp_path / "again").folder
    assert differing(final_state(finished), final_state(again)) == []
    assert repeatable_rows(finished) == repeatable_rows(again)
    other = small_run(tmp_path / "other", seed=1).folder
    assert "student.backbone.conv1.weight" in differing(final_state(finished), final_state(other))


@pytest.mark.parametrize("cut", [1, 7, 10, 13, 19])
def test_resuming_at_any_step_repeats_the_uninterrupted_run(finished: Path, tmp_path: Path, cut: int) -> None:
    folder = tmp_path / "cut"
    config = resolve(merge(SMALL, {"out": str(folder), "checkpoint": {"every_steps": 1}}))
    run_until(config, folder, cut)
    done = relssl.resume(folder, quiet=True)
    assert done is not None and done.rows[-1]["step"] == 20
    assert differing(final_state(finished), final_state(folder)) == []
    assert repeatable_rows(finished) == repeatable_rows(folder)


def run_until(config: Any, folder: Path, step: int) -> None:
    """Start a run and let SIGTERM reach it in the middle of step `step`."""
    original = Trainer.train_step

    def interrupted(self: Trainer, parts: list[Batch]) -> Any:
        if self.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        with pytest.raises(Interrupted) as stopped:
            relssl.pretrain(settings=config, quiet=True)
    assert stopped.value.exit_code == 143
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "interrupted" and status["exit_code"] == 143
    assert status["last_checkpoint"] == f"step-{step:08d}"


def test_a_finished_run_resumed_changes_nothing(finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("state.*")}
    rows = repeatable_rows(finished)
    assert relssl.resume(finished, quiet=True) is not None
    assert {path: path.read_bytes() for path in finished.rglob("state.*")} == before
    assert repeatable_rows(finished) == rows


def test_a_time_limit_saves_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as stopped:
        small_run(tmp_path / "limited", time_limit=1e-6)
    assert stopped.value.exit_code == 75
    assert (tmp_path / "limited/checkpoints/step-00000001").is_dir()


def test_a_used_folder_is_refused_and_untouched(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*"))
    assert main(["pretrain", "digits", "--out", str(finished)]) == 2
    assert f"relssl resume {finished}" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="relssl resume"):
        small_run(finished)
    assert sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*")) == before


def test_a_locked_folder_is_refused(finished: Path) -> None:
    held = RunFolder(finished)
    try:
        with pytest.raises(LockedError, match=f"process {os.getpid()}"):
            relssl.resume(finished, checkpoint="step-00000020", quiet=True)
    finally:
        held.close()


def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_offered(tmp_path: Path, finished: Path) -> None:
    folder = tmp_path / "damaged"
    run_until(resolve(merge(SMALL, {"out": str(folder)})), folder, 15)
    state = folder / "checkpoints/step-00000015/state.safetensors"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"step-00000015.*state.safetensors.*--checkpoint step-00000010"):
        relssl.resume(folder, quiet=True)
    with pytest.MonkeyPatch.context() as patch:  # stopped again before it is where it was: no future that was given up comes back
        patch.setattr(Trainer, "fit", lambda self, display, stop: (_ for _ in ()).throw(Interrupted("stopped", 143)))
        with pytest.raises(Interrupted):
            relssl.resume(folder, checkpoint="step-00000010", quiet=True)
    assert [path.name for path in store.checkpoints(folder / "checkpoints")] == ["step-00000010"]
    assert relssl.resume(folder, quiet=True) is not None
    assert differing(final_state(finished), final_state(folder)) == []
    with pytest.raises(CheckpointError, match="holds no checkpoint 'step-7'"):
        relssl.resume(folder, checkpoint="step-7", quiet=True)


def test_every_missing_part_of_a_checkpoint_is_refused_by_name(tmp_path: Path, finished: Path) -> None:
    tensors, meta = store.load(store.checkpoints(finished / "checkpoints")[-1])
    for name in list(tensors)[:: max(1, len(tensors) // 12)]:
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
        store.save(folder / "checkpoints/step-00000020", {k: v for k, v in tensors.items() if k != name}, meta)
        with pytest.raises(CheckpointError, match=name.rsplit(".", 1)[-1]):
            relssl.resume(folder, quiet=True)


def trainer(tmp_path: Path, **overrides: Any) -> Trainer:
    config = resolve(merge(merge(SMALL, {"out": str(tmp_path)}), nest(overrides)))
    images = load("digits", None, "train").subset(range(config.max_images or 320))
    return Trainer(complete_settings(config, images), Engine(config.engine), images, None)


def whole_state(made: Trainer) -> dict[str, torch.Tensor]:
    parts = {"student": unwrapped(made.model.student), "teacher": made.model.teacher, "memory": made.model.memory}
    state = {f"{part}.{name}": value.clone() for part, module in parts.items() for name, value in module.state_dict().items()}
    for i, momentum in enumerate(made.optimizer.state.values()):
        state[f"momentum.{i}"] = momentum["momentum_buffer"].clone()
    return state


@pytest.mark.parametrize("fused", [True, False], ids=["told on the device", "asked on the host"])
def test_a_non_finite_step_leaves_no_trace(tmp_path: Path, fused: bool) -> None:
    made = trainer(tmp_path)
    if not fused:
        made.optimizer = torch.optim.SGD([{"params": made.parameters, **PLAIN}], lr=0.1, momentum=0.9, fused=False)
    stream: Iterator[list[Batch]] = made.loader.stream(0, 20)
    made.train_step(next(stream))
    before = whole_state(made)
    poisoned = next(stream)
    poisoned[0].strong[0][0, 0, 0, 0] = float("nan")
    made.train_step(poisoned)
    assert differing(before, whole_state(made)) == []
    poisoned[0].strong[0][0, 0, 0, 0] = 0.0
    poisoned[0].weak[3] = float("inf")
    made.train_step(poisoned)
    assert differing(before, whole_state(made)) == []
    made.train_step(next(stream))
    assert "memory.keys" in differing(before, whole_state(made))


def test_the_way_back_is_outside_autocast(tmp_path: Path) -> None:
    """Autocast on the way back would round the fp32 product of the loss's gradient and the memory to bf16."""
    made = trainer(tmp_path, **{"engine.precision": "bf16"})
    seen: list[bool] = []
    made.parameters[0].register_hook(lambda gradient: seen.append(torch.is_autocast_enabled("cpu")))
    made.train_step(next(made.loader.stream(0, 1)))
    assert seen == [False]


def test_non_finite_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    made = trainer(tmp_path, **{"log.every": 4})
    batch = next(made.loader.stream(0, 1))
    good = [view.clone() for view in (batch[0].weak, *batch[0].strong)]

    def train(steps: int) -> None:
        for _ in range(steps):
            figures = made.train_step(batch)
            if figures is not None:
                made._report(figures, None, None, Display(1, 0, show=False))

    batch[0].weak.fill_(float("nan"))
    train(9)
    batch[0].weak.copy_(good[0])
    train(1)
    assert int(made.guard.streak) == 0
    batch[0].weak.fill_(float("nan"))
    with pytest.raises(NumericError, match="10 steps in a row"):
        train(13)


def test_accumulated_parts_fill_memory_and_teacher_as_one_batch_does(tmp_path: Path) -> None:
    whole = small_run(tmp_path / "whole", **NORMLESS).folder
    parts = small_run(tmp_path / "parts", accumulate=4, **NORMLESS).folder
    a, b = final_state(whole), final_state(parts)
    assert torch.equal(a["memory.ids"], b["memory.ids"]) and torch.equal(a["memory.pointer"], b["memory.pointer"])
    for name in a:
        if name.startswith(("memory.keys", "teacher.", "student.")):
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
    for x, y in zip(repeatable_rows(whole), repeatable_rows(parts), strict=True):
        assert x["step"] == y["step"] and x.get("lr") == y.get("lr")
        assert x.get("loss", 0) == pytest.approx(y.get("loss", 0), rel=1e-4)


def test_the_python_function_takes_names_and_sections(tmp_path: Path) -> None:
    sections = {key: value for key, value in SMALL.items() if key != "data"}
    again = relssl.pretrain("digits", out=str(tmp_path / "run"), quiet=True, **(sections | {"max_images": 64, "epochs": 1}))
    assert again is not None and again.rows[-1]["step"] == 2
    assert relssl.load_backbone(again.folder)(torch.rand(2, 3, 32, 32)).shape == (2, 16)
    with pytest.raises(ConfigError, match=r"optimizer.lrr: unknown key; the nearest is optimizer.lr"):
        relssl.pretrain("digits", out=str(tmp_path / "none"), optimizer={"lrr": 3})
    assert not (tmp_path / "none").exists()


def test_a_full_disk_under_the_metrics_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, row: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "run/metrics.jsonl"))

    monkeypatch.setattr("relssl.train.run_folder.Journal.write", full)
    with pytest.raises(StorageError, match=r"metrics.jsonl: cannot be written \(No space left on device\)"):
        small_run(tmp_path / "run")


def test_dropped_paths_resume_exactly_from_files(pictures: Path, tmp_path: Path) -> None:
    """Stochastic depth draws from torch's own generator, loaders must not."""
    settings = merge(
        FILES,
        {
            "data": str(pictures),
            "epochs": 2,
            "backbone_args": SMALL["backbone_args"] | {"drop_path_rate": 0.3},
            "loader": {"workers": 1},
        },
    )
    small_run(tmp_path / "whole", **settings)
    config = resolve(merge(merge(SMALL, settings), {"out": str(tmp_path / "cut")}))
    run_until(config, tmp_path / "cut", 4)
    assert relssl.resume(tmp_path / "cut", quiet=True) is not None
    assert differing(final_state(tmp_path / "whole"), final_state(tmp_path / "cut")) == []


def test_an_error_of_the_libraries_below_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Trainer, parts: list[Batch]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "train_step", step)
    with pytest.raises(ConfigError, match="batch_size: 32 does not fit"):
        small_run(tmp_path / "run")
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"


def test_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    small_run(tmp_path / "run", epochs=6, checkpoint={"every": 5})
    rows = [row for row in repeatable_rows(tmp_path / "run") if "knn_top1" in row and row["step"]]
    best = max(rows, key=lambda row: row["knn_top1"])
    kept = [path.name for path in store.checkpoints(tmp_path / "run/checkpoints")]
    assert f"step-{best['step']:08d}" in kept and kept[-1] == "step-00000060"


def test_multi_crop_trains(tmp_path: Path) -> None:
    result = small_run(
        tmp_path / "crops",
        epochs=1,
        **{"views.crops": [[32, 0.5, 1.0], [24, 0.3, 0.8], [24, 0.3, 0.8]]},
        optimizer={"warmup_epochs": 0},
    )
    assert result.rows[-1]["step"] == 10


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    torch.manual_seed(0)
    for i in range(40):
        (folder / f"sub{i % 3}").mkdir(parents=True, exist_ok=True)
        pixels = (torch.rand(40, 48, 3) * 255).byte().numpy()
        Image.fromarray(pixels).save(folder / f"sub{i % 3}/{i:02}.jpg")
    return folder


FILES: dict[str, Any] = {
    "recipe": "digits",
    "max_images": "null",
    "epochs": 1,
    "batch_size": 8,
    "views": {"weak": {"name": "weak", "size": 32}, "strong": {"name": "contrastive", "size": 32}},
    "method": {"memory_size": 16},
    "optimizer": {"warmup_epochs": 0},
    "loader": {"workers": 1},
}


def test_a_folder_with_bad_images_trains_and_lists_them(pictures: Path, tmp_path: Path) -> None:
    (pictures / "sub0/00.jpg").write_bytes((pictures / "sub0/00.jpg").read_bytes()[:200])
    (pictures / "sub1/not.jpg").write_text("<html>404</html>")
    (pictures / "sub2/empty.png").touch()
    os.mkfifo(pictures / "sub2/pipe.jpg")
    result = small_run(tmp_path / "run", **merge(FILES, {"data": str(pictures), "epochs": 3}))
    assert result.rows[-1]["step"] == 15 and "knn_top1" not in result.rows[-1]
    listed = [json.loads(line) for line in (tmp_path / "run/bad_samples.jsonl").read_text().splitlines()]
    assert {Path(entry["file"]).name for entry in listed} == {"00.jpg", "not.jpg", "empty.png", "pipe.jpg"}
    assert len(listed) == 4 and all(entry["reason"] for entry in listed)


def test_too_many_bad_images_stop_the_run(pictures: Path, tmp_path: Path) -> None:
    for i in range(0, 40, 2):
        next(pictures.rglob(f"{i:02}.jpg")).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot be read, more than loader.max_bad_fraction \(0.1\)"):
        small_run(tmp_path / "run", **merge(FILES, {"data": str(pictures)}))
    assert json.loads((tmp_path / "run/status.json").read_text())["error"]["kind"] == "data"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["pretrain", "nowhere/", "--out", "{run}"], 3, "nowhere"),
        (["pretrain", "cifr10", "--out", "{run}"], 3, "cifar10"),
        (["pretrain", "{empty}", "--out", "{run}"], 3, "no images"),
        (["pretrain", "{pictures}", "--out", "{run}"], 3, "40 usable images, batch is 256"),
        (["pretrain", "--epohcs", "3", "--out", "{run}"], 2, "the nearest is epochs"),
        (["pretrain", "--backbone", "resnet81", "--epochs", "20", "--out", "{run}"], 2, "knows no 'resnet81'"),
        (["pretain"], 2, "the nearest is pretrain"),
        (["resume", "{empty}"], 2, "is no run folder"),
        (["evaluate", "{empty}"], 2, "is no run folder"),
    ],
)
def test_wrong_input_is_one_line_with_its_exit_code(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"run": tmp_path / "run", "empty": tmp_path / "empty", "pictures": pictures}
    assert main([word.format(**places) for word in arguments]) == code
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("relssl:")]
    assert len(told) == 1 and message in told[0]
    assert not (tmp_path / "run").exists()


def test_sigkill_then_resume_from_the_command_line(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    config = tmp_path / "config.yaml"
    text = (
        (finished / "config.yaml").read_text().replace("every_steps: null", "every_steps: 2").replace(str(finished), str(folder))
    )
    config.write_text(text)
    started = subprocess.Popen([sys.executable, "-m", "relssl", "pretrain", "--config", str(config)], stderr=subprocess.DEVNULL)
    while started.poll() is None and not (folder / "checkpoints/step-00000004").exists():
        time.sleep(0.02)
    started.kill()
    started.wait()
    assert main(["resume", str(folder)]) == 0
    assert differing(final_state(finished), final_state(folder)) == []
    assert repeatable_rows(finished) == repeatable_rows(folder)


def test_one_crop_is_a_list_of_one(tmp_path: Path) -> None:
    """The code of several crops with one of them makes the losses and the weights of the plain view, bit for bit."""
    plain = small_run(tmp_path / "plain", **{"views.strong": {"name": "contrastive"}, "log.every": 1})
    listed = small_run(
        tmp_path / "listed", **{"views.strong": {"name": "contrastive"}, "views.crops": [[32, 0.2, 1.0]], "log.every": 1}
    )
    assert repeatable_rows(plain.folder) == repeatable_rows(listed.folder)
    assert differing(final_state(plain.folder), final_state(listed.folder)) == []
