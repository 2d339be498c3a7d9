"""Results as a page of Markdown: what was found beside what was published, and how to repeat it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from relssl.units import duration

Found = Mapping[str, Any]

_WARNING = "**These numbers mean nothing.** {why}; the table shows that everything runs, not what the method can do."
_ENDS = {
    "teacher_neighbours": "effective neighbours",
    "embedding_std": "spread of embeddings",
    "effective_rank": "effective rank",
}


def page(found: Found) -> str:
    """The page of what `reproduce` returns."""
    parts = [f"# {found['title']}, at the {found['scale']} scale", found["shows"], _setting(found), _rows(found)]
    parts += [_beside(found), _orders(found), _expected(found), _missing(found), _machine(found), _commands(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _setting(found: Found) -> str:
    lines = [f"Scale: {found['about']}."]
    if found["overrides"]:
        given = " ".join(f"--{name} {value}" for name, value in found["overrides"].items())
        lines.append(f"All runs with `{given}`.")
    lines.append(f"Published numbers: {found['source']}")
    if found["rehearsal"]:
        lines.append(_WARNING.format(why=f"A rehearsal of {found['overrides']['epochs']} epochs"))
    elif found["scale"] == "smoke":
        lines.append(_WARNING.format(why="A few steps of a tiny network"))
    return "\n".join(lines)


def _rows(found: Found) -> str:
    """Published and own figures, mean +- standard deviation (least..most) over seeds."""
    figures = _union(row["ours"] for row in found["rows"])
    ends = [name for name in _ENDS if any(name in row["ends"] for row in found["rows"])]
    compared = any(number["difference"] is not None for row in found["rows"] for number in row["paper"])
    head = ["", "published", *([] if not compared else ["difference"]), *figures, *(_ENDS[name] for name in ends), "seeds"]
    lines = []
    for row in found["rows"]:
        cells = [row["label"], "; ".join(map(_published, row["paper"]))]
        if compared:
            told = [f"{n['difference']:+.2f} {n['figure']}" for n in row["paper"] if n["difference"] is not None]
            cells.append("; ".join(told))
        cells += [_spread(row["ours"].get(name)) for name in figures]
        cells += [_spread(row["ends"].get(name)) for name in ends]
        count = max((len(one["seeds"]) for one in row["ours"].values()), default=0)
        lines.append([*cells, f"{count}" + (f", {len(row['collapsed'])} collapsed" if row["collapsed"] else "")])
    note = "Top-1 in percent; mean +- standard deviation over seeds (least..most). Relations are those of the last logged step."
    return f"{_table(head, lines)}\n\n{note}"


def _published(number: Found) -> str:
    by = "" if number["by"] == "the paper" else f", {number['by']}"
    return f"{number['value']:.2f} {number['figure']} ({number['sure']}{by})"


def _beside(found: Found) -> str:
    """Differences to the reference row, seed by seed."""
    figures = _union(row["beside_reference"] for row in found["rows"])
    if not figures:
        return ""
    label = next(row["label"] for row in found["rows"] if row["row"] == found["reference"])
    head = [f"minus “{label}”, seed by seed", *figures]
    lines = [
        [row["label"], *(_spread(row["beside_reference"].get(name), sign="+") for name in figures)]
        for row in found["rows"]
        if row["beside_reference"]
    ]
    return _table(head, lines)


def _orders(found: Found) -> str:
    """Rows best first, in the paper's order and in ours."""
    if not found["order"]:
        return ""
    labels = {row["row"]: row["label"] for row in found["rows"]}
    return _table(
        ["by", "rows with a published number, best first"],
        [[name, " > ".join(labels[row] for row in rows)] for name, rows in found["order"].items()],
    )


def _expected(found: Found) -> str:
    """What was expected and whether it holds."""
    if not found["expected"]:
        return ""
    lines = []
    for each in found["expected"]:
        said = [_verdict(name, one) for name, one in each["verdicts"].items()]
        lines.append([each["says"], "; ".join(said) or "not measured"])
    note = "A difference counts where it exceeds the deviation of a difference of two runs, sqrt(s1^2 + s2^2) over seeds."
    return f"{_table(['expected', 'found'], lines)}\n\n{note}"


def _verdict(name: str, one: Found) -> str:
    if name == "collapsed":
        return f"**{one['verdict']}** ({one['collapsed']} of {one['seeds']} collapsed)"
    noise = "" if one["noise"] is None else f", noise {one['noise']:.2f}"
    return f"{name}: **{one['verdict']}** ({one['difference']:+.2f}{noise})"


def _missing(found: Found) -> str:
    if not found["missing"]:
        return ""
    by_why: dict[tuple[str, str], list[int]] = {}
    for each in found["missing"]:
        by_why.setdefault((each["row"], " ".join(each["why"].split())), []).append(each["seed"])
    lines = [f"- {row}, seed {', '.join(map(str, seeds))}: {why}" for (row, why), seeds in by_why.items()]
    return "Not run:\n\n" + "\n".join(lines)


def _machine(found: Found) -> str:
    """Where the runs were made, and what they took."""
    runs = found["runs"]
    if not runs:
        return ""
    made: dict[str, int] = {}
    for run in runs:
        here = run["environment"]
        versions = ", ".join(f"{name} {here['versions'][name]}" for name in ("relssl", "torch", "torchvision", "timm"))
        words = f"{here['engine']}; {here['cores']} cores of {here['processor']}; {versions}; revision {(here['git'] or 'unknown')[:12]}"
        made[words] = made.get(words, 0) + 1
    lines = [f"- {count} runs: {words}" for words, count in made.items()]
    training, after = (sum(run[name] for run in runs) for name in ("training_seconds", "evaluation_seconds"))
    each = [run["training_seconds"] for run in runs]
    took = f"{duration(training)} of training ({duration(min(each))} to {duration(max(each))} a run), {duration(after)} of evaluation"
    return "\n".join([f"Made in {took}, on", "", *lines])


def _commands(found: Found) -> str:
    """The commands of one run of each row."""
    first: dict[str, Found] = {}
    for run in found["runs"]:
        first.setdefault(run["row"], run)
    if not first:
        return ""
    lines = [line for run in first.values() for line in run["commands"]]
    note = f"Other seeds differ in `--seed` and `--out` alone; the commands of all runs are in `{found['name']}.json`."
    return "\n".join(["One run of each row:", "", "```", *lines, "```", "", note])


def _union(maps: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for one in maps for name in one))


def _spread(one: Found | None, sign: str = "") -> str:
    if one is None:
        return ""
    digits = 2 if abs(one["mean"]) < 10 and not sign else 1
    mean = f"{one['mean']:{sign}.{digits}f}"
    if one["std"] is None:
        return mean
    return f"{mean} +- {one['std']:.{digits}f} ({one['min']:{sign}.{digits}f}..{one['max']:{sign}.{digits}f})"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
