"""Measure what a backbone learned: protocols by name, one at a time, on one data set or, for transfer, on several."""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from relssl.data.folder import shown
from relssl.errors import ConfigError, DataError, StorageError
from relssl.evaluation.features import Features, LabelledFeatures, cached, evaluating, extract, state_hash
from relssl.evaluation.metrics import Interval
from relssl.evaluation.result import Finding, Protocol, Record, Task, card, file_name, title, writable
from relssl.files import read_json, write_json
from relssl.settings import parts
from relssl.settings.evaluation import Evaluation, read_settings
from relssl.weights.foreign import Reading
from relssl.weights.opening import Opened, open_backbones

# A protocol's settings are the section of `settings.evaluation` that bears its name.
PROTOCOLS = {
    "knn": Protocol("knn.knn", swept=("k", "temperature")),
    "probe": Protocol("probe.probe"),
    "lowshot": Protocol("lowshot.lowshot", swept=("shots",)),
    "retrieval": Protocol("retrieval.retrieval", swept=("at",)),
    "transfer": Protocol("probe.probe"),
    "linear": Protocol("heads.linear", "images", swept=("lr",)),
    "finetune": Protocol("heads.finetune", "images", trains=True),
    "semi": Protocol("heads.semi", "images", swept=("fractions",), trains=True),
    "detection": Protocol("detection.detection", "scenes", trains=True),
}
# The figure by which transfer quotes a data set, where it is not the probe's main one: Kornblith et al. 2019, "Do Better ImageNet
# Models Transfer Better?", table 1, take the mean over the classes where these are of unequal size.
CUSTOMARY = dict.fromkeys(("flowers102", "oxford-pets", "fgvc-aircraft"), "mean_per_class")

Say = Callable[[str], None]
Measured = tuple[list[Finding], Record]  # findings, and the card's part on the data


