"""The two sides of an evaluation: the bank, images whose labels are known, and test images to be labelled."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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

_NUMBERED = 10_000  # the number of a class from which on others must be in use as well: votes are counted for each up to it


def named(chosen: Any, names: Sequence[str] | None = None) -> str:
    """Return the classes for which a bool [C] is true, the first five by name or number: `classes 3, 8 and 2 more`, or nothing."""
    words = [names[place] if names else str(place) for place in np.flatnonzero(chosen).tolist()]
    more = f" and {len(words) - 5} more" if len(words) > 5 else ""
    return f"class{'es' if len(words) > 1 else ''} {', '.join(words[:5])}{more}" if words else ""


def labels_of(images: Images) -> Tensor:
    """Return the labels of images, int64 [N] in 0..C-1; or, of images with several each, int8 [N,C] (1 yes, 0 no, -1 unknown)."""
    return torch.from_numpy(np.ascontiguousarray(images.labels if images.targets is None else images.targets))


def class_counts(labels: Tensor, classes: int) -> Tensor:
    """Count the images of each class, int64 [C], by labels as of `labels_of`."""
    return (labels > 0).sum(dim=0).cpu() if labels.dim() == 2 else torch.bincount(labels.cpu().long(), minlength=classes)


@dataclass(frozen=True)
class LabelledPair:
    """Both sides of a data set: labelled images; DataError if they number or name their classes so that no figure would mean anything."""

    bank: Images
    test: Images
    of: tuple[int, int] | None = None  # labelled images of the two sides before they were cut; None: they were not
    uncut: str | None = None  # fingerprint of the test side before that, by which a run knows what it was pretrained on

    def __post_init__(self) -> None:
        bank, test = self.bank, self.test
        if bank.classes and test.classes and bank.classes != test.classes:
            alone = sorted(set(bank.classes) ^ set(test.classes))[:3] or ["in another order"]
            raise DataError(f"{bank.name}: bank and test name their classes differently ({', '.join(alone)}); give both the same")

    @staticmethod
    def load(data: str, root: str | None, at_most: tuple[int, int] | None = None, seed: int = 0) -> LabelledPair:
        """Load the labelled images of both sides of a data set, cut to `at_most` (bank, test) images chosen by the seed.

        DataError if the data set has no labels or no test part, or as of the class.
        """
        uncut = load(data, root, "test")  # first: without a test part the other one, perhaps of millions, need not be listed
        bank = labelled(data, load(data, root, "bank"), "training")
        test = labelled(data, uncut, "test")
        most = at_most or (len(bank), len(test))
        if bank.labels is not None and test.labels is not None:
            numbers = np.union1d(bank.labels, test.labels)
            used = max(len(numbers), len(bank.classes or ()), len(test.classes or ()))
            if numbers[-1] >= max(_NUMBERED, 10 * used):
                fault = f"its {used} classes have numbers up to {numbers[-1]}"
                raise DataError(f"{bank.name}: {fault}; number them from 0, or name them")
        cut = choose(bank, most[0], seed), choose(test, most[1], seed)
        return LabelledPair(*cut, (len(bank), len(test)), uncut.fingerprint())

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

        DataError if no figure would mean anything: as of `gaps`; for test images all in the bank.
        """
        bank, test = self.bank, self.test
        notes = list(dict.fromkeys([*bank.notes, *test.notes]))
        notes += [f"a subset: {len(side)} of {of} {name} images" for name, side, of in self.sides if len(side) < of]
        notes += self.gaps()
        again = shared(bank, test)
        if again == len(test):
            raise DataError(f"{test.name}: all {again} test images are in the bank too; evaluate on images of their own")
        if again is None:
            notes.append("whether test images are in the bank too was not looked at: all would have to be read")
        elif again:
            notes.append(f"{again} of {len(test)} test images are in the bank too")
        return [*notes, "the test images are those that the run was pretrained on"] if seen and seen == self.uncut else notes

    def gaps(self) -> list[str]:
        """Return notes on classes without images.

        DataError for a side without any label; of one label an image, also for a single class, or test classes that an uncut bank lacks.
        """
        in_bank, in_test = (class_counts(labels_of(images), self.classes) for _, images, _ in self.sides)
        several, unknown, bank = self.bank.targets is not None, (in_bank == 0) & (in_test > 0), self.bank
        for images, count in ((bank, in_bank), (self.test, in_test)):
            if not count.any():
                raise DataError(f"{images.name}: none of its {len(images)} images is of any class; nothing can be measured")
        if not several and (in_bank > 0).sum() < 2:
            only = named(in_bank > 0, bank.classes)
            raise DataError(f"{bank.name}: all bank images are of {only} alone; give two classes or more")
        missing, unlearned = named(unknown, bank.classes), int(in_test[unknown].sum())
        lost = f"no bank image is of {missing}, so {unlearned} test labels cannot be predicted"
        if missing and not several and all(len(images) == of for _, images, of in self.sides):
            raise DataError(f"{bank.name}: {lost}; give both sides the same classes")
        notes, effect = [lost] if missing else [], ", left out of map" if several else ""
        for kind, absent in (("test image", (in_bank > 0) & (in_test == 0)), ("image at all", in_bank + in_test == 0)):
            notes += [f"no {kind} is of {named(absent, bank.classes)}{effect}"] if absent.any() else []
        return notes

    def card(self) -> dict[str, Any]:
        """Return which images and labels are used, by their content: the same folder elsewhere is the same."""
        used: dict[str, Any] = {"classes": self.classes}
        for name, images, of in self.sides:
            digest = hashlib.sha256(images.fingerprint().encode() + labels_of(images).numpy().tobytes())
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
