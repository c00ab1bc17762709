"""Many processes, one terminal: every line that a child writes gets its rank in front."""

from __future__ import annotations

import os
import select
import selectors
import threading
from collections import Counter
from dataclasses import dataclass
from typing import IO

__all__ = ["LONGEST_LINE", "Lines", "Pump", "prefix"]

LONGEST_LINE = 1 << 20
_CHUNK = 1 << 16
_COLOURS = (36, 33, 35, 32, 34, 31)


def prefix(rank: int, *, colour: bool) -> bytes:
    """What stands in front of a line of `rank`: b"[3] ", coloured by rank if asked."""
    label = f"[{rank}]"
    if colour:
        label = f"\x1b[{_COLOURS[rank % len(_COLOURS)]}m{label}\x1b[0m"
    return label.encode() + b" "


class Lines:
    """Cuts a stream of bytes into whole lines, each with `prefix` in front.

    Of text that a carriage return has overwritten only the last state is kept, as on a terminal. A
    line longer than LONGEST_LINE bytes is cut there, so that memory is bounded.
    """

    def __init__(self, prefix: bytes) -> None:
        self._prefix = prefix
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """The lines that `data` completes, ready to be written; often none."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LONGEST_LINE:
            lines.append(self._rest)
            self._rest = b""
        return b"".join(self._finish(line) for line in lines)

    def close(self) -> bytes:
        """What is left without a newline, ended with one."""
        rest, self._rest = self._rest, b""
        return self._finish(rest) if rest else b""

    def _finish(self, line: bytes) -> bytes:
        return self._prefix + line.rstrip(b"\r").rpartition(b"\r")[2] + b"\n"


@dataclass(slots=True)
class _Stream:
    rank: int
    source: IO[bytes]
    sink: int
    lines: Lines


class Pump:
    """One thread that carries the children's pipes to this process's output, line by line.

    `add` every pipe, `start`, and `drain` when children have ended. Sinks are file descriptors: a
    thread that is stuck in a buffered writer would hang the interpreter's exit. A sink that breaks
    (its reader is gone) loses the output and not the job: the pipes are still emptied.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._run, name="zps-output", daemon=True)
        self._open: Counter[int] = Counter()
        self._closed = threading.Condition()

    def add(self, rank: int, source: IO[bytes], sink: int, prefix: bytes) -> None:
        """Carry `source`, a pipe's reading end, to the descriptor `sink`; before `start` only."""
        os.set_blocking(source.fileno(), False)
        stream = _Stream(rank, source, sink, Lines(prefix))
        self._selector.register(source, selectors.EVENT_READ, stream)
        self._open[rank] += 1

    def start(self) -> None:
        self._thread.start()

    def drain(self, rank: int | None, timeout_s: float) -> bool:
        """Wait until the pipes of `rank` (None: of all) are at their end and written out.

        False after `timeout_s`: a descendant that left its worker's process group may hold a pipe
        for ever.
        """
        if self._thread.ident is None:
            return True
        with self._closed:
            return self._closed.wait_for(lambda: not self._count(rank), timeout_s)

    def _count(self, rank: int | None) -> int:
        return self._open.total() if rank is None else self._open[rank]

    def _run(self) -> None:
        while self._selector.get_map():
            for key, _ in self._selector.select():
                self._carry(key.data)
        self._selector.close()

    def _carry(self, stream: _Stream) -> None:
        try:
            data = os.read(stream.source.fileno(), _CHUNK)
        except BlockingIOError:
            return
        if data:
            _write(stream.sink, stream.lines.feed(data))
            return
        _write(stream.sink, stream.lines.close())
        self._selector.unregister(stream.source)
        stream.source.close()
        with self._closed:
            self._open[stream.rank] -= 1
            self._closed.notify_all()


def _write(sink: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(sink, rest) :]
        except BlockingIOError:  # whoever gave us this output has made it non-blocking
            select.select([], [sink], [])
        except OSError:  # the reader is gone
            return
