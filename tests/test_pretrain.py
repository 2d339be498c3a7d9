"""A run as a whole: what it leaves, that it learns without a trace of accident, and that it repeats bit for bit."""

import json
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
from relssl.settings.reading import merge
from relssl.train.pretrain import explaining
from relssl.train.run_folder import RunFolder
from relssl.weights import store
from small_runs import NORMLESS, SMALL, close_runs, differing, equal_runs, final_state, ready_run, repeatable_rows, small_run

FIGURES = {
    *("step", "epoch", "samples", "loss", "lr", "teacher_momentum", "warmup_mix", "images_per_second", "data_wait", "grad_norm"),
    *("teacher_entropy", "teacher_neighbours", "kl", "agreement", "embedding_std", "effective_rank", "top_agreement"),
    *("positive_margin", "alignment", "uniformity", "memory_unused", "hubness", "matched_age"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 20 steps with a checkpoint of each, which tests only read."""
    return small_run(tmp_path_factory.mktemp("runs") / "whole", checkpoint={"every_steps": 1, "keep": 20}).folder


def cut(run: Path, target: Path, step: int) -> Path:
    """A copy of a run as it was when it was killed after `step`, rows of the steps behind its newest checkpoint included."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("export", "status.json", "step-*"))
    name = f"step-{step:08d}"
    shutil.copytree(run / "checkpoints" / name, target / "checkpoints" / name)
    return target


def contents(folder: Path) -> list[tuple[Path, int]]:
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))


def test_the_run_folder_holds_what_is_promised(finished: Path) -> None:
    for name in ("config.yaml", "environment.json", "export/backbone.safetensors", "export/backbone.md"):
        assert (finished / name).stat().st_size > 0
    status = json.loads((finished / "status.json").read_text())
    assert status == {"state": "complete", "step": 20, "exit_code": 0, "error": None, "last_checkpoint": "step-00000020"}
    saved = {path.name for path in (finished / "checkpoints" / "step-00000020").iterdir()}
    assert saved == {"state.safetensors", "state.json", "SHA256SUMS"}
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 3, 6, 9, 10, 12, 15, 18, 20]
    measured = {"feature_rank", "knn_top1", "knn_teacher_top1"}
    assert rows[0].keys() == {"step", "epoch", "samples", "knn_raw_pixels"} | measured
    assert rows[-1].keys() >= FIGURES | measured | {"neighbour_stability"}
    for row in rows[1:]:
        assert row.keys() >= FIGURES
        assert all(value is not None and math.isfinite(value) for value in row.values())
        assert row["images_per_second"] > 0 and 0 <= row["data_wait"] < 1
    assert [row["step"] for row in rows if "knn_top1" in row] == [0, 10, 20]
    assert relssl.load_run(finished).config.views.mean == load("digits", None, "train").mean


def test_the_same_command_twice_gives_the_same_bits(finished: Path, tmp_path: Path) -> None:
    assert equal_runs(finished, small_run(tmp_path / "again").folder)
    other = small_run(tmp_path / "other", seed=1, epochs=1, log={"knn_every": 0}).folder
    assert "student.backbone.conv1.weight" in differing(final_state(finished), final_state(other))


@pytest.mark.parametrize("step", [1, 10, 13, 19])
def test_resuming_at_any_step_repeats_the_uninterrupted_run(finished: Path, tmp_path: Path, step: int) -> None:
    folder = cut(finished, tmp_path / "cut", step)
    resumed = relssl.resume(folder, quiet=True)
    assert resumed is not None and resumed.rows[-1]["step"] == 20
    assert equal_runs(finished, folder)


def test_a_signal_and_a_time_limit_save_and_end_with_their_codes(finished: Path, tmp_path: Path) -> None:
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
    first = json.loads((folder / "status.json").read_text())
    with pytest.raises(Interrupted) as limited:
        relssl.resume(folder, quiet=True, time_limit=1e-6)
    second = json.loads((folder / "status.json").read_text())
    assert (stopped.value.exit_code, limited.value.exit_code) == (first["exit_code"], second["exit_code"]) == (143, 75)
    assert first["state"] == second["state"] == "interrupted" and second["step"] == first["step"] + 1 < 20
    assert second["last_checkpoint"] == f"step-{second['step']:08d}"
    assert relssl.resume(folder, quiet=True) is not None
    assert equal_runs(finished, folder)


