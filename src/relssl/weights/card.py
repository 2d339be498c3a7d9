"""The model card: what a file holds, what it reached, how to load it; nothing of the machine it was made on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from huggingface_hub import ModelCard, ModelCardData

from relssl import __version__
from relssl.settings.recipes import public_name
from relssl.settings.run import METHODS, Config
from relssl.weights.parity import Parity
from relssl.weights.writers import Source, Written

_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ about }}

Input: {{ 'RGB' if view.channels == 3 else 'grey' }}, {{ view.size }} x {{ view.size }}, mean {{ view.mean | list }}, std \
{{ view.std | list }} of values in 0..1; {{ view }}.
{%- if settings and config %}

All settings are in `{{ settings }}`.
{%- elif settings %}

If it was trained on other images than these, correct `{{ settings }}`.
{%- endif %}

## How to load it
{% for snippet in written.snippets %}
With {{ snippet.title }}:

{% for line in snippet.lines(file) %}    {{ line }}
{% endfor %}    {{ snippet.use }}  # [N, {{ view.channels }}, S, S] to [N, F]
{% endfor %}
{% if written.notes %}{{ written.notes | replace('{file}', file) }}

{% endif -%}
Checked when it was written: on {{ parity.images }}, the features differ from the backbone's by {{ '%.2g' | format(parity.difference) }} \
at most ({{ '%.2g' | format(parity.relative) }} of the largest), in a batch and one alone, loaded with {{ parity.checked | join(', ') }}.
{% if rows %}
## Results

| what | figure |
|---|---|
{% for what, figure in rows %}| {{ what }} | {{ figure }} |
{% endfor %}{% endif %}
## Licence

{{ '' if config else "The licence of their source applies to the weights. " }}The weights belong to whoever trained them, who decides \
how they may be used; the data may set limits of its own. relssl itself is Apache-2.0.

Written by {{ versions }}.
"""


def public(config: Config) -> Config:
    """Return the settings without paths: those of this machine are nobody else's business."""
    data, recipe = Path(config.data).resolve().name or "folder", public_name(config.recipe) or "folder"
    loader = dataclasses.replace(config.loader, cache_folder=None)
    return dataclasses.replace(config, out=None, data_root=None, data=data, recipe=recipe, loader=loader)


def card(source: Source, written: Written, parity: Parity, file: str, settings: str | None) -> str:
    """Return the card of a file or folder `file`, as Markdown; `settings` names the file beside it that holds all settings."""
    config = None if source.config is None or source.network == "backbone" else public(source.config)
    tags = ["timm", "transformers", "image-feature-extraction"]
    if config is None:
        title = source.spec.name
        about = f"Backbone from `{source.origin}`, imported; how it was trained is not known here."
        about += "".join(f"\n\n- {line}" if i == 0 else f"\n- {line}" for i, line in enumerate(source.account))
    else:
        traits, count = METHODS[config.method.name], _images(source.folder)
        tags += [config.method.name] if traits.labels else ["self-supervised-learning", config.method.name]
        title = f"{source.spec.name}, pretrained with {traits.title}"
        labels = (
            "It was trained on labels."
            if traits.labels
            else f"No labels were used: {traits.title} ({traits.paper}), {traits.about}."
        )
        about = (
            f"{source.network.capitalize()} backbone of {source.origin}, recipe `{config.recipe}`, {config.epochs} epochs on "
            f"{f'{count} images of ' if count else ''}`{config.data}`, seed {config.seed}. {labels}"
        )
    data = ModelCardData(
        library_name="timm", pipeline_tag="image-feature-extraction", license="other", license_name="to-be-chosen", tags=tags
    )
    versions = f"relssl {__version__}, torch {torch.__version__}, timm {timm.__version__}, torchvision {torchvision.__version__}"
    names = {"title": title, "about": about, "view": source.spec.view, "config": config, "settings": settings, "file": file}
    names |= {"written": written, "parity": parity, "rows": results(source), "versions": versions}
    return str(ModelCard.from_template(data, template_str=_TEMPLATE, **names))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _images(folder: Path | None) -> int | None:
    """Return how many images the run learned from, as it noted."""
    try:
        return int(_json(folder / "environment.json")["data"]["images"]) if folder is not None else None
    except (LookupError, TypeError, ValueError):
        return None


def results(source: Source) -> list[tuple[str, str]]:
    """List (what, figure) of what the run measured of this network: while it trained, and in evaluations since."""
    if source.folder is None or source.config is None:
        return []
    rows = _while_training(source.folder / "metrics.jsonl", source.network, source.config.log.knn)
    for path in sorted((source.folder / "evaluations").glob("*.json")):
        evaluation = _json(path)
        listed = evaluation.get("results") if isinstance(evaluation, Mapping) else None
        for record in listed if isinstance(listed, list) else []:
            try:
                rows += _evaluated(record, Path(str(evaluation.get("data", ""))).name, source)
            except (LookupError, TypeError, ValueError, AttributeError):  # of another version
                continue
    return rows


def _while_training(path: Path, network: str, knn: tuple[int, float]) -> list[tuple[str, str]]:
    column = "knn_top1" if network == "student" else "knn_teacher_top1"
    measured = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            continue
        if isinstance(row, dict) and isinstance(row.get(column), (int, float)):
            measured.append(row)
    if not measured:
        return []
    what, several = f"kNN top-1 while training, k {knn[0]:g}, T {knn[1]:g}", len(measured) > 1
    rows = [(f"{what}, at the end" if several else what, f"{measured[-1][column]:.2f} %")]
    if several and measured[0].get("step") == 0:
        rows.append(("the same, untrained", f"{measured[0][column]:.2f} %"))
    raw = measured[0].get("knn_raw_pixels")
    return [*rows, ("the same, raw pixels", f"{raw:.2f} %")] if isinstance(raw, (int, float)) else rows


def _evaluated(record: Mapping[str, Any], data: str, source: Source) -> list[tuple[str, str]]:
    """Return the main figure of one evaluation, if it is of these weights: not of the other network, nor of another checkpoint."""
    checkpoint = ((record.get("card") or {}).get("source") or {}).get("checkpoint")
    if record["network"] != source.network or checkpoint not in (None, source.origin):
        return []
    main = record["main"]
    interval = (record.get("intervals") or {}).get(main)
    where = (f" on {data}" if data else "") + "".join(
        f", {name} {value}" for name, value in (record.get("setting") or {}).items()
    )
    notes = "; ".join(map(str, record.get("notes") or ()))
    figure = f"{record['figures'][main]:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")
    return [(f"{record['protocol']} {main}{where}" + (f" ({notes})" if notes else ""), figure)]
