"""The proof that a run resumes bit for bit with the user's settings, on the user's machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from relssl.errors import RelsslError
from relssl.files import read_rows
from relssl.weights import store
from relssl.weights.inspection import differences

STEPS = 6
_CUT = STEPS // 2
# What is shortened; the rest, and how long its schedules are, stays as the user has it.
_SHORT: dict[str, Any] = {
    **{"max_steps": STEPS, "checkpoint.every_steps": _CUT, "checkpoint.keep": 1000, "time_limit": "null"},
    **{"log.every": 1, "log.knn_every": 0, "log.report": "false", "log.to": "null"},
}
_CLOCK = ("images_per_second", "data_wait")


def prove(settings: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Make a short run, and once more from its half on, each in processes of its own; return if their states and rows are equal.

    Args:
        settings: of the run, by dotted names, as they are typed; `data` and `config`, too.
        say: gets a line before each of the two.

    Returns:
        {"exact": bool, "steps", "cut": the step that the second went on from, "differences": by name, "result": one line}.

    Raises:
        RelsslError: if one of them fails, with the exit code and what it said.
    """
    with tempfile.TemporaryDirectory(prefix="relssl-") as folder:
        whole, cut = Path(folder, "whole"), Path(folder, "cut")
        say(f"a run of {STEPS} steps")
        _run("pretrain", *(f"--{name}={value}" for name, value in {**settings, **_SHORT, "out": whole}.items()))
        newest = store.checkpoints(whole / "checkpoints")[-1].name
        shutil.copytree(whole, cut, ignore=shutil.ignore_patterns(newest, "export", "status.json"))
        start = store.checkpoints(cut / "checkpoints")[-1].name
        say(f"the same, from {start} on")
        _run("resume", str(cut))
        apart = differences(whole / "checkpoints" / newest, cut / "checkpoints" / newest)
        rows = [
            [{k: v for k, v in row.items() if k not in _CLOCK} for row in read_rows(run / "metrics.jsonl")]
            for run in (whole, cut)
        ]
    apart |= {"metrics.jsonl": "rows differ"} if rows[0] != rows[1] else {}
    first = next((f"{name} {how}" for name, how in apart.items()), "")
    result = f"not exact: {len(apart)} things differ, the first: {first}; on GPUs try engine.deterministic true"
    result = result if apart else f"exact: cut at {start} and resumed, {newest} and all rows are equal, bit for bit"
    return {"exact": not apart, "steps": STEPS, "cut": start, "differences": apart, "result": result}


def _run(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "relssl", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        error = RelsslError((done.stderr.strip().splitlines() or ["it died without a word"])[-1].removeprefix("relssl: "))
        error.exit_code = done.returncode if done.returncode > 0 else 1
        raise error
