"""The card of a number: everything that two numbers must share before they can be compared."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from relssl import __version__
from relssl.data.images import Images
from relssl.data.plain import Reader
from relssl.engine import Engine
from relssl.errors import ConfigError, DataError
from relssl.evaluation.findings import unpack
from relssl.evaluation.metrics import Bootstrap, percentiles
from relssl.evaluation.pairs import LabelledPair, labels_hash
from relssl.settings.evaluation import Evaluation
from relssl.weights.spec import BackboneSpec

# What may change a figure's digits. Python and the operating system do not.
_PACKAGES = ("torch", "torchvision", "timm", "pillow", "numpy", "scikit-learn", "scipy")
_OF_DETECTION = ("torchmetrics", "pycocotools")
# Settings whose every value gives a finding of its own; the others are the same for all findings of a protocol.
SWEPT = {
    "knn": {"k", "temperature"},
    "linear": {"lr"},
    "semi": {"fractions"},
    "lowshot": {"shots"},
    "retrieval": {"at"},
}
# Who is measured, rather than how; a comparison does not ask for these to be equal.
SUBJECT = ("source", "weights", "backbone")


def card(
    protocol: str,
    network: str,
    weights: str,
    origin: dict[str, Any],
    spec: BackboneSpec,
    reader: Reader,
    settings: Evaluation,
    engine: Engine,
) -> dict[str, Any]:
    """What all findings of one protocol on one network share, but for the data.

    Args:
        protocol, network: their names.
        weights: hash of the network before the evaluation.
        origin: where it comes from.
        spec, reader: what it is, and how images are read for it.
    """
    section = getattr(settings, "probe" if protocol == "transfer" else protocol)
    return {
        "protocol": protocol,
        "network": network,
        "layer": "backbone",
        "settings": {name: value for name, value in dataclasses.asdict(section).items() if name not in SWEPT.get(protocol, ())},
        "view": _scenes(reader, settings) if protocol == "detection" else view(reader) | _mirrored(protocol, reader),
        "batch_norm": _norms(protocol, settings),
        "precision": engine.precision,
        "device": engine.device.type,
        "seed": settings.seed,
        "resamples": settings.resamples,
        "versions": versions(*(_OF_DETECTION if protocol == "detection" else ())),
        "backbone": {"name": spec.name, "args": dict(spec.arguments), "stem": spec.stem},
        "weights": weights,
        "source": origin,
    }


def view(reader: Reader) -> dict[str, Any]:
    """What the network sees of an image."""
    return {
        "size": reader.view.size,
        "shorter_side": reader.view.shorter_side,
        "crop": "centre",
        "interpolation": f"{reader.view.interpolation} with antialias",
        "mean": list(reader.view.mean),
        "std": list(reader.view.std),
        "max_pixels": reader.max_pixels,
    }


def _mirrored(protocol: str, reader: Reader) -> dict[str, Any]:
    """Whether a classifier that is trained on images sees them mirrored too."""
    trains = protocol in ("linear", "finetune", "semi")
    return {"flip_in_training": 0.5 if reader.mirrored else 0.0} if trains else {}


def _scenes(reader: Reader, settings: Evaluation) -> dict[str, Any]:
    """What a detector sees of an image."""
    seen = {key: value for key, value in view(reader).items() if key in ("mean", "std")}
    return {"shorter_side": settings.detection.min_size, "longer_side": settings.detection.max_size, "crop": "none", **seen}


def _norms(protocol: str, settings: Evaluation) -> str:
    if protocol in ("finetune", "semi") or (protocol == "detection" and settings.detection.norm == "train"):
        return "trained with the network"
    if protocol == "detection":
        return "statistics and weights frozen, the rest is trained"
    return "eval mode; statistics hashed before and after, unchanged"


def split(pair: LabelledPair) -> dict[str, Any]:
    """Which images and labels were used, by their content: the same folder elsewhere is the same."""
    whole = pair.of or (len(pair.bank), len(pair.test))
    return {"bank": _side(pair.bank, whole[0]), "test": _side(pair.test, whole[1]), "classes": pair.classes}


def _side(images: Images, of: int) -> dict[str, Any]:
    return {"images": len(images), "of": of, "hash": labels_hash(images)}


def versions(*more: str) -> dict[str, str]:
    """Versions of what computes a figure, and of `more` packages."""
    found = {"relssl": __version__}
    for name in (*_PACKAGES, *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


_MAX_BYTES = 256 << 20

Record = dict[str, Any]


def compare(
    first: str | Path, second: str | Path, *, network: tuple[str, str] | None = None, allow: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The difference of two evaluations, finding by finding.

    Two findings compare only if their cards match in everything but who is measured: network, layer, settings, view, precision,
    images, seed, versions.

    Args:
        first, second: JSON files as `evaluate` writes them, of RUN/evaluations or its `out`.
        network: the network of the first and of the second, such as ("student", "backbone"); default: of equal names.
        allow: fields of the card that may differ, such as "versions" or "view.mean"; a field allows those below it.

    Returns:
        For every pair: protocol, data, setting, network, figure, `first`, `second`, `difference` (second - first) and, where both
        name the test images that they got right, `interval`: the 95 % bootstrap interval of the difference over the images;
        `allowed`, the fields that differ.

    Raises:
        ConfigError: naming the fields that do not match, or if there is nothing to compare. DataError: for a damaged file.
    """
    sides = [_records(Path(path)) for path in (first, second)]
    if network is not None:
        sides = [[record for record in side if record["network"] == name] for side, name in zip(sides, network, strict=True)]
        allow = (*allow, "network")
    rows: list[Record] = []
    faults: dict[str, str] = {}  # what differs, and where first
    for mine in sides[0]:
        other = _counterpart(mine, sides[1], by_network=network is None)
        if other is None:
            continue
        differing = list(_differences(mine["card"], other["card"]))
        if refused := [field for field in differing if not _allowed(field[0], allow)]:
            for field, a, b in refused:
                faults.setdefault(f"{field} differs: {_brief(a)} and {_brief(b)}", _name(mine))
        else:
            rows.append(_difference(mine, other) | {"allowed": [field for field, _, _ in differing]})
    if faults:
        named = [f"{where}: {fault}" for fault, where in faults.items()]
        raise ConfigError(*named[:10], f"{second}: does not compare with {first}; --allow FIELD lets a field differ")
    if not rows:
        raise ConfigError(
            f"{second}: has no finding of the same protocol, data, network and setting as any of {first}; {_has(sides)}"
        )
    return rows


