"""Feature matrices row by row: chunks of bounded size, so that one that lies in a file may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Rows:
    """The rows of a feature matrix [N,D] of any real dtype, or those at `kept`, without a copy of the whole.

    Attributes:
        name: whose they are, for errors.
        features: [N,D].
        kept: int64 places of the rows that take part, or None for all.
        count: rows that take part.
    """

    def __init__(self, name: str, features: Tensor, kept: Tensor | None = None) -> None:
        if features.dim() != 2 or not features.shape[1] or features.is_complex():
            raise ValueError(f"{name} features must be real and [rows, dimensions], got {features.dtype} {list(features.shape)}")
        self.name, self.features, self.kept = name, features, kept
        self.count = len(features) if kept is None else len(kept)

    def chunks(self, size: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """The place of the first row and up to `size` rows as they are, on `device`."""
        if size < 1:
            raise ValueError(f"chunk and bank_chunk must be at least 1, got {size}")
        for start in range(0, self.count, size):
            which = slice(start, start + size) if self.kept is None else self.kept[start : start + size]
            yield start, self.features[which].to(device)

    def units(self, size: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """The same, fp32 and of unit norm; ValueError for NaN or Inf."""
        for start, rows in self.chunks(size, device):
            finite = rows.isfinite().all(dim=1).cpu()
            if not bool(finite.all()):
                row = start + int((~finite).nonzero()[0])
                raise ValueError(
                    f"{self.name} features hold NaN or Inf, first in row {row if self.kept is None else self.kept[row]}"
                )
            yield start, unit(rows)


def unit(rows: Tensor) -> Tensor:
    """[n,D] -> fp32 of unit norm. Each row's largest entry is brought to 1 first, so that no square overflows or vanishes."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    largest = rows.abs().amax(dim=1, keepdim=True)
    rows = (rows / torch.where(largest > 0, largest, 1)).float()
    norm: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / norm.clamp_min(1.0)  # a row of zeros stays zero, and similar to nothing


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in true fp32, without gradients: TF32 or bf16 would reorder near neighbours."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
