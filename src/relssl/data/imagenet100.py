"""The 100 classes of ImageNet that are called ImageNet-100: those that Tian et al. 2020, "Contrastive Multiview Coding", drew."""

from __future__ import annotations

import numpy as np

from relssl.errors import DataError

# HobbitLong/CMC, imagenet100.txt, sorted.
_WORDS = """
n01558993 n01692333 n01729322 n01735189 n01749939 n01773797 n01820546 n01855672 n01978455 n01980166
n01983481 n02009229 n02018207 n02085620 n02086240 n02086910 n02087046 n02089867 n02089973 n02090622
n02091831 n02093428 n02099849 n02100583 n02104029 n02105505 n02106550 n02107142 n02108089 n02109047
n02113799 n02113978 n02114855 n02116738 n02119022 n02123045 n02138441 n02172182 n02231487 n02259212
n02326432 n02396427 n02483362 n02488291 n02701002 n02788148 n02804414 n02859443 n02869837 n02877765
n02974003 n03017168 n03032252 n03062245 n03085013 n03259280 n03379051 n03424325 n03492542 n03494278
n03530642 n03584829 n03594734 n03637318 n03642806 n03764736 n03775546 n03777754 n03785016 n03787032
n03794056 n03837869 n03891251 n03903868 n03930630 n03947888 n04026417 n04067472 n04099969 n04111531
n04127249 n04136333 n04229816 n04238763 n04336792 n04418357 n04429376 n04435653 n04485082 n04493381
n04517823 n04589890 n04592741 n07714571 n07715103 n07753275 n07831146 n07836838 n13037406 n13040303
"""
CLASSES = tuple(_WORDS.split())


def select(labels: np.ndarray | None, classes: tuple[str, ...] | None) -> tuple[np.ndarray, np.ndarray]:
    """Which of ImageNet's images belong to ImageNet-100: their positions [M], and their labels [M] int64 as positions in CLASSES.

    Args:
        labels: int64 [N] of all images, as positions in `classes`; None if not every image lies in a class's folder.
        classes: names of the class folders.

    Raises:
        DataError: if some of the classes have no image.
    """
    if labels is None or classes is None:
        raise DataError("imagenet100: every image in imagenet/ must lie in the folder of its class, imagenet/train/CLASS/")
    there = {classes[label] for label in np.unique(labels)}
    if missing := [word for word in CLASSES if word not in there]:
        raise DataError(f"imagenet100: imagenet/ has no image of {missing[0]}; {len(missing)} of the 100 classes are missing")
    rank = np.array([CLASSES.index(word) if word in CLASSES else -1 for word in classes], np.int64)
    rows = np.flatnonzero(rank[labels] >= 0)
    return rows, rank[labels[rows]]
