"""The control segment: the few words through which the hub wakes workers that share its memory.

The hub alone writes it; workers map it read-only. Every word is 8 bytes, little-endian:

    offset  0   magic
            8   epoch            one life of the hub
           16   signal           futex word (its low 4 bytes); rises after every change below
           24   beat             CLOCK_MONOTONIC in ns when the hub's loop last turned
           64   mail[world]      messages sent to each worker since it joined: look at the socket
            .   seq[buckets]     seqlock: 2 x version, odd while the bucket is being written
            .   closed[buckets]  1 + the highest round of each bucket that has closed
            .   steps[pieces]    how often each piece has been updated by its rule
            .   done[world][buckets]   the last push consumed: its sequence number and its outcome
            .   512 bytes of text      why the hub ended

`done` carries `Outcome` in its low bits, so a worker waits for `done >= seq << OUTCOME_BITS`.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from zps.errors import ProtocolError
from zps.memory.segment import Segment

MAGIC = 0x5A50_5343_544C_3031  # "ZPSCTL01"
OUTCOME_BITS = 3
MAX_SEQ = 1 << 60  # what sequence numbers stay below: an outcome goes into the same word
_HEAD_WORDS = 8
_LAST_WORDS_BYTES = 512


class Outcome(IntEnum):
    """What became of a pushed bucket."""

    APPLIED = 0
    LATE = 1  # its round had already closed without it (quorum below 1)
    STALE = 2  # staler than the bound, under the policy `drop`
    SKIPPED = 3  # the round held a non-finite gradient and was skipped for everyone
    DUPLICATE = 4


class Control:
    """Typed views into a control segment, the same on both sides."""

    def __init__(self, segment: Segment, *, world_size: int, buckets: int, pieces: int):
        self.segment = segment
        words = segment.bytes[: segment.nbytes // 8 * 8].view(np.uint64)
        need = _words(world_size, buckets, pieces)
        if len(words) < need:
            raise ProtocolError(f"the control segment has {len(words)} words, but needs {need}")
        self.head: NDArray[np.uint64] = words[:_HEAD_WORDS]
        at = _HEAD_WORDS
        self.mail, at = words[at : at + world_size], at + world_size
        self.seq, at = words[at : at + buckets], at + buckets
        self.closed, at = words[at : at + buckets].view(np.int64), at + buckets
        self.steps, at = words[at : at + pieces].view(np.int64), at + pieces
        done = words[at : at + world_size * buckets]
        self.done, at = done.reshape(world_size, buckets), at + len(done)
        self._last_words = segment.bytes[8 * at : 8 * at + _LAST_WORDS_BYTES]

    @classmethod
    def create(cls, *, epoch: int, world_size: int, buckets: int, pieces: int) -> Control:
        """Make the hub's control segment."""
        segment = Segment.create("control", 8 * _words(world_size, buckets, pieces))
        control = cls(segment, world_size=world_size, buckets=buckets, pieces=pieces)
        control.head[0], control.head[1] = MAGIC, epoch
        return control

    @property
    def signal_address(self) -> int:
        """The futex word that every waiter sleeps on."""
        return self.segment.address + 16

    @property
    def epoch(self) -> int:
        return int(self.head[1])

    def beat(self, now_ns: int) -> None:
        self.head[3] = now_ns

    @property
    def beat_s(self) -> float:
        """When the hub's loop last turned, on the clock of time.monotonic."""
        return int(self.head[3]) / 1e9

    @property
    def last_words(self) -> str:
        """Why the hub ended, if it could say; a message might be lost with its connection."""
        return self._last_words.tobytes().rstrip(b"\0").decode(errors="replace")

    def say_last(self, text: str) -> None:
        data = text.encode()[:_LAST_WORDS_BYTES]
        self._last_words[: len(data)] = np.frombuffer(data, np.uint8)

    def done_address(self, rank: int) -> int:
        """The first of the `buckets` words in which `rank` reads what became of its pushes."""
        return int(self.done[rank : rank + 1].ctypes.data)

    def mail_address(self, rank: int) -> int:
        return int(self.mail[rank : rank + 1].ctypes.data)

    @property
    def closed_address(self) -> int:
        return int(self.closed.ctypes.data)

    def seq_address(self, bucket: int) -> int:
        return self.seq.ctypes.data + 8 * bucket

    def check(self, epoch: int) -> None:
        """Raise ProtocolError unless this is the control segment of that life of the hub."""
        if int(self.head[0]) != MAGIC or self.epoch != epoch:
            raise ProtocolError("the shared memory does not belong to the hub that offered it")


_OUTCOME_MASK = np.uint64((1 << OUTCOME_BITS) - 1)
_OUTCOME_SHIFT = np.uint64(OUTCOME_BITS)


def done_word(seq: int, outcome: Outcome) -> int:
    """How a consumed push is recorded."""
    return seq << OUTCOME_BITS | outcome


def done_target(seqs: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The least words that say pushes `seqs` have been consumed, whatever their outcome."""
    return seqs << _OUTCOME_SHIFT


def outcomes_of(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """What became of the pushes that these words record, an `Outcome` each."""
    return words & _OUTCOME_MASK


def _words(world_size: int, buckets: int, pieces: int) -> int:
    tables = world_size + 2 * buckets + pieces + world_size * buckets
    return _HEAD_WORDS + tables + _LAST_WORDS_BYTES // 8
