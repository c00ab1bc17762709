"""What is said to `Rounds`, what it answers, and what its modes have in common."""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum
from typing import NamedTuple, Protocol

__all__ = ["MAX_AHEAD", "MAX_ROUND", "Action", "Apply", "Drop", "Mode", "Policy", "Push"]

MAX_AHEAD = 64
"""How many rounds a member may push beyond the one it should wait for: this bounds what is kept."""

MAX_ROUND = 1 << 48
"""What the number of a round stays below."""


class Mode(str, Enum):
    """How the workers of a job keep step."""

    BSP = "bsp"
    SSP = "ssp"
    ASYNC = "async"


class Apply(NamedTuple):
    """Add up these gradients and apply the bucket; its version has risen by one."""

    bucket: int
    round: int
    ranks: tuple[int, ...]
    """The contributors, distinct and ascending: the order to add them in."""
    staleness: tuple[int, ...]
    """For each of `ranks`: applications since the version its gradient was computed on."""


class Drop(NamedTuple):
    """Forget this push.

    reason  "late"       for a round that is closed, or that began before its rank joined
            "duplicate"  this rank has already pushed this bucket in this round
            "stale"      computed on weights more than `drop_over` versions old
            "dead"       from a rank that is not a member
    """

    rank: int
    bucket: int
    round: int
    reason: str


Action = Apply | Drop


class Push(NamedTuple):
    rank: int
    round: int
    bucket: int
    base: int

    def drop(self, reason: str) -> list[Action]:
        return [Drop(self.rank, self.bucket, self.round, reason)]


class Policy(Protocol):
    highest_opened: int

    @property
    def members(self) -> tuple[int, ...]: ...
    def at_rest(self) -> int | None: ...
    def advance(self, rounds: int) -> None: ...
    def min_round(self) -> int: ...
    def join(self, rank: int, at_least: int) -> int: ...
    def leave(self, rank: int) -> list[Action]: ...
    def check(self, push: Push) -> None: ...
    def on_push(self, push: Push) -> list[Action]: ...
    def would_close(self, round: int, bucket: int, ranks: Collection[int]) -> bool: ...
    def would_keep(self, rank: int, round: int) -> bool: ...
    def pending(self) -> dict[tuple[int, int], tuple[int, ...]]: ...
    def waiting_for(self, bucket: int) -> tuple[int, ...]: ...
