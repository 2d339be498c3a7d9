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
from relssl.files import read_json, read_rows, size
from relssl.weights import store

Rule = tuple[Any, str, str, str]  # whether it applies; what, evidence, remedy


def doctor(run: str | Path | None = None) -> list[dict[str, str]]:
    """Look for what may be wrong with this machine, or with a run.

    Args:
        run: a run folder, in whatever state; None: this machine and what is installed on it.

    Returns:
        The findings, each {"what", "evidence", "remedy"}; none where all is well.

    Raises:
        ConfigError: if the folder holds no run.
    """
    rules = machine_rules(machine()) if run is None else run_rules(Path(run))
    return [dict(zip(("what", "evidence", "remedy"), texts, strict=True)) for applies, *texts in rules if applies]


def machine() -> dict[str, Any]:
    """Return what there is to judge of this machine; None or nothing for what it does not tell."""

    def read(name: str) -> str:
        with contextlib.suppress(OSError):
            return Path(name).read_text()
        return ""

    torch = importlib.util.find_spec("torch")
    build = read(f"{os.path.dirname(torch.origin)}/version.py") if torch and torch.origin else ""
    quota, period = [*read("/sys/fs/cgroup/cpu.max").split(), "max", "1"][:2]
    limit, shared, flags = (
        read("/sys/fs/cgroup/memory.max").strip(),
        Path("/dev/shm"),
        re.search(r"flags\s*:(.*)", read("/proc/cpuinfo")),
    )
    needed: list[str] = []
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from its source tree
        needed += importlib.metadata.requires("relssl") or []
    return {
        "needed": needed,
        "versions": {each.name.lower().replace("_", "-"): each.version for each in importlib.metadata.distributions()},
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "quota": float(quota) / float(period) if quota != "max" else None,
        "memory": psutil.virtual_memory().total,
        "limit": int(limit) if limit.isdecimal() else None,
        "shared": shutil.disk_usage(shared).total if shared.exists() else None,
        "free": shutil.disk_usage(".").free,
        "flags": flags[1].split() if flags else [],
        "cuda": next(iter(re.findall(r"cuda.* = '(.*)'", build)), None),
        "gpu": os.path.exists("/dev/nvidiactl"),
        "libc": platform.libc_ver()[0] if platform.system() == "Linux" else "glibc",
        "variables": dict(os.environ),
    }


def machine_rules(facts: dict[str, Any]) -> Iterator[Rule]:
    """Yield what could be said of a machine of these facts."""
    versions, cores, flags, variables = facts["versions"], facts["cores"], {*facts["flags"]}, facts["variables"]
    for need in map(Requirement, facts["needed"]):
        version = versions.get(need.name.lower().replace("_", "-"))
        good = version is not None and need.specifier.contains(version, prereleases=True)
        wanted = not good and (need.marker is None or need.marker.evaluate({"extra": ""}))
        evidence = f"{version or 'none'} is installed, relssl needs {need.name}{need.specifier}"
        yield (
            wanted,
            f"{need.name} is {'missing' if version is None else 'too old, or a bad one'}",
            evidence,
            f"pip install '{need}'",
        )
    quota, limit, shared, threads = facts["quota"], facts["limit"], facts["shared"], variables.get("OMP_NUM_THREADS", "")
    few = f"--engine.threads {max(1, round(quota or 0))} --loader.workers {max(0, round(quota or 0) - 1)}"
    yield (
        quota and quota < cores,
        "fewer CPUs than cores",
        f"the container may use {quota:g} of {cores} cores" if quota else "",
        few,
    )
    own = threads.isdecimal() and int(threads) < cores
    yield (
        own,
        "evaluations leave cores idle",
        f"OMP_NUM_THREADS is {threads} of {cores} cores",
        "unset it; runs go by engine.threads",
    )
    less = limit and limit < facts["memory"]
    evidence = f"the container's limit is {size(limit or 0)} of {size(facts['memory'])}"
    yield less, "less memory than the machine has", evidence, "--batch_size auto; what takes more is killed without a word"
    evidence, remedy = (
        f"/dev/shm has {size(shared or 0)}, which loader processes share",
        "docker run --shm-size 8g, or --loader.workers 0",
    )
    yield shared is not None and shared < 1e9, "little shared memory", evidence, remedy
    yield (
        facts["free"] < 5e9,
        "little disk space",
        f"{size(facts['free'])} are free here",
        "free some, or give --out on another disk",
    )
    cpu, gpu, cuda = f"torch {versions.get('torch')}", facts["gpu"], facts["cuda"]
    yield gpu and not cuda, "an idle GPU", f"an NVIDIA driver is here, and {cpu} is built without CUDA", "install torch for CUDA"
    remedy = "good for CPUs, too; else install the GPU's driver"
    yield cuda and not gpu, "no GPU", f"{cpu} is built for CUDA {cuda}, and no NVIDIA driver is here", remedy
    slow = flags and not gpu and not flags & {"avx512_bf16", "amx_bf16"}
    yield (
        slow,
        "no fast bf16",
        "the CPU has neither AVX-512 BF16 nor AMX",
        "none: --precision auto takes fp32, which is right here",
    )
    narrow = "avx2" in flags and "avx512f" not in flags
    evidence = "without AVX-512, gradients of 1x1 convolutions of stride 2 on up to 7 channels crash, channels last"
    yield (
        narrow,
        "a fault of torch on this CPU",
        evidence,
        "none here: relssl lays such networks out row by row; do so in code of your own",
    )
    other = "malloc" in variables.get("LD_PRELOAD", "") or facts["libc"] != "glibc"
    evidence = variables.get("LD_PRELOAD") or f"the C library is {facts['libc'] or 'not glibc'}"
    yield other, "another malloc", evidence, "steps on a CPU may take up to twice as long; time them with `relssl estimate`"
    odd = [f"{name}={value}" for name, value in variables.items() if re.match("(PY)?TORCH(?!_CPP_LOG)|CUDA_LAUNCH_BL", name)]
    yield odd, "variables that change torch", ", ".join(sorted(odd)), "unset those that you do not need"


