"""The runs that a table is made of, with all their settings, and how far each has come; imports no torch."""

import dataclasses
import itertools
import json
import os
import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from relssl.errors import ConfigError
from relssl.files import read_json
from relssl.reproduction.tables import Row, Table, known
from relssl.settings import recipes
from relssl.settings.evaluation import Evaluation, read_settings
from relssl.settings.reading import NULL, changes, leaves, read_yaml
from relssl.settings.recipes import layer, spell_out
from relssl.settings.run import Config, check, from_mapping, resolve
from relssl.settings.small import GIVING_WAY

# Settings that do not change what a run learns, and those that the data fills in.
_NEUTRAL = ("out", "time_limit", "data_root")
_FROM_DATA = ("views.mean", "views.std", "views.margin")
# Those that given weights, or the memory there is, fill in, by the setting that asks for it.
_FILLED = {
    "start": ("backbone", "encoder.stem", "views.channels", "views.weak.size", "views.strong.size", "views.mean", "views.std"),
    "teacher": ("encoder.dim", "method.shuffle"),
    "fit_batch": ("fit_batch", "batch_size", "optimizer.lr"),
}
# Settings that are the plan's own.
_RESERVED = {"out": "--out and --runs name the folders", "seed": "use --seeds N", "time_limit": "it is for all runs together"}


@dataclass(frozen=True)
class Run:
    """A row with one seed, the `settings` it was resolved from, which its command spells out, and its run folder."""

    row: Row
    seed: int
    settings: dict[str, Any]
    config: Config
    evaluation: Evaluation
    folder: Path

    @property
    def note(self) -> Path:
        """The file beside the folder that holds the run's results, {"evaluation", "results", ...}, or {"error", ...}."""
        return self.folder.with_name(f"{self.folder.name}.json")

    def state(self) -> str:
        """Return new, begun, trained (not evaluated as the plan wants it) or done."""
        if not (self.folder / "config.yaml").exists():
            return "new"
        if read_json(self.folder / "status.json").get("state") != "complete":
            return "begun"
        note = read_json(self.note)
        return "done" if note.get("evaluation") == plain(self.evaluation) and "results" in note else "trained"

    def commands(self) -> list[str]:
        """Return the two commands, of training and of evaluation, that give the same numbers."""
        names = {re.sub(r"^backbone_args\..*", "backbone_args", name) for name in self.settings} - {"data", "recipe"}
        names |= {name for name in GIVING_WAY if attrgetter(name)(self.config)}  # on a command line what is not typed does
        train = {name: attrgetter(name)(self.config) for name in ("recipe", *(name for name in leaves(Config) if name in names))}
        evaluate = {name: value for name, (_, value) in changes(Evaluation(), self.evaluation).items()}
        data, folder = shlex.quote(self.config.data), shlex.quote(str(self.folder))
        return [f"relssl pretrain {data} {options(train)}", f"relssl evaluate {folder} {options(evaluate)}"]


@dataclass(frozen=True)
class Plan:
    """The runs of a table."""

    name: str  # of the results: TABLE-SCALE, of a rehearsal TABLE-SCALE-rehearsal
    table: Table
    overrides: dict[str, str]  # settings of all runs, by dotted name and as they would be typed, so that 1 and "1" are one
    rehearsal: bool  # runs are shorter than the scale has them
    runs: list[Run]  # of all rows that can be set up, seed by seed: a plan that is stopped has compared all rows on some seeds
    chosen: list[Run]  # those that are to be run


