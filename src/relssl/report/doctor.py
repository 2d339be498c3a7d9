"""Findings on this machine, or on a run: what is slow, missing or known to be broken. The machine is looked at without torch, as that may
be what is broken."""

import contextlib
import fcntl
import importlib.util
import os
import platform
import re
import shutil
import statistics
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distributions, requires
from pathlib import Path
from shlex import quote
from typing import Any

import psutil
from packaging.requirements import Requirement

from relssl.errors import CheckpointError
from relssl.files import read_json, read_rows
from relssl.settings.methods import METHODS
from relssl.settings.reading import read_yaml
from relssl.weights import store

# GB of shared memory and on disk, and share of the time waiting for data, that are no finding.
_SHARED, _FREE, _WAITING = 1.0, 5.0, 0.25
Signs = Iterator[
    tuple[str, Any]
]  # names of findings.yaml, each with a truth value, or the facts that its texts name if it is one


def doctor(run: str | Path | None = None) -> list[dict[str, str]]:
    """Look for what may be wrong with this machine, or with a run, in whatever state; return {"name", "what", "evidence", "remedy"} of each
    finding of findings.yaml, none where all is well. ConfigError if the folder holds no run."""
    signs = machine_signs(machine()) if run is None else run_signs(Path(run))
    texts, findings = read_yaml(Path(__file__).with_name("findings.yaml")), list[dict[str, str]]()
    for name, facts in signs:
        if facts:
            known = {"folder": quote(str(run))} | (facts if isinstance(facts, dict) else {})
            what, evidence, remedy = (text.format(**known) for text in texts[name])
            findings.append({"name": name, "what": what, "evidence": evidence, "remedy": remedy})
    return findings


def machine() -> dict[str, Any]:
    """Return what there is to judge of this machine, memory and disk in GB; None or nothing for what it does not tell."""

    def read(name: str) -> str:
        with contextlib.suppress(OSError):
            return Path(name).read_text()
        return ""

    torch, needed, limit = importlib.util.find_spec("torch"), list[str](), read("/sys/fs/cgroup/memory.max").strip()
    with contextlib.suppress(PackageNotFoundError):  # run from its source tree
        needed += requires("relssl") or []
    quota, period = [*read("/sys/fs/cgroup/cpu.max").split(), "max", "1"][:2]
    preload, libc = os.environ.get("LD_PRELOAD", ""), platform.libc_ver()[0] if platform.system() == "Linux" else "glibc"
    build = read(f"{os.path.dirname(torch.origin)}/version.py") if torch and torch.origin else ""
    changing = re.compile("(PY)?TORCH(?!_CPP_LOG)|CUDA_LAUNCH_BL")
    return {
        "needed": needed,
        "versions": {each.name.lower().replace("_", "-"): each.version for each in distributions()},
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "quota": float(quota) / float(period) if quota != "max" else None,
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "memory": psutil.virtual_memory().total / 1e9,
        "limit": int(limit) / 1e9 if limit.isdecimal() else None,
        "shared": shutil.disk_usage("/dev/shm").total / 1e9 if os.path.exists("/dev/shm") else None,
        "free": shutil.disk_usage(".").free / 1e9,
        "flags": {*" ".join(re.findall(r"^flags\s*:(.*)", read("/proc/cpuinfo"), re.MULTILINE)[:1]).split()},
        "cuda": next(iter(re.findall(r"^cuda.* = '(.*)'", build, re.MULTILINE)), None),
        "gpu": any(map(os.path.exists, ("/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1"))),
        "malloc": preload if "malloc" in preload else f"the C library is {libc or 'unknown'}" if libc != "glibc" else "",
        "variables": ", ".join(sorted(f"{name}={value}" for name, value in os.environ.items() if changing.match(name))),
    }


