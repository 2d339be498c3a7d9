"""relssl: pretrain image backbones on unlabelled images with ReSSL.

    import relssl
    run = relssl.pretrain("photos/", backbone="resnet50", epochs=100)
    backbone = relssl.load_backbone(run.folder)

Everything is imported on first use, from where __init__.pyi says, so that `import relssl` itself needs no torch.
"""

import importlib
import random
import re
from pathlib import Path
from typing import Any

__version__ = "0.1.0"
_STUB = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_HOMES = {name: module for module, name in re.findall(r"^from (\S+) import \w+ as (\w+)$", _STUB, re.MULTILINE)}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'relssl' has no attribute {name!r}")
    state = random.getstate()
    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
    finally:
        random.setstate(state)  # some libraries draw from it as they are imported
