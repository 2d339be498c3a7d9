"""A run as a whole: what it leaves, that it learns without a trace of accident, and that it repeats bit for bit."""

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import relssl
from relssl.cli import main
from relssl.data.named import load
from relssl.errors import STOPPING, CheckpointError, ConfigError, DataError, Interrupted, LockedError, StorageError
from relssl.files import read_json, read_rows
from relssl.train.loop import train_step
from relssl.train.pretrain import explaining
from relssl.train.run_folder import RunFolder
from relssl.weights import store
from small_runs import (
    NORMLESS,
    SMALL,
    close_runs,
    cut,
    differing,
    equal_runs,
    final_state,
    merge,
    ready_run,
    small_run,
    training_state,
)

FIGURES = {
    *("step", "epoch", "samples", "loss", "lr", "teacher_momentum", "warmup_mix", "images_per_second", "data_wait", "grad_norm"),
    *("teacher_entropy", "teacher_neighbours", "kl", "agreement", "embedding_std", "effective_rank", "top_agreement"),
    *("positive_margin", "alignment", "uniformity", "memory_unused", "hubness", "matched_age"),
}
# The shortest run: two steps, and nothing is measured.
SHORT: dict[str, Any] = {"max_images": 64, "epochs": 1, "log.knn_every": 0}


def contents(folder: Path) -> list[tuple[Path, int]]:
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))


def test_the_run_folder_holds_what_is_promised(source: Path) -> None:
    for name in ("config.yaml", "environment.json", "export/backbone.safetensors", "export/backbone.md"):
        assert (source / name).stat().st_size > 0
    status = {"state": "complete", "step": 20, "exit_code": 0, "error": None, "last_checkpoint": "step-00000020"}
    assert read_json(source / "status.json") == status
    saved = {path.name for path in (source / "checkpoints" / "step-00000020").iterdir()}
    assert saved == {"state.safetensors", "state.json", "SHA256SUMS"}
    rows = read_rows(source / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 3, 6, 9, 10, 12, 15, 18, 20]
    measured = {"feature_rank", "knn_top1", "knn_teacher_top1"}
    assert rows[0].keys() == {"step", "epoch", "samples", "knn_raw_pixels"} | measured
    assert rows[-1].keys() == FIGURES | measured | {"neighbour_stability", "teacher_temperature"}
    assert all(value is not None and math.isfinite(value) for row in rows for value in row.values())
    assert all(row.keys() >= FIGURES and row["images_per_second"] > 0 and 0 <= row["data_wait"] < 1 for row in rows[1:])
    assert [row["step"] for row in rows if "knn_top1" in row] == [0, 10, 20]
    assert relssl.load_run(source).config.views.mean == load("digits", None, "train").mean


def test_the_same_command_twice_gives_the_same_bits(source: Path, tmp_path: Path) -> None:
    assert equal_runs(source, small_run(tmp_path / "again").folder)
    other = small_run(tmp_path / "other", **SHORT, seed=1).folder
    assert "student.backbone.conv1.weight" in differing(final_state(source), final_state(other))


@pytest.mark.parametrize("step", [1, 10, 13])
def test_resuming_at_any_step_repeats_the_uninterrupted_run(source: Path, tmp_path: Path, step: int) -> None:
    folder = cut(source, tmp_path / "cut", step)
    assert relssl.resume(folder, quiet=True).rows[-1]["step"] == 20
    assert equal_runs(source, folder)


def test_a_signal_and_a_time_limit_save_and_end_with_their_codes(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def interrupt() -> None:
        while not (folder / "metrics.jsonl").exists():  # by then the run listens
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted) as stopped:
        small_run(folder)
    thread.join()
    first = read_json(folder / "status.json")
    with pytest.raises(Interrupted) as limited:
        relssl.resume(folder, quiet=True, time_limit=1e-6)
    second = read_json(folder / "status.json")
    assert (stopped.value.exit_code, limited.value.exit_code) == (first["exit_code"], second["exit_code"]) == (143, 75)
    assert first["state"] == second["state"] == "interrupted" and second["step"] == first["step"] + 1 < 20
    assert second["last_checkpoint"] == f"step-{second['step']:08d}"
    relssl.resume(folder, quiet=True)
    assert equal_runs(source, folder)


