"""Measure what a backbone learned: protocols by name, one at a time, on one data set or, for transfer, on several."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from relssl.data.folder import shown
from relssl.engine import Engine
from relssl.errors import ConfigError, DataError
from relssl.evaluation.features import LabelledFeatures, cached, evaluating, extract, frozen, state_hash
from relssl.evaluation.heads import Task
from relssl.evaluation.metrics import Bootstrap
from relssl.evaluation.pairs import LabelledPair
from relssl.evaluation.result import Finding, Protocol, Record, card, check_out, file_name, results_folder, split, title
from relssl.files import write_json
from relssl.settings.evaluation import Evaluation, read_settings
from relssl.weights.foreign import Reading
from relssl.weights.opening import Opened, open_backbones

# A protocol's settings are the section of `settings.evaluation` that bears its name.
PROTOCOLS = {
    "knn": Protocol("relssl.evaluation.knn:knn", swept=("k", "temperature")),
    "probe": Protocol("relssl.evaluation.probe:probe"),
    "lowshot": Protocol("relssl.evaluation.lowshot:lowshot", swept=("shots",)),
    "retrieval": Protocol("relssl.evaluation.retrieval:retrieval", swept=("at",)),
    "transfer": Protocol("relssl.evaluation.probe:probe"),
    "linear": Protocol("relssl.evaluation.heads:linear", "images", swept=("lr",)),
    "finetune": Protocol("relssl.evaluation.heads:finetune", "images", trains=True),
    "semi": Protocol("relssl.evaluation.heads:semi", "images", swept=("fractions",), trains=True),
    "detection": Protocol(
        "relssl.evaluation.detection:detection", "scenes", trains=True, packages=("torchmetrics", "pycocotools")
    ),
}
# The figure by which transfer quotes a data set, where it is not the probe's main one: Kornblith et al. 2019, "Do Better ImageNet
# Models Transfer Better?", table 1, take the mean over the classes where these are of unequal size.
CUSTOMARY = dict.fromkeys(("flowers102", "oxford-pets", "fgvc-aircraft"), "mean_per_class")

Say = Callable[[str], None]


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
) -> Record:
    """Measure what a backbone learned.

    Args:
        source: a run folder, an exported file, another program's file, or a timm name; see `open_backbones`.
        data: a data set with labels, default the run's own. For `transfer` several, joined by commas; for `detection` a folder
            in COCO's or VOC's layout.
        settings: all settings, instead of `overrides`.
        reading: how to read another program's file.
        out: JSON file for all results, besides those that are kept in a run folder, or instead where that cannot be written.
        say: takes lines of progress.
        done: takes the results so far after each protocol, so that an error in a later one costs nothing.
        overrides: settings by name: `protocol="knn,probe"`, `images=(5000, 1000)`, `linear={"epochs": 10}`.

    Returns:
        {"source", "data", "results": [{"protocol", "network", "data", "setting", "main", "figures", "intervals", "notes",
        "details", "seconds", "card"}, ...]}; of a run also written to RUN/evaluations/PROTOCOL-DATA.json, whose name tells a cut and a
        size as well.

    Raises:
        ConfigError, DataError, CheckpointError, NumericError, StorageError: each with what to do about it.
    """
    settings = settings or read_settings(overrides)
    say = say or (lambda line: None)
    if out is not None:
        check_out(Path(out))
    reading = reading or Reading()
    network = settings.network[0] if settings.network and len(settings.network) == 1 else reading.network
    opened = open_backbones(source, dataclasses.replace(reading, network=network, size=settings.size or reading.size))
    data = data or opened.data
    if data is None:
        raise ConfigError(f"data: {opened.name} does not say what it was trained on; name the labelled data to evaluate it on")
    _check_data(settings, data)
    folder = opened.folder and results_folder(opened.folder, out, say)
    evaluation = _Evaluation(opened, settings, say)
    answer: Record = {"source": opened.name, "data": title(data), "results": []}
    if any(PROTOCOLS[name].takes != "scenes" and name != "transfer" for name in settings.protocol):
        evaluation.pair(data)  # whatever is wrong with the data shows before hours of another protocol
    for name in dict.fromkeys(settings.protocol):
        records = list(evaluation.records(name, data))
        answer["results"] += records
        if folder is not None:
            write_json(folder / file_name(name, data, settings), answer | {"results": records, "time": time.time()})
        if out is not None:
            write_json(Path(out), answer | {"time": time.time()})
        if done is not None:
            done(answer)
    return answer


def _check_data(settings: Evaluation, data: str) -> None:
    """Several data sets are for `transfer` alone, which names its rows after them; cuts of the data are not for `detection`."""
    for name, instead in (("images", "max_images"), ("size", "min_size")):
        if "detection" in settings.protocol and getattr(settings, name) is not None:
            raise ConfigError(f"{name}: is not for detection; use detection.{instead}")
    names = [title(one) for one in data.split(",") if one]
    for protocol in settings.protocol:
        if protocol != "transfer" and len(names) > 1 and not Path(data).exists():
            raise ConfigError(f"protocol: {protocol} takes one data set, got {len(names)}; several are for transfer alone")
        if protocol == "transfer" and len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"transfer: {twice} names more than one data set; results are told apart by it, so rename a folder")


class _Evaluation:
    """What the protocols of one evaluation share."""

    def __init__(self, opened: Opened, settings: Evaluation, say: Say) -> None:
        self.opened, self.settings, self.say = opened, settings, say
        self.reader = opened.reader(settings.size, settings.workers)
        self.engine = Engine.local(settings.device, settings.precision)
        self.bootstrap = Bootstrap(settings.resamples, settings.seed)
        self.notes = [*opened.notes, *_unfinished(opened.folder)]
        self._pair: tuple[str, LabelledPair, list[str]] | None = None
        self.networks, wanted = opened.networks, settings.network
        if wanted is not None and set(self.networks) != {"backbone"}:
            if unknown := [name for name in wanted if name not in self.networks]:
                raise ConfigError(f"network: {opened.name} holds {' and '.join(self.networks)}, not {', '.join(unknown)}")
            self.networks = {name: network for name, network in self.networks.items() if name in wanted}

    def records(self, name: str, data: str) -> Iterator[Record]:
        """Yield the records of one protocol, network by network."""
        protocol, settings = PROTOCOLS[name], self.settings
        section = getattr(settings, "probe" if name == "transfer" else name)
        measure = self._transfer if name == "transfer" else self._findings
        common = card(name, protocol, section, settings, self.opened.spec, self.reader, self.engine)
        for network, backbone in self.networks.items():
            start = time.monotonic()
            self.say(f"{name}: {network} on {title(data)}")
            backbone = self.engine.place(backbone)
            common |= {"network": network, "weights": state_hash(backbone), "source": self.opened.origin}
            with evaluating(backbone) if protocol.trains else frozen(backbone):
                findings, notes, common["images"] = measure(protocol, section, backbone, data)
            seconds = round(time.monotonic() - start, 2)
            for finding in findings:
                plain = finding.plain()
                plain["notes"] = [*self.notes, *notes, *plain["notes"]]
                # Which labelled images were trained on, where a protocol takes a part of them.
                parts = {key: finding.details[key] for key in ("split",) if key in finding.details}
                own = common | {"settings": common["settings"] | finding.setting | parts}
                yield {"protocol": name, "network": network, "data": title(data), **plain, "seconds": seconds, "card": own}

    def pair(self, data: str) -> tuple[LabelledPair, list[str]]:
        """Return both sides of a data set, and what a reader of any figure on them must know."""
        if self._pair is None or self._pair[0] != data:  # one at a time: sets may be large
            settings = self.settings
            pair = LabelledPair.load(data, settings.data_root or self.opened.data_root, settings.images, settings.seed)
            notes = pair.notes()
            if self.opened.seen is not None and self.opened.seen == pair.uncut:
                notes.append("the test images are those that the run was pretrained on")
            self._pair = data, pair, notes
        return self._pair[1:]

    def _findings(
        self, protocol: Protocol, section: Any, backbone: nn.Module, data: str
    ) -> tuple[list[Finding], list[str], Record]:
        """Return findings, what a reader of any of them must know, and the card's part on the data."""
        common: dict[str, Any] = {"settings": section, "seed": self.settings.seed}
        if protocol.takes == "scenes":
            findings = protocol.run(backbone, data, self.opened.spec, self.reader, self.engine, say=self.say, **common)
            return findings, [], findings[0].details["fingerprints"]
        pair, pair_notes = self.pair(data)
        notes, used = list(pair_notes), split(pair)
        if protocol.takes == "images":
            task = Task(pair, self.reader, self.engine, self.bootstrap, self.settings.seed, self.say)
            return protocol.run(backbone, task, section), notes, used
        vectors, labels = {}, {}
        for side, images in (("bank", pair.bank), ("test", pair.test)):
            features = (cached if self.settings.cache else extract)(backbone, images, self.reader, self.engine)
            if features.bad:
                first = f"{shown(features.bad[0][0])}: {features.bad[0][1]}"
                notes.append(f"{len(features.bad)} of {len(images)} {side} images cannot be read, the first is {first}")
                used[side]["read"] = len(features.rows)
            known = images.labels if images.targets is None else images.targets
            assert known is not None
            vectors[side], labels[side] = features.vectors, torch.from_numpy(known[features.rows])
        # MPS has no fp64, which protocols compute in.
        test = vectors["test"].to(self.engine.device) if self.engine.device.type == "cuda" else vectors["test"]
        sides = LabelledFeatures(vectors["bank"], labels["bank"], test, labels["test"], pair.classes)
        notes += sides.check()
        return protocol.run(sides, bootstrap=self.bootstrap, **common), notes, used

    def _transfer(
        self, protocol: Protocol, section: Any, backbone: nn.Module, data: str
    ) -> tuple[list[Finding], list[str], Record]:
        """Run the protocol on each of several data sets; the same as `_findings`, of the table of all."""
        outcomes: dict[str, Finding | str] = {}
        images: Record = {}
        for one in filter(None, data.split(",")):
            try:
                (finding,), notes, used = self._findings(protocol, section, backbone, one)
            except DataError as error:  # one set that is not at hand must not cost the others
                outcomes[title(one)] = str(error)
                continue
            outcomes[title(one)] = dataclasses.replace(finding, notes=(*notes, *finding.notes))
            images[title(one)] = used
        return [transfer_table(outcomes)], [], images


