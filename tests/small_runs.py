"""Small runs for tests: a narrow network on a few digits, a second or two each."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from relssl.data.named import load
from relssl.engine import Engine
from relssl.files import read_rows
from relssl.settings.reading import nest
from relssl.settings.run import resolve
from relssl.train.pretrain import Result, pretrain
from relssl.train.run import Run, complete_settings, create_run
from relssl.weights import store

SMALL: dict[str, Any] = {
    "data": "digits",
    "max_images": 320,
    "epochs": 2,
    "batch_size": 32,
    "backbone_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "zero_init_last": False},
    "encoder": {"stem": "small-pool", "projector_hidden": 32, "dim": 16},
    "method": {"memory_size": 96, "warmup_share": 0.5},
    "optimizer": {"warmup_epochs": 1},
    "engine": {"threads": 1, "device": "cpu"},
    "log": {"every": 3, "knn_every": 1, "knn_images": [100, 100], "to": [], "report": False},
}
# A network without batch norm, for what holds up to batch norm only.
NORMLESS: dict[str, Any] = {
    "backbone": "convnext_atto",
    "backbone_args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "patch_size": 2},
    "encoder": {"stem": "standard", "projector_hidden": 32, "dim": 16, "projector_norm": "none"},
    "engine": {"threads": 1, "device": "cpu", "precision": "fp32"},
}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `over` on `base`; mappings are merged key by key, all else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def small_run(out: Path, **overrides: Any) -> Result:
    over = nest(overrides)
    base = {key: value for key, value in SMALL.items() if key != "backbone_args" or key not in over}
    return pretrain(settings=resolve(merge(merge(base, over), {"out": str(out)})), quiet=True)


def cut(run: Path, target: Path, step: int) -> Path:
    """A copy of a run as it was when it was killed after `step`, rows of the steps behind its newest checkpoint included."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("export", "status.json", "step-*"))
    name = store.step_folder(Path("checkpoints"), step)
    shutil.copytree(run / name, target / name)
    return target


def ready_run(out: Path, images: int = 320, **overrides: Any) -> Run:
    """A small run on digits before its first step, without a folder."""
    config = resolve(merge(merge(SMALL, {"out": str(out)}), nest(overrides)))
    digits = load("digits", None, "train").subset(range(images))
    return create_run(complete_settings(config, digits), Engine(config.engine), digits)


def training_state(run: Run) -> dict[str, torch.Tensor]:
    """A copy of all tensors that a step may change, and of torch's random state."""
    moments = {
        f"{name}.{i}": value.clone()
        for i, state in enumerate(run.state.optimizer.state.values())
        for name, value in state.items()
    }
    tensors = {name: value.clone() for name, value in run.state.model.state_dict().items()}
    return tensors | moments | {"torch": torch.get_rng_state()}


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint."""
    tensors, _ = store.load(store.checkpoints(folder / "checkpoints")[-1])
    return tensors


def repeatable_rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock decides; everything else repeats bit for bit on the same machine."""
    clock = {"images_per_second", "data_wait"}
    return [{k: v for k, v in row.items() if k not in clock} for row in read_rows(folder / "metrics.jsonl")]


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not equal bit for bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def equal_runs(a: Path, b: Path) -> bool:
    """True if two runs ended in the same state, and left the same rows, bit for bit."""
    return differing(final_state(a), final_state(b)) == [] and repeatable_rows(a) == repeatable_rows(b)


def close_runs(a: Path, b: Path) -> bool:
    """True if two runs ended with the same networks and memory, but for rounding."""
    x, y = final_state(a), final_state(b)
    tensors = [name for name in x if name.startswith(("memory.", "teacher.", "student."))]
    return all(torch.allclose(x[name], y[name], rtol=1e-3, atol=1e-4) for name in tensors)
