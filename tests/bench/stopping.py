"""Starts a process that stops itself, says its number, and waits: python -m tests.bench.stopping
fresh|forked"""

from __future__ import annotations

import signal
import sys
from multiprocessing.connection import Connection

from bench.peers import processes


def stop(control: Connection) -> None:
    control.send(None)
    signal.raise_signal(signal.SIGSTOP)


def main() -> None:
    here, there = processes.pipe()
    process = processes.start(stop, there, fresh=sys.argv[1] == "fresh")
    here.recv()
    print(process.pid, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
