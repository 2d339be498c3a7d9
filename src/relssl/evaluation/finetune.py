"""A classifier on labelled images: trained together with a backbone, kept as a file, and applied to images."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from relssl.data.named import load
from relssl.engine import Engine
from relssl.errors import CheckpointError, ConfigError, NumericError
from relssl.evaluation.embed import TABLES, check_target, escaped
from relssl.evaluation.features import extract
from relssl.evaluation.heads import labels_of, linear_classifier, train_whole
from relssl.evaluation.metrics import Bootstrap
from relssl.evaluation.pairs import LabelledPair
from relssl.evaluation.result import Task, title
from relssl.files import replacing
from relssl.settings import parts
from relssl.settings.evaluation import FinetuneConfig, Tuning
from relssl.settings.reading import build
from relssl.weights import export
from relssl.weights.foreign import Reading
from relssl.weights.opening import Opened, is_exported, open_backbones, open_whole
from relssl.weights.spec import Backbone, BackboneSpec

_TOLERANCE = 1e-4  # of scores, relative to the largest: the library adds up in another order


@parts.takes_data
def finetune(
    source: str | Path,
    data: Any,
    out: str | Path,
    *,
    settings: Tuning | None = None,
    reading: Reading | None = None,
    say: Callable[[str], None] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Train a backbone and a linear classifier on it on labelled images, test them, and write both to a file that timm loads.

    Args:
        source, reading, say: as for `evaluate`.
        data: labelled images with a test part: a named set, a folder with train/CLASS/ and val/CLASS/, or a mapping of two sets.
        out: a `.safetensors` file; its settings with the names of the classes, `.yaml`, and its card, `.md`, come beside it.
        settings, overrides: `settings.evaluation.Tuning`, whole or by name, such as `epochs=20`.

    Returns:
        {"out", "classes": names, "images": trained on, "tested": images, "top1": percent, "interval": [low, high] of 95 %, "notes"}.

    Raises:
        ConfigError, DataError, CheckpointError, NumericError, StorageError: each with what to do about it.
    """
    settings, target, reading = settings or build(Tuning, overrides), Path(out), reading or Reading()
    export.check_target(target, "safetensors", Path(source))
    network, size = settings.network or reading.network, settings.size or reading.size
    opened = open_backbones(source, replace(reading, network=network, size=size))
    root = settings.data_root or (opened.config.data_root if opened.config else None)
    pair, engine = LabelledPair.load(str(data), root), Engine.local(settings.device, settings.precision)
    notes = [*opened.notes, *pair.notes(opened.run_data.get("fingerprint"))]
    labels_of(pair, "finetune")
    reader, arguments = opened.reader(settings.size, settings.workers), opened.spec.arguments
    if settings.size:  # which the shapes of weights would follow
        arguments = opened.spec.all_arguments()
    spec = replace(opened.spec, view=reader.view, arguments=arguments)
    task = Task(spec, reader, engine, Bootstrap(1000, settings.seed), say or (lambda line: None))
    names = [*map(escaped, pair.bank.classes or pair.test.classes or ())]
    names += map(str, range(len(names), pair.classes))
    start = linear_classifier(opened.backbone.num_features, len(names), settings.seed)
    _joined(spec, opened.backbone, start, {"classes": names})  # what no file could hold is refused before the work
    tuned, head, finding = train_whole(opened.backbone, pair, settings, task, "finetune")
    figures = finding.plain()
    facts = {"images": finding.details["images"], "tested": figures["tested"], "top1": figures["figures"]["top1"]}
    trained = {name: value for name, value in asdict(settings).items() if name in FinetuneConfig.__dataclass_fields__}
    how = f"seed {settings.seed}, {', '.join(f'{name} {value}' for name, value in trained.items())}"
    origin = f"{opened.header['network']} of {opened.header['origin']}"
    known = {"classes": names, "data": title(str(data)), "source": f"`{opened.name}` ({origin})", "training": how, **facts}
    whole, header = _joined(spec, tuned, head, known), {"network": "classifier", "origin": opened.header["origin"]}
    export.hand_over(Opened(target.name, {"backbone": whole}, whole.spec, header, {}), target, "safetensors", pair.test)
    interval, notes = figures["intervals"]["top1"], [*notes, *figures["notes"]]
    return {"out": str(target), "classes": names, **facts, "interval": interval, "notes": notes}


