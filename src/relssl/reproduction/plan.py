"""Which runs a table is made of, with all their settings, and which of them are done; imports no torch."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from relssl.errors import ConfigError
from relssl.reproduction.tables import Row, Scale, Table, known
from relssl.settings.evaluation import Evaluation, read_settings
from relssl.settings.reading import leaves, merge, nearest, nest, read_yaml
from relssl.settings.recipes import layer
from relssl.settings.run import Config, from_mapping, resolve

# Settings that do not change what a run learns, or are filled in once the data is known.
_APART = ("out", "time_limit", "data_root")
_OF_DATA = ("views.mean", "views.std", "views.margin")
# Settings that are the plan's own.
_OWN = {"out": "--out and --runs name the folders", "seed": "use --seeds N", "time_limit": "it is for all runs together"}


@dataclass(frozen=True)
class Run:
    """A row with one seed.

    Attributes:
        given: the nested settings it was resolved from, all that its command has to say.
        folder: where it lies; what it came to is noted beside it, in `FOLDER.json`.
    """

    row: Row
    seed: int
    given: dict[str, Any]
    config: Config
    evaluation: Evaluation
    folder: Path

    @property
    def note(self) -> Path:
        """The file that says what the run came to."""
        return self.folder.with_name(f"{self.folder.name}.json")

    def commands(self) -> list[str]:
        """The two commands that give the same numbers."""
        names = ["recipe", *(name for name in flat(self.given, leaves(Config)) if name not in ("data", "recipe"))]
        run = ["relssl", "pretrain", self.config.data, *_words({name: attrgetter(name)(self.config) for name in names})]
        usual = flat(dataclasses.asdict(Evaluation()))
        asked = flat(dataclasses.asdict(self.evaluation))
        differing = {name: value for name, value in asked.items() if value != usual[name]}
        evaluate = ["relssl", "evaluate", str(self.folder), *_words(differing)]
        return [shlex.join(run), shlex.join(evaluate)]


def plan(
    table: Table,
    scale: Scale,
    *,
    seeds: int | None = None,
    only: Collection[str] = (),
    runs: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> list[Run]:
    """All runs of a table, row by row within each seed, so that a plan that is stopped has compared all rows on the first seeds.

    Args:
        only: names of the rows that are wanted, default: all; of the others, those that cannot be set up are left out.
        seeds: 0..seeds-1 are run; default: the scale's. Others that have been run before are in the plan as well.
        runs: folder of the run folders; default: runs/reproduce/TABLE-SCALE.
        overrides: dotted settings for all runs; with `epochs` among them the plan is a rehearsal,
            whose evaluations are as short, and see as few images as `max_images` leaves.

    Raises:
        ConfigError: for settings that cannot be used, that the rows differ in, or other than those a run was started with.
    """
    over = flat(nest(overrides or {}), leaves(Config))
    count = scale.seeds if seeds is None else seeds
    if count < 1:
        raise ConfigError(f"seeds: must be at least 1, got {count}")
    rows = table.at(scale.name)
    _check_overrides(over, rows, table)
    where = runs or Path("runs/reproduce") / title(table, scale, over)
    wanted, made = choose(rows, only), list[Run]()
    for seed in sorted({*range(count), *_noted_seeds(where, rows)}):
        for row in rows:
            try:
                run = _run(table, scale, row, seed, where, nest(over))
            except ConfigError:
                if row.name in wanted:
                    raise
                continue
            if seed < count or run.note.exists():
                made.append(run)
    for run in made:
        _refuse_other(run)
    return made


def _noted_seeds(where: Path, rows: tuple[Row, ...]) -> set[int]:
    """Seeds of which a run has been noted, so that asking for fewer later takes nothing away from the results."""
    ends = (path.stem.rpartition("-") for path in where.glob("*-*.json"))
    names = {row.name for row in rows}
    return {int(seed) for row, _, seed in ends if row in names and re.fullmatch("[0-9]{1,6}", seed)}


def title(table: Table, scale: Scale, overrides: Collection[str]) -> str:
    """What the results are called: TABLE-SCALE, of a rehearsal TABLE-SCALE-rehearsal."""
    return f"{table.name}-{scale.name}" + ("-rehearsal" if "epochs" in overrides else "")


def choose(rows: tuple[Row, ...], only: Collection[str]) -> set[str]:
    """The names of the rows that are asked for, all if none is; ConfigError names the nearest of an unknown one."""
    names = [row.name for row in rows]
    return {known("only", name, names) for name in only} or set(names)


def _check_overrides(over: Mapping[str, Any], rows: tuple[Row, ...], table: Table) -> None:
    settings = leaves(Config)
    varied = {name for row in rows for name in flat(row.settings, settings)}
    faults = [f"{name}: cannot be given for all runs; {why}" for name, why in _OWN.items() if name in over]
    for name in over:
        if not any(leaf == name or leaf.startswith(f"{name}.") for leaf in settings):
            faults.append(f"{name}: unknown key; the nearest is {nearest(name, settings)}")
        elif any(other == name or other.startswith(f"{name}.") for other in varied):
            faults.append(f"{name}: is what the rows of {table.name} differ in; leave it out")
    if faults:
        raise ConfigError(*faults)


def _run(table: Table, scale: Scale, row: Row, seed: int, where: Path, over: dict[str, Any]) -> Run:
    folder = where / f"{row.name}-{seed}"
    given: dict[str, Any] = {}
    for settings in (scale.settings, table.scales[scale.name], row.settings):
        given = layer(given, settings)
    try:
        if "epochs" in over:
            given = merge(given, _shorter(given, over["epochs"]))
            if "max_images" in over:
                given = merge(given, {"log": {"knn_images": [over["max_images"]] * 2}})
        given = layer(layer(given, over), {"seed": seed, "out": str(folder)})
        config = resolve(given)
    except ConfigError as error:
        raise ConfigError(*(f"{table.name}, {row.name}: {fault}" for fault in error.faults)) from error
    # The figures that are compared are the student's, which every method has.
    asked = merge(scale.evaluation, {"network": ["student"], "device": config.engine.device})
    if "epochs" in over and "linear" in asked["protocol"]:
        asked = merge(asked, {"linear": {"epochs": config.epochs}})
    if "epochs" in over and "max_images" in over:
        asked = merge(asked, {"images": [config.max_images, config.max_images]})
    return Run(row, seed, given, config, read_settings(asked), folder)


def _shorter(given: dict[str, Any], epochs: Any) -> dict[str, Any]:
    """The learning rate's warm-up keeps its share of a rehearsal."""
    whole = resolve(given)
    fewer = resolve(merge(given, {"epochs": epochs, "optimizer": {"warmup_epochs": 0}})).epochs
    return {"optimizer": {"warmup_epochs": round(whole.optimizer.warmup_epochs / whole.epochs * fewer, 6)}}


