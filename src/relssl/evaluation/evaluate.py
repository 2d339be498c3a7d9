"""Transfer: one protocol on several data sets, each by its customary figure, as one table.

The figures are those of Kornblith et al. 2019, "Do Better ImageNet Models Transfer Better?", table 1: accuracy, but the mean over
the classes where these are of unequal size, and the mean average precision where images have several labels.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from relssl.data.folder import shown
from relssl.data.images import Images
from relssl.data.named import SETS
from relssl.data.plain import Reader
from relssl.engine import Engine
from relssl.errors import ConfigError, DataError
from relssl.evaluation import features
from relssl.evaluation.features import Features, evaluating, extract, frozen, require_varied, state_hash
from relssl.evaluation.findings import Finding
from relssl.evaluation.metrics import Bootstrap
from relssl.evaluation.pairs import LabelledPair
from relssl.evaluation.result import card, split
from relssl.evaluation.results import check_data, check_out, file_name, results_folder, title, unfinished
from relssl.files import write_json
from relssl.settings.evaluation import Evaluation, read_settings
from relssl.weights.opening import Opened, Reading, open_backbones

_UNEQUAL = ("flowers102", "oxford-pets", "fgvc-aircraft")
METRICS: dict[str, str] = {name: "mean_per_class" if name in _UNEQUAL else "top1" for name in SETS} | {"voc07": "map"}


def customary(name: str) -> str:
    """The figure by which results on a data set are quoted; top1 for sets of one's own."""
    return METRICS.get(name, "top1")


def transfer_table(outcomes: Mapping[str, Finding | str]) -> Finding:
    """The findings on several data sets as one.

    Args:
        outcomes: by data set, what the protocol found, or the reason why it was not run there; in the order wanted. Of sets of
            one's own the finding's main figure counts.

    Returns:
        A finding whose figures are `mean`, over the sets that ran, and that of each set by its name, in percent. `details` holds
        {"rows": [...]}, one a set: {"data", "metric", "value", "interval"} with the interval [low, high] or None, or {"data",
        "not_run": reason}. The mean has no interval: the sets were drawn apart.

    Raises:
        DataError: if the protocol ran on none, with all the reasons.
    """
    rows = [_row(name, outcome) for name, outcome in outcomes.items()]
    ran = [row for row in rows if "value" in row]
    if not ran:
        reasons = "; ".join(f"{row['data']}: {row['not_run']}" for row in rows) or "no data set was named"
        raise DataError(f"transfer: ran on none of the data sets ({reasons})")
    notes = [not_run(row) for row in rows if "not_run" in row]
    if notes:
        notes.insert(0, f"the mean is over {len(ran)} of {len(rows)} data sets; do not compare it with one over others")
    notes += [f"{name}: {note}" for name, outcome in outcomes.items() if isinstance(outcome, Finding) for note in outcome.notes]
    return Finding(
        setting={"sets": list(outcomes)},
        main="mean",
        figures={row["data"]: row["value"] for row in ran} | {"mean": sum(row["value"] for row in ran) / len(ran)},
        intervals={row["data"]: tuple(row["interval"]) for row in ran if row["interval"]},
        notes=tuple(notes),
        details={"rows": rows},
    )


def not_run(row: Mapping[str, Any]) -> str:
    """Why there is no figure of a row's data set, as a sentence."""
    return f"{row['data']} was not run: {row['not_run']}"


def _row(name: str, outcome: Finding | str) -> dict[str, Any]:
    if isinstance(outcome, str):
        return {"data": name, "not_run": outcome.removeprefix(f"{name}: ")}  # which our errors begin with
    metric = METRICS.get(name, outcome.main)
    interval = outcome.intervals.get(metric)
    value = outcome.figures[metric]
    return {
        "data": name,
        "metric": metric,
        "value": round(value, 4),
        "interval": interval and [round(bound, 4) for bound in interval],
    }


# Protocols on features, and those that train on images: {name: (module, function)}.
ON_FEATURES = {
    "knn": ("relssl.evaluation.knn", "knn"),
    "probe": ("relssl.evaluation.probe", "probe"),
    "lowshot": ("relssl.evaluation.lowshot", "lowshot"),
    "retrieval": ("relssl.evaluation.retrieval", "retrieval"),
}
ON_IMAGES = {
    "linear": ("relssl.evaluation.heads", "linear"),
    "finetune": ("relssl.evaluation.heads", "finetune"),
    "semi": ("relssl.evaluation.heads", "semi"),
}
# Of these the backbone stays as it is.
FROZEN = (*ON_FEATURES, "linear", "transfer")

Say = Callable[[str], None]
Record = dict[str, Any]


