"""The tables that commands print: a run's end, an estimate, an evaluation, a comparison, the networks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from relssl.files import duration, read_rows, size
from relssl.method.backbones import Network
from relssl.settings.run import Config, derive
from relssl.train.figures import COLLAPSES, alarms, at_the_end, describe

if TYPE_CHECKING:
    from relssl.train.estimate import Estimate
    from relssl.train.pretrain import Result

_WIDTH = 120  # characters a line where nobody's screen sets it
_BASES = {"raw_pixels": "raw pixels", "untrained": "the untrained backbone", "start": "the given weights"}
_CLEAR = 2.0  # points of kNN top-1, more than chance moves it on most test parts


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would end the process


def _print(table: Table, title: Text, rows: Iterable[tuple[str, ...] | None], width: int | None = None) -> None:
    """Print a table with its title; a row that is None draws a line."""
    table.title, table.title_justify = title, "left"
    for row in rows:
        table.add_section() if row is None else table.add_row(*map(Text, row))
    _Console(highlight=False, width=width).print(table)


def _pairs(title: str, rows: Iterable[tuple[str, str] | None]) -> None:
    """Print a table of names and values."""
    _print(Table(show_header=False, min_width=60), Text(title), rows)


def _columns(title: str, words: str, numbers: str, rows: Iterable[tuple[str, ...] | None], last: str = "") -> None:
    """Print a table with columns of text, then of numbers, then of intervals, then perhaps a last one of text."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in (*words.split(), *numbers.split(), "95 % interval", *last.split()):
        text = name in words.split() or name == last
        table.add_column(name, justify="left" if text else "right", overflow="fold", no_wrap=not text)
    _print(table, Text(title, "bold"), rows, None if Console().is_terminal else _WIDTH)


def show(networks: Iterator[Network], size: int) -> list[Network]:
    """Print a line for each network as it comes; returns them all."""
    rule = "{:42} {:>10} {:>8} {:>8} {:>10} {:>13}"
    print(rule.format("network", "parameters", "GFLOPs", "features", "small stem", "smallest side"))
    shown = []
    for each in networks:
        gflops, stem = "-" if each.gflops is None else f"{each.gflops:.2f}", "yes" if each.small_stem else "no"
        cells = (f"{each.parameters / 1e6:.1f} M", gflops, each.features or "-", stem, each.smallest or "-")
        print(rule.format(each.name, *cells), flush=True)
        shown.append(each)
    about = f"""Parameters without the classifier; GFLOPs of an image of {size} x {size} pixels, a multiply-add counted once.
Small stem: encoder.stem may be small. Smallest side: of images that pass through, in pixels."""
    print(about if shown else "none that small")
    return shown


_SHARES = {"data": "waiting for data", "teacher": "teacher, forward", "student": "student, forward"}
_SHARES |= {"backward": "loss, and student backward", "update": "updates of student, teacher and memory"}
_LIMITS = {"data": "getting the images", "networks": "the networks themselves", "update": "the updates after a step"}


def show_estimate(figures: Estimate) -> None:
    """Print the run's cost, where a step's time goes, and what to change."""
    _pairs("What the run would take", _costs(figures))
    _pairs("Where a step's time goes", _step(figures))
    if figures.disk["cache"]:
        print("Steps read the files as they are, as the cache is not complete; with shrunk images they wait less for data.\n")
    changes = [f"{each.setting}: {each.value}  ({each.why})" for each in figures.advice]
    print("\n  ".join(["What to change", *(changes or ["nothing: no setting stands in the way"])]))


def _costs(figures: Estimate) -> Iterator[tuple[str, str] | None]:
    memory, disk = figures.memory, figures.disk
    spread = f"{duration(figures.step_low)} to {duration(figures.step_high)}"
    yield "speed", f"{figures.images_per_second:,.0f} images/s, {figures.device}"
    yield f"step, median of {figures.steps_timed}", f"{duration(figures.step_seconds)} (10 to 90 %: {spread})"
    if (timed := figures.timed_batch) < figures.batch_size:
        yield "  extrapolated", f"from steps of {timed} images, as those of {figures.batch_size} take too long to time"
    yield "whole run", f"{duration(figures.seconds)}: {figures.epochs} epochs, {figures.total_steps:,} steps"
    if figures.evaluations:
        yield "  of it evaluation", f"{duration(figures.evaluation_seconds)}, {figures.evaluations} times"
    yield None
    if memory["device_total"]:
        yield "GPU memory, peak", f"{size(memory['device_used'])} of {size(memory['device_total'])}"
    yield "memory, peak", f"{size(memory['used'])} of {size(memory['total'])}"
    yield "disk", f"{disk['checkpoints']} checkpoints of {size(disk['checkpoint'])}; {size(disk['free'])} free"
    if disk["cache"]:
        yield "disk for shrunk images", f"about {size(disk['cache'])} more"
    if figures.workers is not None:
        yield "loader processes", str(figures.workers)
    if figures.unreadable:
        yield "images met that cannot be read", str(figures.unreadable)


