"""Checkpoints: folders of `state.safetensors`, `state.json` and `SHA256SUMS`, whole or not there, checked before they are read.

Nothing is ever pickled. Only the functions that handle tensors import torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relssl.errors import CheckpointError, StorageError
from relssl.files import storing, sweep, sync_folder, temporary, to_json, write_all

if TYPE_CHECKING:
    from torch import Tensor

MAX_JSON = 8 << 20  # bytes of JSON that are ever read from a file, such as this header: parsed, they take about 25 times as much
VERSION = 1
TENSORS, META, SUMS = FILES = ("state.safetensors", "state.json", "SHA256SUMS")
_STEP = re.compile(r"step-([0-9]{8,})", re.ASCII)


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the tensors as the content of a safetensors file; raise ValueError, naming a tensor, if one cannot be stored."""
    import torch
    from safetensors.torch import save

    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_complex() or name == "__metadata__":
            raise ValueError(f"tensor {name!r} ({tensor.dtype}, {tensor.layout}, {tensor.device}) cannot be stored")
    try:
        # Cloned, as the library refuses tensors that share memory.
        owned = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        data: bytes = save(owned, metadata=None if metadata is None else dict(metadata))
    except Exception as error:  # the library's own types, for names and dtypes it does not know
        raise ValueError(f"the tensors {list(tensors)[:3]} ... cannot be stored ({one_line(error)})") from error
    if (length := int.from_bytes(data[:8], "little")) > MAX_JSON:
        raise ValueError(f"{len(tensors)} tensors need a header of {length} bytes, more than {MAX_JSON}")
    return data


def read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU and owning their memory.

    Raises:
        CheckpointError: naming the file, whatever it holds; a crafted one takes neither much memory nor another exception.
    """
    with _safetensors(path) as file:
        # Cloned out of the memory map: a file that vanishes or shrinks under a map kills the process.
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def metadata(path: Path) -> dict[str, str]:
    """Return what the header of a safetensors file says beside its tensors; raises as `read` does."""
    with _safetensors(path) as file:
        return file.metadata() or {}


@contextlib.contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    from safetensors import safe_open

    try:
        with path.open("rb") as file:
            if (length := int.from_bytes(file.read(8), "little")) > MAX_JSON:
                raise ValueError(f"it claims a header of {length} bytes, more than {MAX_JSON}")
        with safe_open(path, framework="pt") as opened:
            yield opened
    except Exception as error:  # whatever a crafted header makes the library or torch raise
        raise CheckpointError(f"{path}: not a valid safetensors file ({one_line(error)})") from error


def one_line(error: BaseException) -> str:
    """Return the text of another library's error, fit for one line of ours."""
    return " ".join(str(error).split())[:200]


