"""The bell: a worker that shares the hub's memory says "all of it again" without a message.

Most pushes are like the one before: every bucket, in the next round, with nothing new to tell. Such
a push is written to a page of the worker's, and a word in the hub's doorway, a pipe, wakes the hub:

    offset  0   rung         sequence number of the push that lies here; written last
            8   after        that of the last message sent before it
           16   round        of all buckets
           24   samples      float64
           32   grad_scale   float64
           40   flags        1 finite, 2 hold
           64   bases[buckets]   the version of each that its gradient was computed on

The worker alone writes the page, and only when the push before has been consumed. The hub trusts
none of it: it takes a copy and judges that as it judges a message.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from zps import native
from zps.core.rounds import MAX_ROUND
from zps.errors import ProtocolError
from zps.memory.control import MAX_SEQ
from zps.memory.segment import Segment

_HEAD_BYTES = 64
_RECORD = struct.Struct("<QQddQ")  # what follows `rung`
_RANK = struct.Struct("<I")
_FINITE, _HOLD = 1, 2
_READ_BYTES = 4096


class Ring(NamedTuple):
    """One push of all buckets: see the PUSH message for what its fields mean."""

    seq: int
    after: int
    round: int
    samples: float
    grad_scale: float
    finite: bool
    hold: bool


class Bell:
    """One worker's page, on either side."""

    def __init__(self, segment: Segment, buckets: int):
        if segment.nbytes < bell_bytes(buckets):
            raise ProtocolError(f"a bell of {segment.nbytes} bytes, not {bell_bytes(buckets)}")
        self.segment = segment
        self.address = segment.address
        self._head = segment.bytes[:_HEAD_BYTES].data
        self._bases = segment.bytes[_HEAD_BYTES:].view(np.uint64)[:buckets]

    @classmethod
    def create(cls, rank: int, buckets: int) -> Bell:
        """The hub's end. Raises OutOfMemory."""
        return cls(Segment.create(f"bell-{rank}", bell_bytes(buckets)), buckets)

    def write(self, ring: Ring, bases: NDArray[np.uint64]) -> None:
        """Lay a push; the page must be free. bases: (buckets,)"""
        self._bases[:] = bases
        flags = _FINITE * ring.finite | _HOLD * ring.hold
        _RECORD.pack_into(
            self._head, 8, ring.after, ring.round, ring.samples, ring.grad_scale, flags
        )
        native.store_u64(self.address, ring.seq)

    @property
    def rung(self) -> int:
        """The sequence number of the push that lies here, 0 before the first."""
        return native.load_u64(self.address)

    def read(self) -> tuple[Ring, list[int]]:
        """A copy of the push that lies here, and of its bases.

        Raises ProtocolError for what no message could say either.
        """
        seq = native.load_u64(self.address)
        after, round_, samples, grad_scale, flags = _RECORD.unpack_from(self._head, 8)
        if seq >= MAX_SEQ or round_ >= MAX_ROUND:
            raise ProtocolError(f"a bell that was rung for push {seq} in round {round_}")
        ring = Ring(
            seq, after, round_, samples, grad_scale, bool(flags & _FINITE), bool(flags & _HOLD)
        )
        return ring, self._bases.tolist()

    def close(self) -> None:
        self.segment.close()


def bell_bytes(buckets: int) -> int:
    """The size of a page for so many buckets."""
    return _HEAD_BYTES + 8 * buckets


class Doorway:
    """The hub's end of the pipe. It only wakes: a word that is lost or invented does no harm."""

    def __init__(self) -> None:
        self._inner, self._outer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    @property
    def inner(self) -> int:
        """Readable when somebody has knocked."""
        return self._inner

    @property
    def outer(self) -> int:
        """What a worker opens: see `Knocker`."""
        return self._outer

    def knocks(self) -> set[int]:
        """The ranks that have knocked since the last call, or what others wrote for ranks."""
        try:
            data = os.read(self._inner, _READ_BYTES)
        except BlockingIOError:
            return set()
        whole = len(data) - len(data) % _RANK.size
        return {rank for (rank,) in _RANK.iter_unpack(data[:whole])}

    def close(self) -> None:
        os.close(self._inner)
        os.close(self._outer)


class Knocker:
    """A worker's end of the pipe. Raises ProtocolError for what is no pipe of this user's hub."""

    def __init__(self, pid: int, fd: int, rank: int):
        path = f"/proc/{pid}/fd/{fd}"
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise ProtocolError(f"cannot open the hub's doorway at {path}: {error}") from error
        info = os.fstat(self._fd)
        if not stat.S_ISFIFO(info.st_mode) or info.st_uid != os.geteuid():
            os.close(self._fd)
            raise ProtocolError(f"{path} is no doorway of a hub")
        self._word = _RANK.pack(rank)

    def knock(self) -> None:
        """Wake the hub. Nothing happens if it is gone, which is for others to notice."""
        # A full pipe wakes it too.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._fd, self._word)

    def close(self) -> None:
        os.close(self._fd)
