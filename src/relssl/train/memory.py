"""The memory that processes hold, and what there is."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from relssl.engine import Engine


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, of this machine's training processes so far without the loader's processes, and what there is.

    `device` is what was reserved on a GPU; 0 of 0 without one.
    """

    used: int
    total: int
    device_used: int
    device_total: int

    @property
    def share(self) -> float:
        """The fuller of the two, 0 to 1."""
        return max(self.used / self.total, self.device_used / self.device_total if self.device_total else 0.0)


def peak_memory(engine: Engine, processes: int) -> Memory:
    """The peak up to now, if all `processes` of this machine take as much as this one."""
    used, total = processes * host_memory("VmHWM"), _memory_allowed()
    if engine.device.type != "cuda":
        return Memory(used, total, 0, 0)
    device = torch.cuda.get_device_properties(engine.device)
    return Memory(used, total, torch.cuda.max_memory_reserved(engine.device), device.total_memory)


def host_memory(field: str) -> int:
    """Bytes that this process holds (VmRSS) or held at most (VmHWM), as the kernel accounts for it.

    The peak of getrusage would not do, as a new process inherits its parent's; it has to where there is no such account.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _memory_allowed() -> int:
    """The machine's memory, or what a container may take of it."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            return min(total, int((Path("/sys/fs/cgroup") / name).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return total
