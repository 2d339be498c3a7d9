"""Devices, precision and ranks: the only file that knows of Lightning Fabric. Process-wide settings change only in `Engine.running`, for
the time of a run, and in `prepare_process`, which the command line calls."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import platform
import random
import signal
import socket
import sys
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from relssl.errors import STOPPING, ConfigError, DistributedError, RelsslError
from relssl.settings.launcher import MARK, find_launch
from relssl.settings.reading import build
from relssl.settings.run import EngineConfig

T = TypeVar("T")
SILENCE = 45.0  # seconds, at most, after which a process that gives no sign of life is given up
_PAUSE = 1.0  # seconds between two looks at the others
ONE_NUMBER = "runs on other numbers of devices need a script each"
_GRACE = 6.0  # seconds in which a process notices by itself that another one has died


def available_cores() -> int:
    """Count the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_each(processes: int) -> int:
    """Count the cores for each of so many processes of this machine, which share those that this one may use, unless they are srun's tasks,
    each bound to some of its own."""
    cores, names = available_cores(), ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_CPUS_ON_NODE")
    tasks, nodes, allocated = (int(value) if (value := os.environ.get(name, "")).isdecimal() else 0 for name in names)
    bound = tasks == processes * max(1, nodes) and cores < allocated
    return max(1, cores if bound else cores // processes)


def send(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device; to a GPU from page-locked memory, as the copy would wait for its other work otherwise."""
    pinned = device.type == "cuda" and values.device.type == "cpu"
    # Nowhere else without waiting: MPS would read memory that is in other use by then.
    return (values.pin_memory() if pinned else values).to(device, non_blocking=pinned)


@contextmanager
def usual_torch() -> Iterator[None]:
    """Let torch compute as it does where nobody has told it otherwise: in fp32, on the CPU where no device is named, with gradients."""
    with ExitStack() as after:
        after.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            after.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                after.enter_context(torch.autocast(kind, enabled=False))
        with torch.inference_mode(False), torch.enable_grad():
            yield


class Engine:
    """A world of one or many processes that behaves as one. To create one sets nothing process-wide.

    Attributes:
        device: where this process computes.
        rank, world: this process's number and how many there are; the one that `is_first` writes the run folder.
        step: of the run, for messages.
        last_words: called before this process ends because another one has died.
        precision: "fp32" or "bf16", after `auto` has been decided.
        threads: CPU threads of this process while it runs; results are bitwise repeatable for a fixed number only.
    """

    prepared: ClassVar[bool] = False  # true once `prepare_process` has run
    watch: Watch | None  # of several ranks

    def __init__(self, config: EngineConfig, spare: bool = False) -> None:
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        usable = [name for name in available if available[name]]
        wanted, _, number = config.device.partition(":")
        if wanted not in ("auto", *usable) or int(number or 0) >= max(1, torch.cuda.device_count()):
            raise ConfigError(f"engine.device: there is no {config.device} device here; usable: {', '.join(usable)}")
        kind = usable[0] if wanted == "auto" else wanted
        self.threads = config.threads or cores_each(config.devices)
        self.deterministic = config.deterministic
        self.device = torch.device(kind)
        if kind == "cuda":
            self.device = torch.device(kind, int(number) if number else torch.cuda.current_device())
        best = "bf16" if fast_bf16(self.device) else "fp32"
        self.precision = best if config.precision == "auto" else config.precision
        self.rank, self.world, self._fabric, self._format = 0, 1, None, torch.channels_last
        self.step, self.watch = 0, None
        self.last_words: Callable[[DistributedError], object] = id
        if config.devices * config.nodes > 1:
            self._launch(kind, config, spare)
        self.is_first = self.rank == 0

    @classmethod
    def local(cls, device: str = "auto", precision: str = "auto") -> Engine:
        """Create an engine of this process alone, with the threads it has: for evaluation, and for networks outside of runs."""
        return cls(build(EngineConfig, {"device": device, "precision": precision, "threads": torch.get_num_threads()}))

    def _launch(self, kind: str, config: EngineConfig, spare: bool) -> None:
        from lightning.fabric import Fabric  # a second of imports that one process does not need
        from lightning.fabric.strategies import DDPStrategy

        if kind == "cuda" and torch.cuda.device_count() < config.devices:
            raise ConfigError(f"engine.devices: {config.devices} processes need a GPU each, here are {torch.cuda.device_count()}")
        if dist.is_initialized() and dist.get_world_size() != config.devices * config.nodes:
            raise ConfigError(f"engine.devices: this process is one of {dist.get_world_size()} already; {ONE_NUMBER}")
        # Memory and teacher lie outside DDP, and so does the student's batch norm: each rank keeps its own statistics of its
        # share, as the papers' runs do, and rank 0's are saved. Precision is `autocast`'s, around student and teacher alike.
        patience, backend = timedelta(seconds=config.timeout), "nccl" if kind == "cuda" else "gloo"
        shared = {"broadcast_buffers": False, "gradient_as_bucket_view": True, "find_unused_parameters": spare}
        ddp = DDPStrategy(process_group_backend=backend, timeout=patience, cluster_environment=_environment(), **shared)
        threads, watch = torch.get_num_threads(), Watch(self)
        # Until all have met: if a signal ended one on its way here, Lightning would kill this one without a word.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            with quiet_libraries():
                fabric = Fabric(accelerator=kind, devices=config.devices, num_nodes=config.nodes, precision=32, strategy=ddp)
                _meet_again(backend, patience)
                fabric.launch()
            others = list(getattr(ddp.launcher, "procs", ()))
            if others:
                ddp.launcher.procs.clear()  # with which Lightning would kill this process, before it can say why
            # What ranks exchange beside tensors goes by the host, so that it waits for no device, and as long as the first one works.
            self._host: Any = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        except (RuntimeError, ValueError) as error:
            watch.active = False
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise DistributedError(f"engine.devices: processes did not meet at {where} ({reason}); start all alike") from error
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        torch.set_num_threads(threads)  # Lightning shares them out, as `running` does
        self._fabric, self.device, self.rank, self.world = fabric, fabric.device, fabric.global_rank, fabric.world_size
        self.watch = watch.meet(config.timeout, others)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Set what a run needs of the whole process, and put it back afterwards: threads, malloc, deterministic kernels, random
        generators, and what `usual_torch` sets.

        ConfigError inside `torch.autocast`, where networks would go on with weights that were rounded before they moved.
        """
        if torch.is_autocast_enabled(self.device.type):
            raise ConfigError("engine.precision: no run can begin inside torch.autocast; leave it and set engine.precision")
        keep_memory(True)
        with ExitStack() as after:
            if self.watch is not None:
                after.callback(setattr, self.watch, "active", False)
            after.callback(keep_memory, Engine.prepared)
            after.callback(self._set_generators, self._generators())
            before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
            after.callback(torch.use_deterministic_algorithms, before[0], warn_only=before[1])
            after.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(self.threads)
            if self.deterministic:
                if not os.environ.get("CUBLAS_WORKSPACE_CONFIG"):  # read once, by the first product on a GPU
                    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
                    after.callback(os.environ.pop, "CUBLAS_WORKSPACE_CONFIG")
                torch.use_deterministic_algorithms(True)
            if self.device.type == "cuda":
                after.enter_context(torch.cuda.device(self.device))
            after.enter_context(usual_torch())
            yield

    def setup(self, student: nn.Module) -> nn.Module:
        """Place the student and, with several ranks, wrap it so that they average their gradients."""
        placed: nn.Module = self.place(student)
        with quiet_libraries():
            return placed if self._fabric is None else self._fabric.setup(placed)

    def place(self, module: Any) -> Any:
        """Put a module or images [B, C, H, W] on the device, channels last, in which convolutions are fastest.

        From a network on whose convolutions that crashes here, all lies row by row.
        """
        if isinstance(module, nn.Module):
            if self.device.type == "cpu" and _breaks_channels_last(module):
                self._format = torch.contiguous_format
            return module.to(self.device).to(memory_format=self._format)  # type: ignore[call-overload]
        return module.to(self.device, non_blocking=self.device.type == "cuda").contiguous(memory_format=self._format)

    def autocast(self) -> Any:
        """Return a context in which networks compute at this precision."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def part(self, student: nn.Module, last: bool) -> Any:
        """Return a context for the passes of one accumulated part: ranks average gradients with the last one alone."""
        return nullcontext() if self._fabric is None or last else self._fabric.no_backward_sync(student)

    def gather(self, rows: Tensor, share: int) -> Tensor:
        """Join the rows [share, ...] of every rank in rank order, [world * share, ...]; gradients flow back to where rows came from."""
        if len(rows) != share:  # unequal shares would be exchanged as garbage
            raise DistributedError(f"rank {self.rank} holds {len(rows)} rows of a step, needs {share}")
        joined: Tensor = rows if self.world == 1 else _Gather.apply(rows, self.rank, self.world)
        return joined

    def gather_items(self, items: list[Any]) -> list[Any]:
        """Join the lists of every rank in rank order."""
        if self.world == 1:
            return items
        lists: list[Any] = [None] * self.world
        dist.all_gather_object(lists, items, group=self._host)
        return [item for each in lists for item in each]

    def on_first(self, make: Callable[[], T]) -> T | None:
        """Return what `make` returns on the first rank, None on the others; its RelsslError is raised on all, so that none waits."""
        value, fault = None, None
        try:
            value = make() if self.is_first else None
        except RelsslError as error:
            fault = error
        self.wait()  # patiently: to shrink a million images takes hours
        if (fault := self.gather_items([fault])[0]) is not None:
            raise fault
        return value

    def largest(self, number: int) -> int:
        """Return the largest of the ranks' numbers on every rank: how they agree on a signal that reached only one."""
        if self.world == 1:
            return number
        shared = torch.tensor(number)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self._host)
        return int(shared)

    def wait(self) -> None:
        """Wait until all ranks are here, however long the first one evaluates; one that dies or hangs ends the wait, see `Watch`."""
        if self.world > 1:
            dist.barrier(group=self._host)

    def fetch(self, values: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Start to bring tensors to the host. What is returned waits for them alone, and for no later work of the device."""
        gpu = self.device.type == "cuda"
        here = {
            name: torch.empty_like(value, device="cpu", pin_memory=gpu).copy_(value.detach(), non_blocking=gpu)
            for name, value in values.items()
        }
        copied = torch.cuda.current_stream().record_event() if gpu else None

        def wait() -> dict[str, Tensor]:
            if copied is not None:
                copied.synchronize()
            return here

        return wait

    def synchronise(self) -> None:
        """Wait until the device has done all its work: before a clock is read, never in a loop that trains."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def seed(self, seed: int) -> None:
        """Seed every random generator of this process."""
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % (1 << 32))

    def random_state(self) -> dict[str, Any]:
        """Return the random generators of every rank, as a tree of tensors and numbers."""
        return {str(rank): state for rank, state in enumerate(self.gather_items([self._generators()]))}

    def restore_random_state(self, states: dict[str, Any]) -> bool:
        """Take back this rank's generators. Return false if the state was saved by another world or device."""
        own = states.get(str(self.rank))
        if own is None or len(states) != self.world or {"cuda", "mps"} & own.keys() != {self.device.type} - {"cpu"}:
            return False
        self._set_generators(own)
        return True

    def _generators(self) -> dict[str, Any]:
        version, words, normal = random.getstate()
        name, keys, *rest = np.random.get_state()
        own: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, list(words), normal]}
        own["numpy"] = [name, torch.from_numpy(np.asarray(keys, np.int64)), *rest]
        if self.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.device)
        if self.device.type == "mps":
            own["mps"] = torch.mps.get_rng_state()
        return own

    def _set_generators(self, own: dict[str, Any]) -> None:
        torch.set_rng_state(own["torch"])
        version, words, normal = own["python"]
        random.setstate((version, tuple(words), normal))
        name, keys, *rest = own["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        if "cuda" in own:
            torch.cuda.set_rng_state(own["cuda"], self.device)
        if "mps" in own:
            torch.mps.set_rng_state(own["mps"])

    def describe(self) -> str:
        """Describe the engine in one line for the console."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type.upper()
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" * (self.device.type == "cpu")
        ranks = f", {self.world} ranks" * (self.world > 1)
        return f"{name}{ranks}{threads}, {self.precision}"


class Watch(threading.Thread):
    """A thread that ends this process once the launcher above it has died, or, when it has met the other ranks, one of them has died or
    hangs.

    Each rank tells the first one its step now and then, whatever its main thread does, and the first one all others. Silence is
    measured in looks, so that a job that was suspended as a whole goes on. `active` is false once the run is over.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(daemon=True)
        self.active, self._engine, self._reason, self._limit = True, engine, "", SILENCE
        self._children: list[Any] = []
        self._peers: dict[int, socket.socket] = {}
        # A shell that started a single rank may leave; torchrun, and the first process, stay as long as their ranks.
        started = "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get(MARK) == str(os.getppid())
        self._parent = os.getppid() if started else None
        self.start()

    def meet(self, timeout: float, children: list[Any]) -> Watch:
        """Meet the other ranks, and watch them from here on; `children` are those that this process has started."""
        engine, self._children, self._limit = self._engine, children, min(SILENCE, timeout)
        dual, peers = socket.has_dualstack_ipv6(), dict[int, socket.socket]()
        family = socket.AF_INET6 if dual else socket.AF_INET
        with socket.create_server(("", 0), family=family, backlog=engine.world, dualstack_ipv6=dual) as server:
            server.settimeout(timeout)
            port = engine.gather_items([server.getsockname()[1]])[0]
            if engine.rank:
                peers[0] = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout)
                peers[0].send(b"%9d" % engine.rank)
            while len(peers) < (engine.world - 1 if engine.rank == 0 else 1):
                peer, _ = server.accept()
                peers[int(peer.recv(9, socket.MSG_WAITALL))] = peer
        self._peers = peers
        return self

    def run(self) -> None:
        """Look at the others until the run is over, or until one is lost; then end this process."""
        own, verdict, orphaned = self._engine, b"", False
        silent, heard = defaultdict[int, float](float), defaultdict[int, bytes](lambda: b"0")
        while not self._reason:
            time.sleep(_PAUSE)
            for rank, peer in self._peers.items():
                peer.setblocking(False)
                silent[rank] += _PAUSE
                try:
                    peer.send(b"%d " % own.step)
                    words, _, verdict = peer.recv(1 << 16).partition(b"!")
                    silent[rank] = 0.0 if words else math.inf
                    heard[rank] = next(reversed(words.split()), heard[rank])
                except BlockingIOError:
                    pass  # it has said nothing since
                except OSError:
                    silent[rank] = math.inf
            if not self.active:
                return
            lost, orphaned = max(silent, key=silent.__getitem__, default=0), self._parent not in (None, os.getppid())
            if verdict or orphaned:
                self._reason = verdict.decode() or "the process that started this one has died; resume from the last checkpoint"
            elif silent[lost] >= self._limit:
                place = f"last heard of at its step {heard[lost].decode()}; rank {own.rank} is at step {own.step}"
                self._reason = f"rank {lost} has died or hangs, {place}; the last checkpoint is good, resume from it"
        for peer in self._peers.values() if own.rank == 0 else ():
            with suppress(OSError):
                peer.send(b"!" + self._reason.encode())
        time.sleep(0 if orphaned else _GRACE)
        if self.active:
            error = DistributedError(self._reason)
            own.last_words(error)
            if not (verdict or (orphaned and own.rank)):  # one speaks
                print(f"relssl: rank {own.rank}: {error}", file=sys.stderr, flush=True)
            for child in self._children:
                child.kill()
            os._exit(error.exit_code)

    def explain(self, fault: str) -> str:
        """Say why an exchange with the others has failed: which is lost, if that shows soon, else the `fault` itself."""
        for _ in range(8):
            if not self._reason:
                time.sleep(_PAUSE / 2)
        own = self._engine
        return self._reason or f"rank {own.rank} failed at step {own.step} ({fault}); resume from the last checkpoint"


