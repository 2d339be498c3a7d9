"""One safetensors file: written here tensor by tensor, read by the safetensors library.

The library's writer needs a second copy of all tensors in memory, refuses shared storage and reports a full disk without its
errno, so a header and the plain bytes are written here instead. No torch is imported before there is a tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relssl.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

MAX_JSON = 8 << 20  # bytes of JSON that are ever read from a file, such as this header: parsed, they take about 25 times as much
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def header(tensors: Mapping[str, Tensor]) -> tuple[bytes, list[str]]:
    """The safetensors header and the order of the data: widest elements first, so that each tensor is aligned in the file.

    Raises:
        ValueError: naming the tensor that cannot be stored.
    """
    table: dict[str, Any] = {}
    end = 0
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in order:
        tensor = tensors[name]
        code = _DTYPES.get(str(tensor.dtype).removeprefix("torch."))
        if code is None or str(tensor.layout) != "torch.strided" or tensor.is_meta:
            raise ValueError(f"tensor {name!r} ({tensor.dtype}, {tensor.layout}, {tensor.device}) cannot be stored")
        if name == "__metadata__" or name != name.encode("utf-8", "ignore").decode():
            raise ValueError(f"{name!r} cannot be the name of a tensor")
        start, end = end, end + tensor.numel() * tensor.element_size()
        table[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_JSON:
        raise ValueError(f"{len(tensors)} tensors need a header of {len(text)} bytes, more than {MAX_JSON}")
    return len(text).to_bytes(8, "little") + text, order


def blocks(header: bytes, order: list[str], tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of the file: the header, then each tensor, of which only one at a time is copied."""
    import torch

    yield memoryview(header)
    for name in order:
        tensor = tensors[name].detach().cpu().contiguous()
        if tensor.numel():
            yield tensor.reshape(-1).view(torch.uint8).numpy().data


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU and owning their memory.

    Raises:
        CheckpointError: naming the file, whatever it holds; a crafted one takes neither much memory nor another exception.
    """
    from safetensors import safe_open

    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > MAX_JSON:
            raise CheckpointError(f"{path}: claims a header of {length} bytes, more than {MAX_JSON}")
        with safe_open(path, framework="pt") as opened:
            # Cloned out of the memory map: a file that vanishes or shrinks under a map kills the process.
            return {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    except CheckpointError:
        raise
    except Exception as error:  # whatever a crafted header makes the library or torch raise
        raise CheckpointError(f"{path}: not a valid safetensors file ({one_line(error)})") from error


def one_line(error: BaseException) -> str:
    """The text of a foreign error, fit for one line of ours."""
    return " ".join(str(error).split())[:200]
