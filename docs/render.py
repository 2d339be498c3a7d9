"""Write the generated pages of the documentation: the tables of the recipes, and a page for each stored result of `relssl reproduce`.

python docs/render.py [FOLDER]        # default: docs/generated, which git ignores
"""

from __future__ import annotations

import itertools
import json
import sys
from operator import attrgetter
from pathlib import Path

from relssl.reproduction.results import page
from relssl.settings import recipes
from relssl.settings.reading import leaves
from relssl.settings.run import METHODS, Config, differences, resolve

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


def recipe_page() -> str:
    """Return the tables of all recipes, group by group, each with what the recipes are for and where their settings come from."""
    parts = ["# The recipes' settings\n\nWhich to take, and why they are so: [recipes.md](../recipes.md).\n"]
    for folder, members in itertools.groupby(map(recipes.find, recipes.NAMES), lambda recipe: recipe["name"].rpartition("/")[0]):
        group = list(members)
        parts.append(f"\n## {_GROUPS[folder]}\n\n")
        parts += [_settings(group[start : start + _ACROSS]) + "\n" for start in range(0, len(group), _ACROSS)]
        parts.append("".join(f"- `{recipe['name']}`: {recipe['about']}. Source: {recipe['source']}\n" for recipe in group))
    return "".join(parts)


def _settings(group: list[dict[str, str]]) -> str:
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
    stored = (json.loads(path.read_text()) for path in sorted((ROOT / "results").glob("*.json")))
    tables = [content for content in stored if isinstance(content, dict) and {"table", "scale", "rows"} <= content.keys()]
    return {table["name"]: page(table) for table in tables if table["scale"] != "smoke" and not table["rehearsal"]}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in ({"recipes": recipe_page()} | result_pages()).items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
        print(folder / f"{name}.md")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/generated")
