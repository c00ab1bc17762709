"""A handle on something under way, like torch.distributed's Work."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from zps.memory.control import Outcome
from zps.worker.link import Link


class Work:
    """What a push, pull or push_pull returns. Waiting twice is allowed."""

    def __init__(
        self,
        link: Link,
        buckets: NDArray[np.uint32],
        seqs: NDArray[np.uint64],
        *,
        default_timeout_s: float,
    ):
        self._link = link
        self._buckets = buckets
        self._seqs = seqs
        self._default_timeout_s = default_timeout_s
        self._finish: Callable[[], None] = lambda: None
        self._finished = False
        self._outcomes: tuple[Outcome, ...] = ()

    def wait(self, timeout_s: float | None = None) -> Work:
        """Return once the hub has taken the gradients and their effect is visible here.

        timeout_s  None: the setting `timeout_s`
        Raises WaitTimeout (naming whom the hub waits for), HubLost, SessionLost; after a
        WaitTimeout, waiting again is allowed.
        """
        if not self._finished:
            limit = self._default_timeout_s if timeout_s is None else timeout_s
            self._link.wait(self._buckets, self._seqs, limit)
            self._outcomes = self._link.outcomes(self._buckets)
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
        return self._finished or self._link.done(self._buckets, self._seqs)

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """What became of each pushed bucket; empty before `wait` has returned."""
        return self._outcomes
