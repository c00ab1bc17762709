"""Become a command that dies when its parent does: `python -I -S tether.py PARENT_PID COMMAND…`

Runs by its path, before the command and in its place (same process, same descriptors), because
Python code between fork and exec is not safe in a parent that has threads. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>; kept across exec, unlike across fork
PARENT_GONE = 128 + signal.SIGKILL
CANNOT_RUN = 127  # as a shell has it


def tether(parent: int) -> None:
    """Ask the kernel for SIGKILL at the death of `parent`, which must be the parent now.

    The kernel watches the thread that forked, so a launcher starts its children from a thread that
    lives as long as itself: its main thread.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the call, and the kernel will send nothing
        sys.exit(PARENT_GONE)


def command(argv: list[str]) -> list[str]:
    """`argv` wrapped so that the process it starts dies with this one."""
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), str(os.getpid()), *argv]


if __name__ == "__main__":
    tether(int(sys.argv[1]))
    try:
        os.execvp(sys.argv[2], sys.argv[2:])
    except OSError as error:
        sys.stderr.write(f"cannot run {sys.argv[2]}: {error.strerror}\n")
        sys.exit(CANNOT_RUN)
