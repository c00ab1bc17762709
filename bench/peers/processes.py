"""How the processes of participants are started, and how they end."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


def start(main: Callable[..., None], *arguments: Any, fresh: bool) -> BaseProcess:
    """Runs `main(*arguments)` in a new process, with the environment of this one.

    fresh  begin with a new interpreter, in this thread's network namespace, with a layout of memory
           of its own. Otherwise it is forked from one that has imported torch and has done nothing
           else: with new interpreters, a quick run would be imports for the most part.
    It does not outlive whom it comes from, whatever ends that.
    """
    context: Any = multiprocessing.get_context("spawn" if fresh else "forkserver")
    if not fresh:
        context.set_forkserver_preload([f"{__package__}.nursery"])
    process: BaseProcess = context.Process(
        target=_run, args=(main, arguments, dict(os.environ)), daemon=True
    )
    process.start()
    return process


def pipe() -> tuple[Connection, Connection]:
    """Two ends, either of which may be an argument of `start`."""
    return multiprocessing.Pipe()


def end_with_parent() -> None:
    """This process is killed when its parent ends, even while it is stopped."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def send(pids: list[int], number: signal.Signals) -> None:
    """Send a signal to those that still live."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def descendants(pid: int) -> list[int]:
    """The processes that `pid` has started, those that these have started, and so on."""
    begotten: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            begotten.setdefault(parent, []).append(int(stat.parent.name))
    found = list(begotten.get(pid, ()))
    for child in found:
        found += begotten.get(child, ())
    return found


def _run(main: Callable[..., None], arguments: tuple[Any, ...], environ: dict[str, str]) -> None:
    end_with_parent()
    os.environ.clear()
    os.environ.update(environ)
    main(*arguments)
