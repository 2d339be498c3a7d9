"""What the labels of an evaluation allow: refusals, and notes that name classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from relssl.errors import DataError

_NAMED = 5


def named(classes: Sequence[int]) -> str:
    """`classes 3, 8 and 2 more`: the first five by number, counted from 0 in the order of their names."""
    shown, more = ", ".join(map(str, classes[:_NAMED])), len(classes) - _NAMED
    return f"class{'es' if len(classes) > 1 else ''} {shown}" + (f" and {more} more" if more > 0 else "")


def counts(labels: Tensor, classes: int) -> Tensor:
    """Images of each class, int64 [C] on the CPU, by labels [N] in 0..C-1 or int8 [N,C] (1 yes, 0 no, -1 not told)."""
    return (labels > 0).sum(dim=0).cpu() if labels.dim() == 2 else torch.bincount(labels.cpu().long(), minlength=classes)


def places(wanted: Tensor) -> list[int]:
    """The classes for which a bool [C] is true."""
    found: list[int] = wanted.nonzero().flatten().tolist()
    return found


def check_labels(bank: Tensor, test: Tensor, classes: int) -> list[str]:
    """Notes on labels that a classifier learns from and those it is measured on, both as `counts` takes them.

    Raises:
        DataError: without test images, or if the bank's labels leave nothing to tell apart.
    """
    have, asked = counts(bank, classes), counts(test, classes)
    if bank.dim() == 1 and int((have > 0).sum()) < 2:
        kind = f"the single class {int(have.argmax())}" if len(bank) else "no class"
        raise DataError(f"labels: all {len(bank)} images of the bank are of {kind}; at least 2 classes are needed")
    if not int(have.sum()) or not int(asked.sum()):
        raise DataError(f"labels: the {'test' if int(have.sum()) else 'bank'} images are of no class; nothing can be measured")
    notes = []
    if missing := places((have == 0) & (asked > 0)):
        images = int(asked[missing].sum())
        notes.append(f"The bank has no image of {named(missing)}, so {images} test labels cannot be found.")
    if bank.dim() == 2 and (unseen := places(asked == 0)):
        notes.append(f"No test image is of {named(unseen)}, left out of map.")
    return notes
