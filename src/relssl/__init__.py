"""relssl: pretrain image backbones on unlabelled images with ReSSL.

    import relssl
    run = relssl.pretrain("photos/", backbone="resnet50", epochs=100)
    backbone = relssl.load_backbone(run.folder)

Everything is imported on first use, so that `import relssl` itself needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relssl.evaluation.embed import embed
    from relssl.evaluation.evaluate import evaluate
    from relssl.evaluation.result import compare
    from relssl.reproduction.reproduce import reproduce
    from relssl.train.estimate import estimate
    from relssl.train.pretrain import pretrain, resume
    from relssl.weights.export import export, import_weights
    from relssl.weights.opening import load_backbone, load_run

__version__ = "0.1.0"
__all__ = [
    "compare",
    "embed",
    "estimate",
    "evaluate",
    "export",
    "import_weights",
    "load_backbone",
    "load_run",
    "pretrain",
    "reproduce",
    "resume",
]

_HOMES = {
    "compare": "relssl.evaluation.result",
    "embed": "relssl.evaluation.embed",
    "estimate": "relssl.train.estimate",
    "evaluate": "relssl.evaluation.evaluate",
    "export": "relssl.weights.export",
    "import_weights": "relssl.weights.export",
    "load_backbone": "relssl.weights.opening",
    "load_run": "relssl.weights.opening",
    "pretrain": "relssl.train.pretrain",
    "reproduce": "relssl.reproduction.reproduce",
    "resume": "relssl.train.pretrain",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'relssl' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
