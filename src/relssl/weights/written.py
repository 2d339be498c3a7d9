"""What is handed over: the backbone that leaves, and what a format makes of it before anything is on the disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from relssl.config import Config


@dataclass(frozen=True)
class Source:
    """A backbone that leaves.

    Attributes:
        backbone: in eval mode, on the CPU.
        config: what it was made with.
        network: student or teacher of a run of ours; `backbone` of anything else.
        origin: name of the checkpoint, or of the file, that the weights come from.
        folder: the run's, if it is one.
        account: of an imported file, a line each: how it was read and what was assumed.
    """

    backbone: nn.Module
    config: Config
    network: str
    origin: str
    folder: Path | None = None
    account: Sequence[str] = ()

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
        use: its last line, which sets `features` [N, F] from `images` [N, C, S, S].
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


def quote(text: str) -> str:
    """A Python string literal."""
    return f'"{text}"' if text.isascii() and text.isprintable() and not set(text) & {'"', "\\"} else repr(text)
