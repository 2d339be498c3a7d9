"""The formats that a backbone is handed over in; imports no torch, so that the command line can list them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from relssl.errors import ConfigError
from relssl.settings.reading import nearest_word


@dataclass(frozen=True)
class Format:
    """One form of a backbone on the disk.

    Attributes:
        about: what it is and who reads it, for help.
        suffix: of the file; empty for a folder.
        needs: modules to write it and read it back, of the extra `extra`.
    """

    about: str
    suffix: str
    needs: tuple[str, ...] = ()
    extra: str = ""


FORMATS = {
    "safetensors": Format("the network's own names; read by relssl and timm", ".safetensors"),
    "timm": Format("safetensors of timm's networks alone", ".safetensors"),
    "torchvision": Format("state dict with torchvision's names", ".pth"),
    "hf": Format("folder in Hugging Face's layout, read by timm and transformers", ""),
    "onnx": Format("graph for any ONNX runtime", ".onnx", ("onnx", "onnxruntime", "onnxscript"), "onnx"),
    "torch-export": Format("graph that torch runs without timm", ".pt2"),
    "detectron2": Format("ResNets in the pickle that detectron2 reads", ".pkl"),
}


def find_format(name: str) -> Format:
    """The format of that name, once what it needs is known to be installed.

    Raises:
        ConfigError: for an unknown name, or with the line that installs what is missing.
    """
    if name not in FORMATS:
        known = ", ".join(FORMATS)
        raise ConfigError(f"format: {name!r} is unknown; the nearest is {nearest_word(name, FORMATS)} (known: {known})")
    format = FORMATS[name]
    missing = [module for module in format.needs if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"format: {name} needs {', '.join(missing)}; pip install 'relssl[{format.extra}]'")
    return format


def unsuited(name: str, why: str) -> ConfigError:
    """The refusal of a format that cannot hold a network."""
    return ConfigError(f"format: {name} {why}; safetensors, onnx and torch-export take every network")
