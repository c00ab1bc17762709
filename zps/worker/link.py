"""What a worker asks of the way to its hub, whether that is shared memory or messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from zps.errors import GradientError
from zps.wire.messages import MAX_PUSH_BUCKETS, in_range


@dataclass(frozen=True, slots=True)
class PushInfo:
    """What goes with a gradient: see the PUSH message. Raises GradientError for a bad weight."""

    samples: float = 1.0
    grad_scale: float = 1.0
    finite: bool = True
    hold: bool = False
    hypers: bytes | None = None
    absent: NDArray[np.uint32] | None = None

    def __post_init__(self) -> None:
        # Here, because the hub's refusal of a push would come when its round can no longer end.
        if not (self.samples == 0 or in_range(self.samples)) or not (
            in_range(self.grad_scale) and in_range(self.samples / self.grad_scale or 1.0)
        ):
            raise GradientError(
                f"samples={self.samples}, grad_scale={self.grad_scale}: a gradient's weight must "
                "be 0 or from 1e-30 to 1e30, and so must its scale and their ratio"
            )


def push_in_parts(
    buckets: NDArray[np.uint32], push: Callable[[list[int]], int]
) -> NDArray[np.uint64]:
    """Push so many buckets at a time as one message can name; the sequence number of each."""
    seqs = np.empty(len(buckets), np.uint64)
    for at in range(0, len(buckets), MAX_PUSH_BUCKETS):
        part = slice(at, at + MAX_PUSH_BUCKETS)
        seqs[part] = push(buckets[part].tolist())
    return seqs


class Link(Protocol):
    """One worker's way to one hub."""

    first_round: int
    """The first round this worker takes part in."""
    formed: bool
    """Whether the job was running already when this worker came."""
    private: bool
    """Whether `weights` are this worker's own. They change when it fetches, and in rounds that all
    take in step also while it waits for its push."""

    @property
    def weights(self) -> NDArray[np.uint8]:
        """The weights arena as this worker sees it: all buckets, then the extras."""
        ...

    @property
    def slots(self) -> NDArray[np.uint8]:
        """Where gradients are laid before they are pushed, as the plan says."""
        ...

    @property
    def closed_rounds(self) -> NDArray[np.int64]:
        """1 + the highest round of each bucket that has closed; changes under the reader."""
        ...

    @property
    def rounds_over(self) -> int:
        """All buckets have closed in the rounds below this one."""
        ...

    @property
    def steps(self) -> NDArray[np.int64]:
        """How often each piece of the layout has been updated; changes under the reader."""
        ...

    def push(
        self, round_: int, buckets: NDArray[np.uint32], info: PushInfo
    ) -> int | NDArray[np.uint64]:
        """Hand the slots of `buckets` over; returns the sequence numbers to wait for: one for all,
        or one each.

        The slots belong to the hub until `wait` has returned for them.
        """
        ...

    def wait(self, buckets: NDArray[np.uint32], seqs: NDArray[np.uint64], timeout_s: float) -> None:
        """Return once each of `buckets` has been consumed up to the push in `seqs`.

        Raises WaitTimeout, HubLost, or what the hub refused.
        """
        ...

    def done(self, buckets: NDArray[np.uint32], seqs: NDArray[np.uint64]) -> bool:
        """Whether `wait` would return at once."""
        ...

    def listen(self, timeout_s: float) -> None:
        """Take what the hub has sent; if nothing has come, wait for it this long at most."""
        ...

    def outcomes(self, buckets: NDArray[np.uint32]) -> NDArray[np.uint64]:
        """An `Outcome` for the last push of each of `buckets` that was consumed."""
        ...

    def fetch(self, buckets: Sequence[int] | NDArray[np.uint32]) -> None:
        """Bring private weights of `buckets` up to date; nothing to do where they are shared."""
        ...

    def upload(self) -> None:
        """Make the weights and extras as they lie here the hub's, for the next PUBLISH."""
        ...

    def download(self) -> None:
        """Take over the hub's weights and extras after a PUBLISH."""
        ...

    def pull(self, bucket: int, out: NDArray[np.uint8]) -> int:
        """Copy the weights of `bucket`, never half an update; returns their version."""
        ...

    def version(self, bucket: int) -> int:
        """How often `bucket` had been applied when its weights were last seen here."""
        ...

    def replica(self) -> NDArray[np.uint8] | None:
        """Where this worker is to keep the weights it computes on, if the hub wants to see them."""
        ...

    @property
    def owes(self) -> int:
        """How many buckets that were pushed the hub has yet to ask for: a goodbye would lose them.

        `listen` hands over what it asks for.
        """
        ...

    def last_words(self) -> str:
        """Why the hub ended, once it has, and if it could say."""
        ...

    def close(self) -> None: ...
