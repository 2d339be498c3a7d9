"""The model card: what a file holds, what it reached, how to load it; nothing of the machine it was made on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from relssl import __version__
from relssl.settings.recipes import public_name
from relssl.settings.run import METHODS, Config, Traits
from relssl.weights.parity import Parity
from relssl.weights.writers import Source, Written

_FRONT = """---
library_name: timm
pipeline_tag: image-feature-extraction
license: other
license_name: to-be-chosen
tags:
- timm
- transformers
- image-feature-extraction
{learned}---
"""


def _front(source: Source) -> str:
    method = source.config.method.name if source.config else ""
    ways = [] if not method else [method] if METHODS[method].labels else ["self-supervised-learning", method]
    return _FRONT.format(learned="".join(f"- {way}\n" for way in ways))


def public(config: Config) -> Config:
    """The configuration without paths: those of this machine are nobody else's business."""
    data, recipe = Path(config.data).resolve().name or "folder", public_name(config.recipe) or "folder"
    loader = dataclasses.replace(config.loader, cache_folder=None)
    return dataclasses.replace(config, out=None, data_root=None, data=data, recipe=recipe, loader=loader)


def card(source: Source, written: Written, parity: Parity, file: str, settings: str | None) -> str:
    """The card of a file or folder `file`, as Markdown; `settings` names the file beside it that holds all settings."""
    view, channels = source.spec.view, source.spec.view.channels
    config = source.config and public(source.config)
    title = METHODS[config.method.name].title if config else ""
    parts = [
        f"# {source.spec.name}" + (f", pretrained with {title}" if source.network != "backbone" else ""),
        _what(source, config),
        f"Input: {'RGB' if channels == 3 else 'grey'}, {source.size} x {source.size}, mean {list(view.mean)}, std {list(view.std)} "
        f"of values in 0..1; {view}.",
    ]
    if settings and source.network == "backbone":
        parts.append(f"Where it was trained on images made otherwise, correct `{settings}`.")
    elif settings:
        parts.append(f"All settings are in `{settings}`.")
    parts += ["## How to load it", *_loading(written, file, channels)]
    parts.append(
        f"Checked as it was written: on {parity.images}, the features differ from the backbone's by {parity.difference:.2g} "
        f"at most ({parity.relative:.2g} of the largest), together and one alone, loaded with {', '.join(parity.checked)}."
    )
    rows = results(source)
    if rows:
        parts += [
            "## Results",
            "\n".join(["| what | figure |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in rows)]),
        ]
    parts += [
        "## Licence",
        ("Their source's applies to the weights. " if source.network == "backbone" else "")
        + "The weights belong to whoever trained them, who decides how they may be used; the data may set limits of its own. "
        "relssl itself is Apache-2.0.",
        f"Made with {_versions()}.",
    ]
    front = "" if isinstance(written.data, bytes) else _front(source)
    return front + "\n\n".join(parts) + "\n"


def _what(source: Source, config: Config | None) -> str:
    if source.network == "backbone" or config is None:
        lines = [f"Backbone from `{source.origin}`, imported; how it was trained is not known here.", *source.account]
        return "\n- ".join(lines).replace("\n-", "\n\n-", 1)
    count = _count(source.folder)
    of = f"{count} images of " if count else ""
    return (
        f"{source.network.capitalize()} backbone of {source.origin}, recipe `{config.recipe}`, {config.epochs} epochs on "
        f"{of}`{config.data}`, seed {config.seed}. {_learned(METHODS[config.method.name])}"
    )


def _learned(traits: Traits) -> str:
    if traits.labels:
        return "It was trained on labels."
    return f"No labels were used: {traits.title} ({traits.paper}), {traits.about}."


def _loading(written: Written, file: str, channels: int) -> list[str]:
    parts = []
    for snippet in written.snippets:
        lines = [*snippet.lines(file), f"{snippet.use}  # [N, {channels}, S, S] to [N, F]"]
        parts += [f"With {snippet.title}:", "\n".join("    " + line for line in lines)]
    return [*parts, written.notes(file)] if written.notes else parts


def _count(folder: Path | None) -> int | None:
    """How many images the run learned from, as it noted."""
    found = _json(folder / "environment.json") if folder is not None else None
    data = found.get("data") if isinstance(found, Mapping) else None
    count = data.get("images") if isinstance(data, Mapping) else None
    return count if isinstance(count, int) else None


def results(source: Source) -> list[tuple[str, str]]:
    """(what, figure) of what the run measured about this network: while it trained, and in evaluations since."""
    if source.folder is None:
        return []
    rows = _while_training(source, source.folder / "metrics.jsonl")
    for path in sorted((source.folder / "evaluations").glob("*.json")):
        found = _json(path)
        if isinstance(found, Mapping):
            rows += _evaluated(found, source)
    return rows


def _while_training(source: Source, path: Path) -> list[tuple[str, str]]:
    column = "knn_top1" if source.network == "student" else "knn_teacher_top1"
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    measured = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            continue
        if isinstance(row, dict) and isinstance(row.get(column), (int, float)):
            measured.append(row)
    if not measured:
        return []
    assert source.config is not None
    k, temperature = source.config.log.knn
    what = f"kNN top-1 while training, k {k:g}, T {temperature:g}"
    rows = [(f"{what}, at the end" if len(measured) > 1 else what, f"{measured[-1][column]:.2f} %")]
    if len(measured) > 1 and measured[0].get("step") == 0:
        rows.append(("the same, untrained", f"{measured[0][column]:.2f} %"))
    raw = measured[0].get("knn_raw_pixels")
    return [*rows, ("the same, raw pixels", f"{raw:.2f} %")] if isinstance(raw, (int, float)) else rows


def _evaluated(found: Mapping[str, Any], source: Source) -> list[tuple[str, str]]:
    """The main figures of one evaluation of these weights; those of another checkpoint, and what is not understood, are left out."""
    listed, rows = found.get("results"), []
    data = Path(str(found.get("data", ""))).name
    for one in listed if isinstance(listed, list) else []:
        if not isinstance(one, Mapping) or one.get("network") != source.network or not isinstance(one.get("figures"), Mapping):
            continue
        if _checkpoint(one) not in (None, source.origin):
            continue
        main = one.get("main")
        value, interval = one["figures"].get(main), (one.get("intervals") or {}).get(main)
        if isinstance(value, (int, float)):
            setting = ", ".join(f"{name} {part}" for name, part in (one.get("setting") or {}).items())
            where = f" on {data}" if data else ""
            spread = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
            said = "; ".join(map(str, one.get("notes") or ()))
            what = f"{one.get('protocol')} {main}{where}" + (f", {setting}" if setting else "") + (f" ({said})" if said else "")
            rows.append((what, f"{value:.2f}{spread}"))
    return rows


def _checkpoint(record: Mapping[str, Any]) -> Any:
    """The checkpoint that a result is of, if it says so."""
    of = record.get("card")
    origin = of.get("source") if isinstance(of, Mapping) else None
    return origin.get("checkpoint") if isinstance(origin, Mapping) else None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _versions() -> str:
    found = [f"relssl {__version__}"]
    for name in ("torch", "timm", "torchvision"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
