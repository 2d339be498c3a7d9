"""What `relssl backbones` prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from relssl.evaluation.evaluate import not_run
from relssl.files import duration, size
from relssl.method.backbones import Network
from relssl.settings.run import METHODS, Config

if TYPE_CHECKING:
    from relssl.train.estimate import Advice, Estimate
    from relssl.train.pretrain import Result


_ABOUT = """Parameters without the classifier. GFLOPs: 10^9 multiply-adds, each counted once, of an image of {size} x {size} pixels.
Small stem: whether encoder.stem may be small. Smallest side: of the images that pass through, in pixels."""


def show(networks: Iterator[Network], size: int) -> list[Network]:
    """Print a line for each network as it comes; returns them all."""
    rule = "{:42} {:>10} {:>8} {:>8} {:>10} {:>13}"
    print(rule.format("network", "parameters", "GFLOPs", "features", "small stem", "smallest side"))
    shown = []
    for each in networks:
        shown.append(each)
        gflops = "-" if each.gflops is None else f"{each.gflops:.2f}"
        stem = "yes" if each.small_stem else "no"
        print(
            rule.format(each.name, f"{each.parameters / 1e6:.1f} M", gflops, each.features or "-", stem, each.smallest or "-"),
            flush=True,
        )
    print(_ABOUT.format(size=size) if shown else "none that small")
    return shown


_KINDS = {
    "data": "waiting for data",
    "transfer": "views to the device",
    "teacher": "teacher, forward",
    "student": "student, forward",
    "loss": "the loss",
    "backward": "student, backward",
    "health": "figures of logged steps",
    "update": "what moves after a step",
    "rest": "the rest",
}
_LIMITS = {
    "data": "getting the images",
    "transfer": "moving views to the device",
    "networks": "the networks themselves",
    "loss": "the loss and its similarities",
    "rest": "what lies between: updates, figures, Python",
}


def show_estimate(found: Estimate) -> None:
    """Print the run's cost, where a step's time goes, and what to change."""
    console = Console(highlight=False)
    console.print(_costs(found))
    console.print(_step(found))
    console.print("What to change", style="italic")
    for line in advice_lines(found.advice):
        console.print(f"  {line}", markup=False, soft_wrap=True)


def advice_lines(advice: tuple[Advice, ...]) -> list[str]:
    """One line for each change."""
    if not advice:
        return ["nothing: no setting stands in the way"]
    gains = [f"; up to {piece.gain:.2f} x the speed" if piece.gain else "" for piece in advice]
    return [f"{piece.setting}: {piece.value}  ({piece.why}{gain})" for piece, gain in zip(advice, gains, strict=True)]


def _costs(found: Estimate) -> Table:
    table = Table(title="What the run would take", title_justify="left", show_header=False, min_width=60)
    spread = f"{duration(found.step_low)} to {duration(found.step_high)}"
    table.add_row("speed", f"{found.images_per_second:,.0f} images/s, {found.device}")
    table.add_row(f"step, median of {found.steps_timed}", f"{duration(found.step_seconds)} (10 to 90 %: {spread})")
    table.add_row("whole run", f"{duration(found.seconds)}: {found.epochs} epochs, {found.total_steps:,} steps")
    extras = found.extras
    if extras.evaluations:
        table.add_row("  of it kNN", f"{duration(found.evaluation_seconds)}: {extras.evaluations} evaluations")
    table.add_row("  of it saving", f"{duration(found.saving_seconds)}: {extras.saves} checkpoints, without the disk's own time")
    table.add_section()
    memory, disk = found.memory, found.disk
    if memory.device_total:
        table.add_row("GPU memory, peak", f"{size(memory.device_used)} of {size(memory.device_total)}")
    table.add_row("memory, peak", f"{size(memory.used)} of {size(memory.total)}")
    kept = f"{disk.checkpoints} checkpoints of {size(disk.checkpoint)}"
    table.add_row("disk", f"{size(disk.total)}, {kept}; {size(disk.free)} free")
    if disk.cache:
        table.add_row("disk for shrunk images", f"{size(disk.cache)} more; {size(disk.cache_free)} free")
    if found.unreadable:
        table.add_row("images met that cannot be read", str(found.unreadable))
    return table


def _step(found: Estimate) -> Table:
    table = Table(title="Where a step's time goes", title_justify="left", show_header=False, min_width=60)
    for name, share in found.shares.items():
        if not share:  # of methods without a teacher, its passes
            continue
        label = "making the views" if name == "data" and found.workers is None else _KINDS[name]
        table.add_row(label, f"{share:.0%}")
    table.add_section()
    table.add_row("what limits", _LIMITS[found.limit])
    table.add_row("an image needs", f"{sum(found.flops.values()) / 1e9:.3g} GFLOP")
    table.add_row("the device reaches", f"{found.attainable_flops / 1e9:,.0f} GFLOP/s")
    table.add_row("a step takes", f"{found.floor_multiple:.1f} x what that comes to ({duration(found.floor_seconds)})")
    if found.workers is not None:
        table.add_row(f"loader processes: {found.workers}", f"a batch takes {duration(found.stages['load'])} of one core")
    return table


_WIDTH = 120  # characters a line where nobody's screen sets it


class _Line(NamedTuple):
    """A line of the table: what was measured how, and what came out."""

    protocol: str
    network: str
    setting: str
    figure: str
    value: str
    interval: str
    notes: tuple[str, ...]


def show_evaluation(record: dict[str, Any]) -> None:
    """Print a record of `evaluate`: a line for each result, for transfer one for each data set; what to know of them below.

    Args:
        record: {"source", "data", "results": [{"protocol", "network", "setting": {name: value}, "main", "figures": {name:
            percent}, "intervals": {name: [low, high]}, "notes": [sentence], "details"}]}.
    """
    console = _console()
    table = _table(f"{record['source']} on {record['data']}", ("protocol", "network", "setting", "figure"), ("%",))
    table.add_column("notes", overflow="fold")
    numbers: dict[str, int] = {}
    before = None
    for result in record["results"]:
        if before not in (None, result["protocol"]):
            table.add_section()
        before = result["protocol"]
        for line in _lines(result):
            marks = sorted({numbers.setdefault(note, len(numbers) + 1) for note in line.notes})
            table.add_row(*(Text(cell) for cell in (*line[:-1], " ".join(map(str, marks)))))
    console.print(table)
    if numbers:
        console.print()
    for note, number in numbers.items():
        console.print(Text(f"{number:>2}  {note}"), soft_wrap=True)


def show_comparison(rows: list[dict[str, Any]]) -> None:
    """Print what `compare` found, a line for each pair of findings.

    Args:
        rows: {"protocol", "network": [name, name], "setting", "figure", "first", "second", "difference", "interval"?, "allowed"}.
    """
    table = _table("second less first", ("protocol", "network", "setting", "figure"), ("first", "second", "difference"))
    for row in rows:
        names = " / ".join(dict.fromkeys(row["network"]))
        setting = ", ".join(f"{name} {_plain(value)}" for name, value in row["setting"].items())
        values = (f"{row['first']:.2f}", f"{row['second']:.2f}", f"{row['difference']:+.2f}", _range(row.get("interval")))
        table.add_row(*(Text(cell) for cell in (row["protocol"], names, setting, row["figure"], *values)))
    console = _console()
    console.print(table)
    if allowed := sorted({field for row in rows for field in row["allowed"]}):
        console.print(Text(f"\nallowed to differ: {', '.join(allowed)}"))


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH)


def _table(title: str, words: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    """A table with columns of text, then of numbers, then of intervals."""
    table = Table(
        title=Text(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)
    )
    for name in words:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("95 % interval", justify="right", no_wrap=True)
    return table


def _lines(result: dict[str, Any]) -> Iterator[_Line]:
    """The lines of one result."""
    notes = tuple(result.get("notes", ()))
    rows = result.get("details", {}).get("rows", ()) if result["protocol"] == "transfer" else ()
    for row in rows:
        if "not_run" in row:
            yield _Line(result["protocol"], result["network"], row["data"], "not run", "", "", (not_run(row),))
        else:
            yield _Line(
                *(result["protocol"], result["network"], row["data"], row["metric"]),
                *(f"{row['value']:.2f}", _range(row["interval"]), ()),
            )
    main = result["main"]
    setting = "all that ran" if rows else ", ".join(f"{name} {_plain(value)}" for name, value in result["setting"].items())
    value, interval = result["figures"][main], result.get("intervals", {}).get(main)
    yield _Line(result["protocol"], result["network"], setting, main, f"{value:.2f}", _range(interval), notes)


def _plain(value: Any) -> str:
    """A setting's value: numbers short, lists by their elements."""
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(map(_plain, value)) if isinstance(value, (list, tuple)) else str(value)


