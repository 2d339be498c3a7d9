"""The result of a protocol: its figures, the card that says how they were measured, the files they go to, their comparison."""

from __future__ import annotations

import base64
import dataclasses
import importlib.metadata
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from relssl import __version__
from relssl.data.folder import shown
from relssl.data.plain import Reader
from relssl.engine import Engine
from relssl.errors import ConfigError, DataError
from relssl.evaluation.metrics import Bootstrap, Interval, accuracies, accuracy_intervals, percentiles
from relssl.files import storing
from relssl.settings.evaluation import Evaluation
from relssl.weights.spec import BackboneSpec

Record = dict[str, Any]

# What may change a figure's digits. Python and the operating system do not.
_PACKAGES = ("relssl", "torch", "torchvision", "timm", "pillow", "numpy", "scikit-learn", "scipy")
# Who is measured, rather than how; a comparison does not ask for these to be equal.
_SUBJECT = ("source", "weights", "backbone")
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
    def of_ranks(cls, setting: Record, rank: Tensor, truth: Tensor, classes: int, bootstrap: Bootstrap, **more: Any) -> Finding:
        """Return accuracies with their intervals, of `metrics.ranks` [M] and true classes [M]; `more`: notes, details."""
        figures, intervals = accuracies(rank, truth, classes), accuracy_intervals(rank, truth, classes, bootstrap)
        return cls(setting, "top1", figures, intervals, correct=(rank == 0).numpy(), **more)

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


class Protocol(NamedTuple):
    """A way to measure a backbone."""

    place: str  # module and function, imported when it runs, as scikit-learn takes seconds
    takes: str = "features"  # or images, or scenes: images with boxes
    swept: tuple[str, ...] = ()  # settings whose every value gives a finding of its own
    trains: bool = False  # the backbone too, which otherwise stays as it is


def card(
    name: str, protocol: Protocol, section: Any, settings: Evaluation, spec: BackboneSpec, reader: Reader, engine: Engine
) -> Record:
    """Return everything that two figures of a protocol, with settings `section`, must share to compare, but network and data."""
    view, packages = reader.view, _PACKAGES
    norms = "trained with the network" if protocol.trains else "eval mode; statistics hashed before and after, unchanged"
    seen: Record = {"mean": list(view.mean), "std": list(view.std)}
    if protocol.takes == "scenes":
        packages = (*packages, "torchmetrics", "pycocotools")
        seen |= {"shorter_side": section.min_size, "longer_side": section.max_size, "crop": "none"}
        if section.norm != "train":
            norms = "statistics and weights frozen, the rest is trained"
    else:
        seen |= {"size": view.size, "shorter_side": view.shorter_side, "crop": "centre", "max_pixels": reader.max_pixels}
        seen["interpolation"] = f"{view.interpolation} with antialias"
        if protocol.takes == "images":
            seen["flip_in_training"] = 0.5 if reader.mirrored else 0.0
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
        "versions": {package: _version(package) for package in packages},
        "backbone": {"name": spec.name, "args": dict(spec.arguments), "stem": spec.stem},
    }


def _version(package: str) -> str:
    try:
        return __version__ if package == "relssl" else importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def title(data: str) -> str:
    """Return what to call a data set in results: a name as it is, a folder by its last part, nothing of this machine."""
    return ",".join(shown(Path(one).name or one) for one in data.split(","))


def file_name(protocol: str, data: str, settings: Evaluation) -> str:
    """Return the name of a protocol's results; a cut, another size or schedule has its own, so that it replaces no full result."""
    cut = "" if settings.images is None else f"-{settings.images[0]}-{settings.images[1]}"
    size = "" if settings.size is None else f"-{settings.size}px"
    plain = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in title(data))[:100]
    schedule = "-step" if protocol == "linear" and settings.linear.schedule == "step" else ""
    return f"{protocol}-{plain}{cut}{size}{schedule}.json"


def writable(folder: Path) -> Path:
    """Return a folder that files can be written to, created if need be; StorageError if they cannot."""
    with storing(folder):
        folder.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    return folder


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
    sides, alike = [_read(Path(path)) for path in (first, second)], ["protocol", "setting", "main"]
    if network is None:
        alike.append("network")
    else:
        sides = [[record for record in side if record["network"] == name] for side, name in zip(sides, network, strict=True)]
        allow = (*allow, "network")
    rows: list[Record] = []
    faults: dict[str, str] = {}  # what differs, and where first
    for mine in sides[0]:
        others = [other for other in sides[1] if all(other[key] == mine[key] for key in alike)]
        if not others:
            continue
        other = min(
            others, key=lambda other: other["data"] != mine["data"]
        )  # the data may bear another name if nothing else fits
        a, b = (_flat({key: value for key, value in side["card"].items() if key not in _SUBJECT}) for side in (mine, other))
        differing = [name for name in {**a, **b} if a.get(name) != b.get(name)]
        refused = [name for name in differing if not any(f"{name}.".startswith(f"{allowed}.") for allowed in allow)]
        where = " ".join([mine["protocol"], mine["network"], *(f"{key}={value}" for key, value in mine["setting"].items())])
        for name in refused:
            values = (json.dumps(side.get(name)) for side in (a, b))
            pair = " and ".join(text if len(text) <= 80 else text[:77] + "..." for text in values)
            faults.setdefault(f"{name} differs: {pair}", where)
        if not refused:
            rows.append(_difference(mine, other) | {"allowed": differing})
    if faults:
        named = [f"{where}: {fault}" for fault, where in faults.items()]
        raise ConfigError(*named[:10], f"{second}: does not compare with {first}; --allow FIELD lets a field differ")
    if not rows:
        names = (sorted({f"{each['protocol']} of {each['network']} on {each['data']}" for each in side}) for side in sides)
        has = [", ".join(side) or "nothing" for side in names]
        raise ConfigError(
            f"{second}: has no finding of the same protocol, data, network and setting as any of {first}; "
            f"the first holds {has[0]}; the second {has[1]}"
        )
    return rows


def _read(path: Path) -> list[Record]:
    try:
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


def _flat(card: Mapping[str, Any], above: str = "") -> Record:
    """Return the card's values by their dotted names."""
    flat: Record = {}
    for key, value in card.items():
        flat |= _flat(value, f"{above}{key}.") if value and isinstance(value, Mapping) else {f"{above}{key}": value}
    return flat


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
    if "correct" not in record or record["tested"] != record["card"]["images"]["test"]["images"] or not record["tested"]:
        return None
    packed = np.frombuffer(base64.b64decode(record["correct"], validate=True), np.uint8)
    if len(packed) != -(-record["tested"] // 8):
        raise ValueError(f"holds {len(packed)} bytes of answers, not those of {record['tested']} images")
    return np.unpackbits(packed, count=record["tested"]).astype(bool)