def _step(figures: Estimate) -> Iterator[tuple[str, str] | None]:
    names = _SHARES | ({"data": "making the views"} if figures.workers is None else {})
    yield from ((names[name], f"{share:.0%}") for name, share in figures.shares.items() if share)
    yield None
    yield "what limits", _LIMITS[figures.limit]
    yield "an image needs", f"{sum(figures.flops.values()) / 1e9:.3g} GFLOP"
    yield "the device reaches", f"{figures.attainable_flops / 1e9:,.0f} GFLOP/s"
    yield "a step takes", f"{figures.floor_multiple:.1f} x what that comes to ({duration(figures.floor_seconds)})"


def show_evaluation(record: dict[str, Any]) -> None:
    """Print what `evaluate` returns: a line for each result, for transfer one for each data set; what to know of them below."""
    numbers: dict[str, int] = {}
    rows: list[tuple[str, ...] | None] = []
    for protocol, results in itertools.groupby(record["results"], lambda result: result["protocol"]):
        rows += [None] if rows else []
        for result in results:
            sets = result["details"]["rows"] if protocol == "transfer" else ()
            for row in sets:
                value = ("not run", "", "") if "not_run" in row else _value(row["metric"], row["value"], row["interval"])
                rows.append((protocol, result["network"], row["data"], *value, ""))
            main, setting = result["main"], "all that ran" if sets else _setting(result["setting"])
            marks = sorted({numbers.setdefault(note, len(numbers) + 1) for note in result["notes"]})
            value = _value(main, result["figures"][main], result["intervals"].get(main))
            rows.append((protocol, result["network"], setting, *value, " ".join(map(str, marks))))
    _columns(f"{record['source']} on {record['data']}", "protocol network setting figure", "%", rows, last="notes")
    for note, number in numbers.items():
        print(f"{number:>2}  {note}")


def show_comparison(rows: list[dict[str, Any]]) -> None:
    """Print what `compare` returns, a line for each pair of figures."""
    lines = [
        (
            *(row["protocol"], " / ".join(dict.fromkeys(row["network"])), _setting(row["setting"]), row["figure"]),
            *(f"{row['first']:.2f}", f"{row['second']:.2f}", f"{row['difference']:+.2f}", _range(row.get("interval"))),
        )
        for row in rows
    ]
    _columns("second minus first", "protocol network setting figure", "first second difference", lines)
    if allowed := sorted({field for row in rows for field in row["allowed"]}):
        print(f"\nallowed to differ: {', '.join(allowed)}")


def show_advice(facts: dict[str, Any]) -> None:
    """Print what `advise` returns: a line for each temperature, then the advice."""
    chance = "" if facts["chance"] is None else f", purity of all keys {facts['chance']:.1%}"
    print(f"{facts['run']}, step {facts['step']}: relations of {facts['images']} images to {facts['keys']} keys{chance}\n")
    print("temperature  neighbours   of all  purity")
    for row in facts["temperatures"]:
        t, count, purity, (low, high) = *(row[name] for name in ("temperature", "neighbours", "purity")), facts["band"] or (1, 0)
        mark = "  <- the run's own" if t == facts["temperature"] else "  |" if low <= t <= high else ""
        print(f"{t:11g} {count:11.1f} {count / facts['keys']:8.1%} {'' if purity is None else f'{purity:7.1%}'}{mark}")
    print("\n  ".join(["", *(f"{each['setting']}: {each['value']}  ({each['why']})" for each in facts["advice"])]))


def _setting(setting: dict[str, Any]) -> str:
    def plain(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return " ".join(map(plain, value))
        return f"{value:g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name} {plain(value)}" for name, value in setting.items())


def _value(name: str, value: float, interval: Any) -> tuple[str, str, str]:
    return name, f"{value:.2f}", _range(interval)


def _range(interval: Any) -> str:
    return f"{interval[0]:.2f} to {interval[1]:.2f}" if interval else ""


