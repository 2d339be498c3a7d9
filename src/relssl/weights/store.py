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
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from relssl.errors import CheckpointError, StorageError
from relssl.files import storing, sweep, sync_folder, temporary, to_json, write_all

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
TENSORS, META, SUMS = FILES = ("state.safetensors", "state.json", "SHA256SUMS")
MAX_META = 64 << 20  # bytes of state.json: it names the images that could not be read, perhaps hundreds of thousands
MAX_JSON = 8 << 20  # bytes of JSON that are read from a file: parsed, they take about 25 times as much
_STEP = re.compile(r"step-([0-9]{8,})", re.ASCII)
# Texts and archives that lie where weights should, by how they begin.
_STRANGERS = {
    b"version https://git-lfs": "is a Git LFS pointer; fetch the file itself with `git lfs pull`",
    b"<": "is a web page, such as a login page saved in place of a download; download it again",
    b"\x1f\x8b": "is packed by gzip; unpack it first",
}


def encode(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Return the tensors as the content of a safetensors file; raise ValueError if one cannot be stored."""
    import torch
    from safetensors.torch import save

    try:
        # Cloned, as the library refuses tensors that share memory.
        owned = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        return bytes(save(owned, metadata))
    except Exception as error:  # the library's own types, and torch's for tensors that are sparse or on no device
        raise ValueError(f"the tensors {list(tensors)[:3]} ... cannot be stored ({one_line(error)})") from error


def read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU; raise CheckpointError, naming the file, whatever is wrong with it."""
    from safetensors.torch import load

    peek(path)
    try:
        # Not mapped: a file that vanishes or shrinks under a map kills the process.
        return dict(load(path.read_bytes()))
    except Exception as error:  # whatever a crafted header makes the library or torch raise
        raise CheckpointError(f"{path}: not a valid safetensors file ({one_line(error)})") from error


def peek(path: Path) -> str:
    """Return what a file of weights is by how it begins: safetensors, zip (as torch.save writes) or other.

    CheckpointError if it cannot be read, is empty, surely holds no weights, or claims a header of more than `MAX_JSON` bytes.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    kind = "safetensors" if start[8:9] == b"{" else "zip" if start.startswith(b"PK") else "other"
    head = b"" if kind == "safetensors" else start.lstrip().lower()  # which begins with any bytes, those of a length
    faults = [fault for beginning, fault in _STRANGERS.items() if head.startswith(beginning)]
    if kind == "safetensors" and (length := int.from_bytes(start[:8], "little")) > MAX_JSON:
        faults.append(f"claims a header of {length} bytes, more than {MAX_JSON}, and is not read")
    if kind == "zip" and not zipfile.is_zipfile(path):
        faults.append("is cut off or damaged; download or copy it again")
    if faults or not start:
        raise CheckpointError(f"{path}: {next(iter(faults), 'is empty; download or save it again')}")
    return kind


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
            name = where.encode("utf-8", "backslashreplace").decode() or "value"
            while name in tensors or name == "__metadata__":  # keys such as 1 and "1" lead to one name; safetensors keeps one
                name += "~"
            tensors[name] = node
            return {"$tensor": name}
        if isinstance(node, Mapping):
            pairs = [(key, walk(value, f"{inside}{key}")) for key, value in node.items()]
            if all(type(key) is str and not key.startswith("$") for key, _ in pairs):
                return dict(pairs)
            return {"$dict": [[walk(key, where), value] for key, value in pairs]}
        if isinstance(node, (list, tuple)):
            items = [walk(value, f"{inside}{i}") for i, value in enumerate(node)]
            return items if isinstance(node, list) else {"$tuple": items}
        if isinstance(node, float) and not math.isfinite(node):
            return {"$float": str(node)}
        if node is None or isinstance(node, (str, bool, int, float)):
            return node
        raise TypeError(f"{where or 'the state'}: a {type(node).__name__} cannot be stored; turn it into a tensor or a number")

    return tensors, walk(tree, "")


def unflatten(tensors: Mapping[str, Tensor], rest: Any) -> Any:
    """Return the tree that `flatten` took apart; raise CheckpointError if a tensor is missing or `rest` is malformed."""

    def build(node: Any) -> Any:
        match node:
            case {"$tensor": name}:
                return tensors[name]
            case {"$float": text}:
                return float(text)
            case {"$tuple": items}:
                return tuple(map(build, items))
            case {"$dict": pairs}:
                return {build(key): build(value) for key, value in pairs}
            case dict():
                return {key: build(value) for key, value in node.items()}
            case list():
                return [build(item) for item in node]
        return node

    try:
        return build(rest)
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the state is malformed, or a tensor of it is missing ({one_line(error)})") from error


def non_finite(tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the names of those in which a number is not finite."""
    return {name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())}


