"""The model card: what a file holds, what it reached, how to load it; nothing of the machine it was made on."""

from __future__ import annotations

import contextlib
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
{%- if settings %}

{{ "All settings are in" if config else "If it was trained on other images than these, correct" }} `{{ settings }}`.
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
    title, tags = source.spec.name, ["timm", "transformers", "image-feature-extraction"]
    if config is None:
        about = f"Backbone from `{source.origin}`, imported; how it was trained is not known here."
        about += "\n" * bool(source.account) + "".join(f"\n- {line}" for line in source.account)
    else:
        traits = METHODS[config.method.name]
        tags += [config.method.name] if traits.labels else ["self-supervised-learning", config.method.name]
        title += f", pretrained with {traits.title}"
        unlabelled = f"No labels were used: {traits.title} ({traits.paper}), {traits.about}."
        about = (
            f"{source.network.capitalize()} backbone of {source.origin}, recipe `{config.recipe}`, {config.epochs} epochs on "
            f"{_images(source.folder)}`{config.data}`, seed {config.seed}. "
            f"{'It was trained on labels.' if traits.labels else unlabelled}"
        )
    data = ModelCardData(
        library_name="timm", pipeline_tag="image-feature-extraction", license="other", license_name="to-be-chosen", tags=tags
    )
    versions = f"relssl {__version__}, torch {torch.__version__}, timm {timm.__version__}, torchvision {torchvision.__version__}"
    names = {"title": title, "about": about, "view": source.spec.view, "config": config, "settings": settings, "file": file}
    names |= {"written": written, "parity": parity, "rows": _results(source), "versions": versions}
    return str(ModelCard.from_template(data, template_str=_TEMPLATE, **names))


def _json(text: str) -> Any:
    """Return the object in a text, or an empty one: what a run left may be torn, or of another version."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _images(folder: Path | None) -> str:
    """Return how many images the run learned from, as it noted, in words for the card."""
    file = folder / "environment.json" if folder is not None else None
    data = _json(file.read_text()).get("data") if file is not None and file.is_file() else None
    return f"{data['images']} images of " if isinstance(data, dict) and "images" in data else ""


def _results(source: Source) -> list[tuple[str, str]]:
    """List (what, figure) of what the run measured of this network: while it trained, and in evaluations since."""
    if source.folder is None or source.config is None:
        return []
    metrics, column = source.folder / "metrics.jsonl", "knn_top1" if source.network == "student" else "knn_teacher_top1"
    lines = map(_json, metrics.read_text().splitlines() if metrics.is_file() else ())
    measured = [row for row in lines if isinstance(row.get(column), (int, float))]
    rows = []
    if measured:
        k, temperature = source.config.log.knn
        figures = {f"kNN top-1 while training, k {k:g}, T {temperature:g}, at the end": measured[-1][column]}
        if len(measured) > 1 and measured[0].get("step") == 0:
            figures["the same, untrained"] = measured[0][column]
        if isinstance(raw := measured[0].get("knn_raw_pixels"), (int, float)):
            figures["the same, raw pixels"] = raw
        rows = [(what, f"{figure:.2f} %") for what, figure in figures.items()]
    for path in sorted((source.folder / "evaluations").glob("*.json")):
        evaluation = _json(path.read_text())
        data, listed = Path(str(evaluation.get("data", ""))).name, evaluation.get("results")
        for record in listed if isinstance(listed, list) else []:
            with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError):  # of another version
                rows += _evaluated(record, data, source)
    return rows


def _evaluated(record: Mapping[str, Any], data: str, source: Source) -> list[tuple[str, str]]:
    """Return the main figure of one evaluation, if it is of these weights: not of the other network, nor of another checkpoint."""
    checkpoint = ((record.get("card") or {}).get("source") or {}).get("checkpoint")
    if record["network"] != source.network or checkpoint not in (None, source.origin):
        return []
    main, settings = record["main"], "".join(f", {name} {value}" for name, value in (record.get("setting") or {}).items())
    what = f"{record['protocol']} {main}{f' on {data}' if data else ''}{settings}"
    notes, interval = "; ".join(map(str, record.get("notes") or ())), (record.get("intervals") or {}).get(main)
    figure = f"{record['figures'][main]:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")
    return [(f"{what} ({notes})" if notes else what, figure)]