def evaluate(
    source: str | Path,
    data: str | None = None,
    *,
    settings: Evaluation | None = None,
    reading: Reading | None = None,
    out: str | Path | None = None,
    say: Say | None = None,
    done: Callable[[Record], None] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """What a backbone learned.

    Args:
        source: a run folder, an exported file, another program's file, or a timm name; see `open_backbones`.
        data: a data set with labels, default the run's own. For `transfer` several, joined by commas; for `detection` a folder
            in COCO's or VOC's layout.
        settings: all settings, instead of `overrides`.
        reading: how to read another program's file.
        out: JSON file for all results, besides those that are kept in a run folder, or instead where that cannot be written.
        say: told of progress, a line each; default: nobody.
        done: given the answer so far after each protocol, so that an error in a later one costs nothing.
        overrides: settings by name: `protocol="knn,probe"`, `images=(5000, 1000)`, `linear={"epochs": 10}`.

    Returns:
        {"source", "data", "results": [{"protocol", "network", "data", "setting", "main", "figures", "intervals", "notes",
        "details", "seconds", "card"}, ...]}; of a run also written to RUN/evaluations/PROTOCOL-DATA.json, whose name tells a cut and a
        size as well.

    Raises:
        ConfigError, DataError, CheckpointError, NumericError, StorageError: each with what to do about it.
    """
    asked = settings or read_settings(overrides)
    say = say or (lambda line: None)
    if out is not None:
        check_out(Path(out))
    reading = reading or Reading()
    network = asked.network[0] if asked.network and len(asked.network) == 1 else reading.network
    opened = open_backbones(source, dataclasses.replace(reading, network=network, size=asked.size or reading.size))
    data = data or opened.data
    if data is None:
        raise ConfigError(f"data: {opened.name} does not say what it was trained on; name the labelled data to evaluate it on")
    check_data(asked, data)
    folder = opened.folder and results_folder(opened.folder, out, say)
    work = _Work(opened, opened.reader(asked.size, asked.workers), asked, say)
    answer: dict[str, Any] = {"source": opened.name, "data": title(data), "results": []}
    if {*ON_FEATURES, *ON_IMAGES} & set(asked.protocol):
        work.pair(data)  # whatever is wrong with the data is told before hours of another protocol
    for protocol in dict.fromkeys(asked.protocol):
        records = list(work.run(protocol, data))
        answer["results"] += records
        if folder is not None:
            write_json(folder / file_name(protocol, data, asked), answer | {"results": records, "time": time.time()})
        if out is not None:
            write_json(Path(out), answer | {"time": time.time()})
        if done is not None:
            done(answer)
    return answer


class _Work:
    """One evaluation: what its protocols share."""

    def __init__(self, opened: Opened, reader: Reader, settings: Evaluation, say: Say) -> None:
        self.opened, self.reader, self.settings, self.say = opened, reader, settings, say
        self.engine = Engine.local(settings.device, settings.precision)
        self.bootstrap = Bootstrap(settings.resamples, settings.seed)
        self.notes = [*opened.notes, *([] if opened.folder is None else unfinished(opened.folder))]
        self.pairs: dict[str, tuple[LabelledPair, list[str]]] = {}
        self.networks = self._networks()

    def _networks(self) -> dict[str, nn.Module]:
        held, asked = self.opened.networks, self.settings.network
        if asked is None or set(held) == {"backbone"}:
            return held
        if unknown := [name for name in asked if name not in held]:
            raise ConfigError(f"network: {self.opened.name} holds {' and '.join(held)}, not {', '.join(unknown)}")
        return {name: held[name] for name in held if name in asked}

    def run(self, protocol: str, data: str) -> Iterator[Record]:
        """The records of one protocol, network by network."""
        if protocol == "transfer":
            yield from self._transfer(data)
            return
        for name, backbone in self.networks.items():
            start = time.monotonic()
            self.say(f"{protocol}: {name} on {title(data)}")
            placed = self.engine.place(backbone)
            with frozen(placed) if protocol in FROZEN else evaluating(placed):
                common = self._card(protocol, name, state_hash(placed))
                findings, notes, images = self._measure(protocol, placed, data)
            seconds = time.monotonic() - start
            yield from _records(protocol, name, data, findings, [*self.notes, *notes], common | images, seconds)

    def _card(self, protocol: str, network: str, weights: str) -> dict[str, Any]:
        opened = self.opened
        return card(protocol, network, weights, opened.origin, opened.spec, self.reader, self.settings, self.engine)

    def _measure(self, protocol: str, backbone: nn.Module, data: str) -> tuple[list[Finding], list[str], dict[str, Any]]:
        """Findings, what any reader of them must know, and the card's part on the data."""
        section = getattr(self.settings, protocol)
        if protocol == "detection":
            from relssl.evaluation.detection import detection

            found = detection(
                backbone, data, self.opened.spec, self.reader, self.engine,
                settings=section, seed=self.settings.seed, say=self.say,
            )  # fmt: skip
            return found, [], {"images": found[0].details["fingerprints"]}
        pair, notes = self.pair(data)
        if protocol in ON_FEATURES:
            found, more, used = self._on_features(_function(ON_FEATURES[protocol]), backbone, pair, section)
            return found, notes + more, {"images": used}
        run = _function(ON_IMAGES[protocol])
        found = run(
            backbone, pair, self.reader, self.engine,
            settings=section, bootstrap=self.bootstrap, seed=self.settings.seed, say=self.say,
        )  # fmt: skip
        return found, notes, {"images": split(pair)}

    def pair(self, data: str) -> tuple[LabelledPair, list[str]]:
        """Both sides of a data set, and what any reader of a figure on them must know."""
        if data not in self.pairs:
            settings = self.settings
            root = settings.data_root or self.opened.data_root
            pair = LabelledPair.load(data, root, settings.images, settings.seed)
            notes = pair.notes()
            if self.opened.seen is not None and self.opened.seen == pair.uncut:
                notes.append("the test images are those that the run was pretrained on")
            self.pairs = {data: (pair, notes)}  # one at a time: sets may be large
        return self.pairs[data]

    def _on_features(
        self, run: Callable[..., list[Finding]], backbone: nn.Module, pair: LabelledPair, section: Any
    ) -> tuple[list[Finding], list[str], dict[str, Any]]:
        """Findings, notes, and the card's part on the data."""
        sides, notes, used = [], [], split(pair)
        # Where the test features lie, there is computed; MPS knows no fp64.
        device = self.engine.device if self.engine.device.type == "cuda" else torch.device("cpu")
        for side, images in (("bank", pair.bank), ("test", pair.test)):
            found = self._features(backbone, images)
            require_varied(found.vectors, f"{images.name}: the {side}'s")
            if found.bad:
                first = f"{shown(found.bad[0][0])}: {found.bad[0][1]}"
                notes.append(f"{len(found.bad)} of {len(images)} {side} images cannot be read, the first is {first}")
                used[side]["read"] = len(images) - len(found.bad)
            sides += [found.vectors.to(device) if side == "test" else found.vectors, _labels(images, found)]
        found_all = run(
            *sides, classes=pair.classes, settings=section, bootstrap=self.bootstrap, seed=self.settings.seed
        )  # fmt: skip
        return found_all, notes, used

    def _features(self, backbone: nn.Module, images: Images) -> Features:
        if self.settings.cache:
            return features.features(backbone, images, self.reader, self.engine)
        return extract(backbone, images, self.reader, self.engine.device, self.engine.autocast())

    def _transfer(self, data: str) -> Iterator[Record]:
        """A probe on each of several data sets, told by its customary figure, and their mean."""
        probe = _function(ON_FEATURES["probe"])
        for name, backbone in self.networks.items():
            start, placed = time.monotonic(), self.engine.place(backbone)
            outcomes: dict[str, Finding | str] = {}
            images: dict[str, Any] = {}
            with frozen(placed) as weights:
                common = self._card("transfer", name, weights)
                for one in filter(None, data.split(",")):
                    self.say(f"transfer: {name} on {title(one)}")
                    try:
                        pair, notes = self.pair(one)
                        (found,), more, used = self._on_features(probe, placed, pair, self.settings.probe)
                    except DataError as error:  # one set that is not at hand must not cost the others
                        outcomes[title(one)] = str(error)
                        continue
                    outcomes[title(one)] = dataclasses.replace(found, notes=(*notes, *more, *found.notes))
                    images[title(one)] = used
            seconds = time.monotonic() - start
            table = [transfer_table(outcomes)]
            yield from _records("transfer", name, data, table, self.notes, common | {"images": images}, seconds)


def _records(
    protocol: str, network: str, data: str, findings: list[Finding], notes: list[str], common: dict[str, Any], seconds: float
) -> Iterator[Record]:
    for finding in findings:
        plain = finding.plain()
        plain["notes"] = [*notes, *plain["notes"]]
        named = {"protocol": protocol, "network": network, "data": title(data)}
        # Which labelled images were trained on, where a protocol takes a part of them.
        parts = {key: finding.details[key] for key in ("split",) if key in finding.details}
        settings = common["settings"] | finding.setting | parts
        yield named | plain | {"seconds": round(seconds, 2), "card": common | {"settings": settings}}


def _labels(images: Images, found: Features) -> Tensor:
    known = images.targets if images.targets is not None else images.labels
    assert known is not None
    return torch.from_numpy(known[found.rows])


def _function(place: tuple[str, str]) -> Callable[..., list[Finding]]:
    """Imported only when it is asked for: some need scikit-learn, which takes seconds."""
    made: Callable[..., list[Finding]] = getattr(importlib.import_module(place[0]), place[1])
    return made
