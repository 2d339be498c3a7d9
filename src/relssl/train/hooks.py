"""Hooks: objects of the user's that are told what happens in a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from relssl.errors import ConfigError, HookError

EVENTS = ("on_start", "on_row", "on_evaluation", "on_checkpoint", "on_end")  # docs/own-parts.md says what each gets, and when


class Hooks:
    """The hooks of a run, for the one process that writes it.

    Args:
        hooks: objects with methods of `EVENTS`, each of one argument.

    Raises:
        ConfigError: if one has none of them.
    """

    def __init__(self, hooks: Iterable[Any] = ()) -> None:
        if not isinstance(hooks, (list, tuple)):
            raise ConfigError(f"hooks: needs a list of objects, got a {type(hooks).__name__}")
        for hook in hooks:
            title = getattr(hook, "__name__", type(hook).__name__)  # of a class or function its own
            if isinstance(hook, type) or not any(callable(getattr(hook, event, None)) for event in EVENTS):
                raise ConfigError(f"hooks: {title} is no object with one of {', '.join(EVENTS)}")
        self.hooks = hooks

    def call(self, event: str, subject: Any) -> None:
        """Tell all hooks that have a method for the event, in their order; HookError if one raises, which ends the run."""
        for hook in self.hooks:
            try:
                getattr(hook, event, lambda _: None)(subject)
            except Exception as error:  # whatever a user's code raises
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise HookError(f"hooks: {type(hook).__name__}.{event} failed ({reason}); what was saved before stays") from error