def flatten(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Take the tensors out of nested dicts, lists and tuples, such as `optimizer.state_dict()`.

    Returns:
        The tensors by a readable, unique name, and the rest as JSON that keeps the type of keys, tuples and non-finite floats.

    Raises:
        TypeError: for anything else than tensors, str, bool, int, float and None, naming where it lies.
    """
    from torch import Tensor

    tensors: dict[str, Tensor] = {}

    def walk(node: Any, where: str) -> Any:
        inside = f"{where}." if where else ""
        if isinstance(node, Tensor):
            base = name = where.encode("utf-8", "backslashreplace").decode() or "value"
            count = 1
            # Keys such as 1 and "1" lead to one name: the later ones are numbered. safetensors keeps one for itself.
            while name in tensors or name == "__metadata__":
                count += 1
                name = f"{base}~{count}"
            tensors[name] = node
            return {"$tensor": name}
        if isinstance(node, Mapping):
            pairs = [(key, walk(value, f"{inside}{key}")) for key, value in node.items()]
            if all(type(key) is str and not key.startswith("$") for key, _ in pairs):
                return dict(pairs)
            return {"$dict": [[scalar(key, where), value] for key, value in pairs]}
        if isinstance(node, (list, tuple)):
            items = [walk(value, f"{inside}{i}") for i, value in enumerate(node)]
            return items if isinstance(node, list) else {"$tuple": items}
        return scalar(node, where)

    def scalar(node: Any, where: str) -> Any:
        if isinstance(node, float):
            return float(node) if math.isfinite(node) else {"$float": str(float(node))}
        if node is None or isinstance(node, (str, bool, int)):
            return node
        raise TypeError(f"{where or 'the state'}: a {type(node).__name__} cannot be stored; turn it into a tensor or a number")

    return tensors, walk(tree, "")


def unflatten(tensors: Mapping[str, Tensor], rest: Any) -> Any:
    """Return the tree that `flatten` took apart; raise CheckpointError if a tensor is missing or `rest` is malformed."""

    def build(node: Any) -> Any:
        if isinstance(node, list):
            return [build(item) for item in node]
        if not isinstance(node, dict):
            return node
        if len(node) != 1 or not next(iter(node)).startswith("$"):
            return {key: build(value) for key, value in node.items()}
        ((tag, value),) = node.items()
        match tag:
            case "$tensor":
                return tensors[value]
            case "$float":
                return float(value)
            case "$tuple":
                return tuple(build(item) for item in value)
            case "$dict":
                return {build(key): build(item) for key, item in value}
        raise ValueError(f"unknown tag {tag}")

    try:
        return build(rest)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the state is malformed, or a tensor of it is missing ({one_line(error)})") from error


def save(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write a checkpoint folder, whole or not at all.

    Args:
        folder: must not exist yet; its parent must.
        tensors: of any device and layout in memory.
        meta: JSON-able, below 8 MiB as JSON; see `to_json` for what changes (`flatten` keeps everything).

    Raises:
        StorageError: if the folder exists or cannot be written; nothing unfinished is left behind.
        ValueError: for a tensor or meta that cannot be stored, named.
    """
    files = {TENSORS: encode(tensors), META: to_json({"version": VERSION, "meta": meta})}
    if len(files[META]) > MAX_JSON:
        raise ValueError(f"{folder}: meta takes {len(files[META])} bytes as JSON, more than {MAX_JSON}; store arrays as tensors")
    if os.path.lexists(folder):
        raise StorageError(f"{folder}: exists already and is not overwritten; remove it or save under another name")
    files[SUMS] = "".join(_sums({name: (len(data), hashlib.sha256(data)) for name, data in files.items()})).encode()
    unfinished = temporary(folder.parent)
    with storing(folder, sum(map(len, files.values()))):
        try:
            unfinished.mkdir()
            for name, data in files.items():
                with (unfinished / name).open("xb", buffering=0) as file:
                    write_all(file.fileno(), memoryview(data))
                    os.fsync(file.fileno())
            sync_folder(unfinished)
            unfinished.rename(folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        sync_folder(folder.parent)


def _sums(files: Mapping[str, tuple[int, Any]]) -> list[str]:
    """Return the lines of SHA256SUMS, of (size, hash) by name; `sha256sum -c` skips the comments, which hold the sizes."""
    sizes = [f"# {size} {name}\n" for name, (size, _) in files.items()]
    return sizes + [f"{digest.hexdigest()}  {name}\n" for name, (_, digest) in files.items()]


def verify(folder: Path) -> None:
    """Check every file of a checkpoint against its hash; raise CheckpointError, naming folder and file, if one is not as written."""
    present: dict[str, tuple[int, Any]] = {}
    try:
        # A link could lead anywhere, and a pipe would wait for ever.
        if odd := [name for name in FILES if not _is_plain(folder / name)]:
            raise CheckpointError(f"{folder}: {', '.join(odd)} is missing or no regular file; use another checkpoint")
        for name in (TENSORS, META):
            with (folder / name).open("rb") as file:
                present[name] = (os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256"))
        with (folder / SUMS).open("rb") as file:
            stored = file.read(4096)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error})") from error
    lines = _sums(present)
    # Compared byte for byte with what we would write, so that no change goes unseen.
    if "".join(lines).encode() != stored:
        changed = [name for line, name in zip(lines[2:], present, strict=True) if line.encode() not in stored] or [SUMS]
        raise CheckpointError(f"{folder}: {', '.join(changed)} is cut short or has changed; restore it or use another checkpoint")


def is_whole(folder: Path) -> bool:
    """Return whether a checkpoint verifies."""
    try:
        verify(folder)
    except CheckpointError:
        return False
    return True


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors (on the CPU, owning their memory) and the meta of a checkpoint, after its hashes were checked.

    Raises:
        CheckpointError: naming the folder, the file and what is wrong with it; no file makes it anything else.
    """
    verify(folder)
    try:
        if (size := (folder / META).stat().st_size) > MAX_JSON:
            raise ValueError(f"it has {size} bytes, more than {MAX_JSON}")
        content = json.loads((folder / META).read_bytes(), parse_constant=_refuse_constant)
        version, meta = content["version"], content["meta"]
        if type(version) is not int or version != VERSION or not isinstance(meta, dict):
            raise ValueError(f"it is of version {version}, this relssl reads {VERSION}")
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise CheckpointError(f"{folder}: {META} describes no checkpoint that can be read ({one_line(error)})") from error
    return read(folder / TENSORS), meta


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def step_folder(parent: Path, step: int) -> Path:
    """Return where the checkpoint of `step` lies."""
    return parent / f"step-{step:08d}"


def checkpoints(parent: Path) -> list[Path]:
    """List the complete checkpoints in `parent`, by step: named exactly so, no links, with all three files. Not verified."""
    try:
        folders = [parent / name for name in os.listdir(parent) if _STEP.fullmatch(name)]
        complete = [folder for folder in folders if not folder.is_symlink() and all(_is_plain(folder / name) for name in FILES)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{parent}: cannot be read ({error.strerror})") from error
    return sorted(complete, key=lambda folder: int(folder.name.removeprefix("step-")))


def prune(parent: Path, keep: int, protect: Iterable[str | Path] = ()) -> list[Path]:
    """Delete the checkpoints older than the newest `keep` that verify, and what dead processes left unfinished.

    Damaged checkpoints do not count and go only when they are older than those; files that are not ours stay. Only the process
    that holds the run may call this: on a shared disk another machine's processes look dead.

    Args:
        keep: at least 2, so that one broken disk block does not end a run.
        protect: names or paths of checkpoints that stay however old they are.

    Returns:
        What was deleted, oldest first; raises StorageError when a checkpoint cannot be deleted.
    """
    if keep < 2:
        raise ValueError(f"keep must be at least 2, got {keep}")
    sweep(parent)
    safe = {Path(path).name for path in protect}
    older, good = checkpoints(parent), 0
    while older and good < keep:
        # Where nothing can go, the hashes need not be read.
        good += len(older) + good <= keep or is_whole(older[-1])
        older.pop()
    deleted = [folder for folder in older if folder.name not in safe]
    for folder in deleted:
        remove(folder)
    return deleted


def remove(folder: Path) -> None:
    """Delete one checkpoint, which stops being listed at once; files in it that are not ours stay.

    Raises ValueError if it is not named like a checkpoint or is a link, StorageError if it cannot be deleted.
    """
    if not _STEP.fullmatch(folder.name) or folder.is_symlink():
        raise ValueError(f"{folder}: not a checkpoint, not deleted")
    with storing(folder):
        if set(os.listdir(folder)) <= set(FILES):
            unfinished = temporary(folder.parent)
            folder.rename(unfinished)
            shutil.rmtree(unfinished)
            return
        for name in reversed(FILES):
            (folder / name).unlink(missing_ok=True)
