"""Rounds that need no decision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from zps import _core
from zps.native.checks import INT64, address, check_array, check_pointer, place
from zps.native.jobs import Job, Pool, load_all


class Steps(NamedTuple):
    """Step counts of a job's params, (k,) int64 each: as they are, and as `Job.steps` has them."""

    now: NDArray[np.int64]
    next: NDArray[np.int64]


class Lane:
    """Rounds that need no decision, carried out without the interpreter: see csrc/core/lane.h.

    jobs        one a bucket, each with its lasting fields and a slot for every member
    steps       of each job
    members     (address of the bell, address of the first `done` word) of each, in rank order
    closed_ptr  a word a bucket: 1 + its last closed round
    signal_ptr  the futex that workers sleep on
    divides     the rule divides by the sum of the weights
    The caller keeps what lies at these addresses, for as long as it calls `run`.
    """

    def __init__(
        self,
        pool: Pool,
        jobs: Sequence[Job],
        steps: Sequence[Steps],
        members: Sequence[tuple[int, int]],
        closed_ptr: int,
        signal_ptr: int,
        *,
        divides: bool,
    ):
        if not members or any(len(job.slots) != len(members) for job in jobs):
            raise ValueError(f"{len(members)} members, and jobs for others")
        for job, (now, after) in zip(jobs, steps, strict=True):
            check_array(now, INT64, job.steps.shape if job.steps is not None else (0,), "now")
            if after is not job.steps:
                raise ValueError("the steps to come must be those of the job")
            if not job.seq_ptr:
                raise ValueError("a job of a lane has a seqlock")
        for pointer in (closed_ptr, *(word for member in members for word in member)):
            check_pointer(pointer, 8, "a word")
        check_pointer(signal_ptr, 4, "signal_ptr")
        self._pool = pool
        self._kept = (tuple(jobs), tuple(steps))
        self._lane = _core.Lane(
            pool._open(),
            place(None),
            load_all(jobs),
            [(address(now), address(after), len(now)) for now, after in steps],
            members,
            closed_ptr,
            signal_ptr,
            divides,
        )

    def run(
        self,
        round_: int,
        heard: Sequence[int],
        doorway: int,
        elsewhere: Sequence[int],
        timeout_ns: int,
    ) -> None:
        """Carry rounds out from `round_` on, until something else is to be done.

        heard      the last sequence number known of each member
        doorway    a pipe that is not blocking, whose words wake it
        elsewhere  descriptors; one that is readable ends it
        """
        if len(heard) != len(self._kept[0][0].slots):
            raise ValueError(f"{len(heard)} members, not {len(self._kept[0][0].slots)}")
        self._pool._open()
        self._lane.run(round_, heard, doorway, elsewhere, timeout_ns)

    @property
    def heard(self) -> list[int]:
        """The sequence number of each member's last push that was carried out, or was known."""
        return self._lane.heard

    @property
    def times(self) -> list[tuple[int, int, int]]:
        """Each round of the last run: begin, end of the kernels, end, in nanoseconds."""
        return self._lane.times
