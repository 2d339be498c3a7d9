"""The figures of relations in a run's rows: their names for readers, a line in plain words, and alarms with cause and remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from relssl.settings.run import Config, derive

Row = Mapping[str, Any]

# Of each column: its name, how the end table writes it ({memory} is K; empty: not there), and what to know.
FIGURES: dict[str, tuple[str, str, str]] = {
    "teacher_neighbours": (
        "Teacher's effective neighbours",
        "{:.1f} of {memory:,}",
        "Falls from the memory's size to a few as relations form.",
    ),
    "kl": ("Student's divergence", "{:.3f} nats", "How far the student's relations are from the teacher's."),
    "agreement": ("Same nearest neighbour", "{:.2f} of samples", "Share of samples for which both name the same nearest key."),
    "top_agreement": (
        "Same nearest ten",
        "{:.2f} of them",
        "Share of the teacher's ten nearest keys that are the student's too.",
    ),
    "embedding_std": (
        "Spread of the embeddings",
        "{:.2f} (1 is all round)",
        "About 1 when all directions are used, 0 when collapsed.",
    ),
    "effective_rank": ("Effective rank", "{:.0f}", "Directions that the embeddings really use."),
    "teacher_entropy": ("Entropy of the teacher's relation, nats", "", "Logarithm of its effective neighbours."),
    "positive_margin": ("Own key above the memory", "", "Cosine of a sample's two views less the median cosine to the memory."),
    "alignment": ("Distance of a sample's two views", "", "Squared; falls as views of one image come together."),
    "uniformity": ("Uniformity of the keys", "", "Lower is more even on the sphere; 0 when all are one."),
    "memory_unused": ("Nobody's neighbours", "", "Share of the memory that is among no sample's ten nearest."),
    "hubness": ("Hubs", "", "Share of the places among the nearest ten that the most frequent 1 % of the memory takes."),
    "matched_age": ("Age of the nearest key, steps", "", "About half of what the memory spans, unless its older part is stale."),
    "feature_rank": ("Effective rank of the features", "", "Directions that the backbone's features really use (RankMe)."),
    "lidar": ("LiDAR", "", "Directions that tell images apart beyond how their views differ."),
    "neighbour_stability": (
        "Neighbours that stayed",
        "",
        "Share of the ten nearest images that were so at the evaluation before.",
    ),
    "feature_alignment": ("Distance of two views' features", "", "Squared, at unit length."),
    "feature_uniformity": ("Uniformity of the features", "", "Lower is more even on the sphere."),
}
EVALUATED = (
    "feature_rank",
    "lidar",
    "neighbour_stability",
    "feature_alignment",
    "feature_uniformity",
)  # in rows of evaluations alone


def in_words(row: Row, memory: int) -> str:
    """Describe the relations of a row with a memory of K keys: `14 of 4,096 neighbours, sharp; student agrees on 61 %`."""
    if row.get("teacher_neighbours") is None:
        return ""
    count = row["teacher_neighbours"]
    words = {1.2: "one-hot", max(10.0, 0.05 * memory): "sharp", 0.5 * memory: "soft", math.inf: "close to uniform"}
    word = next(word for limit, word in words.items() if not count > limit)
    return f"{count:.0f} of {memory:,} neighbours, {word}; student agrees on {row['agreement']:.0%}"


# Name, condition and sentence of each alarm; a condition reads columns of a row, and `memory` K, `dim` D, `epochs`, `moving` (there is a
# teacher that is to follow the student) and `span`, the steps that the memory holds. What is missing or not finite is NaN, and no reason.
ALARMS: tuple[tuple[str, Callable[[Row], bool], str], ...] = (
    (
        "dead-projector",
        lambda row: row["embedding_std"] < 1e-3,
        "dead: the embeddings do not depend on the image; lower optimizer.lr or lengthen optimizer.warmup_epochs, or set "
        "encoder.projector_norm batch",
    ),
    (
        "dimensional-collapse",
        lambda row: row["embedding_std"] < 0.1 or row["effective_rank"] < min(4.0, 0.1 * row["dim"]),
        "collapsed: the embeddings use few directions or one; lower optimizer.lr, or lengthen method.warmup_share if the method warms up",
    ),
    (
        "uniform-teacher",
        lambda row: row["teacher_neighbours"] > 0.9 * row["memory"],
        "collapsed: the teacher's relation is uniform, which teaches nothing; lower method.teacher_temperature, or lengthen "
        "method.warmup_share",
    ),
    (
        "one-hot-teacher",
        lambda row: row["teacher_neighbours"] < 1.2,
        "the teacher's relation is a single neighbour, and no relation; raise method.teacher_temperature",
    ),
    (
        "frozen-teacher",
        lambda row: row["moving"] and row["teacher_momentum"] > 0.99999 and row["epoch"] < 0.9 * row["epochs"],
        "the teacher does not follow the student; lower method.teacher_momentum",
    ),
    (
        "stale-memory",
        lambda row: row["span"] >= 4 and row["matched_age"] < 0.25 * min(row["span"], row["step"]) / 2,
        "the memory's older part matches nothing any more; lower method.memory_size, or raise method.teacher_momentum",
    ),
)


class _Known(dict[str, Any]):
    def __missing__(self, name: str) -> float:
        return math.nan


def alarms(rows: Iterable[Row], config: Config) -> dict[str, str]:
    """Return the alarms that every one of some rows raises, {name: cause and remedy}; none where embeddings cannot collapse, as they are
    matched to labels or to a given teacher."""
    traits = derive(config).traits
    if traits.labels or config.teacher is not None:
        return {}
    facts: dict[str, float] = {"dim": config.encoder.dim, "epochs": config.epochs, "moving": traits.teacher}
    if traits.memory:
        facts |= {"memory": config.method.memory_size, "span": config.method.memory_size / config.batch_size}
    known = [_Known({name: math.nan if value is None else value for name, value in row.items()} | facts) for row in rows]
    return {name: sentence for name, holds, sentence in ALARMS if known and all(holds(row) for row in known)}
