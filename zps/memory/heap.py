"""The process's allocator, told to keep what it has."""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEEP_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Let large messages be received into memory that was used before.

    By default glibc gives back to the system what a large message has left, and the next one pays
    for each of its pages again: more than for copying it. For a process of ours that serves
    messages; call it before there are threads. Does nothing with another C library.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)
