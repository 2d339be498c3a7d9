"""The two sides of an evaluation: the bank, images whose labels are known, and test images to be labelled."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relssl.data.folder import shown
from relssl.data.images import Images
from relssl.data.named import load
from relssl.data.subsets import shared
from relssl.errors import DataError
from relssl.settings import parts


def listed(classes: Collection[int], names: Sequence[str] | None = None) -> str:
    """Return the first five classes by name, or by number, and how many more there are: `3, 8 and 2 more`."""
    more = f" and {len(classes) - 5} more" if len(classes) > 5 else ""
    return ", ".join(names[place] if names else str(place) for place in sorted(classes)[:5]) + more


def numbered(wanted: Tensor) -> str:
    """Return the classes for which a bool [C] is true: `class 3`, `classes 3, 8 and 2 more`, or nothing."""
    classes = wanted.nonzero().flatten().tolist()
    return f"class{'es' if len(classes) > 1 else ''} {listed(classes)}" if classes else ""


def class_counts(labels: Tensor, classes: int) -> Tensor:
    """Count the images of each class: int64 [C], of labels [N] in 0..C-1 or int8 [N,C] (1 yes, 0 no, -1 unknown)."""
    return (labels > 0).sum(dim=0).cpu() if labels.dim() == 2 else torch.bincount(labels.cpu().long(), minlength=classes)


@dataclass(frozen=True)
class LabelledPair:
    """Both sides of a data set: labelled images."""

    bank: Images
    test: Images
    of: tuple[int, int] | None = None  # labelled images of the two sides before they were cut; None: they were not
    uncut: str | None = None  # fingerprint of the test side before that, by which a run knows what it was pretrained on

    @staticmethod
    def load(data: str, root: str | None, at_most: tuple[int, int] | None = None, seed: int = 0) -> LabelledPair:
        """Load the labelled images of both sides of a data set, cut to `at_most` (bank, test) images chosen by the seed.

        Raises:
            DataError: if the data set has no labels or no test part.
        """
        bank, uncut = labelled(data, load(data, root, "bank"), "training"), load(data, root, "test")
        test = labelled(data, uncut, "test")
        of = (len(bank), len(test))
        most = at_most or of
        return LabelledPair(choose(bank, most[0], seed), choose(test, most[1], seed), of, uncut.fingerprint())

    @property
    def sides(self) -> tuple[tuple[str, Images, int], ...]:
        """Both sides by name, and how many labelled images each had before it was cut."""
        whole = self.of or (len(self.bank), len(self.test))
        return ("bank", self.bank, whole[0]), ("test", self.test, whole[1])

    @property
    def classes(self) -> int:
        """Number of classes."""
        if self.bank.targets is not None:
            return int(self.bank.targets.shape[1])
        assert self.bank.labels is not None and self.test.labels is not None
        return max(len(self.bank.classes or ()), int(self.bank.labels.max()) + 1, int(self.test.labels.max()) + 1)

    def notes(self, seen: str | None = None) -> list[str]:
        """Return what a reader of any figure of this pair must know; `seen` is the fingerprint of what was pretrained on.

        Raises:
            DataError: if no figure would mean anything: a single class, test classes that the bank lacks, or test images that are
                all in the bank.
        """
        bank, test = self.bank, self.test
        if bank.classes and test.classes and bank.classes != test.classes:
            alone = sorted(set(bank.classes) ^ set(test.classes))[:3] or ["in another order"]
            raise DataError(f"{bank.name}: bank and test name their classes differently ({', '.join(alone)}); give both the same")
        notes = list(dict.fromkeys([*bank.notes, *test.notes]))
        notes += [f"a subset: {len(side)} of {of} {name} images" for name, side, of in self.sides if len(side) < of]
        if bank.labels is not None and test.labels is not None:
            known, wanted = set(bank.labels.tolist()), set(test.labels.tolist())
            if len(known) < 2:
                one = listed(known, bank.classes)
                raise DataError(f"{bank.name}: all bank images are of one class ({one}); give two or more")
            if unknown := wanted - known:
                missing = f"{len(unknown)} classes of the test images have no bank image: {listed(unknown, test.classes)}"
                if not any(len(side) < of for _, side, of in self.sides):
                    raise DataError(f"{bank.name}: {missing}; give both sides the same classes")
                notes.append(missing)
            if unused := known - wanted:
                notes.append(f"{len(unused)} classes have no test image: {listed(unused, bank.classes)}")
            if empty := set(range(self.classes)) - known - wanted:
                notes.append(f"{len(empty)} classes have no image at all: {listed(empty, bank.classes)}")
        again = shared(bank, test)
        if again == len(test):
            raise DataError(f"{test.name}: all {again} test images are in the bank too; evaluate on images of their own")
        notes += [f"{again} of {len(test)} test images are in the bank too"] if again else []
        return [*notes, "the test images are those that the run was pretrained on"] if seen and seen == self.uncut else notes

    def card(self) -> dict[str, Any]:
        """Return which images and labels are used, by their content: the same folder elsewhere is the same."""
        used: dict[str, Any] = {"classes": self.classes}
        for name, images, of in self.sides:
            labels = np.ascontiguousarray(images.labels if images.targets is None else images.targets)
            digest = hashlib.sha256(images.fingerprint().encode() + labels.tobytes())
            used[name] = {"images": len(images), "of": of, "hash": digest.hexdigest()[:16]}
        return used


def choose(images: Images, at_most: int, seed: int) -> Images:
    """Draw at most that many images without replacement by the seed, in the order of the data set."""
    if len(images) <= at_most:
        return images
    return images.subset(np.sort(np.random.Generator(np.random.PCG64(seed)).permutation(len(images))[:at_most]))


def labelled(data: str, images: Images, part: str) -> Images:
    """Leave out the images of a part without a label; DataError if none has one."""
    if images.targets is not None:
        return images
    rows = np.flatnonzero(images.labels >= 0) if images.labels is not None else np.empty(0, np.int64)
    if not len(rows):
        own = "hand over (images, labels), or give the data set `.targets`"
        advice = own if parts.is_part(data) else "lay them out as train/CLASS/ and val/CLASS/, two classes or more"
        raise DataError(
            f"{shown(parts.title(data))}: has no labels to evaluate with on its {len(images)} {part} images; {advice}"
        )
    return images if len(rows) == len(images) else images.subset(rows)
