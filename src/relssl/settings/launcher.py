"""The processes that a launcher has started (torchrun, srun, others that set the same variables), before torch is there to ask."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from dataclasses import dataclass

from relssl.errors import ConfigError
from relssl.settings.run import Config, check, replace

MARK = "RELSSL_LAUNCHER"  # variable with the id of the process that started the others


@dataclass(frozen=True)
class Launch:
    """One of several processes that a launcher has started."""

    name: str
    rank: int
    world: int
    local_rank: int  # among those of this machine
    local_world: int
    address: str  # of the first process
    port: int

    def variables(self) -> dict[str, str]:
        """Return what torchrun would have set."""
        numbers = {"RANK": self.rank, "WORLD_SIZE": self.world, "LOCAL_RANK": self.local_rank, "MASTER_PORT": self.port}
        numbers["GROUP_RANK"] = self.rank // self.local_world
        return {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": self.address}


def find_launch() -> Launch | None:
    """Return what launched this process as one of several; None if it is on its own, whatever a batch job around it may hold.

    Raises:
        ConfigError: if the launcher's variables make no sense.
    """
    launch = None
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        rank, world, local = (_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        here = _number("LOCAL_WORLD_SIZE", world if "LOCAL_RANK" in os.environ else 1)
        launch = Launch("torchrun", rank, world, local, here, os.environ.get("MASTER_ADDR", ""), _number("MASTER_PORT", 29500))
    # Only steps of srun have this one. A shell in such a step is no rank, and the job's own variables stand in every script.
    elif "SLURM_STEP_NUM_TASKS" in os.environ and not {"SLURM_PTY_PORT", "SLURM_PTY_WIN_COL"} & os.environ.keys():
        rank, world, local = (_number(name) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
        nodes, step = _number("SLURM_STEP_NUM_NODES", 1), _number("SLURM_JOB_ID") * 8 + _number("SLURM_STEP_ID")
        first = re.sub(r"\[(\d+).*", r"\1", os.environ.get("SLURM_STEP_NODELIST", "localhost")).partition(",")[0]
        here = world // nodes if world % nodes == 0 else 0
        launch = Launch("srun", rank, world, local, here, first, _number("MASTER_PORT", 15000 + step % 10000))
    if launch is None or launch.world == 1:
        return None
    if not (launch.rank < launch.world and launch.local_world and launch.world % launch.local_world == 0 and launch.address):
        given = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(launch).items() if name != "name")
        raise ConfigError(
            f"{launch.name}: its variables do not fit together ({given}); start as many processes on every machine, or unset them"
        )
    return launch


def with_launch(config: Config, *, resumed: bool = False) -> Config:
    """Return the settings with as many processes as a launcher has started.

    Raises:
        ConfigError: if they ask for another number, or for several machines without a launcher; a resumed run takes what there is.
    """
    launch, count = find_launch(), config.engine.devices * config.engine.nodes
    if launch is None:
        if config.engine.nodes > 1:
            raise ConfigError(
                f"engine.nodes: {config.engine.nodes} machines need a launcher; start the command on each of them with torchrun or srun"
            )
        return config
    if not resumed and count not in (1, launch.world):
        raise ConfigError(
            f"engine.devices: asks for {count} processes, {launch.name} has started {launch.world}; leave devices and nodes to it"
        )
    engine = dataclasses.replace(config.engine, devices=launch.local_world, nodes=launch.world // launch.local_world)
    return check(replace(config, engine=engine))


def rank() -> int:
    """Return this process's number as far as variables say; those that relssl starts itself have no more than LOCAL_RANK."""
    with contextlib.suppress(ConfigError):
        launch = find_launch()
        return launch.rank if launch else _number("LOCAL_RANK") if MARK in os.environ else 0
    return 0


def _number(name: str, default: int = 0) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise ConfigError(f"{name}: the variable is no number, {value!r}; a launcher sets it, without one unset it")
    return int(value)
