"""The processes that a launcher has started (torchrun, srun, others that set the same variables), before torch is there to ask."""

import contextlib
import dataclasses
import os
import re

from relssl.errors import ConfigError
from relssl.settings.run import Config, check

MARK = "RELSSL_LAUNCHER"  # variable with the id of the process that started the others


def find_launch() -> dict[str, int | str] | None:
    """Return torchrun's variables of this process, by whatever launcher it is one of several; None if it is on its own, whatever a batch
    job around it may hold.

    Raises:
        ConfigError: if the launcher's variables make no sense.
    """
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        launcher, address, port = "torchrun", os.environ.get("MASTER_ADDR", ""), 29500
        rank, world, local = (_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        here = _number("LOCAL_WORLD_SIZE", world if "LOCAL_RANK" in os.environ else 1)
    # Only steps of srun have this one. A shell in such a step is no rank, and the job's own variables stand in every script.
    elif "SLURM_STEP_NUM_TASKS" in os.environ and not {"SLURM_PTY_PORT", "SLURM_PTY_WIN_COL"} & os.environ.keys():
        launcher, port = "srun", 15000 + (_number("SLURM_JOB_ID") * 8 + _number("SLURM_STEP_ID")) % 10000
        rank, world, local = (_number(name) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
        address = re.sub(r"\[(\d+).*", r"\1", os.environ.get("SLURM_STEP_NODELIST", "localhost")).partition(",")[0]
        here, odd = divmod(world, _number("SLURM_STEP_NUM_NODES", 1))
        here *= not odd
    elif MARK not in os.environ and (os.environ.get("WORLD_SIZE", "1") != "1" or "RANK" in os.environ):
        name, missing = ("WORLD_SIZE", "RANK") if "WORLD_SIZE" in os.environ else ("RANK", "WORLD_SIZE")
        raise ConfigError(f"{name}: is set without {missing}: each process would be a run of its own; set both, or unset it")
    else:
        return None
    numbers = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": here}
    port = _number("MASTER_PORT", port)
    if not (rank < world <= 4096 and here and world % here == 0 and address and 0 < port < 1 << 16):
        place = {"MASTER_ADDR": address or "missing", "MASTER_PORT": port}
        values = ", ".join(f"{name} {value}" for name, value in (numbers | place).items())
        then = "start as many processes on every machine, or unset them"
        raise ConfigError(f"{launcher}: its variables do not fit together ({values}); {then}")
    numbers |= {"GROUP_RANK": rank // here, "MASTER_PORT": port}
    return numbers | {"MASTER_ADDR": address} if world > 1 else None


def with_launch(config: Config, *, resumed: bool = False) -> Config:
    """Return the settings with as many processes as a launcher has started.

    Raises:
        ConfigError: if they ask for another number, or for several machines without a launcher; a resumed run takes what there is.
    """
    launch, count = find_launch(), config.engine.devices * config.engine.nodes
    if launch is None:
        if config.engine.nodes > 1:
            several = f"{config.engine.nodes} machines"
            raise ConfigError(f"engine.nodes: {several} need torchrun or srun to start the command on each of them")
        return config
    world, here = int(launch["WORLD_SIZE"]), int(launch["LOCAL_WORLD_SIZE"])
    if not resumed and count not in (1, world):
        raise ConfigError(f"engine.devices: {count} processes wanted, a launcher started {world}; leave devices and nodes to it")
    engine = dataclasses.replace(config.engine, devices=here, nodes=world // here)
    return check(dataclasses.replace(config, engine=engine))


def rank() -> int:
    """Return this process's number as far as variables say; those that relssl starts itself have no more than LOCAL_RANK."""
    with contextlib.suppress(ConfigError):
        launch = find_launch()
        return int(launch["RANK"]) if launch else _number("LOCAL_RANK") if MARK in os.environ else 0
    return 0


def _number(name: str, default: int = 0) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise ConfigError(f"{name}: the variable is no number, {value!r}; a launcher sets it, without one unset it")
    return int(value)
