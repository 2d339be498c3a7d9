"""The whole state of a run, to a folder and back."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from relssl.engine import Engine
from relssl.errors import CheckpointError, DistributedError, NumericError
from relssl.method.base import Method, unwrapped
from relssl.settings.resuming import WARNED
from relssl.train.state import State
from relssl.weights import store


def save(folder: Path | None, state: State, engine: Engine, origin: dict[str, Any]) -> Path | None:
    """Save the state, and return where; every rank calls it, the one that has a folder writes.

    Args:
        folder: of the run's checkpoints.
        origin: what a run that goes on from here has to agree with, see `loop.origin`.

    Raises:
        DistributedError: if ranks have drifted apart; such a state is never saved.
        NumericError: if a number on any rank is not finite; likewise.
    """
    (tensors, rest), hashes = store.flatten(whole_state(state, engine)), agreed_hashes(state.model, engine)
    broken = sorted(store.non_finite(tensors) - state.infinite)
    if engine.largest(len(broken)):
        names = f"{broken[0]} and {len(broken) - 1} others are" if broken else "numbers of another rank are"
        raise NumericError(
            f"step {state.step}: {names} not finite and not saved; lower optimizer.lr, or set optimizer.clip; the last checkpoint is good"
        )
    if folder is None:
        return None
    facts = {"step": state.step, "best": state.best, "unreadable": sorted(state.unreadable), "hashes": hashes, "tree": rest}
    facts |= {"non_finite": int(state.guard.streak), "neighbours": state.neighbours, "unmeasured": state.unmeasured}
    target = store.step_folder(folder, state.step)
    store.save(target, tensors, facts | origin)
    return target


def whole_state(state: State, engine: Engine) -> dict[str, Any]:
    """Return the tensors and numbers that a checkpoint holds, as a tree; every rank calls it, for its random generators."""
    tree = {name: part.state_dict() for name, part in _parts(state.model).items()}
    return tree | {"optimizer": state.optimizer.state_dict(), "random": engine.random_state()}


def _parts(model: Method) -> dict[str, nn.Module]:
    parts = {"student": unwrapped(model.student), "teacher": model.teacher, "memory": model.memory}
    return {name: part for name, part in parts.items() if part is not None}


def agreed_hashes(model: Method, engine: Engine) -> list[dict[str, str]]:
    """Hash, for each of several ranks, what has to be the same everywhere: student, teacher and memory.

    Batch-norm statistics are left out: each rank keeps those of its own share. DistributedError, naming what differs, if ranks have
    drifted apart.
    """
    if engine.world == 1:
        return []
    hashes = {name: hashlib.sha256() for name in _parts(model)}
    for name, part in _parts(model).items():
        for tensor in part.buffers() if name == "memory" else part.parameters():
            hashes[name].update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    ranks = engine.gather_items([{name: digest.hexdigest() for name, digest in hashes.items()}])
    if apart := [name for name in hashes if len({rank[name] for rank in ranks}) > 1]:
        raise DistributedError(f"the ranks' {' and '.join(apart)} differ; the last checkpoint is good, resume from it")
    return ranks


def restore(path: Path, state: State, engine: Engine, origin: dict[str, Any]) -> list[str]:
    """Load a checkpoint into the state of a run that was just created, with the same `origin` as `save` was given.

    Returns:
        The reasons why the run will not repeat bit for bit; none when it will.

    Raises:
        CheckpointError: if the checkpoint is damaged; whatever torch does, if it does not fit this run (see `store.offering`).
    """
    tensors, facts = store.load(path)
    tree = store.unflatten(tensors, facts["tree"])
    for name, part in _parts(state.model).items():
        part.load_state_dict(tree[name])
    state.optimizer.load_state_dict(tree["optimizer"])
    if (before := facts["steps_per_epoch"]) != (length := origin["steps_per_epoch"]):
        raise CheckpointError(f"{path}: was saved at {before} steps an epoch, the data now gives {length}")
    # Saved tensors come back row by row; the fused optimizer walks parameter and momentum side by side in memory, so a
    # momentum has to lie as its parameter does (channels last).
    for parameter, moments in state.optimizer.state.items():
        same = {name: value for name, value in moments.items() if getattr(value, "shape", None) == parameter.shape}
        moments |= {name: torch.empty_like(parameter).copy_(value) for name, value in same.items()}
    state.step, state.best, state.unreadable = facts["step"], facts["best"], set(facts["unreadable"])
    state.neighbours, state.unmeasured = facts.get("neighbours"), facts.get("unmeasured")
    state.guard.streak.fill_(facts["non_finite"])
    now, saved = origin | origin["choices"], facts | origin["choices"] | facts["choices"]  # older ones say less
    matters = sorted({*WARNED.values(), *origin["choices"]} & now.keys())
    inexact = [f"{name} {saved[name]} -> {now[name]}" for name in matters if saved[name] != now[name]]
    if not engine.restore_random_state(tree["random"]):
        inexact.append("random generators of another world or device")
    return inexact if facts["data"] == origin["data"] else [*inexact, "the data has changed"]
