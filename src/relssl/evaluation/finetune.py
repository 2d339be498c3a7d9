"""A classifier on labelled images: trained together with a backbone, and kept as a file."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from relssl.engine import usual_torch
from relssl.errors import CheckpointError, ConfigError
from relssl.evaluation.embed import escaped
from relssl.evaluation.heads import linear_classifier, train_whole
from relssl.evaluation.result import Task, title, writable
from relssl.files import storing
from relssl.settings import parts
from relssl.settings.evaluation import FinetuneConfig, Tuning
from relssl.settings.reading import build
from relssl.weights import export
from relssl.weights.foreign import Reading
from relssl.weights.opening import Opened, open_backbones
from relssl.weights.spec import Backbone, BackboneSpec

_TOLERANCE = 1e-4  # of scores, relative to the largest: the library adds up in another order


@usual_torch()
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

    Raises ConfigError, DataError, CheckpointError, NumericError, StorageError, each with what to do about it.
    """
    settings, target, reading = settings or build(Tuning, overrides), Path(out), reading or Reading()
    export.check_target(target, "safetensors", Path(source))
    with storing(target):
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
    writable(target.absolute().parent)
    network, size = settings.network or reading.network, settings.size or reading.size
    opened = open_backbones(source, replace(reading, network=network, size=size))
    task = Task.of(opened, settings, say)
    pair, notes = task.pair(str(data))
    # The shapes of weights would follow another size.
    arguments = opened.spec.all_arguments() if settings.size else opened.spec.arguments
    spec = replace(opened.spec, view=task.reader.view, arguments=arguments)
    names = [escaped(name) for name in pair.bank.classes or pair.test.classes or ()]
    names += map(str, range(len(names), pair.classes))
    start = linear_classifier(opened.backbone.num_features, len(names), settings.seed)
    _joined(spec, opened.backbone, start, {"classes": names})  # what no file could hold is refused before the work
    tuned, head, finding = train_whole(opened.backbone, pair, settings, task, "finetune")
    origin, result = opened.header["origin"], finding.plain()
    trained = ", ".join(f"{name} {getattr(settings, name)}" for name in FinetuneConfig.__dataclass_fields__)
    facts = {"images": finding.details["images"], "tested": result["tested"], "top1": result["figures"]["top1"]}
    source = f"`{opened.name}` ({opened.header['network']} of {origin})"
    training = f"seed {settings.seed}, {trained}"
    classifier = {"classes": names, "data": title(str(data)), "source": source, "training": training, **facts}
    whole = _joined(spec, tuned, head, classifier)
    handed = Opened(target.name, {"backbone": whole}, whole.spec, {"network": "classifier", "origin": origin}, {})
    export.hand_over(handed, target, "safetensors", pair.test)
    notes = [*opened.notes, *notes, *result["notes"]]
    return {"out": str(target), "classes": names, **facts, "interval": result["intervals"]["top1"], "notes": notes}


def _joined(spec: BackboneSpec, backbone: nn.Module, head: nn.Linear, classifier: Mapping[str, Any]) -> Backbone:
    """Return a backbone and a classifier on its features, which go to the CPU, as the one network that its library has for both;
    ConfigError if the library's own classifier is not one linear layer on the features."""
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