def test_max_steps_ends_the_run_and_its_schedules(tmp_path: Path) -> None:
    more = {"max_images": 64, "max_steps": 3, "optimizer.warmup_epochs": 0, "log.every": 1, "log.knn_images": [40, 40]}
    rows = small_run(tmp_path / "run", **more).rows
    assert [row["step"] for row in rows if "knn_top1" in row] == [0, 2, 3]
    for row in rows[1:]:
        assert row["lr"] == pytest.approx(rows[1]["lr"] * 0.5 * (1 + math.cos(math.pi * (row["step"] - 1) / 3)))
    assert read_json(tmp_path / "run/status.json")["last_checkpoint"] == "step-00000003"


def test_small_data_and_short_runs_just_run_and_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = {name: SMALL[name] for name in ("data", "backbone_args", "encoder", "engine")} | {"max_images": 40, "epochs": 1}
    few |= {"method": {"warmup_share": 0.5}, "log": {"knn_every": 0, "to": [], "report": False}}
    run = relssl.pretrain(out=tmp_path / "run", **few)
    config, printed = relssl.load_run(run.folder).config, capsys.readouterr().err
    assert (config.batch_size, config.method.memory_size, config.optimizer.warmup_epochs) == (8, 16, 0.25)
    for words in ("batch_size is 8 instead of 64", "memory_size is 16 instead of 512", "warmup_epochs is 0.25 instead of 1"):
        assert words in printed and words in (run.folder / "run.log").read_text()
    with pytest.raises(DataError, match="batch_size"):
        relssl.pretrain(out=tmp_path / "typed", batch_size=64, quiet=True, **few)


def test_a_run_whose_batch_was_lowered_goes_on_by_its_own_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "relssl.train.run.fit",
        lambda config, *_, **__: replace(config, batch_size=16, optimizer=replace(config.optimizer, lr=0.1)),
    )
    few = SMALL | {"max_images": 64, "epochs": 1, "out": str(tmp_path / "run"), "quiet": True}
    command = merge(few, {"optimizer": {"lr": 0.2}}) | {"batch_size": 32, "fit_batch": True}
    rows = relssl.pretrain(**command).rows
    assert rows[-1]["step"] == 4 and relssl.pretrain(resume="auto", **command).rows == rows