def _range(interval: Any) -> str:
    return f"{interval[0]:.2f} to {interval[1]:.2f}" if interval else ""


def facts(result: Result) -> dict[str, Any]:
    """What a run came to, as one JSON object."""
    first, last = result.rows[0], result.rows[-1]
    trained = [row for row in result.rows if "loss" in row]
    return {
        "folder": str(result.folder),
        "backbone": str(result.backbone),
        "step": last["step"],
        "knn_raw_pixels": first.get("knn_raw_pixels"),
        "knn_untrained": first.get("knn_top1") if first["step"] == 0 else None,
        "knn_student": last.get("knn_top1"),
        "knn_teacher": last.get("knn_teacher_top1"),
        "loss_start": trained[0]["loss"],
        "loss_end": last["loss"],
        "health": {name: last[name] for name in HEALTH if name in last},
    }


HEALTH = ("teacher_entropy", "teacher_neighbours", "kl", "agreement", "embedding_std", "effective_rank")


def show_summary(result: Result, config: Config) -> None:
    """Print the table: kNN where there are labels, the relations' health, where the weights lie, how to load them."""
    known = facts(result)
    console = Console(highlight=False)
    table = Table(title="What the backbone learned", title_justify="left", show_header=False, min_width=60)
    rows = (("raw pixels", "raw_pixels"), ("untrained backbone", "untrained"), ("student", "student"), ("teacher", "teacher"))
    for label, name in rows:
        if known[f"knn_{name}"] is not None:
            table.add_row(f"kNN top-1, {label}", f"{known[f'knn_{name}']:.1f} %")
    health = known["health"]
    table.add_section()
    table.add_row("loss, first and last row", f"{_number(known['loss_start'], 3)} -> {_number(known['loss_end'], 3)}")
    if "teacher_neighbours" in health:  # methods without a memory have no relations
        table.add_row(
            "teacher's effective neighbours", f"{_number(health['teacher_neighbours'], 1)} of {config.method.memory_size}"
        )
        table.add_row("student's divergence from it", f"{_number(health['kl'], 3)} nats")
        table.add_row("same nearest neighbour", f"{_number(health['agreement'], 2)} of samples")
    table.add_row("spread of the embeddings", f"{_number(health['embedding_std'], 2)} (1 is all round)")
    of = "" if METHODS[config.method.name].labels else f" of {config.encoder.dim}"
    table.add_row("effective rank", f"{_number(health['effective_rank'], 0)}{of}")
    console.print(table)
    console.print(f"run folder  {known['folder']}\nweights     {known['backbone']}\n\nLoad them:\n", markup=False, soft_wrap=True)
    lines = (
        "import relssl",
        f'backbone = relssl.load_backbone("{known["folder"]}")',
        "features = backbone(images)  # [N, 3, S, S] -> [N, F]",
    )
    console.print("\n".join("    " + line for line in lines), markup=False, soft_wrap=True)


def _number(value: float | None, digits: int) -> str:
    """A figure, which a non-finite step leaves empty."""
    return "not finite" if value is None else f"{value:.{digits}f}"