def test_max_steps_ends_the_run_and_its_schedules(tmp_path: Path) -> None:
    result = small_run(tmp_path / "run", max_steps=14, **{"optimizer.warmup_epochs": 0, "log.every": 1})
    assert [row["step"] for row in result.rows if "knn_top1" in row] == [0, 10, 14]
    peak = result.rows[1]["lr"]
    for row in result.rows[1:]:
        assert row["lr"] == pytest.approx(peak * 0.5 * (1 + math.cos(math.pi * (row["step"] - 1) / 14)))
    assert json.loads((tmp_path / "run/status.json").read_text())["last_checkpoint"] == "step-00000014"


def test_small_data_and_short_runs_just_run_and_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = {name: SMALL[name] for name in ("data", "backbone_args", "encoder", "engine")} | {"max_images": 40, "epochs": 1}
    few["method"] = {"warmup_share": 0.5}
    run = relssl.pretrain(out=tmp_path / "run", log={"knn_every": 0, "to": []}, **few)
    config, said = relssl.load_run(run.folder).config, capsys.readouterr().err
    assert (config.batch_size, config.method.memory_size, config.optimizer.warmup_epochs) == (8, 16, 0.25)
    for words in ("batch_size is 8 instead of 64", "memory_size is 16 instead of 512", "warmup_epochs is 0.25 instead of 1"):
        assert words in said and words in (run.folder / "run.log").read_text()
    with pytest.raises(DataError, match="batch_size"):
        relssl.pretrain(out=tmp_path / "typed", batch_size=64, quiet=True, **few)


def test_a_run_goes_on_for_more_epochs(tmp_path: Path) -> None:
    folder = small_run(tmp_path / "run", epochs=1, **{"log.every": 1, "log.knn_every": 0}).folder
    rows = relssl.resume(folder, epochs=2, quiet=True).rows
    assert [row["step"] for row in rows] == [*range(1, 21)] and relssl.load_run(folder).config.epochs == 2
    expected = small_run(tmp_path / "other", epochs=2, **{"log.every": 1, "log.knn_every": 0}).rows
    for name in ("lr", "warmup_mix", "teacher_momentum"):
        assert [row[name] for row in rows[10:]] == [row[name] for row in expected[10:]]
    before = contents(folder)
    with pytest.raises(ConfigError, match="epochs"):
        relssl.resume(folder, epochs=1, quiet=True)
    same = {"epochs": 2, "out": str(folder), "resume": "auto", "quiet": True}
    assert relssl.pretrain(**(SMALL | {"log": {**SMALL["log"], "every": 1, "knn_every": 0}} | same)).rows == rows
    with pytest.raises(ConfigError, match=r"optimizer.lr: .* 0.1, not 0.5"):
        relssl.pretrain(lr=0.5, **same)
    assert [path for path, _ in contents(folder)] == [path for path, _ in before]


