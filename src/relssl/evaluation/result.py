"""The result of a protocol: its figures, the card that says how they were measured, the files they go to, their comparison."""

from __future__ import annotations

import base64
import dataclasses
import importlib.metadata
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
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
from relssl.evaluation.pairs import LabelledPair
from relssl.files import storing
from relssl.settings import parts
from relssl.settings.evaluation import Evaluation, Measuring
from relssl.settings.reading import flat
from relssl.weights.opening import Opened
from relssl.weights.spec import BackboneSpec

Record = dict[str, Any]

# What may change a figure's digits. Python and the operating system do not.
_PACKAGES = ("torch", "torchvision", "timm", "pillow", "numpy", "scikit-learn", "scipy")
# Who is measured, rather than how; a comparison does not ask for these to be equal.
_SUBJECT = ("source", "weights", "backbone")
_SHAPE = {"protocol": str, "network": str, "data": str, "setting": dict, "main": str, "figures": dict, "card": dict}


@dataclass(frozen=True)
class Finding:
    """One outcome of a protocol."""

    setting: dict[str, Any]  # what tells it from the protocol's other outcomes, such as {"k": 20, "temperature": 0.07}
    main: str  # the figure to quote, a key of `figures`
    figures: dict[str, float]  # such as top1, mean_per_class, map, recall_at_1; percent unless the name says otherwise
    intervals: dict[str, Interval] = field(default_factory=dict)  # 95 %, of some of the figures
    notes: tuple[str, ...] = ()  # what a reader must know, a sentence each
    details: dict[str, Any] = field(default_factory=dict)  # how it came about; plain JSON
    correct: npt.NDArray[np.bool_] | None = None  # [M], for each test image; to compare two findings image by image

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


@dataclass(frozen=True)
class Task:
    """The common ground of all work with opened backbones."""

    spec: BackboneSpec  # of the backbone
    reader: Reader  # how images are read, and what the backbone sees of them
    engine: Engine  # device, and the precision of the backbone; classifiers and losses are fp32
    bootstrap: Bootstrap = Bootstrap()  # of the intervals; its seed is that of everything else that is drawn too
    say: Callable[[str], None] = lambda line: None  # takes lines of progress, some ten a training
    root: str | None = None  # where named data sets lie
    pretrained_on: str | None = None  # fingerprint of the run's images, if known

    @classmethod
    def of(cls, opened: Opened, settings: Measuring, say: Callable[[str], None] | None = None, resamples: int = 1000) -> Task:
        """Return that of opened backbones, with the run's own settings where `settings` leave them open."""
        engine, bootstrap = Engine.local(settings.device, settings.precision), Bootstrap(resamples, settings.seed)
        root = settings.data_root or (opened.config.data_root if opened.config else None)
        known = (say or cls.say, root, opened.run_data.get("fingerprint"))
        return cls(opened.spec, opened.reader(settings.size, settings.workers), engine, bootstrap, *known)

    def pair(self, data: str, at_most: tuple[int, int] | None = None) -> tuple[LabelledPair, list[str]]:
        """Load both sides of a data set, as `LabelledPair.load` does, with what a reader of any figure on them must know."""
        pair = LabelledPair.load(data, self.root, at_most, self.bootstrap.seed)
        return pair, pair.notes(self.pretrained_on)


class Protocol(NamedTuple):
    """A way to measure a backbone.

    On features it is a function (LabelledFeatures, its settings, Bootstrap) -> findings, else (backbone, a LabelledPair or the folder
    of scenes, its settings, Task) -> findings.
    """

    place: str  # module and function, imported when it runs, as scikit-learn takes seconds
    takes: str = "features"  # or images, or scenes: images with boxes
    swept: tuple[str, ...] = ()  # settings whose every value gives a finding of its own
    trains: bool = False  # the backbone too, which otherwise stays as it is


def card(name: str, protocol: Protocol, section: Any, task: Task) -> Record:
    """Return everything that two figures of a protocol, with settings `section`, must share to compare, but network and data."""
    spec, reader, view, packages = task.spec, task.reader, task.reader.view, [*_PACKAGES]
    norms = "trained with the network" if protocol.trains else "eval mode; statistics hashed before and after, unchanged"
    seen: Record = {"mean": list(view.mean), "std": list(view.std)}
    if protocol.takes == "scenes":
        packages += ["torchmetrics", "pycocotools"]
        seen |= {"shorter_side": section.min_size, "longer_side": section.max_size, "crop": "none"}
        norms = norms if section.norm == "train" else "statistics and weights frozen, the rest is trained"
    else:
        seen |= {"size": view.size, "shorter_side": view.shorter_side, "crop": "centre", "max_pixels": reader.max_pixels}
        seen |= {"interpolation": f"{view.interpolation} with antialias"}
    if protocol.takes == "images":
        seen["flip_in_training"] = 0.5 if reader.mirrored else 0.0
    versions = {"relssl": __version__} | dict.fromkeys(packages, "not installed")
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "protocol": name,
        "layer": "backbone",
        "settings": {key: value for key, value in dataclasses.asdict(section).items() if key not in protocol.swept},
        "view": seen,
        "batch_norm": norms,
        "precision": task.engine.precision,
        "device": task.engine.device.type,
        "seed": task.bootstrap.seed,
        "resamples": task.bootstrap.resamples,
        "versions": versions,
        "backbone": {"name": spec.name, "args": dict(spec.arguments), "stem": spec.stem},
    }


