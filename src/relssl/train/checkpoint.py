"""The state of a run: what changes while it goes on, the judge that lets a step change it or not, and its way to a folder and back."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relssl.engine import Engine
from relssl.errors import CheckpointError, DistributedError, NumericError
from relssl.method.base import Method, unwrapped
from relssl.settings.parts import same_name
from relssl.settings.resuming import WARNED
from relssl.weights import store


class Guard:
    """Judges each step on the device, without waiting for it, and takes back what the forward passes of a bad step have changed.

    Those change the networks' buffers: the statistics of batch norms. Optimizer, memory and teacher get the verdict and stay.

    Attributes:
        streak: scalar int64 on the device, the non-finite steps in a row until now.
    """

    def __init__(self, networks: Sequence[nn.Module], device: torch.device) -> None:
        buffers = [buffer for network in networks for buffer in network.buffers()]
        self._kinds = [_Copies([each for each in buffers if each.dtype == kind]) for kind in {each.dtype for each in buffers}]
        self._judged = [bool(copies.note().isfinite()) for copies in self._kinds]  # others hold constants such as -inf
        self.streak = torch.zeros((), dtype=torch.int64, device=device)

    def watch(self) -> None:
        """Note the buffers before a step's forward passes."""
        for copies in self._kinds:
            torch._foreach_copy_(copies.before, copies.buffers)

    def take_back(self) -> None:
        """Put the buffers back."""
        for copies in self._kinds:
            torch._foreach_copy_(copies.buffers, copies.before)

    def doubt(self) -> Tensor | int:
        """Note the buffers after a step's forward passes. Return 0, or NaN if they are no longer finite: a batch norm's variance
        overflows long before the loss does."""
        sums = [copies.note() for copies in self._kinds]
        return 0 * sum(total for total, judged in zip(sums, self._judged, strict=True) if judged)

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Return [] on the device, true if loss and gradient norm are finite; if not, the buffers are put back."""
        good = torch.isfinite(loss) & torch.isfinite(norm)
        for copies in self._kinds:
            torch.where(good, copies.block_after, copies.block_before, out=copies.block_before)
        self.take_back()
        self.streak += 1
        self.streak *= ~good
        return good


class _Copies:
    """Buffers of one type and two copies of each, side by side in blocks, so that a choice between the copies is one kernel."""

    def __init__(self, buffers: list[Tensor]) -> None:
        self.buffers = buffers
        (self.block_before, self.before), (self.block_after, self.after) = (self._block() for _ in range(2))

    def note(self) -> Tensor:
        """Copy the buffers to the second block; return its sum [], which is finite if they are."""
        torch._foreach_copy_(self.after, self.buffers)
        return self.block_after.sum(dtype=torch.float32)

    def _block(self) -> tuple[Tensor, list[Tensor]]:
        block = self.buffers[0].new_empty(sum(buffer.numel() for buffer in self.buffers))
        parts = torch.split(block, [buffer.numel() for buffer in self.buffers])
        return block, [part.view(buffer.shape) for part, buffer in zip(parts, self.buffers, strict=True)]


@dataclass
class State:
    """All that changes while a run goes on; a checkpoint holds it, and the random generators besides."""

    model: Method  # student, teacher and memory
    optimizer: Optimizer  # of the student
    guard: Guard  # the judge of steps, with its count of bad ones
    step: int = 0  # optimizer steps so far
    best: dict[str, Any] | None = None  # {figure: value, "checkpoint"} of the best student so far, once one was measured
    neighbours: list[str] | None = None  # of the images that `Online` looks at, each a line, when they were last measured
    unmeasured: dict[str, Any] | None = None  # the present step's row, if a request to stop came before its kNN was done
    unreadable: set[str] = field(default_factory=set)  # files that could not be read so far
    infinite: set[str] = field(default_factory=set)  # tensors that are not finite from the start, such as masks


def save(folder: Path | None, state: State, engine: Engine, origin: dict[str, Any]) -> Path | None:
    """Save the state among the checkpoints of `folder`, and return where; every rank calls it, the one that has a folder writes.

    A run that goes on from here has to agree with `origin`, see `loop.origin`. Never saved are ranks that have drifted apart
    (DistributedError), and numbers that are not finite, on any rank (NumericError).
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
    """Load a checkpoint into the state of a run that was just created, with the same `origin` as `save` was given; return the reasons why the
    run will not repeat bit for bit. CheckpointError if it is damaged; whatever torch raises, if it does not fit (see `store.offering`)."""
    tensors, facts = store.load(path)
    tree = store.unflatten(tensors, facts["tree"])
    for name, part in _parts(state.model).items():
        part.load_state_dict(tree[name])
    for stored, group in zip(tree["optimizer"]["param_groups"], state.optimizer.param_groups, strict=True):
        stored |= {name: group[name] for name in ("fused", "foreach", "capturable") if name in group}  # the device decides
    state.optimizer.load_state_dict(tree["optimizer"])
    if (before := facts["steps_per_epoch"]) != (length := origin["steps_per_epoch"]):
        raise CheckpointError(f"{path}: was saved at {before} steps an epoch, the data now gives {length}")
    # Saved tensors come back row by row; the fused optimizer walks parameter and momentum side by side in memory, so a
    # momentum has to lie as its parameter does (channels last).
    for parameter, moments in state.optimizer.state.items():
        same = {name: value for name, value in moments.items() if getattr(value, "shape", None) == parameter.shape}
        moments |= {name: torch.empty_like(parameter).copy_(value) for name, value in same.items()}
    state.step, state.best, state.unreadable = facts["step"], facts["best"], set(facts["unreadable"])
    state.neighbours, row = facts.get("neighbours"), facts.get("unmeasured")
    state.unmeasured = row and {name: math.nan if value is None else value for name, value in row.items()}
    state.guard.streak.fill_(facts["non_finite"])
    now, saved = origin | origin["choices"], facts | origin["choices"] | facts["choices"]  # older ones say less
    matters = sorted({*WARNED.values(), *origin["choices"]} & now.keys())
    inexact = [f"{name} {saved[name]} -> {now[name]}" for name in matters if saved[name] != now[name]]
    earlier = facts.get("settings", origin["settings"])  # of which `going_on` has asked; they differ if config.yaml was edited
    inexact += [
        f"{name} {earlier[name]} -> {value}, in config.yaml"
        for name, value in origin["settings"].items()
        if name in earlier and earlier[name] != value and not same_name(earlier[name], value)
    ]
    if not engine.restore_random_state(tree["random"]):
        inexact.append("random generators of another world or device")
    return inexact if facts["data"] == origin["data"] else [*inexact, "the data has changed"]
