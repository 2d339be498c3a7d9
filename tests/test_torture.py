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

KILLS = 10


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "relssl", *words]


@pytest.mark.torture
def test_sigkill_at_random_moments_of_a_digits_run(tmp_path: Path) -> None:
    """The digits recipe, killed ten times and resumed each time, ends bit for bit as the run that nobody disturbed."""
    settings = ["--checkpoint.every_steps", "15"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    begun = time.monotonic()
    subprocess.run(command("pretrain", "digits", "--out", str(whole), *settings), check=True, stdout=subprocess.DEVNULL)
    undisturbed = time.monotonic() - begun
    moments = random.Random(20)
    for kill in range(KILLS):
        words = (
            ["resume", str(killed)]
            if (killed / "config.yaml").exists()
            else ["pretrain", "digits", "--out", str(killed), *settings]
        )
        process = subprocess.Popen(command(*words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Start-up takes a good part of this: some kills fall into it, the others bring the run a little further.
        moment = moments.uniform(0.03, 0.22) * undisturbed
        with pytest.raises(subprocess.TimeoutExpired):  # it is still running when it is killed
            process.wait(moment)
        process.kill()
        process.wait()
        found = store.checkpoints(killed / "checkpoints")
        print(f"kill {kill + 1} after {moment:.1f} s, newest checkpoint {found[-1].name if found else 'none'}", flush=True)
    subprocess.run(command("resume", str(killed)), check=True, stdout=subprocess.DEVNULL)
    assert differing(final_state(whole), final_state(killed)) == []
    assert repeatable_rows(whole) == repeatable_rows(killed)
    print(f"{len(final_state(whole))} tensors and {len(repeatable_rows(whole))} rows equal bit for bit")
