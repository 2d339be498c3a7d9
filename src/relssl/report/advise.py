"""Advice on the teacher's temperature, the memory and the warm-up, from relations as a run's teacher sees them now; nothing is trained."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relssl.engine import usual_torch
from relssl.errors import ConfigError
from relssl.files import read_rows
from relssl.method.relation import relation
from relssl.report.gallery import next_batches, ready, related
from relssl.settings.run import Config, derive
from relssl.weights.opening import load_run

_IMAGES = 256  # at most
_TEMPERATURES = (0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1, 0.15, 0.2)
# Of a good relation: neighbours at least, and how many times fewer than at the student's temperature, as it has to be the sharper one;
# and the distance from the run's own temperature, in times, beyond which training would give other embeddings.
_LEAST, _SHARPER, _FAR = 1.3, 5, 4
Rows = list[dict[str, Any]]


@usual_torch()
def advise(run: str | Path) -> dict[str, Any]:
    """Sweep the teacher's temperature over the newest checkpoint of a run, and suggest a band for it, a memory size and a warm-up.

    Returns:
        Plain JSON: "run", "step", "images" and "keys" that are compared, "temperature" (the run's own), "band" ([low, high], or None),
        "chance" (the purity of all keys, None without labels), "temperatures" (see `sweep`), "advice" (each setting, value and why).

    Raises:
        ConfigError: if the folder holds no run, one of a method without a teacher's relations to a memory, or with balanced ones, or one
            too young to have filled it.
        CheckpointError, DataError: if checkpoint or images are missing or damaged.
    """
    opened, same, chance = load_run(run), None, None
    config, method = opened.config, opened.config.method
    with ready(opened) as (now, _):
        model, batches = now.state.model, next_batches(now, _IMAGES)
        teacher = model.given if model.teacher is None else model.teacher
        if model.memory is None or teacher is None:
            raise ConfigError(f"method.name: {method.name} has no teacher with a memory, and so no relations to advise on")
        if not derive(config).traits.sharpened:
            raise ConfigError(
                f"method.name: {method.name} matches no teacher's relation, whose temperature there would be to choose"
            )
        if model.sinkhorn_iterations:
            raise ConfigError(
                "method.sinkhorn_iterations: balanced relations depend on the whole batch; advice is for plain ones"
            )
        keys, memory = (each.cpu() for each in related(now, teacher, [each.weak for each in batches]))
        ids, samples = torch.cat([each.ids for each in batches]).cpu(), model.memory.ids.cpu()
        if empty := int((samples < 0).sum()):
            reached = f"at step {now.state.step} {empty} of its {len(samples)} keys are random still"
            raise ConfigError(f"method.memory_size: {reached}, and so are relations to them; train on, and ask then")
        others = (samples >= 0) & (samples != ids[:, None])
        if now.images.class_count:
            labels = torch.from_numpy(now.images.labels)
            same = (labels[ids][:, None] == labels[samples.clamp(min=0)]) & others
            chance = round(float(same.sum() / others.sum().clamp(min=1)), 4)
        scale = sorted({*_TEMPERATURES, method.teacher_temperature, method.student_temperature})
        table = sweep(keys, memory, scale, others, same)
    rows = read_rows(opened.folder / "metrics.jsonl") if "warmup_mix" in model.scheduled else []
    return {
        "run": opened.folder.resolve().name,
        "step": now.state.step,
        "images": len(ids),
        "keys": len(memory),
        "temperature": method.teacher_temperature,
        "band": band_of(table, config),
        "chance": chance,
        "temperatures": table,
        "advice": advice_on(table, config, len(now.images), rows, now.total_steps),
    }


def sweep(keys: Tensor, memory: Tensor, scale: list[float], others: Tensor, same: Tensor | None = None) -> Rows:
    """Return what becomes of the relations of keys [E, D] to a memory [K, D] at each temperature.

    Args:
        others: bool [E, K], keys of known images other than the row's own. same: those of them that are of its class, if there are labels.

    Returns:
        Of each, "temperature"; "neighbours", exp of the mean entropy, as of `health`; "purity", the share of the relation to others that
        falls on the image's own class, None without labels.
    """
    return [
        {
            "temperature": temperature,
            "neighbours": float(torch.special.entr(p).sum(dim=1).mean().exp()),
            "purity": None if same is None else round(float((p * same).sum() / (p * others).sum().clamp(min=1e-12)), 4),
        }
        for temperature, p in ((each, relation(keys, memory, each)) for each in scale)  # one at a time: each takes E x K
    ]


def band_of(table: Rows, config: Config) -> list[float] | None:
    """Return the lowest and highest temperature of a table, not far from the run's own, at which relations are good; None if there is none."""
    counts = {row["temperature"]: row["neighbours"] for row in table}
    own, student = config.method.teacher_temperature, config.method.student_temperature
    near = [t for t in counts if own / _FAR <= t <= own * _FAR and t < student]
    good = [t for t in near if _LEAST <= counts[t] <= counts[student] / _SHARPER]
    return [min(good), max(good)] if good else None


def advice_on(table: Rows, config: Config, images: int, rows: Rows, total: int) -> Rows:
    """Return "setting", "value" and "why" for temperature, memory and, with rows of a run of so many steps, warm-up."""
    method, band, counts = config.method, band_of(table, config), {row["temperature"]: row["neighbours"] for row in table}
    own, size, most = method.teacher_temperature, method.memory_size, counts[method.student_temperature] / _SHARPER
    why, value = f"{own:g} has {counts[own]:.1f} effective neighbours", f"{own / _FAR:g}"
    if band:
        value = " to ".join(dict.fromkeys(f"{each:g}" for each in band))
        why += f"; good are {_LEAST} to {most:.3g}, a fifth of those at the student's temperature"
    elif counts[own] > most:
        why += f", and none near it has under {most:.3g}: too flat to learn much from; start anew"
    else:
        value, why = f"{own * _FAR:g}", f"{why}, and none near it has {_LEAST}: relations are one-hot"
    advice = [("teacher_temperature", value, why)]
    why, keys = f"at most half of the {images} images; its oldest keys are {size // config.batch_size} steps old", size
    if size > images / 2:
        why = f"{size} keys are over half of the {images} images, which meet old copies of themselves"
        keys = max(config.batch_size, 1 << int(math.log2(max(2, images / 2))))
        why += "; a smaller batch_size lets it be smaller" * (keys >= size)
        keys = min(keys, size)
    advice.append(("memory_size", str(keys), why))

    # InfoNCE may end once relations are sharp, with fewer neighbours than half of the memory.
    rows = [row for row in rows if row.get("teacher_neighbours") is not None]
    flat = max((row["step"] for row in rows if row["teacher_neighbours"] > size / 2), default=0)
    none, why = method.warmup == "none", f"relations are sharp from step {flat} of {total} on"
    if rows and flat == rows[-1]["step"]:
        why = f"relations are still flat at step {flat}, and InfoNCE spreads embeddings; lower the temperature first"
        advice.append(("warmup", "linear" if none else method.warmup, why))
    elif rows and none:
        advice.append(("warmup", "none", f"{why} without one"))
    elif rows:
        advice.append(("warmup_share", f"{max(method.warmup_share, math.ceil(20 * flat / total) / 20):g}", why))
    return [{"setting": f"method.{name}", "value": value, "why": why} for name, value, why in advice]