def test_a_complete_run_is_not_taken_for_one_on_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, count in (("photos", 40), ("others", 41)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            Image.effect_noise((40, 40), 20 + number).convert("RGB").save(tmp_path / folder / f"{number:02}.png")
    few = merge(SMALL, {"data": "photos", "epochs": 1, "max_images": None, "out": "run", "quiet": True, "log": {"knn_every": 0}})
    few |= {"views": {name: {"size": 32} for name in ("weak", "strong")}, "data_root": "sets"}
    relssl.pretrain(**few)
    with pytest.raises(DataError, match="holds 41 images that are not the 40 of the run"):
        relssl.pretrain(**few | {"data": "others", "resume": "auto"})
    os.rename("photos", "moved")
    relssl.resume("run", data="moved", quiet=True)
    config = relssl.load_run("run").config
    assert config.data == str(tmp_path / "moved") and config.data_root == str(tmp_path / "sets")


def test_a_run_goes_on_for_more_epochs(tmp_path: Path) -> None:
    every = {"max_images": 96, "log": {**SMALL["log"], "every": 1, "knn_every": 0}}
    folder = small_run(tmp_path / "run", epochs=1, **every).folder
    rows = relssl.resume(folder, epochs=2, quiet=True).rows
    assert [row["step"] for row in rows] == [*range(1, 7)] and relssl.load_run(folder).config.epochs == 2
    expected = small_run(tmp_path / "other", epochs=2, **every).rows
    for name in ("lr", "warmup_mix", "teacher_momentum"):
        assert [row[name] for row in rows[3:]] == [row[name] for row in expected[3:]]
    before = contents(folder)
    with pytest.raises(ConfigError, match="epochs"):
        relssl.resume(folder, epochs=1, quiet=True)
    filled = {"views.mean": None, "views.std": None, "views.margin": None}  # as a file of all settings has them
    same = SMALL | every | {"epochs": 2, "out": str(folder), "resume": "auto", "quiet": True} | filled
    assert relssl.pretrain(**same).rows == rows
    with pytest.raises(ConfigError, match=r"optimizer.lr: .* 0.1, not 0.5"):
        relssl.pretrain(lr=0.5, **same)
    assert [path for path, _ in contents(folder)] == [path for path, _ in before]


def test_a_run_goes_on_with_settings_that_change_nothing_and_says_which_change_something(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cut(source, tmp_path / "cut", 19)
    command = [
        "resume",
        str(folder),
        *["--log.every", "5", "--log.knn_every", "2", "--loader.workers", "1", "--checkpoint.keep", "3"],
    ]
    assert main([*command, "--lr", "0.5", "--seed", "1"]) == 2
    assert [line.split(":")[1] for line in capsys.readouterr().err.splitlines()] == [" seed", " optimizer.lr"]
    assert main([*command, "--threads", "1"]) == 0
    assert differing(final_state(source), final_state(folder)) == [] and "exactly" in (folder / "run.log").read_text()
    assert relssl.load_run(folder).config.log.every == 5
    folder = cut(source, tmp_path / "warned", 19)
    assert main(["resume", str(folder), "--threads", "2"]) == 0
    assert "not bit for bit (threads 1 -> 2)" in (folder / "run.log").read_text()


def test_a_used_or_locked_folder_is_left_alone(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(source)
    relssl.resume(source, quiet=True)  # at once, as it had finished
    assert main(["pretrain", "digits", "--out", str(source)]) == 2
    assert f"relssl resume {source}" in capsys.readouterr().err
    assert contents(source) == before
    holder = RunFolder(source)
    try:
        with pytest.raises(LockedError, match=f"process {os.getpid()}"):
            relssl.resume(source, checkpoint="step-00000020", quiet=True)
    finally:
        holder.close()


def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_offered(tmp_path: Path, source: Path) -> None:
    folder = cut(source, tmp_path / "damaged", 10)
    shutil.copytree(source / "checkpoints/step-00000015", folder / "checkpoints/step-00000015")
    state = folder / "checkpoints/step-00000015/state.safetensors"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"step-00000015.*state.safetensors.*--checkpoint step-00000010"):
        relssl.resume(folder, quiet=True)
    with pytest.raises(CheckpointError, match="holds no checkpoint 'step-7'"):
        relssl.resume(folder, checkpoint="step-7", quiet=True)
    with pytest.raises(Interrupted):  # stopped again before it is where it was: no future that was given up comes back
        relssl.resume(folder, checkpoint="step-00000010", quiet=True, time_limit=1e-6)
    assert [path.name for path in store.checkpoints(folder / "checkpoints")] == ["step-00000010", "step-00000011"]


def test_every_missing_part_of_a_checkpoint_is_refused_by_name(tmp_path: Path, source: Path) -> None:
    tensors, meta = store.load(store.checkpoints(source / "checkpoints")[-1])
    for name in list(tensors)[:: max(1, len(tensors) // 6)]:
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.yaml").write_bytes((source / "config.yaml").read_bytes())
        store.save(folder / "checkpoints/step-00000020", {k: v for k, v in tensors.items() if k != name}, meta)
        with pytest.raises(CheckpointError, match=name.rsplit(".", 1)[-1]):
            relssl.resume(folder, quiet=True)


def test_accumulated_parts_fill_memory_and_teacher_as_one_batch_does(tmp_path: Path) -> None:
    short = {"max_images": 128, "epochs": 1, "log.knn_every": 0, "log.every": 1} | NORMLESS
    whole, parts = small_run(tmp_path / "whole", **short), small_run(tmp_path / "parts", accumulate=4, **short)
    assert close_runs(whole.folder, parts.folder)
    for x, y in zip(whole.rows, parts.rows, strict=True):
        assert (x["step"], x["lr"]) == (y["step"], y["lr"]) and x["loss"] == pytest.approx(y["loss"], rel=1e-4)


def test_one_crop_is_a_list_of_one(tmp_path: Path) -> None:
    """The code of several crops with one of them makes the steps of the plain view, bit for bit."""
    runs = [
        ready_run(tmp_path, images=64, **{"views.strong": "contrastive"} | more)
        for more in ({}, {"views.crops": [[32, 0.2, 1.0]]})
    ]
    for run in runs:
        for parts in run.loader.stream(0, 2):
            train_step(run, parts)
    assert differing(*map(training_state, runs)) == []


def process_state() -> list[Any]:
    """What a call may change for the rest of a user's process."""
    generators = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    signals = [signal.getsignal(number) for number in STOPPING]
    kernels = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype()
    return [generators, signals, kernels, torch.is_grad_enabled(), os.environ.copy(), len(warnings.filters)]


def test_a_call_takes_names_and_sections_and_neither_changes_nor_depends_on_the_process(tmp_path: Path) -> None:
    sections = {key: value for key, value in SMALL.items() if key != "data"} | {"max_images": 64, "epochs": 1}
    sections |= {"engine": {"threads": 1, "deterministic": True}, "log": SMALL["log"] | {"knn_every": 0}}

    def run(name: str) -> Path:
        return relssl.pretrain("digits", out=str(tmp_path / name), quiet=True, **sections).folder

    first = run("first")
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    before = process_state()
    try:
        second = run("second")
        assert process_state() == before
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(1)
    with torch.inference_mode():
        third = run("third")
    assert equal_runs(first, second) and equal_runs(first, third)
    assert relssl.load_backbone(first)(torch.rand(2, 3, 32, 32)).shape == (2, 16)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ConfigError, match=r"torch\.autocast"):
        run("fourth")
    with pytest.raises(ConfigError, match=r"optimizer.lrr: unknown key; the nearest is optimizer.lr"):
        relssl.pretrain("digits", out=str(tmp_path / "none"), optimizer={"lrr": 3})
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), ConfigError, "batch_size: 32 does not fit"),
        (OSError(28, "No space left on device", "metrics.jsonl"), StorageError, r"metrics.jsonl: .*No space left on device"),
        (RuntimeError("a bug"), RuntimeError, "a bug"),
    ],
)
def test_errors_of_the_libraries_below_say_what_to_do(tmp_path: Path, fault: Exception, kind: type, text: str) -> None:
    run = ready_run(tmp_path)
    with pytest.raises(kind, match=text), explaining(run.config, run.engine):
        raise fault


