"""The figures of relations in a run's rows: their names for readers, a line in plain words, and alarms with cause and remedy."""

from __future__ import annotations

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
def describe() -> list[dict[str, Any]]:
    """Return the figures as figures.yaml describes them."""
    content: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("figures.yaml").read_text())
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


# Condition and sentence of each alarm, causes before their consequences. A condition reads columns of a row, and `memory` K, `dim` D,
# `epochs`, `moving` (a teacher is to follow the student) and `span`, steps that the memory holds; NaN, no reason, where one is missing.
ALARMS: dict[str, tuple[Callable[[Row], bool], str]] = {
    "dead-projector": (
        lambda row: row["embedding_std"] < 1e-3,
        "dead: the embeddings do not depend on the image; lower optimizer.lr, or set encoder.projector_norm batch",
    ),
    "dimensional-collapse": (
        lambda row: row["embedding_std"] < 0.1 or row["effective_rank"] < min(4.0, 0.1 * row["dim"]),
        "collapsed: the embeddings use few directions or one; lower optimizer.lr, or lengthen method.warmup_share where there is a warm-up",
    ),
    "uniform-teacher": (
        lambda row: row["teacher_neighbours"] > 0.9 * row["memory"],
        "collapsed: the teacher's relation is uniform; lower method.teacher_temperature, or lengthen method.warmup_share",
    ),
    "one-hot-teacher": (
        lambda row: row["teacher_neighbours"] < 1.2,
        "the teacher's relation is a single neighbour, which says nothing of the others; raise method.teacher_temperature",
    ),
    "frozen-teacher": (
        lambda row: row["moving"] and row["teacher_momentum"] > 0.99999 and row["epoch"] < 0.9 * row["epochs"],
        "the teacher does not follow the student; lower method.teacher_momentum",
    ),
    "stale-memory": (
        lambda row: row["span"] >= 4 and row["matched_age"] < min(row["span"], row["step"]) / 8,
        "the older part of the memory matches nothing any more; lower method.memory_size, or raise method.teacher_momentum",
    ),
}
# Those of a collapse; the others are faults of a run that may learn all the same.
COLLAPSES = ("dead-projector", "dimensional-collapse", "uniform-teacher")


def alarms(rows: Iterable[Row], config: Config) -> dict[str, str]:
    """Return the alarms that every one of some rows raises, {name: cause and remedy}; none where embeddings cannot collapse, as they are
    matched to labels or to a given teacher."""
    traits = derive(config).traits
    if traits.labels or config.teacher is not None:
        return {}
    facts: dict[str, float] = {"dim": config.encoder.dim, "epochs": config.epochs, "moving": traits.teacher}
    if traits.memory:
        facts |= {"memory": config.method.memory_size, "span": config.method.memory_size / config.batch_size}
    known = [defaultdict(lambda: math.nan, {k: v for k, v in row.items() if v is not None} | facts) for row in rows]
    return {name: sentence for name, (holds, sentence) in ALARMS.items() if known and all(map(holds, known))}
