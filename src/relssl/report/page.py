"""The report of runs: one page that opens without a network."""

import base64
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from relssl import __version__
from relssl.engine import usual_torch
from relssl.errors import Interrupted, RelsslError
from relssl.files import duration, to_json, write_file
from relssl.report.facts import differences, run_facts
from relssl.report.gallery import Facts, gallery
from relssl.report.pictures import Sheet
from relssl.weights.opening import load_run

_SCRIPTS = ("pictures.js", "charts.js", "images.js", "explorer.js")


@usual_torch()
def write_report(*runs: str | Path, out: str | Path | None = None, say: Callable[[str], None] | None = None) -> Path:
    """Write the report of one run, or of several side by side.

    Args:
        runs: run folders, complete or not; pictures are of the first.
        out: the file to write, over whatever lies there; default: report.html in the folder of a single run, else here.
        say: takes lines of progress.

    Returns:
        The file.

    Raises:
        ConfigError: if a folder holds no run. StorageError: if the file cannot be written.
    """
    folders = [Path(run) for run in runs]
    known = [run_facts(folder) | {"name": name} for folder, name in zip(folders, _names(folders), strict=True)]
    shown, sheets, missing = None, dict[str, Sheet](), known[0]["missing"]
    try:
        shown, sheets = gallery(load_run(folders[0]), say or (lambda line: None))
        if not shown["relations"]:
            missing.append("relations: the method has none of a teacher to a memory, or balances them")
    except Interrupted:  # an earlier page stays
        raise
    except RelsslError as error:
        missing.append(f"no pictures, map and explorer: {error}")
    except Exception as error:  # networks, data and views are others' code, and the rest of the page needs none of them
        missing.append(f"no pictures, map and explorer: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    target = Path(out) if out is not None else (folders[0] if len(folders) == 1 else Path()) / "report.html"
    write_file(target, _page(known, shown, sheets).encode("utf-8", "backslashreplace"))
    return target


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names, with as many of those above them as tell them apart."""
    paths = [folder.resolve() for folder in folders]
    names = (
        [str(Path(*path.parts[-depth:])) for path in paths] for depth in range(1, max(len(path.parts) for path in paths) + 1)
    )
    return next(each for each in names if len({*each}) == len({*paths}))


def _page(runs: list[Facts], shown: Facts | None, sheets: dict[str, Sheet]) -> str:
    """Return the page as HTML; all that runs or styles it is inside, and is named by its hash."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    here = Path(__file__).parent
    style, script = (here / "page.css").read_text(), "\n".join((here / name).read_text() for name in _SCRIPTS)
    for name, sheet in sheets.items():
        size = f"{sheet.columns * 100}% {sheet.rows * 100}%"
        style += f'.{name} {{ background-image: url("{sheet.uri}"); background-size: {size}; }}\n'
    grids = {name: [sheet.columns, sheet.rows] for name, sheet in sheets.items()}
    data = {
        "runs": [{name: run[name] for name in ("name", "curves", "axis")} for run in runs],
        "gallery": shown and shown | {"grids": grids},
    }
    policy = f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    pages = Environment(loader=PackageLoader("relssl.report", "."), undefined=StrictUndefined, autoescape=True)
    pages.filters |= {"figure": _figure, "duration": duration, "in_json": partial(json.dumps, ensure_ascii=False)}
    return pages.get_template("page.html.jinja").render(
        runs=runs,
        gallery=shown,
        differences=differences(runs) if len(runs) > 1 else [],
        policy=policy,
        style=style,
        script=script,
        data=json.loads(to_json(data)),  # NaN is no JSON
        written=time.strftime("%Y-%m-%d %H:%M"),
        version=__version__,
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _figure(value: Any) -> str:
    """Write a number in as many digits as tell something."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
