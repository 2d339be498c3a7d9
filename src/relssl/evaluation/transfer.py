"""Transfer: one protocol on several data sets, each by its customary figure, as one table.

The figures are those of Kornblith et al. 2019, "Do Better ImageNet Models Transfer Better?", table 1: accuracy, but the mean over
the classes where these are of unequal size, and the mean average precision where images have several labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from relssl.data.files import NAMES
from relssl.errors import DataError
from relssl.evaluation.findings import Finding

_UNEQUAL = ("flowers102", "oxford-pets", "fgvc-aircraft")
METRICS: dict[str, str] = {name: "mean_per_class" if name in _UNEQUAL else "top1" for name in NAMES} | {"voc07": "map"}


def customary(name: str) -> str:
    """The figure by which results on a data set are quoted; top1 for sets of one's own."""
    return METRICS.get(name, "top1")


def transfer_table(outcomes: Mapping[str, Finding | str]) -> Finding:
    """The findings on several data sets as one.

    Args:
        outcomes: by data set, what the protocol found, or the reason why it was not run there; in the order wanted. Of sets of
            one's own the finding's main figure counts.

    Returns:
        A finding whose figures are `mean`, over the sets that ran, and that of each set by its name, in percent. `details` holds
        {"rows": [...]}, one a set: {"data", "metric", "value", "interval"} with the interval [low, high] or None, or {"data",
        "not_run": reason}. The mean has no interval: the sets were drawn apart.

    Raises:
        DataError: if the protocol ran on none, with all the reasons.
    """
    rows = [_row(name, outcome) for name, outcome in outcomes.items()]
    ran = [row for row in rows if "value" in row]
    if not ran:
        reasons = "; ".join(f"{row['data']}: {row['not_run']}" for row in rows) or "no data set was named"
        raise DataError(f"transfer: ran on none of the data sets ({reasons})")
    notes = [not_run(row) for row in rows if "not_run" in row]
    if notes:
        notes.insert(0, f"the mean is over {len(ran)} of {len(rows)} data sets; do not compare it with one over others")
    notes += [f"{name}: {note}" for name, outcome in outcomes.items() if isinstance(outcome, Finding) for note in outcome.notes]
    return Finding(
        setting={"sets": list(outcomes)},
        main="mean",
        figures={row["data"]: row["value"] for row in ran} | {"mean": sum(row["value"] for row in ran) / len(ran)},
        intervals={row["data"]: tuple(row["interval"]) for row in ran if row["interval"]},
        notes=tuple(notes),
        details={"rows": rows},
    )


def not_run(row: Mapping[str, Any]) -> str:
    """Why there is no figure of a row's data set, as a sentence."""
    return f"{row['data']} was not run: {row['not_run']}"


def _row(name: str, outcome: Finding | str) -> dict[str, Any]:
    if isinstance(outcome, str):
        return {"data": name, "not_run": outcome.removeprefix(f"{name}: ")}  # which our errors begin with
    metric = METRICS.get(name, outcome.main)
    interval = outcome.intervals.get(metric)
    value = outcome.figures[metric]
    return {
        "data": name,
        "metric": metric,
        "value": round(value, 4),
        "interval": interval and [round(bound, 4) for bound in interval],
    }
