"""What the device does in a step, operation by operation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import ours
from pictures import Source


def trace(settings: Mapping[str, Any], source: Source, steps: int) -> str:
    """torch's profile of some steps after as many that warm up, as a table of what takes longest."""
    work = ours.training(settings, source)
    work.run(steps)
    on_gpu = bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        work.run(steps)
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    return str(found.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=80))
