"""What each method is made of, known without torch; the methods themselves are in `method/`, one file each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traits:
    """What a method needs.

    Attributes:
        about: one line for help and docs.
        title: its name in the literature. paper: where it was published.
        teacher: whether a momentum teacher follows the student.
        memory: whether past keys are kept.
        sharpened: whether a teacher's relation is matched, which has to be sharper than the student's.
        two_way: whether the student sees both views (`views.weak` and `views.strong`), and a teacher too; None: if
            `method.symmetric` says so.
        predictor: whether it cannot do without `encoder.predictor`.
        tiled: whether its loss over the memory can be computed in tiles.
        labels: whether it trains on labels.
        whole_batch: whether a batch cannot be computed in parts, as its samples are compared with each other.
    """

    about: str
    title: str
    paper: str
    teacher: bool = False
    memory: bool = False
    sharpened: bool = False
    two_way: bool | None = False
    predictor: bool = False
    tiled: bool = False
    labels: bool = False
    whole_batch: bool = False


METHODS = {
    "ressl": Traits(
        "relations to a memory, sharpened by a teacher of weak views",
        "ReSSL",
        "arXiv 2107.09282",
        teacher=True,
        memory=True,
        sharpened=True,
        tiled=True,
    ),
    "moco": Traits(
        "InfoNCE against a memory of a teacher's keys (MoCo v2)",
        "MoCo v2",
        "arXiv 2003.04297",
        teacher=True,
        memory=True,
        two_way=None,
        tiled=True,
    ),
    "sce": Traits(
        "a mixture of the positive and the teacher's relation as target",
        "SCE",
        "arXiv 2111.14585",
        teacher=True,
        memory=True,
        sharpened=True,
        two_way=None,
    ),
    "simclr": Traits("NT-Xent among the embeddings of the batch", "SimCLR", "arXiv 2002.05709", two_way=True, whole_batch=True),
    "byol": Traits(
        "a predictor finds the teacher's embedding of the other view",
        "BYOL",
        "arXiv 2006.07733",
        teacher=True,
        two_way=True,
        predictor=True,
    ),
    "simsiam": Traits(
        "a predictor finds the student's own embedding of the other view",
        "SimSiam",
        "arXiv 2011.10566",
        two_way=True,
        predictor=True,
    ),
    "supervised": Traits("cross-entropy to the labels, as an upper mark", "labels", "", labels=True),
}
