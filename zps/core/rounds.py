"""When a bucket is applied, and with whose gradients.

The hub tells `Rounds` who joins, who leaves and what was pushed, and does what it answers: `Apply`
a bucket with these contributors, or `Drop` a push and say why. A push that gets no answer is kept;
a later call answers it.

    for action in rounds.on_push(rank=2, round=7, bucket=0, base=7):
        ...                                     # Apply(bucket, round, ranks, ...) | Drop(reason)

bsp    A round's members are frozen when it opens, at the first push of its number. A bucket is
       applied once each of them has pushed it or left; with a quorum, once that share has. The
       rounds of a bucket are applied in order.
ssp    A push is applied on arrival, unless it is more than `staleness` rounds ahead of the slowest
       other member: then it is kept until that one has caught up or left.
async  A push is applied on arrival.

Sources: Ho et al., More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server,
section 3 (ssp); Chen et al., Revisiting Distributed Synchronous SGD, section 3.1 (quorum).
"""

from __future__ import annotations

from collections.abc import Collection

from zps.core.actions import MAX_AHEAD, MAX_ROUND, Action, Apply, Drop, Mode, Policy, Push
from zps.core.in_step import InStep
from zps.core.on_arrival import OnArrival
from zps.errors import ConfigError, ProtocolError

__all__ = ["MAX_AHEAD", "MAX_ROUND", "Action", "Apply", "Drop", "Mode", "Rounds"]


class Rounds:
    """The rounds of one hub's buckets.

    buckets    how many buckets the hub owns; they are numbered from 0
    staleness  ssp: how many rounds a push may be ahead of the slowest other member when applied
    quorum     bsp: the share of a round's members whose pushes apply a bucket, in (0, 1]
    drop_over  ssp, async: drop a gradient that is staler than this; None never does

    Closed rounds are forgotten: memory is bounded by members x buckets x open rounds.
    """

    def __init__(
        self,
        buckets: int,
        mode: Mode,
        *,
        staleness: int = 0,
        quorum: float = 1.0,
        drop_over: int | None = None,
    ) -> None:
        if staleness < 0:
            raise ConfigError(f"staleness is {staleness}, not 0 or more")
        if not 0 < quorum <= 1:
            raise ConfigError(f"quorum is {quorum}, not above 0 and at most 1")
        self._versions = [0] * buckets
        self._policy: Policy
        if mode is Mode.BSP:
            self._policy = InStep(self._versions, quorum)
        else:
            bound = staleness if mode is Mode.SSP else None
            self._policy = OnArrival(self._versions, bound, drop_over)

    @property
    def versions(self) -> list[int]:
        """How many times each bucket has been applied. A restored hub writes into it in place."""
        return self._versions

    @property
    def highest_opened(self) -> int:
        """The highest round that anyone has pushed, -1 before the first."""
        return self._policy.highest_opened

    def min_round(self) -> int:
        """The lowest round that is not over.

        bsp: every bucket is closed in all rounds below it. ssp, async: every member has pushed in
        all rounds below it.
        """
        return self._policy.min_round()

    def join(self, rank: int, at_least: int = 0) -> int:
        """`rank` becomes a member. Returns the first round that it takes part in.

        That is 0 at the start. Later it is the round after the highest opened one (bsp) or after
        the fastest member's last (ssp, async): what has begun does not wait for a newcomer.

        at_least  do not take part before this round: a worker of several hubs enters all of them
                  at the same one
        """
        return self._policy.join(rank, at_least)

    def leave(self, rank: int) -> list[Action]:
        """`rank` has finished or died: what it pushed counts, the rest is not awaited any more.

        Nothing happens if it is not a member.
        """
        return self._policy.leave(rank)

    def on_push(self, rank: int, round: int, bucket: int, base: int) -> list[Action]:
        """`rank` has pushed its gradient of `bucket` in `round`.

        base  the bucket's version that the gradient was computed on
        Returns what follows, for this push and for those it sets free, in the order to do it.
        Raises ProtocolError, without effect, for what no honest worker sends: see `check`.
        """
        self.check(rank, round, bucket, base)
        return self.take(rank, round, bucket, base)

    def take(self, rank: int, round: int, bucket: int, base: int) -> list[Action]:
        """`on_push` for a push that has passed `check` since anything else was called."""
        return self._policy.on_push(Push(rank, round, bucket, base))

    def check(self, rank: int, round: int, bucket: int, base: int) -> None:
        """Raise ProtocolError if `on_push` would: for a push of several buckets, before the first.

        What is wrong: no such bucket, a version that is still to come, a round that runs away.
        """
        if not 0 <= bucket < len(self._versions):
            raise ProtocolError(
                f"rank {rank} pushed bucket {bucket}; this hub has {len(self._versions)}"
            )
        if round < 0 or not 0 <= base <= self._versions[bucket]:
            raise ProtocolError(
                f"rank {rank} pushed bucket {bucket}, round {round}, computed on version {base}; "
                f"the bucket is at version {self._versions[bucket]}"
            )
        self._policy.check(Push(rank, round, bucket, base))

    def would_close(self, round: int, bucket: int, ranks: Collection[int]) -> bool:
        """Whether the bucket could be applied in this round had all of `ranks` pushed it.

        A round that is closed already is: its late pushes only have to be answered.
        """
        return self._policy.would_close(round, bucket, ranks)

    def would_keep(self, rank: int, round: int) -> bool:
        """Whether a push of `rank` in `round` would now be kept, to wait for slower members."""
        return self._policy.would_keep(rank, round)

    @property
    def members(self) -> tuple[int, ...]:
        """Whoever has joined and not left, ascending."""
        return self._policy.members

    def at_rest(self) -> int | None:
        """bsp: the round that every member is to push next, of every bucket.

        None while one has begun, where some are to begin later than others, and in other modes.
        """
        return self._policy.at_rest()

    def advance(self, rounds: int) -> None:
        """Every member has pushed every bucket in so many more rounds, and all were applied.

        To be called `at_rest` only; the result is that of the pushes one by one.
        """
        self._policy.advance(rounds)

    def pending(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """For each (round, bucket) of which a push is kept: the ranks that it waits for."""
        return self._policy.pending()

    def waiting_for(self, bucket: int) -> tuple[int, ...]:
        """The ranks that the next application of `bucket` waits for; () if nothing has begun."""
        return self._policy.waiting_for(bucket)