def plan(
    table: Table,
    *,
    seeds: int | None = None,
    only: Collection[str] = (),
    runs: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan all runs of a table.

    Args:
        seeds: 0..seeds-1 are chosen; default: the scale's. Others that were run before are in the plan as well.
        only: names of the rows that are chosen, default: all; of the others, those that cannot be set up are left out.
        runs: folder of the run folders; default: runs/reproduce/TABLE-SCALE.
        overrides: settings of all runs, a recipe with its data; with `epochs` or `max_steps` among them the plan is a rehearsal, whose
            evaluations see as few images as `max_images` leaves, and with `epochs` are as short.

    Raises:
        ConfigError: for settings that cannot be used, that the rows differ in, or other than those a run was started with.
    """
    over, count = spell_out(overrides or {}), table.seeds if seeds is None else seeds
    if count < 1:
        raise ConfigError(f"seeds: must be at least 1, got {count}")
    names = [row.name for row in table.rows]
    asked = {known("only", name, names) for name in only} or set(names)
    why = _RESERVED | {name: f"the rows of {table.name} differ in it" for row in table.rows for name in row.settings}
    if faults := [f"{name}: cannot be given for all runs; {why[name]}" for name in over if name in why]:
        raise ConfigError(*faults)
    rehearsal = bool({"epochs", "max_steps"} & over.keys())
    name = f"{table.name}-{table.scale}{'-rehearsal' * rehearsal}"
    folder = Path(runs or f"runs/reproduce/{name}")
    # Seeds that have a note are in the plan, so that asking for fewer later takes nothing away from the results.
    notes = (re.fullmatch("(.+)-([0-9]{1,6})", path.stem) for path in folder.glob("*.json"))
    earlier = {int(note[2]) for note in notes if note and note[1] in names}
    planned = []
    for seed, row in itertools.product(sorted({*range(count), *earlier}), table.rows):
        try:
            run = _run(table, row, seed, folder, over)
        except ConfigError as error:
            if row.name in asked:
                raise ConfigError(*(f"{table.name}, {row.name}: {fault}" for fault in error.faults)) from error
            continue
        if seed < count or run.note.exists():
            _refuse_other_settings(run)
            planned.append(run)
    chosen = [run for run in planned if run.row.name in asked and run.seed < count]
    return Plan(name, table, {name: _typed(over[name]) for name in sorted(over)}, rehearsal, planned, chosen)


def _run(table: Table, row: Row, seed: int, folder: Path, over: dict[str, Any]) -> Run:
    settings = layer(table.settings, row.settings)
    recipe = str(over.get("recipe") or "")
    if recipe.lower() not in NULL and (own := recipes.read(recipe).get("data")):  # the scale's is another one's
        settings["data"] = own
    # The figures that are compared are the student's, which every method has.
    evaluation = table.evaluation | {"network": ["student"]}
    if "epochs" in over:  # the learning rate's warm-up keeps its share
        whole = resolve(settings)
        epochs = resolve(settings | {"epochs": over["epochs"], "optimizer.warmup_epochs": 0}).epochs
        settings |= {"optimizer.warmup_epochs": round(whole.optimizer.warmup_epochs / whole.epochs * epochs, 6)}
        evaluation |= {"linear.epochs": epochs} if "linear" in evaluation["protocol"] else {}
    if {"epochs", "max_steps"} & over.keys() and "max_images" in over:
        settings["log.knn_images"] = evaluation["images"] = [over["max_images"]] * 2
    settings = layer(settings, over) | {"seed": seed, "out": str(folder / f"{row.name}-{seed}")}
    config = check(dataclasses.replace(resolve(settings), typed=None))  # nothing gives way: rows are compared
    return Run(row, seed, settings, config, read_settings(evaluation | {"device": config.engine.device}), Path(settings["out"]))


def _refuse_other_settings(run: Run) -> None:
    """Refuse a folder that holds a run of other settings: its figures are not this row's."""
    file = run.folder / "config.yaml"
    try:
        stored = from_mapping(read_yaml(file)) if file.exists() else run.config
    except ConfigError as error:
        raise ConfigError(f"{run.folder}: its config.yaml cannot be used ({error.faults[0]}); move the folder away") from error
    filled = tuple(name for asking, names in _FILLED.items() if getattr(run.config, asking) for name in names)
    for name, (there, here) in changes(stored, run.config).items():
        # A run holds whole paths.
        same = name in ("data", "start", "teacher") and there and here and os.path.abspath(there) == os.path.abspath(here)
        if not (same or name in _NEUTRAL or name.startswith(filled) or (name in _FROM_DATA and here is None)):
            differs = f"holds a run of other settings ({name}: {there} there, {here} now)"
            raise ConfigError(f"{run.folder}: {differs}; give another --runs and --out, or move it away")


def plain(settings: Evaluation) -> Any:
    """Return settings as they read back from JSON."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def options(settings: Mapping[str, Any]) -> str:
    """Return settings as options of the command line."""
    return " ".join(f"--{name} {shlex.quote(_typed(value))}" for name, value in settings.items())


def _typed(value: Any) -> str:
    if isinstance(value, (list, tuple)) and value and not any(isinstance(item, (list, tuple)) for item in value):
        return ",".join(map(_typed, value))
    return value if isinstance(value, str) else json.dumps(value)
