"""What remote workers hold that are in step, when weights travel as encoded differences.

They hold the same, but for the last difference, which some may not have been sent yet. So there is
one copy of it, one encoding for each version of a bucket, and for each worker the number of the
last difference it was sent: to one that lacks more than one, or about which nothing is known, go
the values that the others hold.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from zps.hub.job import Job
from zps.memory.deltas import Deltas
from zps.memory.segment import private_bytes

Bytes = NDArray[np.uint8]


class Held:
    """Of one job, bucket by bucket."""

    def __init__(self, job: Job, deltas: Deltas):
        self._job = job
        self._deltas = deltas
        self._arena = private_bytes(job.layout.arena_bytes, "what remote workers hold")
        self.reset()

    def reset(self) -> None:
        """Whatever they held: all of them are about to take over the weights as they are."""
        count = len(self._job.layout.buckets)
        self._arena[:] = self._job.store.weights.bytes[: len(self._arena)]
        self._versions = [self._version(bucket) for bucket in range(count)]
        self._made = [0] * count  # differences
        self._last: dict[int, Bytes] = {}  # the last difference, where it can be sent
        self._sent: dict[tuple[int, int], int] = {}  # (session, bucket) -> differences

    def forget(self, session: int) -> None:
        for key in [key for key in self._sent if key[0] == session]:
            del self._sent[key]

    def answer(self, session: int, bucket: int, *, whole: bool) -> tuple[Bytes, bool]:
        """What brings a worker to the present weights, and whether that is a difference.

        whole  it asks for the values. What is returned does not change any more.
        """
        self._advance(bucket)
        key, made = (session, bucket), self._made[bucket]
        last = self._last.get(bucket) if self._sent.get(key) == made - 1 and not whole else None
        self._sent[key] = made
        if last is not None:
            return last, True
        spec = self._job.layout.buckets[bucket]
        return self._arena[spec.byte : spec.byte + spec.nbytes].copy(), False

    def _advance(self, bucket: int) -> None:
        version = self._version(bucket)
        if version == self._versions[bucket]:
            return
        self._versions[bucket] = version
        self._made[bucket] += 1
        self._last.pop(bucket, None)
        weights = self._job.store.weights.bytes
        if any(held == bucket for _, held in self._sent):
            delta = self._deltas.encode(bucket, weights, self._arena)
            if delta is not None:
                self._last[bucket] = delta
        else:  # nobody holds it: nothing has to be followed
            spec = self._job.layout.buckets[bucket]
            place = slice(spec.byte, spec.byte + spec.nbytes)
            self._arena[place] = weights[place]

    def _version(self, bucket: int) -> int:
        return int(self._job.control.seq[bucket]) >> 1
