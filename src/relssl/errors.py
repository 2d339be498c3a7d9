"""Errors a user can act on: each is one line that says what, where and what to do, and carries the exit code of its kind."""

import signal

TIME_LIMIT = 75
# Signals on which a run saves and stops, with their exit codes. Batch systems send SIGUSR1 or SIGUSR2 some time before their limit.
STOPPING = {
    number: TIME_LIMIT if "USR" in number.name else 128 + number
    for number in signal.Signals
    if number.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")  # not every system has them all
}


class RelsslError(Exception):
    """Base of every expected failure; `exit_code` is what the command line ends with, `kind` names it in status.json."""

    exit_code = 1
    kind = "bug"

    def __init_subclass__(cls, exit_code: int | None = None, kind: str | None = None) -> None:
        cls.exit_code, cls.kind = exit_code or cls.exit_code, kind or cls.kind


class ConfigError(RelsslError, ValueError, exit_code=2, kind="config"):
    """A setting, recipe or command line that cannot be used; holds every fault, one a line."""

    def __init__(self, *faults: str) -> None:
        super().__init__("\n".join(faults))
        self.faults = list(faults)


class DataError(RelsslError, exit_code=3, kind="data"):
    """Images that are missing, unreadable or too few."""


class CheckpointError(RelsslError, exit_code=4, kind="checkpoint"):
    """Saved state or weights that are damaged, incomplete or of another shape."""


class StorageError(RelsslError, exit_code=5, kind="storage"):
    """The run folder cannot be written."""


class ExportError(RelsslError, kind="export"):
    """A run that is complete, but whose networks could not be written for others."""


class HookError(RelsslError, kind="hook"):
    """A hook of the user's that failed, and ended its run."""


class NumericError(RelsslError, exit_code=6, kind="numeric"):
    """Training that can no longer learn: non-finite steps in a row."""


class DistributedError(RelsslError, exit_code=7, kind="distributed"):
    """Ranks that disagree or no longer answer."""


class LockedError(RelsslError, exit_code=8, kind="locked"):
    """Another process is writing this run folder."""


class Interrupted(RelsslError, kind="interrupted"):
    """Stopped on request, after the state was saved; the exit code says by what."""

    def __init__(self, message: str, exit_code: int = 130) -> None:  # pickled without the code, which follows with the attributes
        super().__init__(message)
        self.exit_code = exit_code
