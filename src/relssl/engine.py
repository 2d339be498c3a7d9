"""Devices, precision and ranks: a thin layer over Lightning Fabric, and the only file that knows of ranks and of Fabric."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import random
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from torch import Tensor, nn

from relssl.errors import ConfigError, DistributedError
from relssl.settings.run import EngineConfig


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def send(values: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; to a GPU from page-locked memory, as the copy would wait for its other work otherwise."""
    host = device.type == "cuda" and values.device.type == "cpu"
    return (values.pin_memory() if host else values).to(device, non_blocking=True)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Engine:
    """A world of one or many processes that behaves as one.

    Attributes:
        device: where this process computes.
        rank, world: this process's number and how many there are.
        precision: "fp32" or "bf16", after `auto` has been decided.
        threads: CPU threads of this process; results are bitwise repeatable for a fixed number only.
    """

    def __init__(self, config: EngineConfig) -> None:
        kind = _pick_device(config.device)
        self.precision = config.precision
        if config.precision == "auto":
            self.precision = "bf16" if fast_bf16(kind) else "fp32"
        self.threads = config.threads or max(1, available_cores() // config.devices)
        torch.set_num_threads(self.threads)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        keep_memory()
        # Lightning announces each choice that our own first line already names.
        for name in ("lightning.fabric", "lightning.pytorch"):
            logging.getLogger(name).setLevel(logging.WARNING)
        many = config.devices * config.nodes > 1
        self.fabric = Fabric(
            accelerator=kind,
            devices=config.devices,
            num_nodes=config.nodes,
            precision="bf16-mixed" if self.precision == "bf16" else "32-true",
            strategy=_ddp(kind, config.timeout) if many else "auto",
        )
        self.fabric.launch()
        self.device, self.rank, self.world = self.fabric.device, self.fabric.global_rank, self.fabric.world_size
        # What ranks tell each other at every step goes by the host, so that it waits for no device.
        self._host: Any = None
        self._patient: Any = None
        if self.world > 1:
            self._host = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.timeout))
            self._patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run folder."""
        return bool(self.rank == 0)

    def setup(self, student: nn.Module) -> nn.Module:
        """The student on its device, wrapped for precision and, with several ranks, gradient averaging."""
        wrapped: nn.Module = self.fabric.setup(self.place(student))
        return wrapped

    def place(self, module: Any) -> Any:
        """A module or a batch of images [B, C, H, W] on the device, channels last, which convolutions are fastest in."""
        if isinstance(module, nn.Module):
            return module.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)

    def autocast(self) -> Any:
        """The precision of the networks, for the bare teacher."""
        return self.fabric.autocast()

    def part(self, student: nn.Module, last: bool) -> Any:
        """Around the forward and backward pass of one accumulated part: ranks average gradients with the last one alone."""
        return self.fabric.no_backward_sync(student, enabled=not last and self.world > 1)  # type: ignore[arg-type]

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients to the student's."""
        self.fabric.backward(loss)

    def gather(self, rows: Tensor, share: int) -> Tensor:
        """The rows [share, ...] of every rank, in rank order: [world * share, ...].

        Raises:
            DistributedError: if this rank does not hold `share` rows; unequal shares would be exchanged as garbage.
        """
        if len(rows) != share:
            raise DistributedError(f"rank {self.rank} holds {len(rows)} rows of a step, needs {share}")
        if self.world == 1:
            return rows
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(self.world)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def gather_with_gradients(self, rows: Tensor) -> Tensor:
        """The rows [B, ...] of every rank, in rank order; what flows back to a rank's rows is the sum over the ranks."""
        made: Tensor = rows if self.world == 1 else _Gather.apply(rows, self.rank, self.world)
        return made

    def all_of(self, items: list[Any]) -> list[Any]:
        """The items of every rank, in rank order."""
        if self.world == 1:
            return items
        lists: list[Any] = [None] * self.world
        dist.all_gather_object(lists, items, group=self._host)
        return [item for held in lists for item in held]

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the ranks."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.world
        return value

    def first_says(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        return self.fabric.broadcast(value, src=0) if self.world > 1 else value

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers, on every rank: how they agree on a signal that reached only one."""
        if self.world == 1:
            return number
        held = torch.tensor(number)
        dist.all_reduce(held, op=dist.ReduceOp.MAX, group=self._host)
        return int(held)

    def wait(self) -> None:
        """Until all ranks are here, however long the first one evaluates; a rank that dies ends the wait."""
        if self._patient is not None:
            dist.barrier(group=self._patient)

    def fetch(self, values: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Start to bring tensors to the host; what is returned waits for them, and for nothing asked of the device later."""
        if self.device.type != "cuda":
            held = {name: value.detach().to("cpu") for name, value in values.items()}
            return lambda: held
        held = {name: torch.empty_like(value, device="cpu", pin_memory=True) for name, value in values.items()}
        for name, value in values.items():
            held[name].copy_(value.detach(), non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()

        def wait() -> dict[str, Tensor]:
            arrived.synchronize()
            return held

        return wait

    def synchronise(self) -> None:
        """Until the device has done all that was asked of it: before a clock is read, never in a loop that trains."""
        synchronise(self.device)

    def release(self) -> None:
        """Give memory that nothing holds any more back to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def seed(self, seed: int) -> None:
        """Start every random generator of this process."""
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % (1 << 32))

    def random_state(self) -> dict[str, Any]:
        """Every random generator of every rank, as a tree of tensors and numbers."""
        mine: dict[str, Any] = {"torch": torch.get_rng_state(), "python": _nested_list(random.getstate())}
        name, keys, position, has_gauss, gauss = np.random.get_state()
        mine["numpy"] = [name, torch.from_numpy(np.array(keys).astype(np.int64)), int(position), int(has_gauss), float(gauss)]
        if self.device.type == "cuda":
            mine["cuda"] = torch.cuda.get_rng_state(self.device)
        return {str(rank): state for rank, state in enumerate(self.all_of([mine]))}

    def restore_random_state(self, states: dict[str, Any]) -> bool:
        """Take back this rank's generators; False if the state was saved by another world or device."""
        mine = states.get(str(self.rank))
        if mine is None or len(states) != self.world or ("cuda" in mine) != (self.device.type == "cuda"):
            return False
        torch.set_rng_state(mine["torch"])
        version, inner, gauss = mine["python"]
        random.setstate((version, tuple(inner), gauss))
        name, keys, position, has_gauss, gauss = mine["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
        if "cuda" in mine:
            torch.cuda.set_rng_state(mine["cuda"], self.device)
        return True

    def describe(self) -> str:
        """One line for the console."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type.upper()
        ranks = f", {self.world} ranks" if self.world > 1 else ""
        threads = f", {self.threads} threads" if self.device.type == "cpu" else ""
        return f"{name}{ranks}{threads}, {self.precision}"


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, rank: int, world: int) -> Tensor:
        ctx.rank = rank
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        whole = outer[0].contiguous()
        dist.all_reduce(whole)
        return whole.chunk(dist.get_world_size())[ctx.rank], None, None


def fast_bf16(kind: str) -> bool:
    """Whether bf16 has hardware of its own here: CUDA from compute capability 8, CPUs with AVX-512 BF16 or AMX."""
    if kind == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    if kind == "cpu":
        tests = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        return any(test() for test in tests if test is not None)
    return False


def keep_memory() -> None:
    """Let glibc's malloc keep large blocks: by default each large activation is mapped, page-faulted and unmapped every step."""
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # names and numbers of <malloc.h>
    libc = ctypes.CDLL(None)
    for option, value in ((mmap_max, 0), (trim_threshold, -1), (top_pad, 256 << 20)):
        libc.mallopt(option, value)


def _pick_device(wanted: str) -> str:
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(kind for kind, there in usable.items() if there)
    if not usable[wanted]:
        raise ConfigError(
            f"engine.device: there is no {wanted} device here; usable: {', '.join(k for k, v in usable.items() if v)}"
        )
    return wanted


def _ddp(kind: str, timeout: float) -> DDPStrategy:
    # Memory and teacher lie outside DDP, and so does the student's batch norm: each rank keeps its own statistics of its
    # share, as the papers' runs do, and rank 0's are saved.
    return DDPStrategy(
        process_group_backend="nccl" if kind == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout),
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


def _nested_list(state: Any) -> Any:
    return [_nested_list(item) for item in state] if isinstance(state, tuple) else state
