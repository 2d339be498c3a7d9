"""A table at a scale: its runs, and the results written of all that are done; imports no torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from relssl.errors import ConfigError
from relssl.files import storing, write_file, write_json
from relssl.reproduction.plan import Run, flat, noted, plan, state, title
from relssl.reproduction.results import against_paper, by_figure, order, outcome, page, paired, spread, verdict
from relssl.reproduction.tables import Row, Scale, Table

# Overrides that leave a setting the paper's own: where and how fast it runs, and what is logged.
_NEUTRAL = ("engine.", "loader.", "log.", "checkpoint.", "data_root", "compile", "method.loss_form")


class Study:
    """A table at a scale: its runs and where their results go."""

    def __init__(
        self,
        table: Table,
        scale: Scale,
        seeds: int | None,
        only: Collection[str],
        runs: str | Path | None,
        out: Path,
        overrides: Mapping[str, Any],
    ) -> None:
        self.table, self.scale, self.out, self.overrides = table, scale, out, dict(overrides)
        where = None if runs is None else Path(runs)
        self.runs = plan(table, scale, seeds=seeds, only=only, runs=where, overrides=overrides)
        self.name = title(table, scale, overrides)
        self.told: dict[tuple[str, int], str] = {}

    @property
    def rehearsal(self) -> bool:
        """Whether runs are shorter than they are meant to be."""
        return "epochs" in self.overrides

    def check_out(self) -> None:
        """Refuse to write over results of other settings, and make the folder."""
        file = self.out / f"{self.name}.json"
        try:
            before = json.loads(file.read_bytes())["overrides"]
        except (OSError, ValueError, LookupError, TypeError):
            before = None
        if before is not None and before != _plain(self.overrides):
            raise ConfigError(
                f"{file}: holds results of other settings ({_shown(before)} there, {_shown(_plain(self.overrides))} now); give another --out"
            )
        with storing(file):
            self.out.mkdir(parents=True, exist_ok=True)

    def outcomes(self) -> dict[str, dict[int, dict[str, Any]]]:
        """{row: {seed: outcome}} of the runs that are done."""
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for run in self.runs:
            one = outcome(run)
            if one is not None:
                found.setdefault(run.row.name, {})[run.seed] = one
        return found

    def write(self) -> dict[str, Any]:
        """Write both files; returns what is in the first."""
        found = self.results()
        write_json(self.out / f"{self.name}.json", found)
        write_file(self.out / f"{self.name}.md", page(found).encode())
        return found

    def results(self) -> dict[str, Any]:
        """Everything the runs came to, plain."""
        found, whole = self.outcomes(), self.table.at(self.scale.name)
        reference = next((row.name for row in whole if row.name == self.table.reference), whole[0].name)
        data = {run.row.name: run.config.data for run in self.runs}
        names = {row.name for row in whole}
        rows = [row for row in whole if row.name in data]
        return {
            "name": self.name,
            "table": self.table.name,
            "title": self.table.title,
            "shows": self.table.shows,
            "source": self.table.source,
            "scale": self.scale.name,
            "about": self.scale.about,
            "rehearsal": self.rehearsal,
            "overrides": _plain(self.overrides),
            "reference": reference,
            "rows": [self._row(row, found, reference, data) for row in rows],
            "order": order(self.table, self.scale.name, data, found),
            "expected": [verdict(each, found) for each in self.table.expected if set(each.rows) <= names],
            "runs": [
                self._run(run, found[run.row.name][run.seed]) for run in self.runs if run.seed in found.get(run.row.name, {})
            ],
            "missing": [self._missing(run) for run in self.runs if run.seed not in found.get(run.row.name, {})]
            + [
                {"row": row.name, "seed": seed, "why": "not asked for, and its settings cannot be used yet", "exit_code": None}
                for row in whole
                if row.name not in data
                for seed in sorted({run.seed for run in self.runs})
            ],
        }

    def _row(self, row: Row, found: Mapping[str, Mapping[int, Any]], reference: str, data: Mapping[str, str]) -> dict[str, Any]:
        # Figures of one data set say nothing beside those of another.
        beside = row.name != reference and data[row.name] == data.get(reference)
        own = found.get(row.name, {})
        figures = by_figure(own)
        ends = {name: {seed: one["ends"][name] for seed, one in own.items() if name in one["ends"]} for name in _ends(own)}
        return {
            "row": row.name,
            "label": row.label,
            "settings": row.settings,
            "data": data[row.name],
            "paper": against_paper(row, data[row.name], figures, self._as_published()),
            "ours": {name: spread(values) for name, values in figures.items()},
            "beside_reference": paired(figures, by_figure(found.get(reference, {}))) if beside else {},
            "ends": {name: spread(values) for name, values in ends.items()},
            "collapsed": [seed for seed, one in own.items() if one["collapsed"]],
        }

    def _as_published(self) -> bool:
        """Whether runs are the paper's own, so that its numbers are ours to reach."""
        changed = [
            name
            for name, value in flat(self.overrides).items()
            if not name.startswith(_NEUTRAL) and not (name == "recipe" and str(value).startswith("nips/"))
        ]
        return self.scale.name == "paper" and not changed

    @staticmethod
    def _run(run: Run, found: Mapping[str, Any]) -> dict[str, Any]:
        return {"row": run.row.name, "seed": run.seed, "commands": run.commands()} | dict(found)

    def _missing(self, run: Run) -> dict[str, Any]:
        failed, where = noted(run).get("error"), state(run)
        why = f"failed: {failed['message']}" if failed else self.told.get((run.row.name, run.seed), "")
        why = why or {"begun": "stopped on the way", "trained": "not evaluated yet"}.get(where, "not run yet")
        return {"row": run.row.name, "seed": run.seed, "why": why, "exit_code": failed["exit_code"] if failed else None}


def _ends(outcomes: Mapping[int, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for one in outcomes.values() for name in one["ends"]))


def _plain(overrides: Mapping[str, Any]) -> dict[str, str]:
    """Overrides as they would be typed, so that 1 and "1" are one."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in sorted(overrides.items())}


def _shown(overrides: Mapping[str, str]) -> str:
    return " ".join(f"--{name} {value}" for name, value in overrides.items()) or "none"