def machine_signs(facts: dict[str, Any]) -> Signs:
    """Yield the signs of a machine of these facts."""
    flags, cores, gpu, cuda, versions = (facts[name] for name in ("flags", "cores", "gpu", "cuda", "versions"))
    for need in map(Requirement, facts["needed"]):
        version = versions.get(need.name.lower().replace("_", "-"))
        fault = "missing" if version is None else "of a version that does not work"
        bad = version is None or not need.specifier.contains(version, prereleases=True)
        applies = need.marker is None or need.marker.evaluate({"extra": ""})
        yield "package", applies and bad and {"name": need.name, "need": need, "version": version or "none", "fault": fault}
    yield "cpus", facts["quota"] and facts["quota"] < cores and facts
    yield "threads", facts["threads"].isdecimal() and int(facts["threads"]) < cores and facts
    yield "limit", facts["limit"] and facts["limit"] < facts["memory"] and facts
    yield "shared", facts["shared"] is not None and facts["shared"] < _SHARED and facts
    yield "disk", facts["free"] < _FREE and facts
    yield "idle-gpu", gpu and not cuda and "torch" in versions and versions
    yield "no-gpu", cuda and not gpu and "torch" in versions and facts | versions
    yield "bf16", flags and not gpu and not flags & {"avx512_bf16", "amx_bf16"}
    yield "avx2", "avx2" in flags and "avx512f" not in flags
    yield "malloc", facts["malloc"] and facts
    yield "variables", facts["variables"] and facts


def run_signs(folder: Path) -> Signs:
    """Yield the signs of a run."""
    from relssl.report.facts import run_facts  # with torch

    known, status, where = run_facts(folder), read_json(folder / "status.json"), read_json(folder / "environment.json")
    rows, bad, state = read_rows(folder / "metrics.jsonl"), read_rows(folder / "bad_samples.jsonl"), known["state"]
    yield "failed", state == "failed" and (status.get("error") or {"kind": "bug", "message": "for no reason that it tells"})
    yield "stopped", state == "interrupted" and status
    yield "killed", state == "running" and not _is_written(folder)
    verdict, waits = known["verdict"], [row["data_wait"] for row in rows if row.get("data_wait") is not None]
    poor = verdict["word"] in ("collapsing", "flat") and verdict | {"lines": " ".join(verdict["lines"])}
    method = METHODS.get(str(known["settings"].get("method.name")))
    advised = (method is None or (method.sharpened and method.memory)) and not known["settings"].get("method.sinkhorn_iterations")
    yield "poor" if advised else "weak", poor
    yield "waits", waits and (share := statistics.median(waits)) > _WAITING and {"waiting": share}
    images, keys = (where.get("data") or {}).get("images"), known["settings"].get("method.memory_size", 0)
    related = "kl" in known["last"] and isinstance(keys, int)  # text, where the settings cannot be read
    yield "half", images and related and keys > images / 2 and {"keys": keys, "images": images}
    saved, export = store.checkpoints(folder / "checkpoints"), status.get("export") or {}
    yield "unsaved", rows and not saved
    unexported = state == "complete" and not any((folder / "export").glob("*.safetensors"))
    yield "unexported", unexported and {"error": "RUN/export holds none"} | export
    yield "unreadable", bad and bad[0] | {"bad": len(bad)}
    now, then = {each.name: each.version for each in distributions()}, where.get("versions") or {}
    changed = [f"{name} {version}, now {now[name]}" for name, version in then.items() if now.get(name, version) != version]
    yield "versions", state != "complete" and changed and {"changed": ", ".join(changed)}
    for line in known["missing"]:
        yield "missing", not line.startswith("the run is not") and {"line": line}
    for path in saved:
        try:
            store.verify(path)
        except CheckpointError as damage:  # or the run has let go of it since
            yield "damaged", path.exists() and {"damage": str(damage).partition(";")[0]}


def _is_written(folder: Path) -> bool:
    """Return whether a process holds a run's lock; true if that cannot be told."""
    try:
        with (folder / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return not isinstance(error, FileNotFoundError)
