"""The generated pages of the documentation: tables of all settings and recipes, and a page for each stored result of `relssl reproduce`.

mkdocs calls `on_config` and `on_files` (mkdocs.yml); no page is written to the disk but those of the site.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

from relssl.reproduction.results import curves, page
from relssl.settings import recipes
from relssl.settings.methods import METHODS
from relssl.settings.reading import leaves, words
from relssl.settings.run import Config, differences, resolve

ROOT = Path(__file__).parents[1]
_GROUPS = {"": "ReSSL, extended, and sets of one's own", "nips": "ReSSL, conference version", "solo": "ReSSL as in solo-learn"}
_GROUPS |= {name: f"Beside ReSSL: {traits.title}" for name, traits in METHODS.items() if name != "ressl"}
_ACROSS = 5  # recipes that stand side by side
# Settings that every table shows, even where they are the defaults.
_ALWAYS = {
    *("data", "backbone", "epochs", "batch_size", "encoder.predictor", "encoder.projector_hidden", "encoder.dim", "optimizer.lr"),
    *("method.memory_size", "method.teacher_momentum", "method.student_temperature", "method.teacher_temperature"),
    *("method.warmup", "optimizer.weight_decay", "optimizer.warmup_epochs"),
}
_NEVER = {"recipe", "backbone_args"}
_SETTINGS = """# Settings

Every setting of a run is an option of `relssl pretrain` (`--optimizer.lr 0.06`), a key of a YAML file (`--config FILE`), and a keyword of
`relssl.pretrain` (`optimizer={"lr": 0.06}`). The defaults here are those without a recipe, and every run has one, which changes them:
[recipes side by side](recipes.md). `relssl validate DATA --show` prints what a run would have, before few images make some of
it smaller. In options `-` and `_` are the same.
"""
_WORDS = """
## Short names

Settings that are known by other names as well, on the command line, in YAML and in Python:

| setting | also |
| --- | --- |
"""


def pages() -> dict[str, str]:
    """Return {name: page in Markdown} of all generated pages."""
    return {"settings": settings_page(), "recipes": recipe_page()} | result_pages()


def settings_page() -> str:
    """Return the tables of all settings, section by section, with what they are where no recipe says otherwise."""
    parts = [_SETTINGS]
    for section, names in itertools.groupby(leaves(Config).items(), lambda each: each[0].rpartition(".")[0]):
        parts.append(f"\n## {section or 'The run'}\n\n| setting | default | what it is |\n| --- | --- | --- |\n")
        for name, field in names:
            about = (field.description or "").replace("|", "\\|").replace("*", "\\*")
            parts.append(f"| `{name}` | `{json.dumps(field.default)}` | {about} |\n")
    known = {name: words(name) for name in leaves(Config)}
    parts.append(_WORDS)
    parts += [f"| `{name}` | {', '.join(f'`{word}`' for word in others)} |\n" for name, others in known.items() if others]
    return "".join(parts)


def recipe_page() -> str:
    """Return the tables of all recipes, group by group, each with what the recipes are for and where their settings come from."""
    parts = ["# The recipes' settings\n\nWhich to take, and why they are so: [recipes](../recipes.md).\n"]
    for folder, members in itertools.groupby(map(recipes.find, recipes.NAMES), lambda recipe: recipe["name"].rpartition("/")[0]):
        group = list(members)
        parts.append(f"\n## {_GROUPS[folder]}\n\n")
        parts += [_recipe_table(group[start : start + _ACROSS]) + "\n" for start in range(0, len(group), _ACROSS)]
        parts.append("".join(f"- `{recipe['name']}`: {recipe['about']}. Source: {recipe['source']}\n" for recipe in group))
    return "".join(parts)


def _recipe_table(group: list[dict[str, str]]) -> str:
    """Return a table of the settings above, and of all that differ from the defaults in any of the recipes."""
    configs = [resolve({"recipe": recipe["name"]}) for recipe in group]
    shown = _ALWAYS.union(*map(differences, configs)) - _NEVER
    rows = [["", *(f"`{recipe['name']}`" for recipe in group)], ["---"] * (len(group) + 1)]
    for name in (name for name in leaves(Config) if name in shown):
        values = map(attrgetter(name), configs)
        rows.append([f"`{name}`", *(value if isinstance(value, str) else json.dumps(value) for value in values)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def result_pages() -> dict[str, str]:
    """Return {TABLE-SCALE: page} of the stored results, without smoke tables and rehearsals, which say nothing."""
    return {table["name"]: page(table) for table in _results()}


def _results() -> Iterator[dict[str, Any]]:
    stored = (json.loads(path.read_text()) for path in sorted((ROOT / "results").glob("*.json")))
    tables = (each for each in stored if isinstance(each, dict) and {"table", "scale", "rows"} <= each.keys())
    yield from (table for table in tables if table["scale"] != "smoke" and not table["rehearsal"])


def on_config(config: Any) -> Any:
    """Add the pages of results to the navigation, below the one that sums them up."""
    results = [{"Summary": "results.md"}, *({table["title"]: f"tables/{table['name']}.md"} for table in _results())]
    config.nav = [{"Results": results} if "Results" in entry else entry for entry in config.nav]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, and those that lie in the root of the repository."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, f"tables/{name}.md", content=text))
    for table in _results():
        if drawing := curves(table):
            files.append(File.generated(config, f"tables/{table['name']}.svg", content=drawing))
    for name in ("CONTRIBUTING", "CHANGELOG"):
        text = (ROOT / f"{name}.md").read_text(encoding="utf-8")
        place = {"CONTRIBUTING": "contributing.md", "CHANGELOG": "changes.md"}[name]
        files.append(File.generated(config, place, content=text))
    return files
