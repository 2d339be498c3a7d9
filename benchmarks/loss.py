"""The loss over the memory, forward and backward: time, memory and error of each form it can be computed in.

`conventional` is the field's form, softmax times log-softmax over a clone of the memory; `plain` is the paper's formula as
`relssl.method.relation` has it; `tiled` computes loss and gradient together, a few samples at a time; `triton` is that with a
kernel of its own on GPUs. Each runs in a process of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from options import Options
from processes import Failed, alone
from relssl.engine import keep_memory
from relssl.method.ressl import OBJECTIVES
from rounds import Contender, Work, compare, left, show, spread, times

STUDENT, TEACHER = 0.1, 0.04
# (K keys in the memory, D dimensions, B samples, V views)
SHAPES = ((4096, 128, 256, 1), (65536, 128, 256, 1), (131072, 512, 256, 1), (131072, 512, 256, 5))
TINY_SHAPES = ((64, 8, 16, 1), (64, 8, 16, 2))
Shape = tuple[int, int, int, int]
# queries [V, B, D], keys [B, D], memory [K, D] -> loss
Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def forms() -> list[str]:
    """The forms that there are here."""
    ours = [name for name in OBJECTIVES if name != "triton" or torch.cuda.is_available()]
    return ["conventional", *ours]


def form(name: str) -> Form:
    """The form of that name, at the papers' temperatures."""
    if name == "conventional":
        return _conventional
    return partial(OBJECTIVES[name], student_temperature=STUDENT, teacher_temperature=TEACHER)


def _conventional(queries: Tensor, keys: Tensor, memory: Tensor) -> Tensor:
    queue = memory.clone()
    target = F.softmax(keys @ queue.T / TEACHER, dim=-1)
    return -(target * F.log_softmax(queries @ queue.T / STUDENT, dim=-1)).sum(-1).mean()


def work(name: str, shape: Shape, threads: int) -> Work:
    """Loss and gradient at a shape, over and over."""
    torch.set_num_threads(threads)
    loss, (queries, keys, memory) = form(name), embeddings(shape)
    # As in training, and only now: else what making the embeddings took would lie ready, and not count as taken by the loss.
    keep_memory()

    def run(count: int) -> None:
        for _ in range(count):
            queries.grad = None
            loss(queries, keys, memory).backward()  # type: ignore[no-untyped-call]
        if queries.is_cuda:
            torch.cuda.synchronize()

    return Work(run, shape[2])


def embeddings(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries with a gradient, keys near them, and a memory, on the device."""
    size, dim, batch, views = shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    memory, keys = (F.normalize(torch.randn(rows, dim, generator=generator), dim=1) for rows in (size, batch))
    noise = torch.randn(views, batch, dim, generator=generator) / dim**0.5
    queries = F.normalize(keys + noise, dim=-1).to(device).requires_grad_()
    return queries, keys.to(device), memory.to(device)


def errors(name: str, shape: Shape, threads: int) -> dict[str, float]:
    """Relative errors of loss and gradient in fp32, against the plain form in float64."""
    torch.set_num_threads(threads)
    queries, keys, memory = embeddings(shape)
    exact = queries.detach().double().requires_grad_()
    truth = form("plain")(exact, keys.double(), memory.double())
    made = form(name)(queries, keys, memory)
    for value in (truth, made):
        value.backward()  # type: ignore[no-untyped-call]
    assert exact.grad is not None and queries.grad is not None
    off = (queries.grad.double() - exact.grad).norm() / exact.grad.norm()
    return {"loss": abs(made.item() / truth.item() - 1), "gradient": float(off)}


def measure(options: Options, deadline: float | None = None) -> dict[str, Any]:
    """Compare the forms at each shape, print and return the records; what is not done by the deadline fails."""
    found: dict[str, Any] = {}
    rows = list[list[object]]()
    for shape in TINY_SHAPES if options.tiny else SHAPES:
        size, dim, batch, views = shape
        contenders = [Contender(f, work, {"name": f, "shape": shape, "threads": options.threads}) for f in forms()]
        # About as many products as one call at the papers' small sizes takes, at least one.
        units = options.pick(min(16, max(1, 2**31 // (size * dim * batch * views))), 1)
        records = compare(contenders, options.rounds, units, deadline)
        for name, record in records.items():
            record["times"] = times(records, name, "conventional")
            # More views are more rows of the same: one is enough to see the error, and float64 needs memory.
            record["error"] = _tried(name, (size, dim, batch, 1), options.threads, deadline) if views == 1 else None
            rows.append([f"{size} x {dim}, {batch}, {views}", name, *_cells(record)])
        found[f"{size}x{dim} B{batch} V{views}"] = records
    heads = ["K x D, B, V", "form", "ms", "times as fast", "MiB on top", "error of loss", "of gradient"]
    show("Loss over the memory, forward and backward", heads, rows)
    return found


def _tried(name: str, shape: Shape, threads: int, deadline: float | None) -> dict[str, Any]:
    try:
        found: dict[str, Any] = alone(errors, name, shape, threads, timeout=left(deadline))
    except Failed as error:
        return {"failed": str(error)}
    return found


def _cells(record: dict[str, Any]) -> list[object]:
    if "failed" in record:
        return [record["failed"], "-", "-", "-", "-"]
    before, most = record["memory_mib"]
    error = record["error"] or {}
    wrong = [f"{error[part]:.1e}" if part in error else "-" for part in ("loss", "gradient")]
    milliseconds = [1000 * seconds for seconds in record["seconds_per_unit"]]
    return [spread(milliseconds, 1), spread(record["times"]), most - before, *wrong]
