"""The figures of relations in a run's rows: their names for readers, a line in plain words, and alarms with cause and remedy."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from relssl.settings.run import Config, derive

Row = Mapping[str, Any]


@functools.cache
def _read(name: str) -> Any:
    return yaml.safe_load(Path(__file__).with_name(f"{name}.yaml").read_text())


def describe() -> list[dict[str, Any]]:
    """Return the figures as figures.yaml describes them."""
    content: list[dict[str, Any]] = _read("figures")
    return content


def at_the_end(row: Row, memory: int) -> dict[str, tuple[str, str]]:
    """Return what the end of a run says of its last row, {column: (title, figure in words)}."""
    single = {next(iter(each["columns"])): (each["title"], each["form"]) for each in describe() if "form" in each}
    return {
        name: (title, "not finite" if row[name] is None else form.format(row[name], memory=memory))
        for name, (title, form) in single.items()
        if name in row
    }


def in_words(row: Row, memory: int) -> str:
    """Describe the relations of a row with a memory of K keys: `14 of 4,096 neighbours, sharp; student agrees on 61%`."""
    count = row.get("teacher_neighbours", math.nan)
    if not math.isfinite(count):
        return ""
    words = {1.2: "one-hot", max(10.0, 0.05 * memory): "sharp", 0.5 * memory: "soft", math.inf: "close to uniform"}
    word = next(word for limit, word in words.items() if count <= limit)
    return f"{count:.0f} of {memory:,} neighbours, {word}; student agrees on {row['agreement']:.0%}"


# Condition of each alarm, causes before their consequences; alarms.yaml has their sentences. It reads columns of a row, and `memory` K,
# `dim` D, `batch` B, `epochs`, `most` (steps), `moving` (a teacher is to follow the student) and `span`, steps that the memory
# holds; NaN, no reason, where one is missing.
ALARMS: dict[str, Callable[[Row], bool]] = {
    "dead-projector": lambda row: row["embedding_std"] < 1e-3,
    "dimensional-collapse": lambda row: (
        row["embedding_std"] < 0.1 or row["effective_rank"] < min(4.0, 0.1 * row["dim"], 0.5 * row["batch"])
    ),
    "uniform-teacher": lambda row: row["teacher_neighbours"] > 0.9 * row["memory"],
    "one-hot-teacher": lambda row: row["teacher_neighbours"] < 1.2,
    "frozen-teacher": lambda row: (
        row["moving"]
        and row["teacher_momentum"] > 0.99999
        and row["epoch"] < 0.9 * row["epochs"]
        and row["step"] < 0.9 * row["most"]
    ),
    "stale-memory": lambda row: row["span"] >= 4 and row["matched_age"] < min(row["span"], row["step"]) / 8,
}
# Those of a collapse; the others are faults of a run that may learn all the same.
COLLAPSES = ("dead-projector", "dimensional-collapse", "uniform-teacher")


def alarms(rows: Iterable[Row], config: Config) -> dict[str, str]:
    """Return the alarms that every one of some rows raises, {name: cause and remedy}; none where embeddings cannot collapse, as they are
    matched to labels or to a given teacher."""
    traits = derive(config).traits
    if traits.labels or config.teacher is not None:
        return {}
    facts: dict[str, float] = {"dim": config.encoder.dim, "batch": config.batch_size, "epochs": config.epochs}
    facts |= {"most": config.max_steps or math.inf, "moving": traits.teacher}
    if traits.memory:
        facts |= {"memory": config.method.memory_size, "span": config.method.memory_size / config.batch_size}
    if not traits.sharpened:  # whose loss has no teacher's temperature
        facts["teacher_neighbours"] = math.nan
    known = [defaultdict(lambda: math.nan, {k: v for k, v in row.items() if v is not None} | facts) for row in rows]
    return {name: _read("alarms")[name] for name, holds in ALARMS.items() if known and all(map(holds, known))}