def _joined(spec: BackboneSpec, backbone: nn.Module, head: nn.Linear, classifier: Mapping[str, Any]) -> Backbone:
    """Return a backbone and a classifier on its features, which go to the CPU, as the one network that its library has for both.

    Raises:
        ConfigError: if the library's own classifier is not one linear layer on the features.
    """
    parts, whole = nn.Sequential(backbone, head).cpu().eval(), replace(spec, classifier=classifier)
    weights = dict(backbone.state_dict())
    layer = max(name.rpartition(".")[0] for name in whole.create().state_dict().keys() - weights.keys())
    weights |= {f"{layer}.{name}": value for name, value in head.state_dict().items()}
    images = torch.rand(2, spec.view.channels, *[spec.view.size] * 2, generator=torch.Generator().manual_seed(0))
    with contextlib.suppress(CheckpointError), torch.no_grad():  # other weights than a linear layer's
        network, scores = replace(whole, classifier={**classifier, "layer": layer}).load(weights, Path(spec.name)), parts(images)
        if bool((network(images) - scores).abs().max() <= _TOLERANCE * scores.abs().max()):
            return network
    raise ConfigError(
        f"backbone: the classifier that {spec.name} has in its library is not one linear layer on its features, so that no file could "
        "hold it; take another network, or measure this one by `relssl evaluate SOURCE DATA --protocol finetune`"
    )


@parts.takes_data
def predict(
    model: str | Path,
    data: Any,
    out: str | Path,
    *,
    split: str = "train",
    data_root: str | None = None,
    device: str = "auto",
    precision: str = "fp32",
    workers: int | None = None,
) -> dict[str, Any]:
    """Classify images by a file that `finetune` wrote, and write the name, class and score of each.

    Unreadable images are left out. The score is the class's share of the softmax, 0..1.

    Args:
        model: the `.safetensors` file, with its settings beside it.
        data: any data set, folder or list, by name or as an object.
        out: a `.csv` with the columns name, class, score; a `.parquet` with a column `scores` of all classes besides; or a `.npz` with
            `names`, `predicted` int64 [N], `scores` float32 [N, C] and `classes`, the names of the C columns. Its folder must exist.
        split: train, bank or test, for sets that have them.
        precision: fp32, bf16 or auto: bf16 where it is faster.

    Returns:
        {"out", "images", "classes", "bad": [(file, reason)], "notes": what to know of the images}.

    Raises:
        ConfigError, DataError, CheckpointError, NumericError, StorageError: each with what to do about it.
    """
    path, source = Path(out), Path(model)
    check_target(path)
    opened = open_whole(source) if source.is_file() and is_exported(source) else None
    if opened is None or not opened.spec.classes:
        raise ConfigError(f"{model}: is no classifier; `relssl finetune {model} DATA --out MODEL.safetensors` trains one")
    engine, classes = Engine.local(device, precision), np.array(opened.spec.classes)
    images = load(str(data), data_root, split)
    features = extract(engine.place(opened.backbone), images, opened.reader(workers=workers), engine)
    names = [images.source.name(row) for row in features.rows.tolist()]
    finite = features.vectors.isfinite().all(dim=1)
    if not bool(finite.all()):
        raise NumericError(f"{names[int(finite.int().argmin())]!r}: its scores hold NaN or Inf; check the weights")
    scores, kind = features.vectors.softmax(dim=1).numpy(), path.suffix.lower()
    best, bad = scores.argmax(axis=1), [*images.bad, *features.bad]
    with replacing(path, needed=scores.nbytes) as file:
        if kind == ".npz":
            np.savez(file, names=np.array(names), predicted=best, scores=scores, classes=classes)
        else:
            columns = {"name": [*map(escaped, names)], "class": classes[best].tolist(), "score": scores.max(axis=1)}
            TABLES[kind](file, columns, "scores", scores[:, :0] if kind == ".csv" else scores)
    return {"out": str(out), "images": len(names), "classes": classes.tolist(), "bad": bad, "notes": list(images.notes)}
