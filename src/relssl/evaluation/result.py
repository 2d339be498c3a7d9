"""The result of a protocol: its figures, the card that says how they were measured, the files they go to, their comparison."""

from __future__ import annotations

import base64
import dataclasses
import importlib.metadata
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from relssl import __version__
from relssl.data.folder import shown
from relssl.data.plain import Reader
from relssl.engine import Engine
from relssl.errors import ConfigError, DataError, StorageError
from relssl.evaluation.metrics import Bootstrap, Interval, accuracies, accuracy_intervals, percentiles
from relssl.evaluation.pairs import LabelledPair, labels_hash
from relssl.files import storing
from relssl.settings.evaluation import Evaluation
from relssl.weights.spec import BackboneSpec

Record = dict[str, Any]

# What may change a figure's digits. Python and the operating system do not.
_PACKAGES = ("relssl", "torch", "torchvision", "timm", "pillow", "numpy", "scikit-learn", "scipy")
# Who is measured, rather than how; a comparison does not ask for these to be equal.
_SUBJECT = ("source", "weights", "backbone")
_MAX_BYTES = 256 << 20
_SHAPE = {"protocol": str, "network": str, "data": str, "setting": dict, "main": str, "figures": dict, "card": dict}


@dataclass(frozen=True)
class Finding:
    """One outcome of a protocol.

    Attributes:
        setting: what tells it from the protocol's other outcomes, such as {"k": 20, "temperature": 0.07}.
        main: the figure to quote, a key of `figures`.
        figures: by name, such as top1, top5, mean_per_class, map, recall_at_1; percent unless its name says otherwise.
        intervals: 95 % intervals [low, high] of some of the figures, in their unit.
        notes: what a reader must know, such as a k that had to be lowered; a sentence each.
        details: how it came about, such as the penalty that was chosen or the figures of each draw; plain JSON.
        correct: bool [M], true for each test image that was labelled right, to compare two findings image by image.
    """

    setting: dict[str, Any]
    main: str
    figures: dict[str, float]
    intervals: dict[str, Interval] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    correct: npt.NDArray[np.bool_] | None = None

    @classmethod
    def of_ranks(
        cls,
        setting: dict[str, Any],
        rank: Tensor,
        truth: Tensor,
        classes: int,
        bootstrap: Bootstrap,
        notes: Sequence[str] = (),
        details: dict[str, Any] | None = None,
    ) -> Finding:
        """Return accuracies with their intervals, from `metrics.ranks` [M] and the true classes [M]."""
        figures, intervals = accuracies(rank, truth, classes), accuracy_intervals(rank, truth, classes, bootstrap)
        return cls(setting, "top1", figures, intervals, tuple(notes), details or {}, (rank == 0).numpy())

    def plain(self) -> Record:
        """Return it as JSON; `correct` packed, eight images a byte, as base64."""
        record: Record = {
            "setting": self.setting,
            "main": self.main,
            "figures": {name: round(value, 4) for name, value in self.figures.items()},
            "intervals": {name: [round(low, 4), round(high, 4)] for name, (low, high) in self.intervals.items()},
            "notes": list(self.notes),
            "details": self.details,
        }
        if self.correct is not None:
            record["tested"] = len(self.correct)
            record["correct"] = base64.b64encode(np.packbits(self.correct).tobytes()).decode()
        return record


