"""The two sides of an evaluation: images whose labels are known, and images to be labelled."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from relssl.data.folder import shown
from relssl.data.images import Images
from relssl.data.named import load
from relssl.data.subsets import shared
from relssl.errors import ConfigError, DataError

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


@dataclass(frozen=True)
class LabelledPair:
    """Both sides of a data set.

    Attributes:
        bank, test: labelled images.
        of: how many labelled images the two sides had before they were cut.
        uncut: fingerprint of the test side before it was cut; a run that was pretrained on those images names them by it.
    """

    bank: Images
    test: Images
    of: tuple[int, int] | None = None
    uncut: str | None = None

    @staticmethod
    def load(data: str, root: str | None, at_most: tuple[int, int] | None = None, seed: int = 0) -> LabelledPair:
        """Both sides of a data set, cut to `at_most` (bank, test) images chosen by the seed.

        Images without a label are left out.

        Raises:
            DataError: if the data set has no labels or no test part.
        """
        if at_most is not None and min(at_most) < 1:
            raise ConfigError(f"images: must be at least 1 on each side, got {at_most[0]} and {at_most[1]}")
        bank = _labelled(data, load(data, root, "bank"))
        uncut = load(data, root, "test")
        sides = [bank, _labelled(data, uncut)]
        counts = (len(sides[0]), len(sides[1]))
        if at_most is not None:
            sides = [choose(side, most, seed) for side, most in zip(sides, at_most, strict=True)]
        return LabelledPair(sides[0], sides[1], counts, uncut.fingerprint())

    @property
    def several(self) -> bool:
        """Whether an image can have several labels."""
        return self.bank.targets is not None

    @property
    def classes(self) -> int:
        """How many classes there are."""
        if self.bank.targets is not None:
            return int(self.bank.targets.shape[1])
        assert self.bank.labels is not None and self.test.labels is not None
        named = len(self.bank.classes or ())
        return max(named, int(self.bank.labels.max()) + 1, int(self.test.labels.max()) + 1)

    def notes(self) -> list[str]:
        """What a reader of any figure of this pair must know.

        Raises:
            DataError: if no figure would mean anything: a single class, test classes that the bank has not, or test images
                that are all in the bank.
        """
        named, asked = self.bank.classes, self.test.classes
        if named and asked and named != asked:
            alone = sorted(set(named) ^ set(asked))[:3] or ["in another order"]
            raise DataError(
                f"{self.bank.name}: bank and test name their classes differently ({', '.join(alone)}); give both the same"
            )
        notes = self._cuts() + ([] if self.several else self._classes())
        again = shared(self.bank, self.test)
        if again == len(self.test):
            raise DataError(f"{self.test.name}: all {again} test images are in the bank too; evaluate on images of their own")
        if again:
            notes.append(f"{again} of {len(self.test)} test images are in the bank too")
        return notes

    def _cuts(self) -> list[str]:
        bank, test = self.of or (len(self.bank), len(self.test))
        sides = (("bank", len(self.bank), bank), ("test", len(self.test), test))
        return [f"a subset: {used} of {whole} {side} images" for side, used, whole in sides if used < whole]

    def _classes(self) -> list[str]:
        bank, test = self.bank, self.test
        assert bank.labels is not None and test.labels is not None
        there, asked = set(bank.labels.tolist()), set(test.labels.tolist())
        if len(there) < 2:
            raise DataError(f"{bank.name}: all bank images are of one class ({_named(bank, there)}); two or more are needed")
        notes = []
        if unknown := asked - there:
            missing = f"{len(unknown)} classes of the test images have no bank image: {_named(test, unknown)}"
            if self.of is None or (len(bank), len(test)) == self.of:
                raise DataError(f"{bank.name}: {missing}; give both sides the same classes")
            notes.append(missing)
        if unasked := there - asked:
            notes.append(f"{len(unasked)} classes have no test image: {_named(bank, unasked)}")
        return notes


def labels_hash(images: Images) -> str:
    """16 hex digits of which image has which label, and of the images themselves."""
    digest = hashlib.sha256(images.fingerprint().encode())
    digest.update(np.ascontiguousarray(images.labels if images.targets is None else images.targets).tobytes())
    return digest.hexdigest()[:16]


def choose(images: Images, at_most: int, seed: int) -> Images:
    """At most that many images, drawn without replacement by the seed and kept in their order."""
    if len(images) <= at_most:
        return images
    rows = np.sort(np.random.Generator(np.random.PCG64(seed)).permutation(len(images))[:at_most])
    return images.subset(rows)


def _labelled(data: str, images: Images) -> Images:
    if images.targets is not None:
        return images
    rows = np.flatnonzero(images.labels >= 0) if images.labels is not None else np.empty(0, np.int64)
    if not len(rows):
        raise DataError(
            f"{shown(data)}: has no labels to evaluate with; lay it out as train/CLASS/ and val/CLASS/ with two classes or more, "
            "and no image outside of them"
        )
    return images if len(rows) == len(images) else images.subset(rows)


def _named(images: Images, classes: set[int]) -> str:
    """Up to five of the classes by name."""
    names = [images.classes[place] if images.classes else str(place) for place in sorted(classes)]
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
