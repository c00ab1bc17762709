"""A process that serves a participant's workers, and ends with them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from . import processes
from .base import BenchError

_START_S = 60.0
_EXIT_S = 10.0


@contextmanager
def server_process(
    name: str, serve: Callable[..., None], *arguments: Any
) -> Iterator[tuple[Any, int]]:
    """Runs `serve(*arguments, parent)` in a new process; yields what it sends first, and its pid.

    parent  a Connection: `serve` sends one thing as soon as it is ready, and is no longer needed
            when the other end is closed. Ctrl-C does not reach it.
    Raises BenchError, in the name of participant `name`, when it does not become ready.
    """
    here, there = processes.pipe()
    process = processes.start(_run, serve, arguments, there, fresh=False)
    there.close()
    try:
        ready = _first_word(name, here)
        assert process.pid is not None
        yield ready, process.pid
    finally:
        here.close()
        process.join(_EXIT_S)
        process.kill()
        process.join()


def _first_word(name: str, server: Connection) -> Any:
    if not server.poll(_START_S):
        raise BenchError(f"{name}: the server did not start within {_START_S:.0f} s")
    try:
        return server.recv()
    except EOFError:
        raise BenchError(f"{name}: the server ended before it was ready") from None


def _run(serve: Callable[..., None], arguments: tuple[Any, ...], parent: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to end
    serve(*arguments, parent)
