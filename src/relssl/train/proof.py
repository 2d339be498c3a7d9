"""The proof that a run resumes bit for bit with the user's settings, on the user's machine."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from relssl.errors import ConfigError, RelsslError
from relssl.files import read_rows
from relssl.weights import store
from relssl.weights.inspection import differences

# A run of six steps, with a checkpoint at its half; all else, and how long its schedules are, stays as the user has it.
_SHORT = {
    **{"max_steps": 6, "checkpoint.every_steps": 3, "checkpoint.keep": 1000, "time_limit": "null"},
    **{"log.every": 1, "log.knn_every": 0, "log.report": "false", "log.to": "null"},
}
_CLOCK = ("images_per_second", "data_wait")


def prove(settings: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Make a short run, and once more from a checkpoint on, each in processes of its own; return whether state and rows are equal.

    `settings` are as they are typed, by dotted names, with `data` and `config`; `say` gets a line before each run. RelsslError if a run
    fails, with its exit code and last line.
    """
    with tempfile.TemporaryDirectory(prefix="relssl-") as folder:
        whole, cut = Path(folder, "whole"), Path(folder, "cut")
        say("a run of 6 steps")
        typed = {name: value for name, value in {**settings, **_SHORT, "out": whole}.items() if value is not None}
        _relssl("pretrain", *(f"--{name}={value}" for name, value in typed.items()))
        if len(saved := [path.name for path in store.checkpoints(whole / "checkpoints")]) < 2:
            raise ConfigError(
                "epochs: the run has too few steps for the proof, which needs 4; give more epochs, or a smaller batch_size"
            )
        start, end = saved[-2:]
        shutil.copytree(whole, cut, ignore=shutil.ignore_patterns(end, "export", "status.json"))
        say(f"the same, from {start} on")
        _relssl("resume", str(cut))
        apart = differences(whole / "checkpoints" / end, cut / "checkpoints" / end)
        rows = [[{k: row[k] for k in row if k not in _CLOCK} for row in read_rows(run / "metrics.jsonl")] for run in (whole, cut)]
    apart |= {"metrics.jsonl": "has other rows"} if rows[0] != rows[1] else {}
    first = " ".join(next(iter(apart.items()), ()))
    result = f"not exact: {len(apart)} things differ, the first: {first}; on GPUs set engine.deterministic true"
    result = result if apart else f"exact: cut at {start} and resumed, {end} and all rows are equal, bit for bit"
    return {"exact": not apart, "result": result, "differences": apart}


def _relssl(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "relssl", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        error = RelsslError((done.stderr.strip().splitlines() or ["it died without a word"])[-1].removeprefix("relssl: "))
        error.exit_code = max(1, done.returncode)
        raise error
