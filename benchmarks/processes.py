"""Work in a process of its own, so that no setting of one contender (threads, allocator, compiled code) reaches another."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

Answering = Callable[..., Any]


class Failed(Exception):
    """What ran elsewhere failed, died or took too long; the message is one line."""


class Elsewhere:
    """A fresh process that makes something at the first call and then answers calls with it, resting in between.

    Args:
        make: a module's function; given `arguments`, it returns the callable that answers.
        arguments: what `make` is called with; they travel to the process, so they must be picklable.
    """

    def __init__(self, make: Callable[..., Answering], **arguments: Any) -> None:
        # A server that has done nothing but import the package forks itself: as clean as a new interpreter, and at once there.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["relssl.train.pretrain", "torchvision.transforms.v2"])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments))
        self._process.start()
        # With our copy of its end closed, the death of the process is the end of the pipe and not a wait for ever.
        theirs.close()

    def __call__(self, *request: Any, timeout: float | None = None) -> Any:
        """What the process answers.

        Args:
            timeout: seconds after which the process is killed; None waits for ever.

        Raises:
            Failed: with the process's own error in one line.
        """
        try:
            self._pipe.send(request)
            if not self._pipe.poll(timeout):
                self._process.kill()
                raise Failed(f"took longer than {timeout:.0f} s and was stopped")
            fine, answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise Failed(f"its process died with exit code {self._process.exitcode}") from None
        if not fine:
            raise Failed(answer)
        return answer

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pipe.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def alone(function: Callable[..., Any], *arguments: Any, timeout: float | None = None) -> Any:
    """`function(*arguments)`, computed in a process of its own; Failed if it fails there."""
    with Elsewhere(_itself, function=function) as process:
        return process(*arguments, timeout=timeout)


def _itself(function: Answering) -> Answering:
    return function


def _serve(pipe: Connection, make: Callable[..., Answering], arguments: dict[str, Any]) -> None:
    made: Answering | None = None
    # Else what runs here, such as the workers of a loader, would be started as this process was, and not as it usually is.
    multiprocessing.set_start_method(None, force=True)  # type: ignore[arg-type]
    try:
        while True:
            request = pipe.recv()
            try:
                made = made or make(**arguments)
                pipe.send((True, made(*request)))
            except Exception as error:  # whatever a contender raises, the others go on
                pipe.send((False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
    except (EOFError, KeyboardInterrupt):
        return
