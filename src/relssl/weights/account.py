"""Every name of a file accounted for: matched, known to be something else, or refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relssl.errors import CheckpointError
from relssl.weights.layouts import Found, State


@dataclass
class LoadReport:
    """How a file's names were accounted for.

    Attributes:
        file, layout, network, backbone, stem: what was read as what.
        detected: whether the layout was found from the names rather than given.
        matched, total: weights of the backbone that the file gave, of all it has.
        left_out: names known to be something else (heads, queue, optimizer), and how many tensors each stands for.
        missing, unexpected: names that did not match and were allowed.
        notes: what was assumed, for people.
        out: where `import_weights` wrote it.
    """

    file: str
    layout: str
    detected: bool
    network: str
    backbone: str
    stem: str
    matched: int
    total: int
    left_out: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    out: str | None = None

    def facts(self) -> dict[str, Any]:
        """As plain JSON-able values."""
        return asdict(self)

    def gaps(self) -> list[str]:
        """What was allowed and every figure of these weights has to say."""
        found = []
        if self.missing:
            found.append(
                f"{len(self.missing)} of {self.total} weights are not in {self.file} and fresh, {self.missing[0]} the first"
            )
        if self.unexpected:
            found.append(f"{len(self.unexpected)} names in {self.file} were left out, {self.unexpected[0]} the first")
        return found

    def lines(self) -> list[str]:
        """For people."""
        left = ", ".join(f"{name} ({count})" if count else name for name, count in self.left_out.items()) or "nothing"
        found = " (found from its names)" if self.detected else ""
        return [
            f"{self.file}: layout {self.layout}{found}, {self.network}, {self.backbone}, stem {self.stem}",
            f"matched {self.matched} of {self.total}, missing {len(self.missing)}, unexpected {len(self.unexpected)}; left out: {left}",
            *self.notes,
        ]


def account(
    state: State,
    found: Found,
    wanted: Mapping[str, Tensor],
    heads: Sequence[str],
    allow: Sequence[str],
    report: LoadReport,
) -> dict[str, Tensor]:
    """The backbone's weights, complete; what is left out, missing and unexpected goes into the report.

    Args:
        wanted: every weight of the network; their values stand in for those that are allowed to be missing.
        heads: what may lie among the backbone's names without being part of it.
        allow: names, or beginnings of names that end in `.` or `*`.

    Raises:
        CheckpointError: naming what does not match and is not allowed.
    """
    extra = []
    for name in found.weights.keys() - wanted.keys():
        head = next((part for part in heads if name.startswith(part)), None)
        if head is None:
            extra.append(found.names[name])
        else:
            report.left_out[found.prefix + head] = report.left_out.get(found.prefix + head, 0) + 1
    absent = wanted.keys() - found.weights.keys()
    # Files of before PyTorch 0.4.1 have no counters, and nothing reads them here.
    counters = {name for name in absent if name.endswith("num_batches_tracked")}
    if counters:
        report.notes.append(f"{len(counters)} counters num_batches_tracked are not in the file and start at 0")
    given = {name: value for name, value in found.weights.items() if name in wanted}
    shapes = [
        f"{found.names[name]} {list(value.shape)} for {list(wanted[name].shape)}"
        for name, value in given.items()
        if value.shape != wanted[name].shape
    ]
    missing = {name: state.shown(found.prefix + name) for name in absent - counters}
    unexpected = sorted(extra + found.unknown)
    report.matched, report.total = len(given) - len(shapes), len(wanted) - len(counters)
    report.missing, report.unexpected = sorted(missing.values()), unexpected
    _refuse(state.path, report, shapes, allow)
    broken = [f"{found.names[name]} ({fault})" for name, value in given.items() if (fault := _fault(value, wanted[name]))]
    if broken:
        raise CheckpointError(f"{state.path}: {len(broken)} weights cannot be used: {', '.join(broken[:3])}")
    return {name: given.get(name, value).detach().to(value.dtype).clone() for name, value in wanted.items()}


def _fault(value: Tensor, wanted: Tensor) -> str | None:
    if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_nested:
        return "no plain tensor"
    if value.is_floating_point() != wanted.is_floating_point() or value.is_complex():
        return f"{value.dtype} for {wanted.dtype}"
    return None if value.isfinite().all() else "not finite"


def _refuse(path: Path, report: LoadReport, shapes: Sequence[str], allow: Sequence[str]) -> None:
    missing, unexpected = (_forbidden(names, allow) for names in (report.missing, report.unexpected))
    lists = [
        f"{kind} ({len(names)}): {', '.join(list(names)[:3])}{' ...' if len(names) > 3 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("other shape", sorted(shapes)))
        if names
    ]
    if lists:
        raise CheckpointError(
            f"{path}: {report.matched} of {report.total} weights of {report.backbone} (stem {report.stem}) match layout "
            f"{report.layout}, {report.network}; {'; '.join(lists)}"
        )


def _forbidden(names: Iterable[str], allow: Sequence[str]) -> list[str]:
    starts = tuple(part.removesuffix("*") for part in allow if part.endswith((".", "*")))
    return [name for name in names if name not in allow and not (starts and name.startswith(starts))]