def run_rules(folder: Path) -> Iterator[Rule]:
    """Yield what could be said of a run."""
    from relssl.report.facts import run_facts  # with torch

    facts, rows, status = run_facts(folder), read_rows(folder / "metrics.jsonl"), read_json(folder / "status.json")
    state, settings, where = facts["state"], facts["settings"], read_json(folder / "environment.json")
    error, again = status.get("error") or {}, f"`relssl resume {folder}`"
    yield state == "failed", "the run failed", f"{error.get('kind')}: {error.get('message')}", f"once that is mended, {again}"
    yield state == "interrupted", "the run was stopped", f"at step {status.get('step')}", again
    killed = state == "running" and not _is_written(folder)
    yield killed, "the run was killed", "it says that it is running, and no process writes it; perhaps out of memory", again
    for line in facts["missing"]:
        yield not line.startswith("the run is not"), "missing", line, "the rest can be used all the same"
    word, lines = facts["verdict"]["word"], " ".join(facts["verdict"]["lines"])
    yield word in ("collapsing", "flat"), f"it is {word}", lines, f"`relssl advise {folder}`"
    waits = [row["data_wait"] for row in rows if row.get("data_wait") is not None]
    share, remedy = statistics.median(waits) if waits else 0, "`relssl estimate` with its settings says which one to change"
    yield share > 0.25, "steps wait for data", f"{share:.0%} of the time, in the median", remedy
    images, memory = (where.get("data") or {}).get("images"), settings.get("method.memory_size")
    half = images and memory and "teacher_neighbours" in facts["last"] and memory > images / 2
    evidence = f"{memory} keys, {images} images, which meet old copies of themselves"
    yield (
        half,
        "a memory of over half of the data",
        evidence,
        f"--method.memory_size {1 << max(1, (images or 4) // 2).bit_length() - 1}",
    )
    saved = store.checkpoints(folder / "checkpoints")
    yield (
        rows and not saved,
        "no checkpoint",
        "there is nothing to go on from, or to export",
        "--checkpoint.every_steps N saves sooner",
    )
    for path in saved:
        try:
            store.verify(path)
        except CheckpointError as damage:
            yield (
                True,
                "a damaged checkpoint",
                str(damage).partition(";")[0],
                "restore it, or remove its folder; `relssl resume` names a good one",
            )
    exported = [*(folder / "export").glob("*.safetensors")]
    evidence = str((status.get("export") or {}).get("error") or "RUN/export holds no weights")
    yield state == "complete" and not exported, "no exported weights", evidence, f"`relssl export {folder}`"
    bad = read_rows(folder / "bad_samples.jsonl")
    evidence = f"{len(bad)} files, the first is {bad[0]['file']} ({bad[0]['reason']})" if bad else ""
    yield bad, "images that cannot be read", evidence, "replace them, or take them out; others stand in for them"
    now = {each.name: each.version for each in importlib.metadata.distributions()}
    then = {name: version for name, version in facts["versions"].items() if name != "relssl" and now.get(name) != version}
    evidence = ", ".join(f"{name} {version}, now {now.get(name)}" for name, version in then.items())
    yield then and state != "complete", "other versions than it began with", evidence, "it goes on, not bit for bit"


def _is_written(folder: Path) -> bool:
    """Return whether a process holds a run's lock; true if that cannot be told."""
    try:
        with (folder / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
