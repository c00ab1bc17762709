"""How the processes of participants are started."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

# What takes long to import. The second is what torch imports when it first makes an optimizer.
_PRELOADED = ["torch.distributed", "torch._dynamo", "zps", f"{__package__}.team"]


def start(main: Callable[..., None], *arguments: Any, from_here: bool = False) -> BaseProcess:
    """Runs `main(*arguments)` in a new process, with the environment of this one.

    It is forked from one that has imported torch and has done nothing else: with a new interpreter
    each time, a quick run would be imports for the most part.

    from_here  begin with a new interpreter, in this thread's network namespace
    """
    context: Any = multiprocessing.get_context("spawn" if from_here else "forkserver")
    if not from_here:
        context.set_forkserver_preload(_PRELOADED)
    process: BaseProcess = context.Process(
        target=_run, args=(main, arguments, dict(os.environ)), daemon=True
    )
    process.start()
    return process


def pipe() -> tuple[Connection, Connection]:
    """Two ends, either of which may be an argument of `start`."""
    return multiprocessing.Pipe()


def _run(main: Callable[..., None], arguments: tuple[Any, ...], environ: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environ)
    main(*arguments)