@pytest.mark.parametrize(("best", "figure"), [("knn", "knn_top1"), ("label-free", "positive_margin")])
def test_the_best_checkpoint_is_kept(tmp_path: Path, best: str, figure: str) -> None:
    more = {"max_images": 96, "epochs": 4, "checkpoint": {"every": 3, "best": best, "keep": 2}}
    run = small_run(tmp_path / "run", **more)
    rows = [row for row in run.rows if "feature_rank" in row and row["step"]]  # those of evaluations
    top = max(rows, key=lambda row: row[figure])
    *_, newest = saved = store.checkpoints(run.folder / "checkpoints")
    name = f"step-{top['step']:08d}"
    assert {path.name for path in saved} == {name, "step-00000009", "step-00000012"}
    assert read_json(newest / "state.json")["meta"]["best"] == {figure: top[figure], "checkpoint": name}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (40, 40, 48, 3), dtype=np.uint8)):
        (folder / f"sub{number % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"sub{number % 3}/{number:02}.jpg")
    return folder


FILES: dict[str, Any] = {"recipe": "digits", "max_images": "null", "epochs": 1, "batch_size": 8, "loader": {"workers": 0}}
FILES |= {"views": {"weak": {"name": "weak", "size": 32}, "strong": {"name": "contrastive", "size": 32}}}
FILES |= {"method": {"memory_size": 16}, "optimizer": {"warmup_epochs": 0}}


def test_a_run_goes_on_where_its_images_are_now(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = small_run(tmp_path / "whole", **merge(FILES, {"data": str(pictures)})).folder
    monkeypatch.chdir(tmp_path)
    again = {"out": "run", "resume": "auto", "quiet": True, **merge(merge(SMALL, FILES), {"data": "pictures"})}
    with pytest.raises(Interrupted):  # the same command starts the run, and goes on with it
        relssl.pretrain(**again, time_limit=1e-6)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # from any folder
    with pytest.raises(Interrupted):
        relssl.resume("../run", time_limit=1e-6, quiet=True)
    shutil.move(pictures, tmp_path / "elsewhere/moved")
    with pytest.raises(DataError, match="--data PATH"):
        relssl.resume("../run", quiet=True)
    with pytest.raises(Interrupted):
        relssl.resume("../run", data="moved", time_limit=1e-6, quiet=True)
    shutil.copytree("moved", "other")
    next(Path("other").rglob("*.jpg")).rename("other/new.jpg")
    before = contents(tmp_path / "run")
    with pytest.raises(DataError, match="are not the 40 of the run"):
        relssl.resume("../run", data="other", quiet=True)
    assert [path for path, _ in contents(tmp_path / "run")] == [path for path, _ in before]
    relssl.resume("../run", time_limit=math.inf, quiet=True)
    assert equal_runs(whole, tmp_path / "run")


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_dropped_paths_resume_exactly_from_files(pictures: Path, tmp_path: Path, optimizer: str) -> None:
    """Stochastic depth draws from torch's own generator, loaders must not."""
    dropping = {"backbone_args": SMALL["backbone_args"] | {"drop_path_rate": 0.3}, "checkpoint": {"every_steps": 3}}
    dropping |= {"optimizer": {"name": optimizer, "lr": 0.01}, "data": str(pictures)}
    whole = small_run(tmp_path / "whole", **merge(FILES, dropping)).folder
    folder = cut(whole, tmp_path / "cut", 3)
    relssl.resume(folder, quiet=True)
    assert equal_runs(whole, folder)


def test_a_folder_with_bad_images_trains_and_lists_them(pictures: Path, tmp_path: Path) -> None:
    (pictures / "sub0/00.jpg").write_bytes((pictures / "sub0/00.jpg").read_bytes()[:200])
    (pictures / "sub1/not.jpg").write_text("<html>404</html>")
    (pictures / "sub2/empty.png").touch()
    os.mkfifo(pictures / "sub2/pipe.jpg")
    result = small_run(tmp_path / "run", **merge(FILES, {"data": str(pictures), "epochs": 2, "loader": {"workers": 1}}))
    assert result.rows[-1]["step"] == 10 and "knn_top1" not in result.rows[-1]
    listed = read_rows(tmp_path / "run/bad_samples.jsonl")
    assert sorted(Path(entry["file"]).name for entry in listed) == ["00.jpg", "empty.png", "not.jpg", "pipe.jpg"]
    assert all(entry["reason"] for entry in listed)


def test_too_many_bad_images_stop_the_run(pictures: Path, tmp_path: Path) -> None:
    for i in range(0, 40, 2):
        next(pictures.rglob(f"{i:02}.jpg")).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"loader.max_bad_fraction"):
        small_run(tmp_path / "run", **merge(FILES, {"data": str(pictures)}))
    assert read_json(tmp_path / "run/status.json")["error"]["kind"] == "data"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("pretrain nowhere/ --out {run}", 3, "nowhere"),
        ("pretrain cifr10 --out {run}", 3, "cifar10"),
        ("pretrain {empty} --out {run}", 3, "no usable image"),
        ("pretrain {pictures} --out {run} --batch_size 64", 3, "batch_size"),
        ("pretrain --backbone resnet81 --epochs 20 --out {run}", 2, "resnet81"),
        ("estimate {pictures} --batch_size 64", 3, "usable images"),
        ("estimate --backbone resnot18", 2, "backbone: "),
        ("estimate --steps 0", 2, "steps: "),
        ("resume {empty}", 2, "is no run folder"),
        ("evaluate {empty}", 2, "is no run folder"),
    ],
)
def test_wrong_input_is_one_line_with_its_exit_code(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: str, code: int, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"run": tmp_path / "run", "empty": tmp_path / "empty", "pictures": pictures}
    assert main([word.format(**places) for word in arguments.split()]) == code
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("relssl:")]
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.torture
def test_sigkill_at_random_moments_of_a_digits_run(tmp_path: Path) -> None:
    """The digits recipe, killed ten times and resumed each time, ends bit for bit as the run that nobody disturbed: torture."""
    command = [sys.executable, "-m", "relssl"]
    settings = ["--checkpoint.every_steps", "15", "--epochs", "15"]  # of over 80 steps each
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, "pretrain", "digits", "--out", str(whole), *settings], check=True, stdout=subprocess.DEVNULL)
    moments = random.Random(20)
    # Steps to be killed after, none so late that the run could end first; two kills come during start-up instead.
    for step in [0, 0, *sorted(moments.sample(range(1, 1100), 8))]:
        begun = (killed / "config.yaml").exists()
        words = ["resume", str(killed)] if begun else ["pretrain", "digits", "--out", str(killed), *settings]
        process = subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        newest = store.step_folder(Path(), step).name
        while step and process.poll() is None and all(path.name < newest for path in store.checkpoints(killed / "checkpoints")):
            time.sleep(0.01)
        time.sleep(moments.uniform(0.5, 6) if step == 0 else moments.uniform(0, 0.5))
        assert process.poll() is None  # it is still running when it is killed
        process.kill()
        process.wait()
    subprocess.run([*command, "resume", str(killed)], check=True, stdout=subprocess.DEVNULL)
    assert equal_runs(whole, killed)