def facts(result: Result, config: Config) -> dict[str, Any]:
    """Return what a run came to, as one JSON object."""
    first, last, start = result.rows[0], result.rows[-1], next(row for row in result.rows if "loss" in row)
    measured = next((row for row in reversed(result.rows) if "feature_rank" in row or "knn_top1" in row), last)
    before = first if first["step"] == 0 else {}
    relation = [name for each in describe() if each.get("group") == "relation" for name in each["columns"]]
    known = {
        "folder": str(result.folder),
        "backbone": str(result.backbone),
        "step": last["step"],
        "knn_raw_pixels": first.get("knn_raw_pixels"),
        "knn_untrained": before.get("knn_top1") if config.start is None else None,
        "knn_start": before.get("knn_top1") if config.start is not None else None,
        "knn_student": measured.get("knn_top1") if measured is not first else None,
        "knn_teacher": measured.get("knn_teacher_top1", first.get("knn_teacher_top1")),  # of a frozen one, measured once
        "feature_rank": [before["feature_rank"], measured.get("feature_rank")] if "feature_rank" in before else None,
        "loss_start": start["loss"],
        "loss_end": last["loss"],
        "info_nce_start": start["warmup_mix"],
        "info_nce_end": last["warmup_mix"],
        "health": {name: last[name] for name in relation if name in last},
    }
    word, *lines = _judge(known, config)
    return known | {"word": word, "verdict": lines}


def _judge(known: dict[str, Any], config: Config) -> Iterator[str]:
    """Yield a word on a run's figures (learning, flat, healthy or collapsing) and lines on why: with labels by the gain over untrained
    networks and pixels, else by its relations."""
    top1, bases = known["knn_student"], {title: known[f"knn_{name}"] for name, title in reversed(_BASES.items())}
    gains = {name: top1 - base for name, base in bases.items() if top1 is not None and base is not None}
    health = {name: math.nan if value is None else value for name, value in known["health"].items()}
    raised = alarms([health | {"step": known["step"]}], config)
    fault = next((raised[name] for name in COLLAPSES if name in raised), None)
    if any(map(math.isnan, health.values())) or known["loss_end"] is None:
        yield from ("collapsing", "Not good: figures of the last step are not finite; lower optimizer.lr, or set optimizer.clip")
    elif fault:
        yield from ("collapsing", f"Not good: {fault}")
    elif gains:
        least, points = min(gains.values()), " and ".join(f"{gain:+.1f} points on {name}" for name, gain in gains.items())
        if least >= _CLEAR:
            yield from ("learning", f"Good: {points}")
        else:
            yield from ("flat", f"{'Little' if least > 0 else 'Not good'}: {points}; more epochs or more images may help")
    elif config.teacher is not None or derive(config).traits.labels:  # whose embeddings no figure here can judge
        yield from ("healthy", "What it learned, labelled images can say: relssl evaluate RUN DATA")
    else:
        yield from ("healthy", "Healthy: the embeddings are spread out, and none of the signs of a collapse is there.")
        yield "What that is worth, labelled images can say: relssl evaluate RUN DATA"
    start, end = known["info_nce_start"], known["info_nce_end"]
    if not fault and end < start and (known["loss_end"] or 0) > (known["loss_start"] or math.inf):
        yield f"The loss rose as InfoNCE's part of it, the smaller one, went from {start:.0%} to {end:.0%}: that is no fault."
    yield from (f"But {sentence}." for name, sentence in raised.items() if name not in COLLAPSES)


def show_summary(known: dict[str, Any], config: Config) -> None:
    """Print the table: kNN where there are labels, the relations' health, where the weights lie, how to load them; below it, in words,
    whether the figure that counts is good."""
    folder = Path(known["folder"])
    _pairs("What the backbone learned", _learned(known, config))
    print("\n".join(known["verdict"]))
    if bad := read_rows(folder / "bad_samples.jsonl"):
        print(f"Images that could not be read: {len(bad)}, in {folder / 'bad_samples.jsonl'}")
    places = {"run folder": folder, "weights": Path(known["backbone"]), "report": folder / "report.html"}
    print("\n" + "\n".join(f"{name:11} {path}" for name, path in places.items() if path.exists()))
    print(f"""
Load them:

    import relssl
    backbone = relssl.load_backbone("{known["folder"]}")
    features = backbone(images)  # [N, C, S, S] -> [N, F]""")


def _learned(known: dict[str, Any], config: Config) -> Iterator[tuple[str, str] | None]:
    def finite(form: str, *values: float | None) -> str:
        return " -> ".join("not finite" if value is None else form.format(value) for value in values)

    counts, telling = "  <- counts most", "effective_rank" if config.teacher is None else "agreement"
    for name in ("raw_pixels", "untrained", "start", "student", "teacher"):
        if (top1 := known[f"knn_{name}"]) is not None:
            yield f"kNN top-1, {_BASES.get(name, name).removeprefix('the ')}", f"{top1:.1f} %{counts * (name == 'student')}"
    yield None
    if known["feature_rank"] is not None:
        yield "rank of the features, before and after", finite("{:.0f}", *known["feature_rank"])
    yield "loss, first and last row", finite("{:.3f}", known["loss_start"], known["loss_end"])
    for name, (title, figure) in at_the_end(known["health"], config.method.memory_size).items():
        yield title[0].lower() + title[1:], figure + counts * (known["knn_student"] is None and name == telling)
