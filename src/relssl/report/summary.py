"""The small table a run ends with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from relssl.config import Config
from relssl.methods import METHODS

if TYPE_CHECKING:
    from relssl.train.pretrain import Result


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


def show(result: Result, config: Config) -> None:
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