def save(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write a checkpoint folder, whole or not at all.

    Args:
        folder: must not exist yet; its parent must.
        tensors: of any device and layout in memory.
        meta: JSON-able; see `to_json` for what changes (`flatten` keeps everything).

    Raises:
        StorageError: if the folder exists or cannot be written; nothing unfinished is left behind.
        ValueError: for a tensor that cannot be stored.
    """
    files = {TENSORS: encode(tensors), META: to_json({"version": VERSION, "meta": meta})}
    files[SUMS] = _sums({name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()})
    if os.path.lexists(folder):
        raise StorageError(f"{folder}: exists already and is not overwritten; remove it or save under another name")
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


def _sums(files: Mapping[str, tuple[int, str]]) -> bytes:
    """Return the content of SHA256SUMS, of (size, hash) by name; `sha256sum -c` skips the comments, which hold the sizes."""
    lines = [f"# {size} {name}\n" for name, (size, _) in files.items()]
    return "".join([*lines, *(f"{digest}  {name}\n" for name, (_, digest) in files.items())]).encode()


def verify(folder: Path) -> None:
    """Check every file of a checkpoint against its hash; raise CheckpointError, naming the folder, if one is not as written."""
    with _intact(folder):
        for name in FILES:
            if (folder / name).is_symlink() or not (folder / name).is_file():  # a link could lead anywhere, and a pipe would wait
                raise ValueError(f"{name} is missing or no regular file")
        present = {}
        for name in (TENSORS, META):
            with (folder / name).open("rb") as file:
                present[name] = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
        # Compared byte for byte with what we would write, so that no change goes unseen.
        if (folder / SUMS).read_bytes() != _sums(present):
            raise ValueError(f"{', '.join(FILES)} do not belong together, as one of them has changed or was cut short")


@contextlib.contextmanager
def _intact(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged: {one_line(error)}; restore it or use another checkpoint") from error


def is_whole(folder: Path) -> bool:
    """Return whether a checkpoint verifies."""
    with contextlib.suppress(CheckpointError):
        verify(folder)
        return True
    return False


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors (on the CPU, owning their memory) and the meta of a checkpoint, after its hashes were checked.

    Raises:
        CheckpointError: naming the folder and what is wrong with it; no file makes it anything else.
    """
    verify(folder)
    with _intact(folder / META):
        if (size := (folder / META).stat().st_size) > MAX_META:
            raise ValueError(f"it has {size} bytes, more than {MAX_META}")
        # NaN and infinity are no JSON: looked up in an empty dict, they are an error.
        content = json.loads((folder / META).read_bytes(), parse_constant=dict[str, float]().__getitem__)
        version, meta = content["version"], content["meta"]
        if type(version) is not int or version != VERSION or not isinstance(meta, dict):
            raise ValueError(f"it is of version {version}, this relssl reads {VERSION}")
    return read(folder / TENSORS), meta


def step_folder(parent: Path, step: int) -> Path:
    """Return where the checkpoint of `step` lies."""
    return parent / f"step-{step:08d}"


def checkpoints(parent: Path) -> list[Path]:
    """List the checkpoints in `parent`, by step: folders named exactly so, no links. They may be damaged, or incomplete."""
    folders = [each for each in parent.glob("step-*") if _STEP.fullmatch(each.name) and each.is_dir() and not each.is_symlink()]
    ours = list[Path]()
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):  # the run has let go of it since
            names = set(os.listdir(folder))
            ours += [folder] if names & set(FILES) or not names else []  # where others' files alone are left, one was deleted
    return sorted(ours, key=lambda folder: int(folder.name.removeprefix("step-")))


@contextlib.contextmanager
def offering(path: Path) -> Iterator[None]:
    """Raise whatever goes wrong with the checkpoint at `path` as a CheckpointError that says which other one of its run is good."""
    try:
        yield
    except (CheckpointError, LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        fault = f"{error} is missing" if isinstance(error, LookupError) else one_line(error)
        fault = str(error) if isinstance(error, CheckpointError) else f"{path}: does not fit this configuration: {fault}"
        good = next((other for other in reversed(checkpoints(path.parent)) if other != path and is_whole(other)), None)
        offer = good and f"a good one: `relssl resume {quote(str(path.parents[1]))} --checkpoint {good.name}`"
        raise CheckpointError(f"{fault}; {offer or 'no other is good'}") from error


def prune(parent: Path, keep: int, protect: Iterable[str | Path] = ()) -> list[Path]:
    """Delete the checkpoints older than the newest `keep`, of which two verify, and what dead processes left unfinished.

    Only the process that holds the run may call this: on a shared disk another machine's processes look dead.

    Args:
        keep: at least 2, so that one broken disk block does not end a run.
        protect: names or paths of checkpoints that stay however old they are.

    Returns:
        What was deleted, oldest first; raises StorageError when a checkpoint cannot be deleted.
    """
    if keep < 2:
        raise ValueError(f"keep must be at least 2, got {keep}")
    sweep(parent)
    older, good = checkpoints(parent), 0
    while older and good < keep:
        # Where nothing can go the hashes need not be read; nor beyond two, without which no broken disk block ends a run.
        good += good >= 2 or len(older) + good <= keep or is_whole(older[-1])
        older.pop()
    safe = {Path(path).name for path in protect}
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
