"""A run's checkpoints verified, looked into and compared, without the networks that they belong to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relssl.errors import CheckpointError
from relssl.files import size
from relssl.settings.reading import changes, flat, show
from relssl.settings.resuming import WARNED
from relssl.weights import store
from relssl.weights.opening import load_run

_DEPENDS = ("steps_per_epoch", "data", *dict.fromkeys(WARNED.values()))  # what going on from a checkpoint has to agree with


def examine(action: str, run: str, other: str | None) -> tuple[dict[str, Any], list[str]]:
    """Return the facts that `relssl checkpoint` finds, and lines for people; raises what the functions below and `find` do."""
    if action == "verify":
        faults = verify(run)
        return {"checkpoints": faults, "damaged": sum(map(bool, faults.values()))}, [
            fault or f"{name}: is as it was written" for name, fault in faults.items()
        ]
    if action == "inspect":
        facts = inspect(find(run, other))
        rows = [
            f"  {name:10} {part['tensors']:6} tensors {part['numbers']:12,} numbers {size(part['bytes']):>10}"
            for name, part in facts["parts"].items()
        ]
        bad = [f"  not finite: {', '.join(facts['not_finite'][:3])} ({len(facts['not_finite'])})"] if facts["not_finite"] else []
        depends = ", ".join(f"{name} {value}" for name, value in facts["depends"].items())
        return facts, [f"{facts['checkpoint']}: {size(facts['bytes'])}", *rows, f"  depends on: {depends}", *bad]
    newest, steps = find(run), store.checkpoints(Path(run, "checkpoints"))
    if other is None and len(steps) < 2:
        raise CheckpointError(f"{run}: holds one checkpoint, which is like itself; name a step, or another run")
    second = find(other) if other and Path(other).is_dir() else find(run, other or steps[-2].name)
    named = differences(second, newest)
    if second.parents[1] != newest.parents[1]:
        pairs = changes(load_run(second.parents[1]).config, load_run(newest.parents[1]).config)
        named |= {f"setting {name}": f"{show(was)}, {show(now)}" for name, (was, now) in pairs.items()}
    counts = ", ".join(f"{part} {count}" for part, count in Counter(name.partition(".")[0] for name in named).items())
    head = f"{second} and {newest} {f'differ in {len(named)} things ({counts}):' if named else 'hold the same, bit for bit'}"
    lines = [f"  {name}: {how}" for name, how in named.items()]
    more = [f"  and {len(lines) - 20} more; --json has all"] if len(lines) > 20 else []
    return {"first": str(second), "second": str(newest), "differences": named}, [head, *lines[:20], *more]


def find(run: str | Path, name: str | None = None) -> Path:
    """Return a checkpoint of a run, by its name or step, verified; the newest by default. Raises as `opening.Run.checkpoint`."""
    return load_run(run).checkpoint(store.step_folder(Path(), int(name)).name if name and name.isdecimal() else name)


def verify(run: str | Path) -> dict[str, str]:
    """Check all checkpoints of a run against their hashes; return {name: what is wrong, or ""}.

    Raises:
        CheckpointError: if there is none.
    """
    faults = dict[str, str]()
    for path in sorted((load_run(run).folder / "checkpoints").glob("step-*")):
        try:
            store.verify(path)
            faults[path.name] = ""
        except CheckpointError as error:
            faults[path.name] = str(error)
    if not faults:
        raise CheckpointError(f"{run}: holds no checkpoint yet")
    return faults


def inspect(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds: its step, tensors, numbers and bytes of each part, what it depends on, what is not finite.

    Raises:
        CheckpointError: if it is damaged.
    """
    tensors, facts = store.load(path)
    parts = {name.partition(".")[0]: [0, 0, 0] for name in sorted(tensors)}
    for name, tensor in tensors.items():
        part = parts[name.partition(".")[0]]
        part[:] = (a + b for a, b in zip(part, (1, tensor.numel(), tensor.nbytes), strict=True))
    return {
        "checkpoint": path.name,
        "step": facts["step"],
        "bytes": sum((path / name).stat().st_size for name in store.FILES),
        "parts": {name: dict(zip(("tensors", "numbers", "bytes"), part, strict=True)) for name, part in parts.items()},
        "depends": {name: value for name, value in (facts | facts["choices"]).items() if name in _DEPENDS},
        "not_finite": [name for name, tensor in tensors.items() if not tensor.isfinite().all()],
    }


def differences(first: Path, second: Path) -> dict[str, str]:
    """Return what two checkpoints differ in, bit for bit, by name, with how; nothing if they hold the same state.

    Raises:
        CheckpointError: if one is damaged.
    """
    (a, facts), (b, others) = store.load(first), store.load(second)
    named = {name: _difference(a.get(name), b.get(name)) for name in sorted(a.keys() | b.keys())}
    before, after = (_leaves(each) for each in (facts, others))
    pairs = {name: (before.get(name), after.get(name)) for name in sorted(before.keys() | after.keys())}
    named |= {name: "" if was == now else f"{show(was)}, {show(now)}" for name, (was, now) in pairs.items()}
    return {name: how for name, how in named.items() if how}


def _difference(a: Tensor | None, b: Tensor | None) -> str:
    if a is None or b is None:
        return f"only in the {'second' if a is None else 'first'}"
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return f"{a.dtype} {[*a.shape]}, {b.dtype} {[*b.shape]}"
    if torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
        return ""
    apart = (a.double() - b.double()).abs()
    return f"by {apart.max():.3g} at most, in {int((a != b).sum())} of {a.numel()} numbers"


def _leaves(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts by dotted names; of lists that hold others, such as groups of parameters, by their places."""
    nested = {
        name: dict(enumerate(value))
        if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value)
        else value
        for name, value in facts.items()
    }
    return _leaves(flat(nested)) if any(isinstance(value, Mapping) and value for value in nested.values()) else nested
