"""Findings on this machine, or on a run: what is slow, missing or known to be broken. The machine is looked at without torch, as that may
be what is broken."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

from relssl.errors import CheckpointError
from relssl.files import read_json, read_rows
from relssl.settings.reading import read_yaml
from relssl.weights import store

Facts = dict[str, Any]
_SHARED, _FREE, _WAITING = (
    1.0,
    5.0,
    0.25,
)  # GB of shared memory and on disk, and share of time waiting for data, that are no finding


def doctor(run: str | Path | None = None) -> list[dict[str, str]]:
    """Look for what may be wrong with this machine, or with a run.

    Args:
        run: a run folder, in whatever state; None: this machine and what is installed on it.

    Returns:
        The findings, each {"name", "what", "evidence", "remedy"}, as of findings.yaml; none where all is well.

    Raises:
        ConfigError: if the folder holds no run.
    """
    texts, signs = (
        read_yaml(Path(__file__).with_name("findings.yaml")),
        machine_signs(machine()) if run is None else run_signs(Path(run)),
    )
    return [
        {"name": name} | dict(zip(("what", "evidence", "remedy"), (text.format(**facts) for text in texts[name]), strict=True))
        for name, facts in signs
    ]


def machine() -> Facts:
    """Return what there is to judge of this machine, memory and disk in GB; None or nothing for what it does not tell."""

    def read(name: str) -> str:
        with contextlib.suppress(OSError):
            return Path(name).read_text()
        return ""

    found, needed, limit = importlib.util.find_spec("torch"), list[str](), read("/sys/fs/cgroup/memory.max").strip()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from its source tree
        needed += importlib.metadata.requires("relssl") or []
    quota, period = [*read("/sys/fs/cgroup/cpu.max").split(), "max", "1"][:2]
    preload, libc = os.environ.get("LD_PRELOAD", ""), platform.libc_ver()[0] if platform.system() == "Linux" else "glibc"
    build = read(f"{os.path.dirname(found.origin)}/version.py") if found and found.origin else ""
    changing = {name: value for name, value in os.environ.items() if re.match("(PY)?TORCH(?!_CPP_LOG)|CUDA_LAUNCH_BL", name)}
    return {
        "needed": needed,
        "versions": {each.name.lower().replace("_", "-"): each.version for each in importlib.metadata.distributions()},
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "quota": float(quota) / float(period) if quota != "max" else None,
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "memory": psutil.virtual_memory().total / 1e9,
        "limit": int(limit) / 1e9 if limit.isdecimal() else None,
        "shared": shutil.disk_usage("/dev/shm").total / 1e9 if os.path.exists("/dev/shm") else None,
        "free": shutil.disk_usage(".").free / 1e9,
        "flags": {*" ".join(re.findall(r"^flags\s*:(.*)", read("/proc/cpuinfo"), re.MULTILINE)[:1]).split()},
        "cuda": next(iter(re.findall(r"^cuda.* = '(.*)'", build, re.MULTILINE)), None),
        "gpu": os.path.exists("/dev/nvidiactl"),
        "malloc": preload if "malloc" in preload else f"the C library is {libc or 'unknown'}" if libc != "glibc" else "",
        "variables": ", ".join(sorted(f"{name}={value}" for name, value in changing.items())),
    }


def machine_signs(facts: Facts) -> Iterator[tuple[str, Facts]]:
    """Yield the names of findings on a machine of these facts, with what their texts name."""
    flags, cores, gpu = facts["flags"], facts["cores"], facts["gpu"]
    for need in map(Requirement, facts["needed"]):
        version = facts["versions"].get(need.name.lower().replace("_", "-"))
        good = version is not None and need.specifier.contains(version, prereleases=True)
        if not good and (need.marker is None or need.marker.evaluate({"extra": ""})):
            fault = "missing" if version is None else "of a version that is known not to work"
            yield "package", {"name": need.name, "need": need, "version": version or "none", "fault": fault}
    applies = {
        "cpus": facts["quota"] and facts["quota"] < cores,
        "threads": facts["threads"].isdecimal() and int(facts["threads"]) < cores,
        "limit": facts["limit"] and facts["limit"] < facts["memory"],
        "shared": facts["shared"] is not None and facts["shared"] < _SHARED,
        "disk": facts["free"] < _FREE,
        "idle-gpu": gpu and not facts["cuda"],
        "no-gpu": facts["cuda"] and not gpu,
        "bf16": flags and not gpu and not flags & {"avx512_bf16", "amx_bf16"},
        "avx2": "avx2" in flags and "avx512f" not in flags,
        "malloc": facts["malloc"],
        "variables": facts["variables"],
    }
    yield from ((name, facts | {"torch": facts["versions"].get("torch")}) for name, applying in applies.items() if applying)


def run_signs(folder: Path) -> Iterator[tuple[str, Facts]]:
    """Yield the names of findings on a run, with what their texts name."""
    from relssl.report.facts import run_facts  # with torch

    known, status, where = run_facts(folder), read_json(folder / "status.json"), read_json(folder / "environment.json")
    rows, bad, state = read_rows(folder / "metrics.jsonl"), read_rows(folder / "bad_samples.jsonl"), known["state"]
    saved, now = (
        store.checkpoints(folder / "checkpoints"),
        {each.name: each.version for each in importlib.metadata.distributions()},
    )
    then = {
        name: version for name, version in (where.get("versions") or {}).items() if name != "relssl" and now.get(name) != version
    }
    facts = {"kind": "bug", "message": "unknown"} | (status.get("error") or {}) | (bad[0] if bad else {})
    facts |= {
        "folder": folder,
        "step": status.get("step"),
        "word": known["verdict"]["word"],
        "lines": " ".join(known["verdict"]["lines"]),
        "waiting": statistics.median([row["data_wait"] for row in rows if row.get("data_wait") is not None] or [0]),
        "keys": known["settings"].get("method.memory_size", 0) if "teacher_neighbours" in known["last"] else 0,
        "images": (where.get("data") or {}).get("images"),
        "export": (status.get("export") or {}).get("error") or "RUN/export holds none",
        "bad": len(bad),
        "changed": ", ".join(f"{name} {version}, now {now.get(name)}" for name, version in then.items()),
    }
    applies = {
        "failed": state == "failed",
        "stopped": state == "interrupted",
        "killed": state == "running" and not _is_written(folder),
        "poor": facts["word"] in ("collapsing", "flat"),
        "waits": facts["waiting"] > _WAITING,
        "half": facts["images"] and facts["keys"] > facts["images"] / 2,
        "unsaved": rows and not saved,
        "unexported": state == "complete" and not [*(folder / "export").glob("*.safetensors")],
        "unreadable": bad,
        "versions": then and state != "complete",
    }
    yield from ((name, facts) for name, applying in applies.items() if applying)
    yield from (("missing", {"line": line}) for line in known["missing"] if not line.startswith("the run is not"))
    for path in saved:
        try:
            store.verify(path)
        except CheckpointError as error:
            yield "damaged", {"damage": str(error).partition(";")[0]}


def _is_written(folder: Path) -> bool:
    """Return whether a process holds a run's lock; true if that cannot be told."""
    try:
        with (folder / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return not isinstance(error, FileNotFoundError)