class _Gather(torch.autograd.Function):
    """torch's own all_gather with gradients, `torch.distributed.nn`, is deprecated."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, rank: int, world: int) -> Tensor:
        ctx.rank, ctx.world = rank, world
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        whole = outer[0].clone(memory_format=torch.contiguous_format)  # autograd may hand the same tensor to others
        dist.all_reduce(whole)
        return whole.chunk(ctx.world)[ctx.rank], None, None


def fast_bf16(device: torch.device) -> bool:
    """Return true if bf16 has hardware of its own: CUDA from compute capability 8, CPUs with AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _breaks_channels_last(network: nn.Module) -> bool:
    """Return true if torch 2 crashes or hangs on its gradients: 1x1 convolutions of stride 2 on 2 to 7 channels, without AVX-512."""
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d) and set(module.kernel_size) == {1}]
    narrow = any(module.in_channels < 8 and max(module.stride) > 1 for module in convolutions)
    return narrow and torch.backends.cpu.get_cpu_capability() == "AVX2"  # type: ignore[no-untyped-call]


def _environment() -> Any:
    """Return what tells Lightning of the other processes: a launcher's variables, or Lightning itself, which starts them.

    ConfigError where a process cannot be started anew, as each of the others would have to be.
    """
    from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

    if launch := find_launch():
        os.environ |= {name: str(value) for name, value in launch.items()}
        return TorchElasticEnvironment()
    parent = os.getppid() if os.environ.get("LOCAL_RANK") != "0" else None
    # Else this is one of those processes, or has started them before.
    if os.environ.get(MARK) not in (str(os.getpid()), str(parent)):
        if hasattr(sys, "ps1") or not hasattr(sys.modules["__main__"], "__file__"):
            raise ConfigError(
                "engine.devices: several processes start from a script or the command line, not from a notebook or an interactive "
                "session; write a script, or use `relssl pretrain`"
            )
        # Whatever a shell or batch system has set of these is about other processes.
        for name in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        os.environ[MARK] = str(os.getpid())
    return LightningEnvironment()