def _refuse_other(run: Run) -> None:
    """Refuse a folder that holds a run of other settings: its figures are not this row's."""
    file = run.folder / "config.yaml"
    if not file.exists():
        return
    try:
        stored = from_mapping(read_yaml(file))
    except ConfigError as error:
        raise ConfigError(f"{run.folder}: its config.yaml cannot be used ({error.faults[0]}); move the folder away") from error
    names = [name for name in leaves(Config) if name not in _APART and not _alike(name, run.config, stored)]
    if names:
        was, now = attrgetter(names[0])(stored), attrgetter(names[0])(run.config)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ConfigError(
            f"{run.folder}: holds a run of other settings ({names[0]}: {was} there, {now} now{more}); "
            "give another --runs and --out, or move it away"
        )


def _alike(name: str, planned: Config, stored: Config) -> bool:
    now = attrgetter(name)(planned)
    return bool(now == attrgetter(name)(stored) or (name in _OF_DATA and now is None))


def state(run: Run) -> str:
    """Where a run stands: new, begun, trained (not evaluated as is asked) or done."""
    if not (run.folder / "config.yaml").exists():
        return "new"
    if _read(run.folder / "status.json").get("state") != "complete":
        return "begun"
    note = _read(run.note)
    return "done" if note.get("evaluation") == plain(run.evaluation) and "results" in note else "trained"


def noted(run: Run) -> dict[str, Any]:
    """What stands in the run's note: {"evaluation", "results", ...}, {"error", ...} or nothing."""
    return _read(run.note)


def plain(settings: Evaluation) -> dict[str, Any]:
    """Settings as they read back from JSON."""
    made: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))
    return made


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def flat(tree: Mapping[str, Any], whole: Collection[str] = (), prefix: str = "") -> dict[str, Any]:
    """{"optimizer": {"lr": 1}} -> {"optimizer.lr": 1}; what is named in `whole` stays one."""
    made: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + key
        if isinstance(value, Mapping) and name not in whole:
            made |= flat(value, whole, name + ".")
        else:
            made[name] = value
    return made


def _words(settings: Mapping[str, Any]) -> list[str]:
    """Options as they are typed."""
    return [word for name, value in settings.items() for word in (f"--{name}", _typed(value))]


def _typed(value: Any) -> str:
    if isinstance(value, (list, tuple)) and value and not any(isinstance(item, (list, tuple)) for item in value):
        return ",".join(map(_typed, value))
    return value if isinstance(value, str) else json.dumps(value)