def test_a_run_goes_on_with_settings_that_change_nothing_and_says_which_change_something(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cut(finished, tmp_path / "cut", 17)
    command = [
        "resume",
        str(folder),
        "--log.every",
        "5",
        "--log.knn_every",
        "2",
        "--loader.workers",
        "1",
        "--checkpoint.keep",
        "3",
    ]
    assert main([*command, "--lr", "0.5", "--seed", "1"]) == 2
    assert [line.split(":")[1] for line in capsys.readouterr().err.splitlines()] == [" seed", " optimizer.lr"]
    assert main([*command, "--threads", "1"]) == 0
    assert differing(final_state(finished), final_state(folder)) == [] and "exactly" in (folder / "run.log").read_text()
    assert relssl.load_run(folder).config.log.every == 5
    folder = cut(finished, tmp_path / "warned", 19)
    assert main(["resume", str(folder), "--threads", "2"]) == 0
    assert "not bit for bit (threads 1 -> 2)" in (folder / "run.log").read_text()


def test_a_used_or_locked_folder_is_left_alone(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(finished)
    assert relssl.resume(finished, quiet=True) is not None  # at once, as it had finished
    assert main(["pretrain", "digits", "--out", str(finished)]) == 2
    assert f"relssl resume {finished}" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="relssl resume"):
        small_run(finished)
    assert contents(finished) == before
    holder = RunFolder(finished)
    try:
        with pytest.raises(LockedError, match=f"process {os.getpid()}"):
            relssl.resume(finished, checkpoint="step-00000020", quiet=True)
    finally:
        holder.close()


def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_offered(tmp_path: Path, finished: Path) -> None:
    folder = cut(finished, tmp_path / "damaged", 10)
    shutil.copytree(finished / "checkpoints/step-00000015", folder / "checkpoints/step-00000015")
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


def test_every_missing_part_of_a_checkpoint_is_refused_by_name(tmp_path: Path, finished: Path) -> None:
    tensors, meta = store.load(store.checkpoints(finished / "checkpoints")[-1])
    for name in list(tensors)[:: max(1, len(tensors) // 6)]:
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
        store.save(folder / "checkpoints/step-00000020", {k: v for k, v in tensors.items() if k != name}, meta)
        with pytest.raises(CheckpointError, match=name.rsplit(".", 1)[-1]):
            relssl.resume(folder, quiet=True)


def test_accumulated_parts_fill_memory_and_teacher_as_one_batch_does(tmp_path: Path) -> None:
    short = {"epochs": 1, "log.knn_every": 0}
    whole = small_run(tmp_path / "whole", **NORMLESS, **short).folder
    parts = small_run(tmp_path / "parts", accumulate=4, **NORMLESS, **short).folder
    assert close_runs(whole, parts)
    for x, y in zip(repeatable_rows(whole), repeatable_rows(parts), strict=True):
        assert (x["step"], x["lr"]) == (y["step"], y["lr"]) and x["loss"] == pytest.approx(y["loss"], rel=1e-4)


def test_one_crop_is_a_list_of_one(tmp_path: Path) -> None:
    """The code of several crops with one of them makes the losses and the weights of the plain view, bit for bit."""
    short = {"views.strong": {"name": "contrastive"}, "log": {"every": 1, "knn_every": 0}, "epochs": 1}
    plain = small_run(tmp_path / "plain", **short).folder
    listed = small_run(tmp_path / "listed", **short, **{"views.crops": [[32, 0.2, 1.0]]}).folder
    assert equal_runs(plain, listed)


def test_the_python_function_takes_names_and_sections_and_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    sections = {key: value for key, value in SMALL.items() if key != "data"} | {"max_images": 64, "epochs": 1}
    sections["engine"] = {"threads": 2, "deterministic": True}
    run = relssl.pretrain("digits", out=str(tmp_path / "run"), quiet=True, **sections)
    assert torch.get_num_threads() == 1 and not torch.are_deterministic_algorithms_enabled()
    assert run is not None and run.rows[-1]["step"] == 2
    assert relssl.load_backbone(run.folder)(torch.rand(2, 3, 32, 32)).shape == (2, 16)
    with pytest.raises(ConfigError, match=r"optimizer.lrr: unknown key; the nearest is optimizer.lr"):
        relssl.pretrain("digits", out=str(tmp_path / "none"), optimizer={"lrr": 3})
    assert not (tmp_path / "none").exists()


def process_state() -> list[Any]:
    """What a call may change for the rest of a user's process."""
    generators = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    signals = [signal.getsignal(number) for number in STOPPING]
    return [generators, signals, torch.get_default_dtype(), torch.is_grad_enabled(), os.environ.copy(), len(warnings.filters)]


def test_a_run_neither_changes_nor_depends_on_the_users_process(tmp_path: Path) -> None:
    short = {"max_images": 64, "epochs": 1, "log.knn_every": 0}
    first, before = small_run(tmp_path / "first", **short), process_state()
    with torch.inference_mode():
        second = small_run(tmp_path / "second", **short)
    assert process_state() == before
    torch.set_default_dtype(torch.float64)
    try:
        third = small_run(tmp_path / "third", **short)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert equal_runs(first.folder, second.folder) and equal_runs(first.folder, third.folder)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ConfigError, match=r"torch\.autocast"):
        small_run(tmp_path / "fourth", **short)


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


def test_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    small_run(tmp_path / "run", epochs=5, max_images=96, checkpoint={"every": 4})
    rows = [row for row in repeatable_rows(tmp_path / "run") if "knn_top1" in row and row["step"]]
    best = max(rows, key=lambda row: row["knn_top1"])
    names = [path.name for path in store.checkpoints(tmp_path / "run/checkpoints")]
    assert f"step-{best['step']:08d}" in names and names[-1] == "step-00000015"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (40, 40, 48, 3), dtype=np.uint8)):
        (folder / f"sub{number % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"sub{number % 3}/{number:02}.jpg")
    return folder


FILES: dict[str, Any] = {"recipe": "digits", "max_images": "null", "epochs": 1, "batch_size": 8, "loader": {"workers": 1}}
FILES |= {"views": {"weak": {"name": "weak", "size": 32}, "strong": {"name": "contrastive", "size": 32}}}
FILES |= {"method": {"memory_size": 16}, "optimizer": {"warmup_epochs": 0}}


def test_a_run_goes_on_where_its_images_are_now(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = merge(FILES, {"epochs": 2, "loader": {"workers": 0}})
    whole = small_run(tmp_path / "whole", **merge(settings, {"data": str(pictures)})).folder
    monkeypatch.chdir(tmp_path)
    again = {"out": "run", "resume": "auto", "quiet": True, **merge(merge(SMALL, settings), {"data": "pictures"})}
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
    dropping |= {"optimizer": {"name": optimizer, "lr": 0.01}, "loader": {"workers": 0}}
    whole = small_run(tmp_path / "whole", **merge(FILES, {"data": str(pictures), **dropping})).folder
    folder = tmp_path / "cut"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("export", "status.json", "step-00000005"))
    assert relssl.resume(folder, checkpoint="step-00000003", quiet=True) is not None
    assert equal_runs(whole, folder)


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
    with pytest.raises(DataError, match=r"loader.max_bad_fraction"):
        small_run(tmp_path / "run", **merge(FILES, {"data": str(pictures), "loader": {"workers": 0}}))
    assert json.loads((tmp_path / "run/status.json").read_text())["error"]["kind"] == "data"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["pretrain", "nowhere/", "--out", "{run}"], 3, "nowhere"),
        (["pretrain", "cifr10", "--out", "{run}"], 3, "cifar10"),
        (["pretrain", "{empty}", "--out", "{run}"], 3, "no usable image"),
        (["pretrain", "{pictures}", "--out", "{run}", "--batch_size", "64"], 3, "batch_size"),
        (["pretrain", "--backbone", "resnet81", "--epochs", "20", "--out", "{run}"], 2, "resnet81"),
        (["estimate", "{pictures}", "--batch_size", "64"], 3, "usable images"),
        (["estimate", "--backbone", "resnot18"], 2, "backbone: "),
        (["estimate", "--steps", "0"], 2, "steps: "),
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
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("relssl:")]
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "run").exists()


def test_sigkill_then_resume_from_the_command_line(finished: Path, tmp_path: Path) -> None:
    folder, config = tmp_path / "killed", tmp_path / "config.yaml"
    config.write_text((finished / "config.yaml").read_text().replace(str(finished), str(folder)))
    started = subprocess.Popen([sys.executable, "-m", "relssl", "pretrain", "--config", str(config)], stderr=subprocess.DEVNULL)
    while started.poll() is None and not (folder / "checkpoints/step-00000004").exists():
        time.sleep(0.02)
    started.kill()
    started.wait()
    assert main(["resume", str(folder)]) == 0
    assert equal_runs(finished, folder)


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
