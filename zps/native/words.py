"""Words in shared memory: waiting for them, raising them, and copying what they guard."""

from __future__ import annotations

import enum

import numpy as np
from numpy.typing import NDArray

from zps import _core
from zps.native.checks import UINT32, UINT64, address, check_array, check_pointer


class Waited(enum.IntEnum):
    """Why `wait` returned."""

    REACHED = 0
    MAIL = 1
    TIMEOUT = 2


def wait(
    signal_ptr: int,
    words_ptr: int,
    index: NDArray[np.uint32],
    targets: NDArray[np.uint64],
    mail_ptr: int,
    mail_seen: int,
    spin_us: int,
    timeout_ns: int,
) -> Waited:
    """Wait until words[index[i]] >= targets[i] for every i, mail comes, or the time is over.

    Spins for spin_us, then sleeps on the signal, a futex in shared memory that may be mapped
    read-only. Mail has come when the word at mail_ptr (0: none) is not mail_seen; whoever writes it
    posts the signal too. Does not return early on Ctrl-C: pass short timeouts in turn.
    """
    check_array(index, UINT32, (None,), "index")
    check_array(targets, UINT64, index.shape, "targets")
    check_pointer(signal_ptr, 4, "signal_ptr")
    if len(index):
        check_pointer(words_ptr, 8, "words_ptr")
    if mail_ptr:
        check_pointer(mail_ptr, 4, "mail_ptr")
    return Waited(
        _core.wait(
            signal_ptr,
            words_ptr,
            address(index),
            address(targets),
            len(index),
            mail_ptr,
            mail_seen,
            spin_us * 1000,
            timeout_ns,
        )
    )


def post(
    signal_ptr: int, words_ptr: int, index: NDArray[np.uint32], values: NDArray[np.uint64]
) -> None:
    """Store words[index[i]] = values[i], then wake every waiter on the signal."""
    check_array(index, UINT32, (None,), "index")
    check_array(values, UINT64, index.shape, "values")
    check_pointer(signal_ptr, 4, "signal_ptr")
    if len(index):
        check_pointer(words_ptr, 8, "words_ptr")
    _core.post(signal_ptr, words_ptr, address(index), address(values), len(index))


def post_signal(signal_ptr: int) -> None:
    """Wake every waiter on the signal, to look again: for mail."""
    check_pointer(signal_ptr, 4, "signal_ptr")
    _core.post(signal_ptr, 0, 0, 0, 0)


def pull(seq_ptr: int, src_ptr: int, dst_ptr: int, nbytes: int, spins: int) -> int:
    """Copy bytes that a seqlock guards, whole, and return their version.

    Returns -1 if none of `spins` attempts found them at rest: the writer is slow, or dead.
    """
    check_pointer(seq_ptr, 8, "seq_ptr")
    return _core.pull(seq_ptr, src_ptr, dst_ptr, nbytes, spins)


def load_u64(ptr: int) -> int:
    """Read a shared word (acquire)."""
    check_pointer(ptr, 8, "ptr")
    return _core.load_u64(ptr)


def store_u64(ptr: int, value: int) -> None:
    """Write a shared word (release)."""
    check_pointer(ptr, 8, "ptr")
    _core.store_u64(ptr, value)


def load_u32(ptr: int) -> int:
    """Read a shared word (acquire)."""
    check_pointer(ptr, 4, "ptr")
    return _core.load_u32(ptr)


def store_u32(ptr: int, value: int) -> None:
    """Write a shared word (release)."""
    check_pointer(ptr, 4, "ptr")
    _core.store_u32(ptr, value)


def add_u32(ptr: int, value: int) -> int:
    """Add to a shared word, wrapping, and return its new value."""
    check_pointer(ptr, 4, "ptr")
    return _core.add_u32(ptr, value) & 0xFFFFFFFF
