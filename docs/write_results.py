"""Joins docs/results/*.md and what `relssl reproduce` wrote to results/ into docs/results.md.

    python docs/write_results.py [--check]

`--check` writes nothing and fails if the page is not up to date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

_HERE = Path(__file__).parent
# The order of the page. A fragment that is not named here comes after these, by its name; tables of `reproduce` follow `digits`.
_ORDER = ("header", "digits", "TABLES", "predictor", "cifar10-5000", "folder", "speed", "evaluation", "exactness", "start-up")
_SCALES = ("paper", "small")


def page(fragments: Path, results: Path) -> str:
    """The whole page.

    Args:
        fragments: folder of the written parts, one topic a file.
        results: folder with TABLE-SCALE.md of `relssl reproduce`. Smoke tables and rehearsals, which say nothing, are left out.
    """
    parts = {path.stem: path.read_text() for path in sorted(fragments.glob("*.md"))}
    tables = [_lowered(path.read_text()) for scale in _SCALES for path in sorted(results.glob(f"*-{scale}.md"))]
    if tables:
        parts["TABLES"] = "\n".join(["## What the paper compares\n", *tables])
    names = [*_ORDER, *(name for name in parts if name not in _ORDER)]
    return "\n".join(parts[name].rstrip("\n") + "\n" for name in names if name in parts)


def _lowered(text: str) -> str:
    """Headings two levels down, as a table of its own is a part of the page; fenced lines stay as they are."""
    fenced, lines = False, []
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        lines.append(line if fenced else re.sub(r"^(#+ )", r"##\1", line))
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or check it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if the page is not up to date; write nothing")
    args = parser.parse_args(argv)
    target, made = _HERE / "results.md", page(_HERE / "results", _HERE.parent / "results")
    if not args.check:
        target.write_text(made)
    elif target.read_text() != made:
        print(f"{target}: is not up to date; run `make results`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
