"""Errors a user can act on: each is one line that says what, where and what to do, and carries the exit code of its kind."""


class RelsslError(Exception):
    """Base of every expected failure; `exit_code` is what the command line ends with, `kind` names it in status.json."""

    exit_code = 1
    kind = "bug"


class ConfigError(RelsslError, ValueError):
    """A setting, recipe or command line that cannot be used; holds every fault found, one a line."""

    exit_code = 2
    kind = "config"

    def __init__(self, *faults: str) -> None:
        super().__init__("\n".join(faults))
        self.faults = list(faults)


class DataError(RelsslError):
    """Images that are missing, unreadable or too few."""

    exit_code = 3
    kind = "data"


class CheckpointError(RelsslError):
    """Saved state or weights that are damaged, incomplete or of another shape."""

    exit_code = 4
    kind = "checkpoint"


class StorageError(RelsslError):
    """The run folder cannot be written."""

    exit_code = 5
    kind = "storage"


class NumericError(RelsslError):
    """Training that can no longer learn: non-finite steps in a row."""

    exit_code = 6
    kind = "numeric"


class DistributedError(RelsslError):
    """Ranks that disagree or no longer answer."""

    exit_code = 7
    kind = "distributed"


class LockedError(RelsslError):
    """Another process is writing this run folder."""

    exit_code = 8
    kind = "locked"


class Interrupted(RelsslError):
    """Stopped on request, after the state was saved; the exit code says by what."""

    kind = "interrupted"

    def __init__(self, message: str, exit_code: int = 130) -> None:  # pickled without the code, which follows with the attributes
        super().__init__(message)
        self.exit_code = exit_code
