"""Tensors to the bytes of a safetensors file and back; writing them to the disk is the store's business."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relssl.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

MAX_JSON = 8 << 20  # bytes of JSON that are ever read from a file, such as this header: parsed, they take about 25 times as much


def encode(tensors: Mapping[str, Tensor]) -> bytes:
    """The tensors as the content of a safetensors file.

    Raises:
        ValueError: naming the tensors when they cannot be stored.
    """
    import torch
    from safetensors.torch import save

    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_complex() or name == "__metadata__":
            raise ValueError(f"tensor {name!r} ({tensor.dtype}, {tensor.layout}, {tensor.device}) cannot be stored")
    try:
        # Cloned, as the library refuses tensors that share memory.
        data: bytes = save({name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()})
    except Exception as error:  # the library's own types, for names and dtypes it does not know
        raise ValueError(
            f"the tensors {', '.join(map(repr, list(tensors)[:3]))} ... cannot be stored ({one_line(error)})"
        ) from error
    length = int.from_bytes(data[:8], "little")
    if length > MAX_JSON:
        raise ValueError(f"{len(tensors)} tensors need a header of {length} bytes, more than {MAX_JSON}")
    return data


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU and owning their memory.

    Raises:
        CheckpointError: naming the file, whatever it holds; a crafted one takes neither much memory nor another exception.
    """
    with _opened(path) as opened:
        # Cloned out of the memory map: a file that vanishes or shrinks under a map kills the process.
        return {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118


def metadata(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says beside its tensors; raises as `read` does."""
    with _opened(path) as opened:
        return opened.metadata() or {}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import safe_open

    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > MAX_JSON:
            raise CheckpointError(f"{path}: claims a header of {length} bytes, more than {MAX_JSON}")
        with safe_open(path, framework="pt") as opened:
            yield opened
    except CheckpointError:
        raise
    except Exception as error:  # whatever a crafted header makes the library or torch raise
        raise CheckpointError(f"{path}: not a valid safetensors file ({one_line(error)})") from error


def one_line(error: BaseException) -> str:
    """The text of a foreign error, fit for one line of ours."""
    return " ".join(str(error).split())[:200]
