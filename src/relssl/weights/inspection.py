"""A run's checkpoints verified, looked into and compared, without the networks that they belong to."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relssl.errors import CheckpointError
from relssl.settings.reading import changes, flat, show
from relssl.settings.resuming import WARNED
from relssl.weights import store
from relssl.weights.opening import load_run


def verify(run: str | Path, name: str | None = None) -> dict[str, Any]:
    """Check all checkpoints of a run, or the named one, against their hashes; CheckpointError with a line for each that is damaged."""
    paths = [find(run, name)] if name else sorted((load_run(run).folder / "checkpoints").glob("step-*"))
    faults = list[str]()
    for path in paths:
        try:
            store.verify(path)
        except CheckpointError as error:
            if name or path.exists():  # else a run that goes on has let go of it
                faults.append(str(error))
    if faults:
        raise CheckpointError("\n".join(faults))
    return {"intact": [path.name for path in paths if path.exists()]}


def inspect(run: str | Path, name: str | None = None) -> dict[str, Any]:
    """Return what a checkpoint holds, by part; what going on from it has to agree with; and the tensors that are not finite.

    Raises:
        CheckpointError: if it is not there, or damaged.
    """
    tensors, facts = store.load(path := find(run, name))
    totals = {"tensors": Counter[str](), "numbers": Counter[str](), "bytes": Counter[str]()}
    for name, tensor in sorted(tensors.items()):
        for total, count in zip(totals.values(), (1, tensor.numel(), tensor.nbytes), strict=True):
            total[name.partition(".")[0]] += count
    origin = {
        name: value for name, value in (facts | facts["choices"]).items() if name in ("steps_per_epoch", "data", *WARNED.values())
    }
    broken = sorted(store.non_finite(tensors))
    return {"checkpoint": path.name, "step": facts["step"], **totals, "depends": origin, "not_finite": broken}


def find(run: str | Path, name: str | None = None) -> Path:
    """Return a checkpoint of a run, by its name or step, verified; the newest by default. Raises as `opening.Run.checkpoint`."""
    return load_run(run).checkpoint(store.step_folder(Path(), int(name)).name if name and name.isdecimal() else name)


def diff(run: str, other: str | None = None) -> dict[str, Any]:
    """Compare a run's newest checkpoint with another: a step of its own, by default the one before, or another run's newest, with settings.

    Raises:
        CheckpointError: if there is no other, or one is damaged.
    """
    newest, runs = find(run), [other, run] if other and Path(other).is_dir() else []
    before = [path.name for path in store.checkpoints(newest.parent)][-2:-1] or [newest.name]
    first = find(runs[0]) if runs else find(run, other or before[0])
    pairs = changes(*(load_run(each).config for each in runs)) if runs else {}
    settings = {f"setting {name}": f"{show(was)}, {show(now)}" for name, (was, now) in pairs.items()}
    return {"first": str(first), "second": str(newest), "differences": settings | differences(first, newest)}


def differences(first: Path, second: Path) -> dict[str, str]:
    """Return what two checkpoints differ in, bit for bit, by name, with how; nothing if they hold the same state."""
    (a, facts), (b, others) = store.load(first), store.load(second)
    named = {name: _difference(a.get(name), b.get(name)) for name in sorted(a.keys() | b.keys())}
    before, after = flat(facts), flat(others)
    pairs = {name: (before.get(name), after.get(name)) for name in sorted(before.keys() | after.keys())}
    named |= {name: f"{show(was)}, {show(now)}" for name, (was, now) in pairs.items() if was != now}
    return {name: how for name, how in named.items() if how}


def _difference(a: Tensor | None, b: Tensor | None) -> str:
    if a is None or b is None:
        return f"only in the {'second' if a is None else 'first'}"
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return f"{a.dtype} {[*a.shape]}, {b.dtype} {[*b.shape]}"
    if torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
        return ""
    return f"by {(a.double() - b.double()).abs().max():.3g} at most, in {int((a != b).sum())} of {a.numel()} numbers"
