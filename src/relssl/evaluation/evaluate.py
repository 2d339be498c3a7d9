"""Measure what a backbone learned: protocols by name, one at a time, on one data set or, for transfer, on several."""

import functools
import importlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from relssl.data.folder import shown
from relssl.data.images import Images
from relssl.data.named import SETS
from relssl.engine import usual_torch
from relssl.errors import ConfigError, DataError, StorageError
from relssl.evaluation.features import LabelledFeatures, cached, evaluating, extract, state_hash
from relssl.evaluation.metrics import Interval
from relssl.evaluation.pairs import LabelledPair, labels_of
from relssl.evaluation.result import Finding, Protocol, Record, Task, card, file_name, title, writable
from relssl.files import read_json, write_json
from relssl.method.backbones import feature_width
from relssl.settings import parts
from relssl.settings.evaluation import Evaluation, expand, read_settings
from relssl.weights.foreign import Reading
from relssl.weights.opening import Opened, open_backbones

# A protocol's settings are the section of `settings.evaluation` that bears its name.
PROTOCOLS = {
    "knn": Protocol("knn.knn", swept=("k", "temperature")),
    "probe": Protocol("probe.probe"),
    "lowshot": Protocol("lowshot.lowshot", swept=("shots",)),
    "retrieval": Protocol("knn.retrieval", swept=("at",)),
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


@usual_torch()
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
        data: a data set with labels, by name or as an object, default the run's own. For `transfer` several, joined by commas; for
            `detection` a folder in COCO's or VOC's layout.
        settings: all settings, instead of `overrides`.
        reading: how to read another program's file.
        out: JSON file for all results, besides those that are kept in a run folder, or instead where that cannot be written.
        say: takes lines of progress.
        done: takes the results so far after each protocol, so that an error in a later one costs nothing.
        overrides: settings by name: `protocol="knn,probe"`, `images=(5000, 1000)`, `linear={"epochs": 10}`.

    Returns:
        {"source", "data", "results": [{"protocol", "network", "data", "setting", "main", "figures", "intervals", "notes",
        "details", "seconds", "card"}, ...]}; of a run also written to RUN/evaluations, a file for each protocol.

    Raises ConfigError, DataError, CheckpointError, NumericError, StorageError, each with what to do about it.
    """
    settings = expand(settings or read_settings(overrides))
    say, out = say or (lambda line: None), Path(out).absolute() if out else None
    if out and (not out.parent.is_dir() or out.is_dir()):
        raise ConfigError(f"out: {out} must be a JSON file in a folder that exists")
    opened = _open(source, reading or Reading(), settings)
    data = str(data or (opened.config.data if opened.config else ""))
    if not data:
        raise ConfigError(f"data: {opened.name} does not say what it was trained on; name the labelled data to evaluate it on")
    _check_data(settings, data)
    folder = _results_folder(opened.folder, out, say)
    work = _Work(settings, Task.of(opened, settings, say, settings.resamples))
    notes, answer = list(opened.notes), Record(source=opened.name, data=title(data), results=[])
    if opened.folder and read_json(opened.folder / "status.json").get("state", "complete") != "complete":
        notes.append("the run is not complete; its newest checkpoint was measured, which the card names")
    if any(PROTOCOLS[name].takes != "scenes" and name != "transfer" for name in settings.protocol):
        work.pair(data)  # whatever is wrong with the data shows before hours of another protocol
    for name in dict.fromkeys(settings.protocol):
        records = list[Record]()
        for network, backbone in opened.networks.items():
            about = {"network": network, "source": opened.origin}
            records += [each | {"notes": [*notes, *each["notes"]]} for each in work.records(name, backbone, data, about)]
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
    names = set(settings.network or ())
    network = min(names) if len(names) == 1 else reading.network
    opened = open_backbones(source, replace(reading, network=network, size=settings.size or reading.size))
    if opened.folder is not None and (unknown := names - opened.networks.keys()):
        raise ConfigError(f"network: {opened.name} holds {' and '.join(opened.networks)}, not {', '.join(sorted(unknown))}")
    if opened.folder is None and len(names) > 1:
        raise ConfigError(f"network: {opened.name} is read one network at a time; name one of {', '.join(sorted(names))}")
    for backbone in opened.networks.values() if settings.size else ():
        feature_width(backbone, settings.size or 0)
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
    names = [title(one) for one in named_sets(data)]
    others = [protocol for protocol in settings.protocol if protocol != "transfer"]
    if others and len(names) > 1 and not Path(data).exists():
        raise ConfigError(f"protocol: {others[0]} takes one data set, got {len(names)}; several are for transfer alone")
    if "transfer" in settings.protocol and (twice := {name for name in names if names.count(name) > 1}):
        raise ConfigError(f"transfer: {min(twice)} names more than one data set; their results would mix, so rename a folder")


def named_sets(data: str) -> list[str]:
    """Return the data sets that DATA names, joined by commas, of which one may stand between the columns of a set of the Hub."""
    names = list[str]()
    for each in filter(None, data.split(",")):
        inside = names and names[-1].startswith("hf:") and "#" in names[-1]
        if inside and not (each in SETS or ":" in each or os.path.exists(each)):
            names[-1] += f",{each}"
        else:
            names.append(each)
    return names


class _Work:
    """The work that the protocols of one evaluation share."""

    def __init__(self, settings: Evaluation, task: Task) -> None:
        self.settings, self.task = settings, task
        # One at a time: sets may be large.
        self.pair = functools.lru_cache(maxsize=1)(functools.partial(task.pair, at_most=settings.images))

    def records(self, name: str, backbone: nn.Module, data: str, about: Record) -> Iterator[Record]:
        """Yield the records of one protocol on one network; `about` it is for the cards."""
        protocol, section = PROTOCOLS[name], getattr(self.settings, "probe" if name == "transfer" else name)
        start, backbone = time.monotonic(), self.task.engine.place(backbone)
        self.task.say(f"{name}: {about['network']} on {title(data)}")
        common = card(name, protocol, section, self.task) | about | {"weights": state_hash(backbone)}
        with evaluating(backbone):
            run = self._transfer if name == "transfer" else self._findings
            findings, common["images"] = run(protocol, section, backbone, data)
        # If batch norm counted the images it sees, each batch would measure another network, and no figure would show it.
        if state_hash(backbone) != common["weights"]:
            raise AssertionError(f"{name} changed the backbone's weights or batch-norm statistics")
        seconds = round(time.monotonic() - start, 2)
        for finding in findings:
            # Which labelled images were trained on, where a protocol takes a part of them.
            split = {key: value for key, value in finding.details.items() if key == "split"}
            settings = {"settings": common["settings"] | finding.setting | split}
            record = {"protocol": name, "network": about["network"], "data": title(data), "seconds": seconds}
            yield record | finding.plain() | {"card": common | settings}

    def _findings(self, protocol: Protocol, section: Any, backbone: nn.Module, data: str) -> Measured:
        module, function = protocol.place.split(".")
        run: Callable[..., list[Finding]] = getattr(importlib.import_module(f"relssl.evaluation.{module}"), function)
        if protocol.takes == "scenes":
            findings = run(backbone, data, section, self.task)
            return findings, findings[0].details["fingerprints"]
        pair, notes = self.pair(data)
        used = pair.card()
        if protocol.takes == "images":
            findings = run(backbone, pair, section, self.task)
        else:
            sides, faults = self._features(backbone, pair, used)
            notes = [*dict.fromkeys([*notes, *faults])]
            findings = run(sides, section, self.task.bootstrap)
        return [replace(finding, notes=(*notes, *finding.notes)) for finding in findings], used

    def _features(self, backbone: nn.Module, pair: LabelledPair, used: Record) -> tuple[LabelledFeatures, list[str]]:
        """Return the features of a pair, whose card gets how many images could be read if some could not, and notes on these."""
        take, task = functools.partial(cached, say=self.task.say) if self.settings.cache else extract, self.task
        notes, vectors, read = list[str](), list[Tensor](), list[Images]()
        for side, images, _ in pair.sides:
            features = take(backbone, images, task.reader, task.engine)
            if bad := features.bad:
                first = f"the first is {shown(bad[0][0])}: {bad[0][1]}"
                notes.append(f"{len(bad)} of {len(images)} {side} images cannot be read, {first}")
                used[side]["read"] = len(features.rows)
            vectors.append(features.vectors)
            read.append(images.subset(features.rows) if bad else images)
        classes, pair = pair.classes, replace(pair, bank=read[0], test=read[1])
        # Protocols compute where the test features are, in fp64, which MPS has not.
        device = task.engine.device if task.engine.device.type == "cuda" else "cpu"
        sides = LabelledFeatures(vectors[0], labels_of(pair.bank), vectors[1].to(device), labels_of(pair.test), classes)
        sides.check()
        return sides, [*notes, *pair.gaps()]

    def _transfer(self, protocol: Protocol, section: Any, backbone: nn.Module, data: str) -> Measured:
        """Run the protocol on each of several data sets; one finding has the customary figure of each, and their `mean`.

        Its details hold {"rows": [...]}, one a set: {"data", "metric", "value", "interval"} with the interval [low, high] or None, or
        {"data", "not_run": reason}. The mean has no interval, as the sets were drawn apart. DataError if there is no figure.
        """
        images, rows, notes, missing = Record(), list[Record](), list[str](), list[str]()
        figures, intervals = dict[str, float](), dict[str, Interval]()
        for name, one in {title(one): one for one in named_sets(data)}.items():
            try:
                (finding,), images[name] = self._findings(protocol, section, backbone, one)
            except DataError as error:  # one set that is not at hand must not cost the others
                reason = str(error).removeprefix(f"{name}: ")  # which our errors begin with
                rows.append({"data": name, "not_run": reason})
                missing.append(f"{name} was not run: {reason}")
                continue
            metric = CUSTOMARY.get(name, finding.main)
            figures[name], interval = round(finding.figures[metric], 4), finding.plain()["intervals"].get(metric)
            rows.append({"data": name, "metric": metric, "value": figures[name], "interval": interval})
            intervals |= {name: tuple(interval)} if interval else {}
            notes += [f"{name}: {note}" for note in finding.notes]
        if not figures:
            raise DataError(f"transfer: ran on none of the data sets ({'; '.join(missing) or 'none was named'})")
        if missing:
            subset = f"the mean is over {len(figures)} of {len(rows)} data sets; do not compare it with one over others"
            notes = [subset, *missing, *notes]
        setting, mean = {"sets": [row["data"] for row in rows]}, {"mean": sum(figures.values()) / len(figures)}
        return [Finding(setting, "mean", figures | mean, intervals, tuple(notes), {"rows": rows})], images
