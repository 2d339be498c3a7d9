"""The formats that a backbone is handed over in; imports no torch, so that the command line can list them."""

import importlib.util
from typing import NamedTuple

from relssl.errors import ConfigError
from relssl.settings.reading import nearest_word


class Format(NamedTuple):
    """One form of a backbone on the disk: what it is and who reads it, the file's suffix (empty for a folder), modules it needs."""

    about: str
    suffix: str
    needs: tuple[str, ...] = ()


FORMATS = {
    "safetensors": Format("the network's own names; read by relssl and timm", ".safetensors"),
    "timm": Format("safetensors of timm's networks alone", ".safetensors"),
    "torchvision": Format("state dict with torchvision's names", ".pth"),
    "hf": Format("folder in Hugging Face's layout, read by timm and transformers", ""),
    "onnx": Format("graph for any ONNX runtime", ".onnx", ("onnx", "onnxruntime", "onnxscript")),
    "torch-export": Format("graph that torch runs without timm", ".pt2"),
    "detectron2": Format("ResNets under detectron2's names", ".pth"),
}


def find_format(name: str) -> Format:
    """Return the format of that name; raise ConfigError if it is unknown, or with the line that installs what it needs."""
    if name not in FORMATS:
        near, known = nearest_word(name, FORMATS), ", ".join(FORMATS)
        raise ConfigError(f"format: {name!r} is unknown; the nearest is {near} (known: {known})")
    missing = [module for module in FORMATS[name].needs if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"format: {name} needs {', '.join(missing)}; pip install 'relssl[{name}]'")
    return FORMATS[name]
