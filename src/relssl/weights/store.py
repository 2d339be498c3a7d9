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
import stat
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relssl.errors import CheckpointError, StorageError
from relssl.files import storing, sweep, sync_folder, temporary, to_json, write_all

if TYPE_CHECKING:
    from torch import Tensor

MAX_JSON = 8 << 20  # bytes of JSON that are ever read from a file, such as this header: parsed, they take about 25 times as much
VERSION = 1
TENSORS, META, SUMS = "state.safetensors", "state.json", "SHA256SUMS"
_STEP = re.compile(r"step-([0-9]{8,})", re.ASCII)


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the tensors as the content of a safetensors file.

    Raises:
        ValueError: naming a tensor that cannot be stored.
    """
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
        raise ValueError(
            f"the tensors {', '.join(map(repr, list(tensors)[:3]))} ... cannot be stored ({one_line(error)})"
        ) from error
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
            pairs = [(key, walk(value, f"{where}.{key}" if where else str(key))) for key, value in node.items()]
            if all(type(key) is str and not key.startswith("$") for key, _ in pairs):
                return dict(pairs)
            return {"$dict": [[scalar(key, where), value] for key, value in pairs]}
        if isinstance(node, (list, tuple)):
            items = [walk(value, f"{where}.{i}" if where else str(i)) for i, value in enumerate(node)]
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
    """Return the tree that `flatten` took apart.

    Raises:
        CheckpointError: if a tensor is missing or `rest` does not come from `flatten`.
    """

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
    except KeyError as error:
        raise CheckpointError(f"tensor {error} is missing from the state") from error
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the state is malformed ({one_line(error)})") from error


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
    files[SUMS] = _manifest({name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()})
    unfinished = temporary(folder.parent)
    with storing(folder, sum(map(len, files.values()))):
        try:
            unfinished.mkdir()
            for name, data in files.items():
                descriptor = os.open(unfinished / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                try:
                    write_all(descriptor, memoryview(data))
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            sync_folder(unfinished)
            unfinished.rename(folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        sync_folder(folder.parent)


def _manifest(entries: Mapping[str, tuple[int, str]]) -> bytes:
    """SHA256SUMS; `sha256sum -c` skips the comments, which hold the sizes so that a cut file can be told from a changed one."""
    sizes = "".join(f"# {size} {name}\n" for name, (size, _) in entries.items())
    return (sizes + "".join(f"{digest}  {name}\n" for name, (_, digest) in entries.items())).encode("ascii")


def verify(folder: Path) -> None:
    """Check every file of a checkpoint against its hash.

    Raises:
        CheckpointError: naming the folder, the file and whether it is missing, truncated or changed.
    """
    manifest = _read_small(folder, SUMS)
    text = manifest.decode("ascii", "replace")
    name = r"([A-Za-z0-9_][A-Za-z0-9_.]*)"
    sizes = {file: int(size) for size, file in re.findall(rf"^# ([0-9]{{1,18}}) {name}$", text, re.M)}
    hashes = {file: digest for digest, file in re.findall(rf"^([0-9a-f]{{64}})  {name}$", text, re.M)}
    entries = {file: (size, hashes.get(file, "")) for file, size in sizes.items()}
    # Only what we would write ourselves is accepted, byte for byte, so that no change of the file goes unseen.
    if _manifest(entries) != manifest or not {TENSORS, META} <= entries.keys():
        raise CheckpointError(f"{folder}: {SUMS} is damaged; use another checkpoint")
    for file, (size, digest) in entries.items():
        with _opened(folder, file) as opened:
            length = os.fstat(opened.fileno()).st_size
            if length < size:
                raise CheckpointError(f"{folder}: {file} is truncated: {length} of {size} bytes")
            if length > size or hashlib.file_digest(opened, "sha256").hexdigest() != digest:
                raise CheckpointError(f"{folder}: {file} does not match its hash; restore it or use another checkpoint")


def is_whole(folder: Path) -> bool:
    """Return whether a checkpoint verifies."""
    try:
        verify(folder)
    except CheckpointError:
        return False
    return True


@contextlib.contextmanager
def _opened(folder: Path, name: str) -> Iterator[BufferedReader]:
    """Open a regular file of the checkpoint: a link could lead anywhere and a pipe would wait for ever."""
    try:
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(folder / name, flags), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CheckpointError(f"{folder}: {name} is not a regular file")
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: {name} is missing" if folder.is_dir() else f"{folder}: no such folder") from error
    except OSError as error:
        raise CheckpointError(f"{folder}: {name} cannot be read ({error.strerror})") from error


def _read_small(folder: Path, name: str) -> bytes:
    with _opened(folder, name) as file:
        data = file.read(MAX_JSON + 1)
    if len(data) > MAX_JSON:
        raise CheckpointError(f"{folder}: {name} has more than {MAX_JSON} bytes")
    return data


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors (on the CPU, owning their memory) and the meta of a checkpoint, after its hashes were checked.

    Raises:
        CheckpointError: naming the folder, the file and what is wrong with it; no file makes it anything else.
    """
    verify(folder)

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    try:
        described = json.loads(_read_small(folder, META), parse_constant=refuse)
        version, meta = described["version"], described["meta"]
        if type(version) is not int or version < 1 or not isinstance(meta, dict):
            raise ValueError("version or meta is of the wrong type")
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise CheckpointError(f"{folder}: {META} describes no checkpoint ({one_line(error)})") from error
    if version > VERSION:
        raise CheckpointError(f"{folder}: written by version {version}, this reads up to {VERSION}; upgrade relssl")
    return read(folder / TENSORS), meta