@parts.takes_data
def evaluate(
    source: str | Path,
    data: Any = None,
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
        data: a data set with labels, by name or as an object, default the run's own. For `transfer` several, joined by commas; for `detection` a folder
            in COCO's or VOC's layout.
        settings: all settings, instead of `overrides`.
        reading: how to read another program's file.
        out: JSON file for all results, besides those that are kept in a run folder, or instead where that cannot be written.
        say: takes lines of progress.
        done: takes the results so far after each protocol, so that an error in a later one costs nothing.
        overrides: settings by name: `protocol="knn,probe"`, `images=(5000, 1000)`, `linear={"epochs": 10}`.

    Returns:
        {"source", "data", "results": [{"protocol", "network", "data", "setting", "main", "figures", "intervals", "notes",
        "details", "seconds", "card"}, ...]}; of a run also written to RUN/evaluations, a file for each protocol.

    Raises:
        ConfigError, DataError, CheckpointError, NumericError, StorageError: each with what to do about it.
    """
    settings, say, out = settings or read_settings(overrides), say or (lambda line: None), Path(out).absolute() if out else None
    if out and (not out.parent.is_dir() or out.is_dir()):
        raise ConfigError(f"out: {out} must be a JSON file in a folder that exists")
    opened = _open(source, reading or Reading(), settings)
    data = str(data or (opened.config.data if opened.config else ""))
    if not data:
        raise ConfigError(f"data: {opened.name} does not say what it was trained on; name the labelled data to evaluate it on")
    _check_data(settings, data)
    folder = _results_folder(opened.folder, out, say)
    evaluation = _Evaluation(opened, settings, say)
    answer: Record = {"source": opened.name, "data": title(data), "results": []}
    if any(PROTOCOLS[name].takes != "scenes" and name != "transfer" for name in settings.protocol):
        evaluation.pair(data)  # whatever is wrong with the data shows before hours of another protocol
    for name in dict.fromkeys(settings.protocol):
        records = list(evaluation.records(name, data))
        answer["results"] += records
        if folder is not None:
            write_json(folder / file_name(name, data, settings), answer | {"results": records, "time": time.time()})
        if out:
            write_json(out, answer | {"time": time.time()})
        if done is not None:
            done(answer)
    return answer


def _open(source: str | Path, reading: Reading, settings: Evaluation) -> Opened:
    """Open the backbones that are wanted, or all of a run."""
    wanted = set(settings.network or ())
    network = min(wanted) if len(wanted) == 1 else reading.network
    opened = open_backbones(source, replace(reading, network=network, size=settings.size or reading.size))
    if opened.folder is not None and (unknown := wanted - opened.networks.keys()):
        raise ConfigError(f"network: {opened.name} holds {' and '.join(opened.networks)}, not {', '.join(sorted(unknown))}")
    return opened


def _results_folder(run: Path | None, out: Path | None, say: Say) -> Path | None:
    """Return where a run's results go, None if to `out` alone; StorageError, before the work, if they cannot be written."""
    if out:
        writable(out.parent)
    try:
        return run and writable(run / "evaluations")
    except StorageError as error:
        if not out:
            raise StorageError(f"{error}, or give --out FILE") from error
        say(f"{run}/evaluations: cannot be written; the results go to {out} alone")
        return None


def _check_data(settings: Evaluation, data: str) -> None:
    """Several data sets are for `transfer` alone, which names its rows after them; cuts of the data are not for `detection`."""
    for name, instead in (("images", "max_images"), ("size", "min_size")):
        if "detection" in settings.protocol and getattr(settings, name) is not None:
            raise ConfigError(f"{name}: is not for detection; use detection.{instead}")
    names = [title(one) for one in data.split(",") if one]
    others = [protocol for protocol in settings.protocol if protocol != "transfer"]
    if others and len(names) > 1 and not Path(data).exists():
        raise ConfigError(f"protocol: {others[0]} takes one data set, got {len(names)}; several are for transfer alone")
    if "transfer" in settings.protocol and (twice := {name for name in names if names.count(name) > 1}):
        raise ConfigError(f"transfer: {min(twice)} names more than one data set; their results would mix, so rename a folder")


class _Evaluation:
    """The work that the protocols of one evaluation share."""

    def __init__(self, opened: Opened, settings: Evaluation, say: Say) -> None:
        self.opened, self.settings, self.task = opened, settings, Task.of(opened, settings, say, settings.resamples)
        self.notes = [*opened.notes, *_unfinished(opened.folder)]
        # One at a time: sets may be large.
        self.pair = functools.lru_cache(maxsize=1)(functools.partial(self.task.pair, at_most=settings.images))

    def records(self, name: str, data: str) -> Iterator[Record]:
        """Yield the records of one protocol, network by network."""
        protocol, section = PROTOCOLS[name], getattr(self.settings, "probe" if name == "transfer" else name)
        measure = self._transfer if name == "transfer" else self._findings
        common = card(name, protocol, section, self.task)
        for network, backbone in self.opened.networks.items():
            start = time.monotonic()
            self.task.say(f"{name}: {network} on {title(data)}")
            backbone = self.task.engine.place(backbone)
            common |= {"network": network, "weights": state_hash(backbone), "source": self.opened.origin}
            with evaluating(backbone):
                findings, common["images"] = measure(protocol, section, backbone, data)
            # If batch norm counted the images it sees, each batch would measure another network, and no figure would show it.
            if state_hash(backbone) != common["weights"]:
                raise AssertionError(f"{name} changed the backbone's weights or batch-norm statistics")
            record = {"protocol": name, "network": network, "data": title(data), "seconds": round(time.monotonic() - start, 2)}
            for finding in findings:
                plain = finding.plain()
                plain["notes"] = [*self.notes, *plain["notes"]]
                settings = common["settings"] | finding.setting
                if "split" in finding.details:  # which labelled images were trained on, where a protocol takes a part of them
                    settings["split"] = finding.details["split"]
                yield record | plain | {"card": common | {"settings": settings}}

    def _findings(self, protocol: Protocol, section: Any, backbone: nn.Module, data: str) -> Measured:
        module, function = protocol.place.split(".")
        run: Callable[..., list[Finding]] = getattr(importlib.import_module(f"relssl.evaluation.{module}"), function)
        if protocol.takes == "scenes":
            findings = run(backbone, data, section, self.task)
            return findings, findings[0].details["fingerprints"]
        pair, (*notes,) = self.pair(data)
        used = pair.card()
        if protocol.takes == "images":
            findings = run(backbone, pair, section, self.task)
        else:
            take, both = functools.partial(cached, say=self.task.say) if self.settings.cache else extract, list[Features]()
            for side, images, _ in pair.sides:
                both.append(features := take(backbone, images, self.task.reader, self.task.engine))
                if bad := features.bad:
                    first = f"the first is {shown(bad[0][0])}: {bad[0][1]}"
                    notes.append(f"{len(bad)} of {len(images)} {side} images cannot be read, {first}")
                    used[side]["read"] = len(features.rows)
            sides = LabelledFeatures.of(pair, *both)
            notes += sides.check()
            if (
                self.task.engine.device.type == "cuda"
            ):  # protocols compute where the test features are, in fp64, which MPS has not
                sides = replace(sides, test=sides.test.to(self.task.engine.device))
            findings = run(sides, section, self.task.bootstrap)
        return [replace(finding, notes=(*notes, *finding.notes)) for finding in findings], used

    def _transfer(self, protocol: Protocol, section: Any, backbone: nn.Module, data: str) -> Measured:
        """Run the protocol on each of several data sets."""
        outcomes, images = dict[str, Finding | str](), Record()
        for one in filter(None, data.split(",")):
            try:
                (outcomes[title(one)],), images[title(one)] = self._findings(protocol, section, backbone, one)
            except DataError as error:  # one set that is not at hand must not cost the others
                outcomes[title(one)] = str(error)
        return [transfer_table(outcomes)], images


def transfer_table(outcomes: Mapping[str, Finding | str]) -> Finding:
    """Join the findings on several data sets, or the reasons why there is none, in one: the customary figure of each, and `mean`.

    `details` holds {"rows": [...]}, one a set: {"data", "metric", "value", "interval"} with the interval [low, high] or None, or
    {"data", "not_run": reason}. The mean has no interval, as the sets were drawn apart. DataError if there is no finding.
    """
    rows, notes, figures, intervals = list[Record](), list[str](), dict[str, float](), dict[str, Interval]()
    for name, outcome in outcomes.items():
        if isinstance(outcome, str):
            rows.append({"data": name, "not_run": outcome.removeprefix(f"{name}: ")})  # which our errors begin with
            continue
        plain, metric = outcome.plain(), CUSTOMARY.get(name, outcome.main)
        figures[name], interval = plain["figures"][metric], plain["intervals"].get(metric)
        rows.append({"data": name, "metric": metric, "value": figures[name], "interval": interval})
        intervals |= {name: tuple(interval)} if interval else {}
        notes += [f"{name}: {note}" for note in outcome.notes]
    missing = [not_run(row) for row in rows if "not_run" in row]
    if not figures:
        raise DataError(f"transfer: ran on none of the data sets ({'; '.join(missing) or 'none was named'})")
    if missing:
        subset = f"the mean is over {len(figures)} of {len(rows)} data sets; do not compare it with one over others"
        notes = [subset, *missing, *notes]
    mean = sum(figures.values()) / len(figures)
    return Finding({"sets": list(outcomes)}, "mean", figures | {"mean": mean}, intervals, tuple(notes), {"rows": rows})


def not_run(row: Mapping[str, Any]) -> str:
    """Return why there is no figure of a row's data set, as a sentence."""
    return f"{row['data']} was not run: {row['not_run']}"


def _unfinished(run: Path | None) -> list[str]:
    """Return a note for a run that may still be at work, or was stopped."""
    complete = run is None or read_json(run / "status.json").get("state", "complete") == "complete"
    return [] if complete else ["the run is not complete; its newest checkpoint was measured, which the card names"]
