"""What a process has used: processor time and memory, its loader workers included."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from pathlib import Path

import torch

from relssl.train.estimate import host_memory

MIB = 1 << 20


def cpu_seconds() -> float:
    """Processor seconds of this process and of all its children, ended or at work."""
    # Asked first, as it also collects the children that have ended, whose time then counts in os.times.
    at_work = multiprocessing.active_children()
    own = os.times()
    return own.user + own.system + own.children_user + own.children_system + sum(_cpu_seconds_of(child.pid) for child in at_work)


def _cpu_seconds_of(pid: int | None) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # not on this system, or just ended
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def forget_peak() -> None:
    """Count the peak of memory from here on."""
    with contextlib.suppress(OSError):  # elsewhere than on Linux the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")
    if _on_gpu():
        torch.cuda.reset_peak_memory_stats()


def memory() -> int:
    """Bytes held now: on the GPU if one is in use, else by this process."""
    return int(torch.cuda.memory_allocated()) if _on_gpu() else host_memory("VmRSS")


def peak_memory() -> int:
    """Most bytes held since `forget_peak`, in the same place. Of a process, without its workers but for pages they share."""
    return int(torch.cuda.max_memory_allocated()) if _on_gpu() else host_memory("VmHWM")


def _on_gpu() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
