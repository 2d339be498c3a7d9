"""Advice on the teacher's temperature, the memory and the warm-up, from relations as a run's teacher sees them now; nothing is trained.

Legend: E images, K keys in the memory, D dimensions.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relssl.errors import ConfigError
from relssl.files import read_rows
from relssl.method.relation import relation
from relssl.report.gallery import embed, next_batches, ready
from relssl.settings.run import Config
from relssl.train.estimate import Advice
from relssl.weights.opening import load_run

_IMAGES = 256  # at most
_TEMPERATURES = (0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1, 0.15, 0.2)
# Of a good relation: neighbours at least, and how many times fewer than at the student's temperature, as it has to be the sharper one.
_LEAST, _SHARPER = 10, 3
_FAR = 4  # times the run's own temperature: embeddings trained further away would be others


def advise(run: str | Path) -> dict[str, Any]:
    """Sweep the teacher's temperature over the newest checkpoint of a run, and suggest a band for it, a memory size and a warm-up.

    Args:
        run: its folder.

    Returns:
        Plain JSON: "run", "step", "images" (E), "keys" (K), "temperature" (the run's own), "band" ([low, high], or None), "chance" (the
        purity of all keys, None without labels), "temperatures" (as of `sweep`), "advice" (each a setting, its value, and why).

    Raises:
        ConfigError: if the folder holds no run, or the method takes no relations to a memory.
        CheckpointError, DataError: if checkpoint or images are missing or damaged.
    """
    opened = load_run(run)
    config, method = opened.config, opened.config.method
    with ready(opened) as (now, _, _):
        model = now.state.model
        if model.memory is None or model.teacher is None:
            raise ConfigError(f"method.name: {method.name} has no teacher with a memory, and so no relations to advise on")
        batches = next_batches(now, _IMAGES)
        keys, ids = embed(now, model.teacher, [batch.weak for batch in batches]).cpu(), torch.cat([b.ids for b in batches]).cpu()
        memory, samples = model.memory.keys.float().cpu(), model.memory.ids.cpu()
        others = (samples >= 0) & (samples != ids[:, None])
        same = None
        if now.images.class_count:
            labels = torch.from_numpy(now.images.labels)
            same = (labels[ids][:, None] == labels[samples.clamp(min=0)]) & others
        scale = sorted({*_TEMPERATURES, method.teacher_temperature, method.student_temperature})
        table = sweep(keys, memory, scale, others, same)
        band, size = band_of(table, config), len(now.images)
        lengths = (
            _warmup(config, read_rows(Path(run) / "metrics.jsonl"), now.total_steps) if "warmup_mix" in model.scheduled else []
        )
        facts = {"run": opened.folder.resolve().name, "step": now.state.step, "images": len(ids), "keys": len(memory)}
    chance = None if same is None else round(float(same.sum() / others.sum().clamp(min=1)), 4)
    advice = [_temperature(table, band, config), _memory(table, band, config, size), *lengths]
    facts |= {"temperature": method.teacher_temperature, "band": band, "chance": chance, "temperatures": table}
    return facts | {"advice": [asdict(each) for each in advice]}


@torch.no_grad()
def sweep(keys: Tensor, memory: Tensor, scale: list[float], others: Tensor, same: Tensor | None = None) -> list[dict[str, Any]]:
    """Return what becomes of relations at each temperature.

    Args:
        keys, memory: [E, D] and [K, D], unit norm.
        scale: the temperatures.
        others: [E, K], true for keys of known images other than the row's own.
        same: [E, K], true for those of its class; None without labels.

    Returns:
        Of each, "temperature"; "neighbours", exp of the mean entropy, as of `health`; "purity", the share of the relation to others that
        falls on the image's own class, None without labels.
    """
    rows = []
    for temperature in scale:
        p = relation(keys, memory, temperature)
        rest = (p * others).sum()
        row = {"temperature": temperature, "neighbours": float(torch.special.entr(p).sum(dim=1).mean().exp())}
        rows.append(row | {"purity": None if same is None else round(float((p * same).sum() / rest.clamp(min=1e-12)), 4)})
    return rows


def band_of(table: list[dict[str, Any]], config: Config) -> list[float] | None:
    """Return the lowest and the highest temperature of a table, not far from the run's own, at which relations are good; None if none is."""
    counts, own, student = _counts(table), config.method.teacher_temperature, config.method.student_temperature
    near = {t: count for t, count in counts.items() if own / _FAR <= t <= own * _FAR and t < student}
    good = [t for t, count in near.items() if _LEAST <= count <= counts[student] / _SHARPER]
    return [min(good), max(good)] if good else None