def step_folder(parent: Path, step: int) -> Path:
    """Return where the checkpoint of `step` lies."""
    return parent / f"step-{step:08d}"


def checkpoints(parent: Path) -> list[Path]:
    """List the complete checkpoints in `parent`, by step: named exactly so, no links, with all three files. Not verified."""
    try:
        entries = list(os.scandir(parent))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{parent}: cannot be read ({error.strerror})") from error
    complete = []
    for entry in entries:
        match = _STEP.fullmatch(entry.name)
        if match and entry.is_dir(follow_symlinks=False):
            files = [Path(entry) / name for name in (TENSORS, META, SUMS)]
            if all(file.is_file() and not file.is_symlink() for file in files):
                complete.append((int(match[1]), entry.name))
    return [parent / name for _, name in sorted(complete)]


def prune(parent: Path, keep: int, protect: Iterable[str | Path] = ()) -> list[Path]:
    """Delete the checkpoints older than the newest `keep` that verify, and what dead processes left unfinished.

    Damaged checkpoints do not count and go only when they are older than those; files that are not ours stay. Only the process
    that holds the run may call this: on a shared disk another machine's processes look dead.

    Args:
        keep: at least 2, so that one broken disk block does not end a run.
        protect: names or paths of checkpoints that stay however old they are.

    Returns:
        What was deleted, oldest first.

    Raises:
        StorageError: when a checkpoint cannot be deleted.
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
    """Delete one checkpoint; it stops being listed at once, and files in it that are not ours stay.

    Raises:
        ValueError: if the folder is not named like a checkpoint or is a link.
        StorageError: if it cannot be deleted.
    """
    if not _STEP.fullmatch(folder.name) or folder.is_symlink():
        raise ValueError(f"{folder}: not a checkpoint, not deleted")
    ours = (SUMS, META, TENSORS)
    with storing(folder):
        if {entry.name for entry in os.scandir(folder)} <= set(ours):
            unfinished = temporary(folder.parent)
            folder.rename(unfinished)
            shutil.rmtree(unfinished)
            return
        for name in ours:
            (folder / name).unlink(missing_ok=True)
