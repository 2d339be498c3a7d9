"""What shows a user the state of checkpoints, data and machine: `checkpoint`, `scan` and `verify-resume`."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from relssl.cli import main
from relssl.weights import inspection, store
from small_runs import SMALL, small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    short = {"epochs": 1, "checkpoint.every_steps": 9, "log.knn_every": 0}
    return small_run(tmp_path_factory.mktemp("runs") / "run", **short).folder


def test_checkpoints_are_verified_inspected_and_compared(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def ask(*words: str) -> dict[str, Any]:
        assert main(["checkpoint", *words, "--json"]) == 0
        return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))

    assert ask("verify", str(run))["intact"] == ["step-00000009", "step-00000010"]
    facts = ask("inspect", str(run), "9")
    assert facts["step"] == 9 and facts["not_finite"] == [] and facts["depends"]["threads"] == 1
    assert facts["numbers"]["memory"] > 96 * 16
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    assert ask("diff", str(run), str(copy))["differences"] == {}
    named = ask("diff", str(run))["differences"]
    assert named["step"] == "9, 10" and {name.split(".")[0] for name in named} >= {"student", "teacher", "memory", "optimizer"}
    file = copy / "checkpoints/step-00000010/state.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert main(["checkpoint", "verify", str(copy)]) == 4
    assert "step-00000010: is damaged" in (told := capsys.readouterr().err) and "step-00000009" not in told
    assert main(["checkpoint", "inspect", str(copy), "7"]) == 4 and "step-00000009" in capsys.readouterr().err
    assert main(["checkpoint", "verify", str(tmp_path)]) == 2


def test_a_run_that_goes_on_may_let_go_of_a_checkpoint_meanwhile(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    monkeypatch.setattr(
        store, "verify", lambda path, verify=store.verify: (path.name.endswith("9") and store.remove(path), verify(path))
    )
    assert inspection.verify(copy) == {"intact": ["step-00000010"]}


def test_a_scan_counts_what_cannot_be_read_copies_and_leaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (8 + i, 20, 3), np.uint8)) for i in range(6)]
    for part, numbers in {"train": (0, 1, 2, 3), "val": (3, 4, 5)}.items():
        for i in numbers:
            (tmp_path / part / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            pictures[i].save(tmp_path / part / "ab"[i % 2] / f"{i}.png")
    pictures[1].save(tmp_path / "train/a/again.bmp")  # the same pixels in another file
    (tmp_path / "train/b/cut.png").write_bytes((tmp_path / "train/b/1.png").read_bytes()[:90])
    (tmp_path / "train/b/._1.png").write_bytes(b"of a Mac")
    assert main(["scan", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["train"]["images"] == 5 and facts["test"]["images"] == 3
    assert [facts["train"][kind] for kind in ("unreadable", "copies")] == [1, 1]
    assert facts["train"]["shorter_side"] == {"least": 8, "median": 9, "most": 11}
    assert facts["leaks"] == 1 and facts["first_leaks"][0].endswith("train/b/3.png")
    assert main(["scan", str(tmp_path / "train/a")]) == 0
    assert "test: none" in capsys.readouterr().out
    assert main(["scan", "digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["leaks"] == 0


@pytest.mark.torture
def test_resuming_is_proven_with_the_settings_of_a_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes: torture."""
    (tmp_path / "run.yaml").write_text(json.dumps({name: value for name, value in SMALL.items() if name != "data"}))
    command = ["verify-resume", "digits", "--config", str(tmp_path / "run.yaml")]
    assert main([*command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["exact"] and "step-00000003" in facts["result"] and facts["differences"] == {}
    assert main(["verify-resume", str(tmp_path / "nothing")]) == 3