def title(data: str) -> str:
    """Return what to call a data set in results: a name as it is, a folder by its last part, nothing of this machine."""
    return ",".join(shown(Path(one).name or one) for one in parts.title(data).split(","))


def file_name(protocol: str, data: str, settings: Evaluation) -> str:
    """Return the name of a protocol's results; a cut, another size or schedule has its own, so that it replaces no full result."""
    plain = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in title(data))[:100]
    cut = "" if settings.images is None else "-{}-{}".format(*settings.images)
    size = "" if settings.size is None else f"-{settings.size}px"
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
        For every pair: protocol, data, setting, network, figure, `first`, `second`, `difference` (second - first), `allowed`, the
        fields that differ, and of top-1 `interval`, the 95 % bootstrap interval of the difference over the test images, if known.

    Raises:
        ConfigError: naming the fields that do not match, or if there is nothing to compare. DataError: for a damaged file.
    """
    sides, alike = [_read(Path(path)) for path in (first, second)], ["protocol", "setting", "main", "network"]
    if network is not None:
        sides = [[record for record in side if record["network"] == name] for side, name in zip(sides, network, strict=True)]
        alike, allow = alike[:-1], (*allow, "network")
    rows, faults = list[Record](), dict[str, str]()  # what differs, and where first
    for mine in sides[0]:
        others = [other for other in sides[1] if all(other[key] == mine[key] for key in alike)]
        for other in sorted(others, key=lambda other: other["data"] != mine["data"])[:1]:  # of another name if nothing else fits
            cards = mine["flat"], other["flat"]
            differing = [name for name in cards[0] | cards[1] if cards[0].get(name) != cards[1].get(name)]
            where = " ".join([mine["protocol"], mine["network"], *(f"{key}={value}" for key, value in mine["setting"].items())])
            for name in differing:
                if not any(f"{name}.".startswith(f"{field}.") for field in allow):
                    values = " and ".join(f"{json.dumps(each.get(name)):.80}" for each in cards)
                    faults.setdefault(f"{name} differs: {values}", where)
            rows.append(_difference(mine, other) | {"allowed": differing})
    if faults:
        lines = [f"{where}: {fault}" for fault, where in faults.items()]
        raise ConfigError(*lines[:10], f"{second}: does not compare with {first}; --allow FIELD lets a field differ")
    if not rows:
        names = ({f"{each['protocol']} of {each['network']} on {each['data']}" for each in side} for side in sides)
        has = "; the second ".join(", ".join(sorted(side)) or "nothing" for side in names)
        fault = f"has no finding of the same protocol, data, network and setting as any of {first}"
        raise ConfigError(f"{second}: {fault}; the first holds {has}")
    return rows


def _read(path: Path) -> list[Record]:
    """Return the findings in a file, each with `flat`, its card by dotted names, and `right`, which test images were labelled right;
    None where some could not be read, so that places do not match."""
    try:
        records: list[Record] = json.loads(path.read_bytes())["results"]
        for record in records:
            if not all(isinstance(record[key], kind) for key, kind in _SHAPE.items()):
                raise ValueError("a finding is malformed")
            record["figure"] = float(record["figures"][record["main"]])
            record["flat"], record["right"] = flat({k: v for k, v in record["card"].items() if k not in _SUBJECT}), None
            count = record.get("tested")
            if count and count == record["card"]["images"]["test"]["images"]:
                packed = np.frombuffer(base64.b64decode(record["correct"], validate=True), np.uint8)
                if len(packed) * 8 < count:
                    raise ValueError(f"holds {len(packed) * 8} answers, not those of {count} images")
                record["right"] = np.unpackbits(packed)[:count].astype(bool)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: is not a result of `relssl evaluate` ({' '.join(str(error).split())[:100]})") from error
    return records


def _difference(mine: Record, other: Record) -> Record:
    row: Record = {key: mine[key] for key in ("protocol", "data", "setting")}
    row |= {"network": [mine["network"], other["network"]], "figure": mine["main"], "first": mine["figure"]}
    row |= {"second": other["figure"], "difference": round(other["figure"] - mine["figure"], 4), "interval": None}
    a, b = mine["right"], other["right"]
    if mine["main"] == "top1" and a is not None and b is not None and len(a) == len(b):
        counts = np.array([int((b & ~a).sum()), int((a & ~b).sum()), int((a == b).sum())])
        drawn = Bootstrap().generator().multinomial(len(a), counts / len(a), size=10_000)  # what both get right cancels
        row["interval"] = [round(bound, 4) for bound in percentiles(100 * (drawn[:, 0] - drawn[:, 1]) / len(a))]
    return row