def _records(path: Path) -> list[Record]:
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
        raise DataError(f"{path}: is no result of `relssl evaluate` ({' '.join(str(error).split())[:100]})") from error
    return records


_SHAPE = {"protocol": str, "network": str, "data": str, "setting": dict, "main": str, "figures": dict, "card": dict}


def _counterpart(mine: Record, others: list[Record], *, by_network: bool) -> Record | None:
    """The finding of the same protocol, data, setting and figure; the data may bear another name if nothing else fits."""
    wanted = ("protocol", "setting", "main", *(["network"] if by_network else []))
    alike = [other for other in others if all(other[key] == mine[key] for key in wanted)]
    named = [other for other in alike if other["data"] == mine["data"]]
    return next(iter(named or alike), None)


def _differences(mine: Any, other: Any, field: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted field, its value here, its value there) of all that differs, except who is measured."""
    if isinstance(mine, Mapping) and isinstance(other, Mapping):
        for key in dict.fromkeys([*mine, *other]):
            if field or key not in SUBJECT:
                yield from _differences(mine.get(key), other.get(key), f"{field}.{key}" if field else str(key))
    elif mine != other:
        yield field, mine, other


def _allowed(field: str, allow: Sequence[str]) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in allow)


def _difference(mine: Record, other: Record) -> dict[str, Any]:
    main = mine["main"]
    values = [float(record["figures"][main]) for record in (mine, other)]
    row = {key: mine[key] for key in ("protocol", "data", "setting")}
    row |= {"network": [mine["network"], other["network"]], "figure": main, "first": values[0], "second": values[1]}
    row["difference"] = round(values[1] - values[0], 4)
    if main == "top1" and "correct" in mine and "correct" in other:
        row["interval"] = _paired(mine, other)
    return row


def _paired(mine: Record, other: Record) -> list[float] | None:
    """The interval of the difference in percent when test images are drawn again: what both get right or wrong cancels."""
    first, second = _answers(mine), _answers(other)
    if first is None or second is None or len(first) != len(second):
        return None
    gained, lost, total = int((second & ~first).sum()), int((first & ~second).sum()), len(first)
    drawn = Bootstrap().generator().multinomial(total, np.array([gained, lost, total - gained - lost]) / total, size=10_000)
    low, high = percentiles(100 * (drawn[:, 0] - drawn[:, 1]) / total)
    return [round(low, 4), round(high, 4)]


def _answers(record: Record) -> npt.NDArray[np.bool_] | None:
    """Which test images were labelled right; None where some could not be read, so that places do not tell which is which."""
    if "correct" not in record or record["tested"] != record["card"]["images"]["test"]["images"]:
        return None
    return unpack(record["correct"], record["tested"]) if record["tested"] else None


def _name(record: Record) -> str:
    setting = " ".join(f"{key}={value}" for key, value in record["setting"].items())
    return " ".join(filter(None, (record["protocol"], record["network"], setting)))


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _has(sides: list[list[Record]]) -> str:
    """What each side holds, for a user who compared the wrong files."""
    held = [", ".join(sorted({f"{r['protocol']} of {r['network']} on {r['data']}" for r in side})) or "nothing" for side in sides]
    return f"the first holds {held[0]}; the second {held[1]}"
