"""The whole state of a run, to a folder and back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from relssl.engine import Engine
from relssl.errors import CheckpointError, DistributedError
from relssl.method.base import Method, unwrapped
from relssl.weights import store


def save(folder: Path, step: int, model: Method, optimizer: Optimizer, engine: Engine, facts: dict[str, Any]) -> Path | None:
    """Save the state after `step` steps; every rank calls it, the first writes. Returns the checkpoint there."""
    whole = whole_state(model, optimizer, engine)
    hashes = agreed_hashes(model, engine)
    if not engine.is_first:
        return None
    tensors, rest = store.flatten(whole)
    target = store.step_folder(folder, step)
    meta = {"step": step, "threads": engine.threads, "world": engine.world, "precision": engine.precision}
    meta |= {"hashes": hashes, "tree": rest}
    store.save(target, tensors, meta | facts)
    return target


def whole_state(model: Method, optimizer: Optimizer, engine: Engine) -> dict[str, Any]:
    """All that a checkpoint holds, as a tree of tensors and numbers; every rank calls it, for its random generators."""
    whole = {name: part.state_dict() for name, part in _parts(model).items()}
    return whole | {"optimizer": optimizer.state_dict(), "random": engine.random_state()}


def _parts(model: Method) -> dict[str, nn.Module]:
    """What the method has of student, teacher and memory."""
    parts = {"student": unwrapped(model.student), "teacher": model.teacher, "memory": model.memory}
    return {name: part for name, part in parts.items() if part is not None}


def agreed_hashes(model: Method, engine: Engine) -> list[dict[str, str]]:
    """Each rank's hashes of what has to be the same everywhere: student, teacher and memory. One process is not hashed.

    Batch-norm statistics are left out: each rank keeps those of its own share.

    Raises:
        DistributedError: if ranks have drifted apart, naming what differs; such a state is never saved.
    """
    if engine.world == 1:
        return []
    parts = {name: part.buffers() if name == "memory" else part.parameters() for name, part in _parts(model).items()}
    held = engine.gather_items([{name: _digest(tensors) for name, tensors in parts.items()}])
    apart = [name for name in parts if len({rank[name] for rank in held}) > 1]
    if apart:
        raise DistributedError(f"the ranks' {' and '.join(apart)} differ; the last checkpoint is good, resume from it")
    return held


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def restore(path: Path, model: Method, optimizer: Optimizer, engine: Engine) -> tuple[dict[str, Any], list[str]]:
    """Load a checkpoint into a run just built.

    Returns:
        (its facts, reasons why the run will not repeat bit for bit; none when it will).

    Raises:
        CheckpointError: if it is damaged, or its tensors do not match this configuration's.
    """
    tensors, meta = store.load(path)
    state = store.unflatten(tensors, meta["tree"])
    try:
        for name, part in _parts(model).items():
            part.load_state_dict(state[name])
        optimizer.load_state_dict(state["optimizer"])
        _lay_out(optimizer)
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not fit this configuration: {' '.join(str(error).split())[:300]}") from error
    inexact = [
        f"{name} {meta[name]} -> {now}"
        for name, now in (("threads", engine.threads), ("world", engine.world), ("precision", engine.precision))
        if meta[name] != now
    ]
    if not engine.restore_random_state(state["random"]):
        inexact.append("random generators of another world or device")
    return meta, inexact


def _lay_out(optimizer: Optimizer) -> None:
    # Saved tensors come back row by row; the fused optimizer walks parameter and momentum side by side in memory, so a
    # momentum has to lie as its parameter does (channels last).
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)
