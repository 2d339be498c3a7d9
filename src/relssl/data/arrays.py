"""Named arrays in one file that is read whole as it was written, or not at all; no pickle."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from relssl.atomic import replacing, write_all

# Followed by the SHA-256 of the rest: 8 bytes of length, a header in JSON, then the arrays one after another.
_MAGIC = b"relssl arrays 1\n"


def write_arrays(path: Path, kind: str, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray], mode: int = 0o644) -> None:
    """Write arrays and JSON facts to `path`, over whatever lies there.

    Args:
        kind: what the file is and the version of its layout; only a reader that asks for the same gets it.
        mode: permissions of the file.

    Raises:
        StorageError: if it cannot be written; an older file is still there then.
    """
    packed = {name: np.ascontiguousarray(array, array.dtype.newbyteorder("<")) for name, array in arrays.items()}
    layout = {name: [array.dtype.str, list(array.shape)] for name, array in packed.items()}
    header = json.dumps({"kind": kind, "facts": facts, "arrays": layout}).encode("ascii")
    parts = [memoryview(len(header).to_bytes(8, "little") + header)]
    parts += [array.reshape(-1).view(np.uint8).data for array in packed.values()]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    with replacing(path, sum(map(len, parts)), mode) as file:
        for part in [memoryview(_MAGIC + digest.digest()), *parts]:
            write_all(file.fileno(), part)


def read_arrays(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """The facts and arrays of a file, read-only; None if there is none, it is damaged, or of another kind."""
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                return None
            digest, start = file.read(32), file.tell()
            if hashlib.file_digest(file, "sha256").digest() != digest:
                return None
            file.seek(start)
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            if header["kind"] != kind:
                return None
            arrays = {}
            for name, (kept, shape) in header["arrays"].items():
                dtype = np.dtype(kept)
                arrays[name] = np.frombuffer(file.read(dtype.itemsize * math.prod(shape)), dtype).reshape(shape)
            return header["facts"], arrays
    except OSError:
        return None
