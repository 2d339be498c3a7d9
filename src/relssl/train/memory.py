"""The memory that an optimizer step takes, computed without taking any of it, and the memory that there is."""

import copy
import math
import re
import resource
import sys
import weakref
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from relssl.data.loader import VIEW_BYTES
from relssl.engine import Engine
from relssl.errors import ConfigError, RelsslError
from relssl.files import size
from relssl.method import create_method
from relssl.method.base import Method
from relssl.method.create import create_run_optimizer, step_settings
from relssl.method.tiled import TILE_BYTES
from relssl.settings.parts import is_part
from relssl.settings.run import Config, derive

# A step can hardly take more than so many times the bytes of its views: a huge transformer takes about 1,400 times as many.
_MOST = 2000
_CGROUPS = Path("/sys/fs/cgroup")


def fit(
    config: Config,
    engine: Engine,
    workers: int,
    classes: int = 0,
    given: nn.Module | None = None,
    free: int | None = None,
    resident: int = 0,
) -> Config:
    """Return the settings, with `fit_batch` those of the largest batch that fits in memory, before any of it is taken.

    `workers` loader processes of each training process hold batches ahead; `free` bytes are there, by default those of `free_memory`,
    of which the images will take as many as `resident`; other arguments as of `step_memory`. ConfigError, with the batch size or
    accumulation that fits, if a step would take more.
    """
    derived, gpu = derive(config), engine.device.type == "cuda"
    free = -engine.largest(-(free or free_memory(engine.device))) - resident  # ranks agree
    image = sum(4 * config.views.channels * view.size**2 for view in derived.views)
    here = 1 if gpu else config.engine.devices  # processes that share it
    if here * derived.share * image * _MOST <= free:
        return config

    def needed(share: int) -> float:
        step = step_memory(config, engine, share, classes, given)
        # Beside a step's tensors, as measured: what kernels and fragments take; what malloc holds (`keep_memory`), and loaders.
        if gpu:  # where views of several steps, and tiles of the loss, are larger than those that the step was computed with
            blocks = (len(derived.views) + 2) * min(VIEW_BYTES, 8 * share * derived.passes * image)
            return 1.15 * step + blocks + 3 * min(TILE_BYTES["cuda"], 4 * share * config.method.memory_size)
        return here * (1.25 * step + (256 << 20) + (2 * workers + 1) * share * image)

    smallest = 2 * derived.norm_splits
    most, least = needed(derived.share), needed(smallest)
    if most <= free:
        return config
    image_takes = (most - least) / max(1, derived.share - smallest)
    share = double(smallest, smallest + (free - least) / max(1, image_takes))
    batch, fits = share * derived.passes, least <= free
    if config.fit_batch and fits:
        scaled = replace(config.optimizer, lr=config.optimizer.lr * batch / config.batch_size)
        return replace(config, batch_size=batch, fit_batch=False, optimizer=scaled)
    parts, advice = -(-derived.share // share) * config.accumulate, "take a smaller network or smaller views"
    if fits:
        whole = derived.traits.whole_batch or config.batch_size % (parts * config.engine.devices * config.engine.nodes)
        advice = f"take batch_size {batch}" + ("" if whole else f", or keep the batch with accumulate {parts}")
    elif least <= free + resident:
        advice = "set loader.path files to keep the images out of it"
    pixels = ", ".join(sorted({str(view.size) for view in derived.views}))
    step = f"a step of {config.backbone} with {config.batch_size} images in views of {pixels} pixels"
    raise ConfigError(f"batch_size: {step} takes about {size(round(most))} of memory, {size(max(0, free))} are free; {advice}")


def double(share: int, most: float) -> int:
    """Return the share doubled as often as it stays at `most`."""
    return share << int(math.log2(max(1, most / share)))


def step_memory(config: Config, engine: Engine, share: int, classes: int = 0, given: nn.Module | None = None) -> int:
    """Compute the bytes that training holds at the peak of a step: networks, memory, optimizer, views and what the gradient needs.

    A step of the run's own networks is made with tensors that have shapes and no content, so that it takes a second or two and no
    memory, whatever the batch. What kernels take for themselves while they run is not in it. A user's own network or method that needs
    content to be passed counts as nothing. `share` is the images of one accumulated part on one process, `given` a frozen teacher.
    """
    form, devices = "tiled" if derive(config).traits.tiled else "plain", [engine.device] if engine.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        model = create_method(config, torch.Generator(), form, max(1, classes), given)
    try:
        return _peak(model, config, engine, share)
    except RelsslError:
        raise
    except Exception:  # whatever a user's code raises over tensors without content
        if not (is_part(config.backbone) or is_part(config.method.name)):
            raise
        return 0


def _peak(model: Method, config: Config, engine: Engine, share: int) -> int:
    now = {"teacher_temperature": config.method.teacher_temperature, "teacher_momentum": 0.99, "warmup_mix": 0.5}
    settings, sides = step_settings(config, model, now), [view.size for view in derive(config).views]
    fake = FakeTensorMode()
    with FakeCopyMode(fake):
        model = copy.deepcopy(model.train())
    with fake, _Living() as living:
        for tensor in [*model.parameters(), *model.buffers()]:
            living.note(tensor)
        optimizer = create_run_optimizer(config, model.student)
        for first in (True, False):
            if derive(config).traits.labels:
                settings["labels"] = torch.zeros(share, dtype=torch.int64)
            weak, *strong = (torch.empty(share, config.views.channels, side, side) for side in sides)
            # Of the CPU, wherever the run computes: these tensors lie there.
            with torch.autocast("cpu", torch.bfloat16, enabled=engine.precision == "bf16"):
                step = model(weak, strong, **settings)
            step.loss.backward()  # type: ignore[no-untyped-call]
            if first:
                optimizer.step()  # its state is there from now on
                if config.accumulate == 1:
                    optimizer.zero_grad()
            del weak, strong, step
        peak: int = living.peak
    return peak + 3 * sum(buffer.nbytes for buffer in model.buffers())  # the guard's copies, and one for what is read of figures


class _Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that operations make, as long as each lives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        return result

    def note(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, once."""
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self._storages:
            self._storages.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.now -= size


def peak_memory(engine: Engine, processes: int) -> dict[str, int]:
    """Return {"used", "total", "device_used", "device_total"} in bytes up to now: of this machine, if all `processes` take as much as
    this one, and of its GPU, 0 without one."""
    memory = {"used": processes * memory_used(), "total": psutil.virtual_memory().total, "device_used": 0, "device_total": 0}
    with suppress(OSError, ValueError):  # no container, or one without a limit
        memory["total"] = min(memory["total"], _cgroup("memory.max"))
    if engine.device.type == "cuda":
        memory["device_used"] = torch.cuda.max_memory_reserved(engine.device)
        memory["device_total"] = torch.cuda.get_device_properties(engine.device).total_memory
    return memory


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process may still take: of a GPU, or of the machine, its container and the process's own limits."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for what comes
        return int(torch.cuda.mem_get_info(device)[0]) + held
    free = [psutil.virtual_memory().available]
    for folder, limit, usage, total in (
        ("", "memory.max", "memory.current", ""),
        ("memory/", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        with suppress(OSError, ValueError):  # no container, or one without a limit
            facts = dict(line.split() for line in (_CGROUPS / folder / "memory.stat").read_text().splitlines())
            cached = sum(int(facts.get(f"{total}{name}_file", 0)) for name in ("active", "inactive"))  # given back when needed
            free.append(_cgroup(folder + limit) - _cgroup(folder + usage) + cached)
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        free.append(most - psutil.Process().memory_info().vms)
    return max(0, min(free))


def _cgroup(name: str) -> int:
    return int((_CGROUPS / name).read_text())


def memory_used() -> int:
    """Return the most bytes that this process has held at once."""
    with suppress(OSError, TypeError):  # getrusage counts the process that started this one as well
        peak = re.search(r"VmHWM:\s*([0-9]+) kB", Path("/proc/self/status").read_text())
        return 1024 * int(peak[1])  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