def _counts(table: list[dict[str, Any]]) -> dict[float, float]:
    return {row["temperature"]: row["neighbours"] for row in table}


def _temperature(table: list[dict[str, Any]], band: list[float] | None, config: Config) -> Advice:
    counts, own, name = _counts(table), config.method.teacher_temperature, "method.teacher_temperature"
    most, known = counts[config.method.student_temperature] / _SHARPER, f"{own:g} has {counts[own]:.1f}"
    if band is None and counts[own] > most:
        why = f"{known} effective neighbours of {config.method.memory_size}, and none near it under {most:.0f}: too flat to learn from; start anew"
        return Advice(name, f"{own / _FAR:g}", why)
    if band is None:
        return Advice(
            name, f"{own * _FAR:g}", f"{known} effective neighbours, and none near it {_LEAST}: one-hot, as without relations"
        )
    why = f"{_LEAST} to {most:.0f} effective neighbours, a third of those at the student's temperature; {known}"
    return Advice(name, f"{band[0]:g} to {band[1]:g}", f"{why}{'' if band[0] <= own <= band[1] else ', outside of it'}")


def _memory(table: list[dict[str, Any]], band: list[float] | None, config: Config, images: int) -> Advice:
    """Advise on the memory: as many keys as give a relation in the middle of the band its neighbours, and few copies of an image itself."""
    size, counts = config.method.memory_size, _counts(table)
    middle = math.sqrt(band[0] * band[1]) if band else config.method.teacher_temperature
    share = counts[min(counts, key=lambda t: abs(math.log(t / middle)))] / size
    least, most = 1 << math.ceil(math.log2(_LEAST / share)), 1 << int(math.log2(max(2, images / 2)))
    if size > most:
        return Advice(
            "method.memory_size", str(most), f"{size} is over half of the {images} images: they meet old copies of themselves"
        )
    if size < least <= most:
        return Advice(
            "method.memory_size", str(least), f"of {size} keys {share:.1%} are neighbours, which is fewer than {_LEAST}"
        )
    return Advice("method.memory_size", str(size), f"holds {_LEAST} neighbours or more, and under half of the {images} images")


def _warmup(config: Config, rows: list[dict[str, Any]], total: int) -> list[Advice]:
    """Advise on InfoNCE's warm-up, which may end once relations are sharp, with fewer neighbours than half of the memory."""
    method, rows = config.method, [row for row in rows if row.get("teacher_neighbours") is not None]
    flat = [row["step"] for row in rows if row["teacher_neighbours"] > method.memory_size / 2]
    if not rows:
        return []
    if flat and flat[-1] == rows[-1]["step"]:
        why = f"relations were flat up to step {flat[-1]}, and InfoNCE spreads embeddings; first lower the temperature"
        return [Advice("method.warmup", "linear" if method.warmup == "none" else method.warmup, why)]
    share = math.ceil(20 * (flat[-1] if flat else 0) / total) / 20
    why = f"relations were sharp from step {flat[-1] if flat else rows[0]['step']} of {total} on"
    if method.warmup == "none":
        return [Advice("method.warmup", "none", f"{why}, without one")]
    return [Advice("method.warmup_share", f"{max(share, method.warmup_share):g}", why)]
