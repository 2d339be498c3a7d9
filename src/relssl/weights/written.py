"""What is handed over: the backbone that leaves, and what a format makes of it before anything is on the disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import nn

from relssl.config import Config
from relssl.errors import ConfigError
from relssl.weights.runs import NETWORKS, from_checkpoint, load_exported, load_run


@dataclass(frozen=True)
class Source:
    """A backbone that leaves.

    Attributes:
        backbone: in eval mode, on the CPU.
        config: what it was made with.
        network: student or teacher; `backbone` where that is not known.
        origin: name of the checkpoint, or of the file, that the weights come from.
        folder: the run's, if it is one.
    """

    backbone: nn.Module
    config: Config
    network: str
    origin: str
    folder: Path | None = None

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return self.config.views.weak.size


@dataclass(frozen=True)
class Snippet:
    """Python that loads what was written: printed in the card, and run to check it.

    Attributes:
        title: with what it is loaded.
        lines: the code, given the path of what was written.
        use: its last line, which sets `features` [N, F] from `images` [N, 3, S, S].
        arrays: `images` is a numpy array, not a tensor.
        needs: module that may be missing; then the code is printed and not run.
        tolerance: how far features may be off, relative to the largest one; 0 where the same code runs the same weights.
    """

    title: str
    lines: Callable[[str], list[str]]
    use: str = "features = backbone(images)"
    arrays: bool = False
    needs: str | None = None
    tolerance: float = 0.0


@dataclass(frozen=True)
class Written:
    """A backbone in a format, in memory.

    Attributes:
        data: the file's bytes, or those of each file of a folder.
        snippets: the ways to load it.
        exact: the loaded network has the source's very weights, in its order.
        notes: more about loading it, as Markdown, given the file's name.
    """

    data: bytes | Mapping[str, bytes]
    snippets: tuple[Snippet, ...]
    exact: bool = True
    notes: Callable[[str], str] | None = None


def open_source(path: str | Path, network: str | None) -> Source:
    """The backbone of a run's newest checkpoint, or in an exported or imported `.safetensors` file.

    Raises:
        ConfigError: if the path is neither, or the network is unknown or asked of a file.
        CheckpointError: if weights are damaged or do not match.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        if network is not None:
            raise ConfigError(f"network: {path.name} holds one network; leave the option out")
        backbone = load_exported(path)
        held, origin = _told(path)
        return Source(backbone, _config(backbone), held, origin)
    if network not in (None, *NETWORKS):
        raise ConfigError(f"network: must be student or teacher, got {network!r}")
    run = load_run(path)
    checkpoint = run.checkpoint()
    backbone = from_checkpoint(run.config, checkpoint, network or "student")
    return Source(backbone, run.config, network or "student", checkpoint.name, run.folder)


def _config(backbone: nn.Module) -> Config:
    config = backbone.config
    assert isinstance(config, Config)
    return config


def _told(path: Path) -> tuple[str, str]:
    """The network that a file says it holds and where that came from; files not written by an export say neither."""
    with safe_open(path, "pt") as opened:
        told = opened.metadata() or {}
    network, origin = told.get("network", ""), told.get("origin", "")
    return (network, origin) if network in NETWORKS and origin else ("backbone", path.name)


def quote(text: str) -> str:
    """A Python string literal."""
    return f'"{text}"' if text.isascii() and text.isprintable() and not set(text) & {'"', "\\"} else repr(text)
