"""What `relssl estimate` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from relssl.units import duration, size

if TYPE_CHECKING:
    from relssl.train.advice import Advice
    from relssl.train.estimate import Estimate

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


def show(found: Estimate) -> None:
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
