"""Long proofs, run by `make torture`."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from relssl.weights import store
from small_runs import differing, final_state, repeatable_rows

EPOCHS, STEPS_PER_EPOCH, STARTUP_KILLS, KILLS = 30, 44, 2, 10


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "relssl", *words]


def newest(run: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    found = store.checkpoints(run / "checkpoints")
    return int(found[-1].name.removeprefix("step-")) if found else 0


@pytest.mark.torture
def test_sigkill_at_random_moments_of_a_digits_run(tmp_path: Path) -> None:
    """The digits recipe, killed ten times and resumed each time, ends bit for bit as the run that nobody disturbed."""
    settings = ["--checkpoint.every_steps", "15", "--epochs", str(EPOCHS)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command("pretrain", "digits", "--out", str(whole), *settings), check=True, stdout=subprocess.DEVNULL)
    moments = random.Random(20)
    # Steps to be killed after, none so late that the run could end first; two kills come during start-up instead.
    steps = sorted(moments.sample(range(1, int(0.9 * EPOCHS * STEPS_PER_EPOCH)), KILLS - STARTUP_KILLS))
    for kill, step in enumerate([*[0] * STARTUP_KILLS, *steps], 1):
        words = (
            ["resume", str(killed)]
            if (killed / "config.yaml").exists()
            else ["pretrain", "digits", "--out", str(killed), *settings]
        )
        process = subprocess.Popen(command(*words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while step and process.poll() is None and newest(killed) < step:
            time.sleep(0.01)
        time.sleep(moments.uniform(0.5, 6) if step == 0 else moments.uniform(0, 0.5))
        assert process.poll() is None  # it is still running when it is killed
        process.kill()
        process.wait()
        print(f"kill {kill} at step {step} or later, newest checkpoint {newest(killed)}", flush=True)
    subprocess.run(command("resume", str(killed)), check=True, stdout=subprocess.DEVNULL)
    assert differing(final_state(whole), final_state(killed)) == []
    assert repeatable_rows(whole) == repeatable_rows(killed)
    print(f"{len(final_state(whole))} tensors and {len(repeatable_rows(whole))} rows equal bit for bit")
