"""Writes the tables of docs/recipes.md from the recipes; what stands above them there is written by hand."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from relssl.settings import recipes
from relssl.settings.reading import leaves
from relssl.settings.run import METHODS, Config, differences, resolve

PAGE = Path(__file__).parent / "recipes.md"
_MARK = "<!-- What follows is written by docs/write_recipes.py. -->\n"
_GROUPS = {"": "ReSSL, extended, and sets of one's own", "nips": "ReSSL, conference version", "solo": "ReSSL as in solo-learn"}
_GROUPS |= {name: f"Beside ReSSL: {traits.title}" for name, traits in METHODS.items() if name != "ressl"}
_ACROSS = 5  # recipes that stand side by side
# What every table tells, though it be the default.
_ALWAYS = {
    *("data", "backbone", "epochs", "batch_size", "encoder.predictor", "encoder.projector_hidden", "encoder.dim", "optimizer.lr"),
    *("method.memory_size", "method.teacher_momentum", "method.student_temperature", "method.teacher_temperature"),
    *("method.warmup", "optimizer.weight_decay", "optimizer.warmup_epochs"),
}
_NEVER = {"recipe", "backbone_args"}


def renewed(page: str) -> str:
    """The page with the tables of today's recipes below its mark."""
    parts = [page.partition(_MARK)[0] + _MARK]
    for folder, members in itertools.groupby(recipes.listing(), lambda recipe: recipe.name.rpartition("/")[0]):
        group = list(members)
        parts.append(f"\n## {_GROUPS[folder]}\n\n")
        parts += [_settings(group[start : start + _ACROSS]) + "\n" for start in range(0, len(group), _ACROSS)]
        parts.append("".join(f"- `{recipe.name}`: {recipe.about}. Source: {recipe.source}\n" for recipe in group))
    return "".join(parts)


def _settings(group: list[recipes.Recipe]) -> str:
    """A table of the settings that some recipes are told by: those above, and what differs from the defaults in any of them."""
    configs = [resolve({"recipe": recipe.name}) for recipe in group]
    told = _ALWAYS.union(*map(differences, configs)) - _NEVER
    rows = [["", *(f"`{recipe.name}`" for recipe in group)], ["---"] * (len(group) + 1)]
    rows += [[f"`{name}`", *(_cell(config, name) for config in configs)] for name in leaves(Config) if name in told]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(config: Config, name: str) -> str:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
