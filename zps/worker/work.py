"""A handle on something under way, like torch.distributed's Work."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from zps.memory.control import Outcome
from zps.trace import NO_TRACE, Tracer
from zps.worker.link import Link


class Part(NamedTuple):
    """The pushes of one work at one hub."""

    link: Link
    buckets: NDArray[np.uint32]
    seqs: NDArray[np.uint64]
    settle: Callable[[NDArray[np.uint32], NDArray[np.uint64], NDArray[np.uint64]], None]
    """Called once with the buckets, the pushes waited for, and what became of each."""


class Work:
    """What a push, pull or push_pull returns. Waiting twice is allowed."""

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        default_timeout_s: float,
        attend: Callable[[], object] = bool,
        tracer: Tracer = NO_TRACE,
    ):
        """attend: called by `done`, for what has to be done before anything is"""
        self._tracer = tracer
        self._attend = attend
        self._parts = tuple(parts)
        self._default_timeout_s = default_timeout_s
        self._finish: Callable[[], None] = lambda: None
        self._finished = False
        self._found: list[NDArray[np.uint64]] = []

    def wait(self, timeout_s: float | None = None) -> Work:
        """Return once the hub has taken the gradients and their effect is visible here.

        timeout_s  None: the setting `timeout_s`
        Raises WaitTimeout (naming whom the hub waits for), HubLost, SessionLost; after a
        WaitTimeout, waiting again is allowed.
        """
        if not self._finished:
            limit = self._default_timeout_s if timeout_s is None else timeout_s
            deadline = time.monotonic() + limit
            with self._tracer.span("wait"):
                for part in self._parts:
                    part.link.wait(part.buckets, part.seqs, max(0.0, deadline - time.monotonic()))
            self._found = [part.link.outcomes(part.buckets) for part in self._parts]
            for part, outcomes in zip(self._parts, self._found, strict=True):
                part.settle(part.buckets, part.seqs, outcomes)
            self._finish()
            self._finished = True
        return self

    def then(self, finish: Callable[[], None]) -> Work:
        """The same work, with `finish` called once it has been waited for."""
        self._finish = finish
        return self

    @property
    def finished(self) -> bool:
        """Whether `wait` has returned."""
        return self._finished

    def done(self) -> bool:
        """Whether `wait` would return at once."""
        if self._finished:
            return True
        self._attend()
        return all(part.link.done(part.buckets, part.seqs) for part in self._parts)

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """What became of each pushed bucket; empty before `wait` has returned."""
        return tuple(Outcome(code) for found in self._found for code in found.tolist())
