"""Settings with which a run may go on changed: one table, which resuming, its refusals and warnings, and the pages go by."""

import json
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from relssl.errors import ConfigError
from relssl.settings import parts, recipes
from relssl.settings.reading import changes, leaves
from relssl.settings.run import Config, from_mapping, to_mapping

# Free: what the run computes is the same bit for bit, or as a run of so many epochs has it from here on. Beginnings of names.
FREE = (
    *("data", "data_root", "out", "epochs", "max_steps", "time_limit", "engine.timeout"),
    *("loader.workers", "loader.cache_folder", "log.", "checkpoint.every", "checkpoint.keep"),
)
# Warned of: results are alike, and not bit for bit, if this fact that each checkpoint notes is another one; a run says so as it goes on.
WARNED = {"engine.threads": "threads", "engine.devices": "world", "engine.nodes": "world", "engine.precision": "precision"}
WARNED |= {"engine.device": "random generators", "compile": "compiled", "method.loss_form": "loss form"}
DATAS = ("views.mean", "views.std", "views.margin")  # null is what the data say, which the run has in its place
ONCE = ("out", "time_limit", "engine.devices", "engine.nodes")  # which hold for one command, and are not written down


def going_on(config: Config, over: Mapping[str, Any], run: object) -> Config:
    """Return the settings of a run that goes on with those in `over` changed; ConfigError for each one that may not, which is all others.

    Another number of epochs lifts `max_steps`, unless that is given, too.
    """
    over = {name: value for name, value in over.items() if value is not None or name not in DATAS}
    changed = from_mapping({**recipes.spell_out(to_mapping(config)), **over})
    if changed.epochs != config.epochs:
        changed = from_mapping(to_mapping(changed) | {"max_steps": over.get("max_steps")})
    pairs = {name: pair for name, pair in changes(config, changed).items() if not (_may_change(name) or parts.same_name(*pair))}
    faults = [
        f"{name}: the run in {run} has {', not '.join(parts.title(str(each)) for each in pair)}" for name, pair in pairs.items()
    ]
    if faults:
        raise ConfigError(*(f"{fault}; leave it out, or start another run" for fault in faults))
    return changed


def lasting(stored: Config, config: Config) -> Config:
    """Return the settings to write down of a run that goes on: the stored ones with what `going_on` lets change."""
    pairs = {name: now for name, (_, now) in changes(stored, config).items() if _may_change(name) and name not in ONCE}
    return from_mapping(recipes.spell_out(to_mapping(stored)) | pairs)


def fixed(config: Config) -> dict[str, Any]:
    """Return {dotted name: value}, as plain JSON, of the settings that may not change while a run goes on."""
    return json.loads(json.dumps({name: attrgetter(name)(config) for name in leaves(Config) if not _may_change(name)}))  # type: ignore[no-any-return]


def _may_change(name: str) -> bool:
    return name in WARNED or name.startswith(FREE)
