"""The documentation is true: its commands are accepted, its links lead somewhere, and what it tells a contributor to do works."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import relssl
from relssl.cli import main
from relssl.settings import recipes
from relssl.settings.reading import leaves
from relssl.settings.run import Config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOB = "https://github.com/relssl/relssl/blob/main/"
TREE = "https://github.com/relssl/relssl/tree/main/"
RAW = "https://raw.githubusercontent.com/relssl/relssl/main/"


def commands(page: Path) -> list[list[str]]:
    """The words of every `relssl VERB ...` in the code blocks of a page, without comments; lines that end in a backslash go on."""
    fenced, found = False, []
    for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        fenced ^= line.startswith("```")
        if (fenced or line.startswith("    ")) and line.strip().startswith("relssl ") and "[" not in line.partition("#")[0]:
            found.append(shlex.split(line, comments=True)[1:])
    return [words[: words.index(">")] if ">" in words else words for words in found]


COMMANDS = {f"{page.name}: {' '.join(words)}": words for page in PAGES for words in commands(page)}


@pytest.mark.parametrize("name", [name for name, words in COMMANDS.items() if words[0] not in ("backbones", "reproduce")])
def test_commands_are_accepted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that train are checked by `validate`; the others may miss the run that they speak of, and nothing else."""
    verb, *words = COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    for number in range(8):
        for folder in ("photos/train/a", "photos/val/a"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / "docs/report-map.webp", tmp_path / folder / f"{number}.webp")
    if verb in ("pretrain", "estimate", "validate"):
        assert main(["validate", *words]) == 0, capsys.readouterr().err
        return
    code = main([verb, *("runs/photos" if word.startswith("timm:") else word for word in words)])  # downloads nothing
    error = capsys.readouterr().err
    assert code in (0, 2, 3, 4), error
    assert not re.search(r"\bunknown\b|not expected|needs a value|invalid choice|required", error), error


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_into_the_repository_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for base in (BLOB, TREE, RAW):
        for target in re.findall(rf"{re.escape(base)}([^)\s#]+)", text):
            assert (ROOT / target).exists(), target
    if page.parent == ROOT:  # shown by PyPI and in the site, where relative links lead nowhere
        assert all(link.startswith(("https://", "#")) for link in re.findall(r"\]\(([^)]+)\)", text))


def test_generated_pages_come_from_settings_recipes_and_stored_results() -> None:
    pages = runpy.run_path(str(ROOT / "docs/render.py"))["pages"]()
    assert all(f"- `{name}`: " in pages["recipes"] for name in recipes.NAMES)
    assert all(f"| `{name}` | " in pages["settings"] for name in leaves(Config))
    results = {name: text for name, text in pages.items() if "-" in name}
    assert "temperature-small" in results
    for name, text in results.items():
        content = json.loads((ROOT / f"results/{name}.json").read_text())
        assert all(f"| {row['label']} | " in text for row in content["rows"])
        published = [number for row in content["rows"] for number in row["paper"]]
        assert all(f"{number['value']:.2f} {number['figure']} ({number['sure']}" in text for number in published)
        assert all(f"| {each['says']} | " in text for each in content["expected"])


def test_versions_and_addresses_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == relssl.__version__
    assert citation["license"] == project["license"]
    assert citation["repository-code"] == project["urls"]["Homepage"]
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text())["site_url"] == project["urls"]["Documentation"]
    assert f"\n## {relssl.__version__} " in (ROOT / "CHANGELOG.md").read_text()


def test_a_method_is_added_as_the_guide_says(tmp_path: Path) -> None:
    package = tmp_path / "relssl"
    shutil.copytree(ROOT / "src/relssl", package, ignore=shutil.ignore_patterns("__pycache__"))
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    step, base, recipe = re.findall(r"^```(?:python|yaml)\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    (package / "method/align.py").write_text(step)
    (package / "settings/recipes/_align.yaml").write_text(base)
    (package / "settings/recipes/align").mkdir()
    (package / "settings/recipes/align/digits.yaml").write_text(recipe)
    words = "pretrain digits --method align --max_images 128 --epochs 1 --log.knn_every 0 --log.report false --engine.device cpu --engine.threads 1 --out run"
    env = {"PYTHONPATH": str(tmp_path), "PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "relssl", *words.split()]
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)  # where the copy of the package is
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "run/export/backbone.safetensors").exists()