def _meet_again(backend: str, patience: timedelta) -> None:
    """Meet under another name than the ranks that torchrun has started anew: its store still has their addresses."""
    names = ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE")
    attempt, shared = (os.environ.get(name, "0") for name in names)
    if int(attempt) and shared == "True" and not dist.is_initialized():
        rank, world, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        shelf = dist.TCPStore(os.environ["MASTER_ADDR"], port, world, is_master=False, timeout=patience)  # type: ignore[attr-defined]
        store = dist.PrefixStore(f"attempt-{attempt}", shelf)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the libraries' own messages and warnings off the console."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(level)


def prepare_process() -> None:
    """Keep memory as long as the process lasts; the command line calls it, a script may."""
    keep_memory(True)
    Engine.prepared = True


def keep_memory(keep: bool) -> None:
    """Let glibc's malloc keep large blocks, or treat them as it does by default: map, fault in and unmap each activation every step.

    Steps on a CPU take up to twice as long without.
    """
    if platform.libc_ver()[0] == "glibc":
        # Numbers of M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD in <malloc.h>, our values and the defaults there.
        for option, value, usual in ((-4, 0, 65536), (-1, -1, 128 << 10), (-2, 256 << 20, 128 << 10)):
            ctypes.CDLL(None).mallopt(option, value if keep else usual)