def transfer_table(outcomes: Mapping[str, Finding | str]) -> Finding:
    """Join the findings on several data sets, each by its customary figure, in one.

    Args:
        outcomes: by data set, the finding there, or the reason why there is none; in the order wanted.

    Returns:
        A finding whose figures are `mean`, over the sets that ran, and that of each set by its name, in percent. `details` holds
        {"rows": [...]}, one a set: {"data", "metric", "value", "interval"} with the interval [low, high] or None, or {"data",
        "not_run": reason}. The mean has no interval: the sets were drawn apart.

    Raises:
        DataError: if there is no finding, with all the reasons.
    """
    rows: list[Record] = []
    for name, outcome in outcomes.items():
        if isinstance(outcome, str):
            rows.append({"data": name, "not_run": outcome.removeprefix(f"{name}: ")})  # which our errors begin with
            continue
        metric = CUSTOMARY.get(name, outcome.main)
        interval = [round(bound, 4) for bound in outcome.intervals[metric]] if metric in outcome.intervals else None
        rows.append({"data": name, "metric": metric, "value": round(outcome.figures[metric], 4), "interval": interval})
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
    """Return why there is no figure of a row's data set, as a sentence."""
    return f"{row['data']} was not run: {row['not_run']}"


def _unfinished(run: Path | None) -> list[str]:
    """Return a note for a run that may still be at work, or was stopped."""
    try:
        complete = run is None or json.loads((run / "status.json").read_bytes())["state"] == "complete"
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return [] if complete else ["the run is not complete; its newest checkpoint was measured, which the card names"]
