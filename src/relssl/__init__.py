"""relssl: pretrain image backbones on unlabelled images with ReSSL.

    import relssl
    run = relssl.pretrain("photos/", backbone="resnet50", epochs=100)
    backbone = relssl.load_backbone(run.folder)

Everything is imported on first use, so that `import relssl` itself needs no torch.
"""

from __future__ import annotations

import importlib
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relssl.evaluation.embed import embed as embed
    from relssl.evaluation.embed import predict as predict
    from relssl.evaluation.evaluate import evaluate as evaluate
    from relssl.evaluation.finetune import finetune as finetune
    from relssl.evaluation.result import compare as compare
    from relssl.report.advise import advise as advise
    from relssl.report.doctor import doctor as doctor
    from relssl.report.page import write_report as write_report
    from relssl.report.views import write_views as write_views
    from relssl.reproduction.reproduce import reproduce as reproduce
    from relssl.train.estimate import estimate as estimate
    from relssl.train.pretrain import pretrain as pretrain
    from relssl.train.pretrain import resume as resume
    from relssl.weights.export import export as export
    from relssl.weights.export import import_weights as import_weights
    from relssl.weights.opening import load_backbone as load_backbone
    from relssl.weights.opening import load_run as load_run

__version__ = "0.1.0"
_HOMES = {
    "advise": "report.advise",
    "compare": "evaluation.result",
    "doctor": "report.doctor",
    "embed": "evaluation.embed",
    "estimate": "train.estimate",
    "evaluate": "evaluation.evaluate",
    "export": "weights.export",
    "finetune": "evaluation.finetune",
    "import_weights": "weights.export",
    "load_backbone": "weights.opening",
    "load_run": "weights.opening",
    "predict": "evaluation.embed",
    "pretrain": "train.pretrain",
    "reproduce": "reproduction.reproduce",
    "resume": "train.pretrain",
    "write_report": "report.page",
    "write_views": "report.views",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'relssl' has no attribute {name!r}")
    state = random.getstate()
    try:
        return getattr(importlib.import_module(f"relssl.{_HOMES[name]}"), name)
    finally:
        random.setstate(state)  # some libraries draw from it as they are imported
