from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

_DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_results", _DOCS / "write_results.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_results_page_is_up_to_date(writer: ModuleType) -> None:
    assert (_DOCS / "results.md").read_text() == writer.page(_DOCS / "results", _DOCS.parent / "results"), "run `make results`"


def test_tables_come_after_the_digits_and_unknown_fragments_last(writer: ModuleType, tmp_path: Path) -> None:
    fragments, results = tmp_path / "fragments", tmp_path / "results"
    fragments.mkdir()
    results.mkdir()
    for name, text in (("start-up", "## S\n"), ("new", "## N\n\n"), ("header", "# H\n"), ("digits", "## D\n")):
        (fragments / f"{name}.md").write_text(text)
    (results / "memory-small.md").write_text("# M\n\ntext\n\n```\n# no heading\n```\n")
    (results / "memory-paper.md").write_text("# P\n")
    (results / "memory-smoke.md").write_text("# smoke\n")
    (results / "memory-paper-rehearsal.md").write_text("# rehearsal\n")
    assert writer.page(fragments, results) == (
        "# H\n\n## D\n\n## What the paper compares\n\n### P\n\n### M\n\ntext\n\n```\n# no heading\n```\n\n## S\n\n## N\n"
    )