def unpack(text: str, count: int) -> npt.NDArray[np.bool_]:
    """Return the `correct` [count] that `Finding.plain` packed; ValueError if it holds another number of images."""
    packed = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(packed) != -(-count // 8):
        raise ValueError(f"holds {len(packed)} bytes, {count} images need {-(-count // 8)}")
    return np.unpackbits(packed, count=count).astype(bool)


@dataclass(frozen=True)
class Protocol:
    """A way to measure a backbone.

    Attributes:
        place: module and function, imported when it runs, as some need scikit-learn, which takes seconds.
        takes: features, images, or scenes (images with boxes).
        swept: settings whose every value gives a finding of its own; the others are the same for all findings.
        trains: true if it trains the backbone too, which otherwise stays as it is.
        packages: what computes its figures besides the usual ones.
    """

    place: str
    takes: str = "features"
    swept: tuple[str, ...] = ()
    trains: bool = False
    packages: tuple[str, ...] = ()

    @property
    def run(self) -> Callable[..., list[Finding]]:
        """The function."""
        module, _, name = self.place.partition(":")
        function: Callable[..., list[Finding]] = getattr(importlib.import_module(module), name)
        return function


def card(
    name: str, protocol: Protocol, section: Any, settings: Evaluation, spec: BackboneSpec, reader: Reader, engine: Engine
) -> Record:
    """Return everything that two figures of a protocol must share before they compare, but for network and data.

    Args:
        name, protocol, section: its name, what it is, and its settings.
        settings: those of the evaluation.
        spec, reader: what the backbone is, and how images are read for it.
    """
    view, norms = reader.view, "eval mode; statistics hashed before and after, unchanged"
    seen: Record = {"mean": list(view.mean), "std": list(view.std)}
    if protocol.takes == "scenes":
        seen = {"shorter_side": section.min_size, "longer_side": section.max_size, "crop": "none", **seen}
        norms = "trained with the network" if section.norm == "train" else "statistics and weights frozen, the rest is trained"
    else:
        interpolation = f"{view.interpolation} with antialias"
        seen = {"size": view.size, "shorter_side": view.shorter_side, "crop": "centre", "interpolation": interpolation, **seen}
        seen["max_pixels"] = reader.max_pixels
        if protocol.takes == "images":
            seen["flip_in_training"] = 0.5 if reader.mirrored else 0.0
        if protocol.trains:
            norms = "trained with the network"
    return {
        "protocol": name,
        "layer": "backbone",
        "settings": {name: value for name, value in dataclasses.asdict(section).items() if name not in protocol.swept},
        "view": seen,
        "batch_norm": norms,
        "precision": engine.precision,
        "device": engine.device.type,
        "seed": settings.seed,
        "resamples": settings.resamples,
        "versions": {package: _version(package) for package in (*_PACKAGES, *protocol.packages)},
        "backbone": {"name": spec.name, "args": dict(spec.arguments), "stem": spec.stem},
    }


def split(pair: LabelledPair) -> Record:
    """Return which images and labels were used, by their content: the same folder elsewhere is the same."""
    of = pair.of or (len(pair.bank), len(pair.test))
    sides = {"bank": (pair.bank, of[0]), "test": (pair.test, of[1])}
    used: Record = {name: {"images": len(side), "of": all, "hash": labels_hash(side)} for name, (side, all) in sides.items()}
    return used | {"classes": pair.classes}


def _version(package: str) -> str:
    try:
        return __version__ if package == "relssl" else importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def title(data: str) -> str:
    """Return what to call a data set in results: a name as it is, a folder by its last part, nothing of this machine."""
    return ",".join(shown(Path(one).name or one) for one in data.split(","))


def file_name(protocol: str, data: str, settings: Evaluation) -> str:
    """Return the name of a protocol's results. A cut of the data, another size, or the paper's other schedule has one of its own,
    so that it replaces no full result."""
    cut = "" if settings.images is None else f"-{settings.images[0]}-{settings.images[1]}"
    size = "" if settings.size is None else f"-{settings.size}px"
    plain = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in title(data))[:100]
    schedule = "-step" if protocol == "linear" and settings.linear.schedule == "step" else ""
    return f"{protocol}-{plain}{cut}{size}{schedule}.json"


def check_out(out: Path) -> None:
    """Refuse, before the work, a file that could not be written at the end."""
    if not out.absolute().parent.is_dir() or out.is_dir():
        raise ConfigError(f"out: {out} must be a JSON file in a folder that exists")
    _check_writable(out.absolute().parent)


def results_folder(run: Path, out: str | Path | None, say: Callable[[str], None]) -> Path | None:
    """Return where a run keeps its results; None if that cannot be written and they go to `out`."""
    folder = run / "evaluations"
    try:
        _check_writable(folder)
    except StorageError as error:
        if out is None:
            raise StorageError(f"{error}, or give --out FILE") from error
        say(f"{folder}: cannot be written; the results go to {out} alone")
        return None
    return folder


