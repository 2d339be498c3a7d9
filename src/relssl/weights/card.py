"""The model card: what a file holds, what it reached, how to load it; nothing of the machine it was made on."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from huggingface_hub import ModelCard, ModelCardData

import relssl
from relssl.files import read_rows
from relssl.settings import parts
from relssl.settings.recipes import public_name
from relssl.settings.run import Config, derive
from relssl.weights.opening import Opened
from relssl.weights.writers import Parity, Written

_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}
{% if classifier %}
Backbone from {{ classifier.source }} with a classifier, trained together on {{ classifier.images }} labelled images of \
`{{ classifier.data }}`: {{ classifier.training }}. Classes, in the order of the scores:

`{{ classifier.classes | join('`, `') }}`
{%- elif config %}
{{ network | capitalize }} backbone of {{ origin }}, recipe `{{ config.recipe }}`, {{ config.epochs }} epochs\
{{ ' or %d steps' % config.max_steps if config.max_steps }} on {{ '%s images of ' % images if images }}`{{ config.data }}`, seed {{ config.seed }}. \
{% if traits.labels %}It was trained on labels.{% else %}No labels were used: {{ traits.title }}{{ ' (%s)' % traits.paper if traits.paper }}, \
{{ traits.about }}.{% endif %}{% if config.start %} It went on from the weights of `{{ config.start }}`.{% endif %}\
{% if config.teacher %} A frozen teacher gave the relations: `{{ config.teacher }}`.{% endif %}
{%- else %}
Backbone from `{{ origin }}`, imported; how it was trained is not known here.
{% for line in report %}
- {{ line }}
{%- endfor %}
{%- endif %}

Input: {{ {1: 'grey', 3: 'RGB'}.get(view.channels, '%d channels' % view.channels) }}, {{ view.size }} x {{ view.size }}, mean {{ view.mean | list }}, std \
{{ view.std | list }} of values in 0..1; {{ view }}.
{%- if settings %}

{{ "All settings are in" if config or classifier else "If it was trained on other images than these, correct" }} `{{ settings }}`.
{%- endif %}

## How to load it
{% for snippet in written.snippets %}
With {{ snippet.title }}:

{% for line in snippet.lines(file, hub) %}    {{ line }}
{% endfor %}    {{ snippet.use }}  # [N, {{ view.channels }}, S, S] to [N, {{ 'C' if classifier else 'F' }}]
{% endfor %}
{% if written.notes %}{{ written.notes | replace('{file}', file) }}

{% endif -%}
Checked when it was written: on {{ parity.images }}, the {{ 'scores' if classifier else 'features' }} differ from the network's by {{ '%.2g' | format(parity.difference) }} \
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
    given: dict[str, Any] = {name: Path(source).name for name in ("start", "teacher") if (source := getattr(config, name))}
    return dataclasses.replace(config, out=None, data_root=None, data=data, recipe=recipe, loader=loader, **given)


def card(source: Opened, written: Written, parity: Parity, file: str, settings: str | None, hub: str | None = None) -> str:
    """Return the card of a file or folder, as Markdown.

    Args:
        file: its name.
        settings: the name of the file beside it that holds all settings.
        hub: the repository that it will lie in.
    """
    spec, header, classifier, traits = source.spec, source.header, source.spec.classifier, None
    config = None if source.config is None or header["network"] == "backbone" else public(source.config)
    use, known = "image-classification" if classifier else "image-feature-extraction", spec.library is not None
    title, tags = parts.title(spec.name), [*(["timm", "transformers"] if known else []), use]
    if classifier:
        title += f", trained to classify {classifier['data']}"
    elif config:
        traits = derive(config).traits
        title += f", pretrained with {traits.title}"
        tags += [*([] if traits.labels else ["self-supervised-learning"]), parts.title(config.method.name)]
    licence = {"license": "other", "license_name": "to-be-chosen"}
    data = ModelCardData(library_name="timm" if known else None, pipeline_tag=use, tags=tags, **licence)
    facts: dict[str, Any] = {
        **{"title": title, "classifier": classifier, "config": config, "traits": traits, "view": spec.view, **header},
        **{"images": source.run_data.get("images"), "report": source.report.lines() if source.report else ()},
        **{"written": written, "parity": parity, "file": file, "settings": settings, "hub": hub, "rows": _results(source)},
        "versions": ", ".join(f"{each.__name__} {each.__version__}" for each in (relssl, torch, timm, torchvision)),
    }
    return str(ModelCard.from_template(data, template_str=_TEMPLATE, **facts))


def _results(source: Opened) -> list[tuple[str, str]]:
    """List (what, figure) of what the run measured of this network: while it trained, and in evaluations since."""
    if classifier := source.spec.classifier:
        return [(f"top-1 on {classifier['tested']} test images of {classifier['data']}", f"{float(classifier['top1']):.2f} %")]
    if source.folder is None or source.config is None:
        return []
    network, (k, temperature), figures = source.header["network"], source.config.log.knn, {}
    column = "knn_top1" if network == "student" else "knn_teacher_top1"
    if measured := [row for row in read_rows(source.folder / "metrics.jsonl") if row.get(column) is not None]:
        figures[f"kNN top-1 while training, k {k:g}, T {temperature:g}, at the end"] = measured[-1][column]
        if len(measured) > 1 and measured[0]["step"] == 0:
            figures["the same, given weights" if source.config.start else "the same, untrained"] = measured[0][column]
        if (raw := measured[0].get("knn_raw_pixels")) is not None:
            figures["the same, raw pixels"] = raw
    rows = [(what, f"{figure:.2f} %") for what, figure in figures.items()]
    for path in sorted((source.folder / "evaluations").glob("*.json")):
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):  # torn, or of another version
            evaluation = json.loads(path.read_text())
            for record in evaluation["results"]:
                if (record["network"], record["card"]["source"]["checkpoint"]) == (network, source.header["origin"]):
                    main, interval = record["main"], record["intervals"].get(record["main"])
                    notes = "; ".join(note.partition(", the first ")[0] for note in record["notes"])  # which names a file
                    setting = "".join(f", {name} {value}" for name, value in record["setting"].items()) + f" ({notes})" * bool(
                        notes
                    )
                    figure = f"{record['figures'][main]:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")
                    rows.append((f"{record['protocol']} {main} on {Path(evaluation['data']).name}{setting}", figure))
    return rows
