"""Where the time goes: spans of the engine's own work, for Chrome's trace viewer and Perfetto.

With ZPS_TRACE=run.json every process writes a file of its own when it leaves its job, such as
run.hub0.json and run.worker1.json. Those of one machine share a clock, so that `zps trace run.json`
can lay them side by side.

    worker   encode   a gradient on its way into its slot, or the look for NaN where it lies there
             signal   telling the hub
             wait     until the hub has answered
             copy     bringing weights, where they are not the hub's own memory
    hub,     recv     reading a push
    node     decide   what follows from it
             apply    the kernels
             reply    waking the workers, or sending them what they wait for

Format: the Trace Event Format of the Chromium project, complete events ("ph": "X").
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from threading import get_native_id
from time import monotonic_ns
from typing import Any

from zps.errors import ConfigError, ZpsError

__all__ = ["NO_TRACE", "Tracer", "join"]

log = logging.getLogger("zps")

_KEEP = 1_000_000  # of a longer run, the last ones: about 100 bytes each

Span = AbstractContextManager[Any]


_Done = tuple[str, int, int, int]
"""Name, begin and end in nanoseconds of the monotonic clock, thread."""


class Tracer:
    """The spans of one process. Threads may share it.

    path  where ZPS_TRACE says; None: nothing is recorded, at the cost of a call
    role  "hub", "node" or "worker"
    Raises ConfigError when there is no such folder to write to.
    """

    _nothing: Span = nullcontext()

    def __init__(self, path: Path | None, role: str):
        if path is not None and not os.access(path.parent, os.W_OK):
            raise ConfigError(f"ZPS_TRACE={path}: {path.parent} is no folder that can be written")
        self._path = path
        self._role = role
        self._spans: deque[_Done] = deque(maxlen=_KEEP)

    def span(self, name: str) -> Span:
        """`with tracer.span("apply"): ...` records the time that this takes."""
        return self._nothing if self._path is None else _Open(self._spans.append, name)

    def add(self, name: str, begin_ns: int, end_ns: int) -> None:
        """Record a span that was timed elsewhere, by the monotonic clock."""
        if self._path is not None:
            self._spans.append((name, begin_ns, end_ns, get_native_id()))

    def finish(self, number: int) -> None:
        """`write` at the end of a job, which a trace that cannot be written does not spoil."""
        try:
            self.write(number)
        except ZpsError as error:
            log.warning("%s", error)

    def write(self, number: int) -> None:
        """Write what has been recorded, as hub or worker of this number, and forget it.

        Raises ZpsError when the file cannot be written.
        """
        if self._path is None or not self._spans:
            return
        spans = list(self._spans)  # another thread may be in one: it keeps what it adds to
        self._spans.clear()
        target = self._path.with_suffix(f".{self._role}{number}.json")
        pid = os.getpid()
        who = {"name": f"{self._role} {number}"}
        head: dict[str, Any] = {"ph": "M", "name": "process_name", "pid": pid, "args": who}
        events = [head]
        for name, begin_ns, end_ns, thread in spans:
            begin_us, us = begin_ns / 1000, (end_ns - begin_ns) / 1000
            event = {"ph": "X", "name": name, "cat": self._role, "ts": begin_us, "dur": us}
            events.append({**event, "pid": pid, "tid": thread})
        try:
            target.write_text(json.dumps({"traceEvents": events}))
        except OSError as error:
            raise ZpsError(f"the trace cannot be written: {error}") from error


NO_TRACE = Tracer(None, "")


def join(path: Path) -> int:
    """Put the files that the processes of ZPS_TRACE=`path` have written together, into `path`.

    Returns how many there were. Raises ZpsError when there is none, one that is no trace, or when
    `path` cannot be written.
    """
    parts = sorted(path.parent.glob(f"{path.stem}.*[0-9].json"))
    if not parts:
        raise ZpsError(f"no process has written a trace beside {path}: set ZPS_TRACE={path}")
    events: list[Any] = []
    for part in parts:
        try:
            events += json.loads(part.read_text())["traceEvents"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ZpsError(f"{part} is no trace: {error!r}") from error
    try:
        path.write_text(json.dumps({"traceEvents": events}))
    except OSError as error:
        raise ZpsError(f"the trace cannot be written: {error}") from error
    return len(parts)


class _Open:
    """A span that is not over. It begins when it is made: this has to be cheap."""

    __slots__ = ("_add", "_begin_ns", "_name")

    def __init__(self, add: Callable[[_Done], None], name: str):
        self._add = add
        self._name = name
        self._begin_ns = monotonic_ns()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._add((self._name, self._begin_ns, monotonic_ns(), get_native_id()))