def _check_writable(folder: Path) -> None:
    with storing(folder):
        folder.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def compare(
    first: str | Path, second: str | Path, *, network: tuple[str, str] | None = None, allow: Sequence[str] = ()
) -> list[Record]:
    """Return the difference of two evaluations, finding by finding.

    Two findings compare only if their cards match in everything but who is measured: network, layer, settings, view, precision,
    images, seed, versions.

    Args:
        first, second: JSON files as `evaluate` writes them, of RUN/evaluations or its `out`.
        network: the network of the first and of the second, such as ("student", "backbone"); default: of equal names.
        allow: fields of the card that may differ, such as "versions" or "view.mean"; a field allows those below it.

    Returns:
        For every pair: protocol, data, setting, network, figure, `first`, `second`, `difference` (second - first) and, where both
        name the test images that they labelled right, `interval`: the 95 % bootstrap interval of the difference over the images;
        `allowed`, the fields that differ.

    Raises:
        ConfigError: naming the fields that do not match, or if there is nothing to compare. DataError: for a damaged file.
    """
    sides = [_read(Path(path)) for path in (first, second)]
    if network is not None:
        sides = [[record for record in side if record["network"] == name] for side, name in zip(sides, network, strict=True)]
        allow = (*allow, "network")
    alike = ("protocol", "setting", "main", *(["network"] if network is None else []))
    rows: list[Record] = []
    faults: dict[str, str] = {}  # what differs, and where first
    for mine in sides[0]:
        others = [other for other in sides[1] if all(other[key] == mine[key] for key in alike)]
        # The data may bear another name if nothing else fits.
        other = next(iter([other for other in others if other["data"] == mine["data"]] or others), None)
        if other is None:
            continue
        differing = list(_differences(mine["card"], other["card"]))
        refused = [each for each in differing if not any(each[0] == name or each[0].startswith(f"{name}.") for name in allow)]
        where = " ".join([mine["protocol"], mine["network"], *(f"{key}={value}" for key, value in mine["setting"].items())])
        for name, *values in refused:
            a, b = (text if len(text) <= 80 else text[:77] + "..." for text in map(json.dumps, values))
            faults.setdefault(f"{name} differs: {a} and {b}", where)
        if not refused:
            rows.append(_difference(mine, other) | {"allowed": [name for name, _, _ in differing]})
    if faults:
        named = [f"{where}: {fault}" for fault, where in faults.items()]
        raise ConfigError(*named[:10], f"{second}: does not compare with {first}; --allow FIELD lets a field differ")
    if not rows:
        has = [
            ", ".join(sorted({f"{r['protocol']} of {r['network']} on {r['data']}" for r in side})) or "nothing" for side in sides
        ]
        raise ConfigError(
            f"{second}: has no finding of the same protocol, data, network and setting as any of {first}; "
            f"the first holds {has[0]}; the second {has[1]}"
        )
    return rows


def _read(path: Path) -> list[Record]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("is too large for results")
        records: list[Record] = json.loads(path.read_bytes())["results"]
        for record in records:
            if not all(isinstance(record[key], kind) for key, kind in _SHAPE.items()):
                raise ValueError("a finding is malformed")
            float(record["figures"][record["main"]])
            _answers(record)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: is not a result of `relssl evaluate` ({' '.join(str(error).split())[:100]})") from error
    return records


def _differences(mine: Any, other: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted field, its value here, its value there) of all that differs, except who is measured."""
    if isinstance(mine, Mapping) and isinstance(other, Mapping):
        for key in dict.fromkeys([*mine, *other]):
            if name or key not in _SUBJECT:
                yield from _differences(mine.get(key), other.get(key), f"{name}.{key}" if name else str(key))
    elif mine != other:
        yield name, mine, other


def _difference(mine: Record, other: Record) -> Record:
    main = mine["main"]
    first, second = (float(record["figures"][main]) for record in (mine, other))
    row = {key: mine[key] for key in ("protocol", "data", "setting")}
    row |= {"network": [mine["network"], other["network"]], "figure": main, "first": first, "second": second}
    row["difference"] = round(second - first, 4)
    if main == "top1" and "correct" in mine and "correct" in other:
        a, b = _answers(mine), _answers(other)
        row["interval"] = None if a is None or b is None or len(a) != len(b) else _paired(a, b)
    return row


def _paired(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> list[float]:
    """Compute the interval of the difference in percent when test images are drawn again: what both get right cancels."""
    gained, lost, total = int((second & ~first).sum()), int((first & ~second).sum()), len(first)
    drawn = Bootstrap().generator().multinomial(total, np.array([gained, lost, total - gained - lost]) / total, size=10_000)
    return [round(bound, 4) for bound in percentiles(100 * (drawn[:, 0] - drawn[:, 1]) / total)]


def _answers(record: Record) -> npt.NDArray[np.bool_] | None:
    """Return which test images were labelled right; None where some could not be read, so that places do not match."""
    if "correct" not in record or record["tested"] != record["card"]["images"]["test"]["images"]:
        return None
    return unpack(record["correct"], record["tested"]) if record["tested"] else None
