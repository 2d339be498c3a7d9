"""The machine's CPU cores; read by data and engine, imports neither."""

from __future__ import annotations

import os


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
