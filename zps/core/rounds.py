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

import math
from collections.abc import Collection, Iterable
from enum import Enum
from typing import NamedTuple, Protocol

from zps.errors import ConfigError, ProtocolError

__all__ = ["MAX_AHEAD", "MAX_ROUND", "Action", "Apply", "Drop", "Mode", "Rounds"]

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
    closes: bool
    """bsp: the round is over with this call and this is its last Apply. Otherwise False.

    A round may also end without one, when those it waited for leave: see `Rounds.min_round`.
    """


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
        self._policy: _Policy
        if mode is Mode.BSP:
            self._policy = _Synchronous(self._versions, quorum)
        else:
            bound = staleness if mode is Mode.SSP else None
            self._policy = _OnArrival(self._versions, bound, drop_over)

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
        return self._policy.on_push(_Push(rank, round, bucket, base))

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
        self._policy.check(_Push(rank, round, bucket, base))

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


class _Push(NamedTuple):
    rank: int
    round: int
    bucket: int
    base: int

    def drop(self, reason: str) -> list[Action]:
        return [Drop(self.rank, self.bucket, self.round, reason)]


class _Policy(Protocol):
    highest_opened: int

    @property
    def members(self) -> tuple[int, ...]: ...
    def at_rest(self) -> int | None: ...
    def advance(self, rounds: int) -> None: ...
    def min_round(self) -> int: ...
    def join(self, rank: int, at_least: int) -> int: ...
    def leave(self, rank: int) -> list[Action]: ...
    def check(self, push: _Push) -> None: ...
    def on_push(self, push: _Push) -> list[Action]: ...
    def would_close(self, round: int, bucket: int, ranks: Collection[int]) -> bool: ...
    def would_keep(self, rank: int, round: int) -> bool: ...
    def pending(self) -> dict[tuple[int, int], tuple[int, ...]]: ...
    def waiting_for(self, bucket: int) -> tuple[int, ...]: ...


class _Round:
    """One open round: its frozen members that are still live, and how many buckets are open."""

    __slots__ = ("members", "open_buckets")

    def __init__(self, members: set[int], open_buckets: int) -> None:
        self.members = members
        self.open_buckets = open_buckets


class _Synchronous:
    """bsp.

    _first   member -> the first round it takes part in
    _lowest_first  the lowest of them, 0 without members
    _rounds  open round -> _Round
    _pushed  for each bucket: open round -> rank -> base
    _next    for each bucket: the lowest round that is not closed
    _over    every bucket is closed in all rounds below this one
    """

    def __init__(self, versions: list[int], quorum: float) -> None:
        self.highest_opened = -1
        self._versions = versions
        self._quorum = quorum
        self._first: dict[int, int] = {}
        self._lowest_first = 0
        self._rounds: dict[int, _Round] = {}
        self._pushed: list[dict[int, dict[int, int]]] = [{} for _ in versions]
        self._next = [0] * len(versions)
        self._over = 0

    @property
    def members(self) -> tuple[int, ...]:
        return tuple(sorted(self._first))

    def at_rest(self) -> int | None:
        if self._rounds or not self._first:
            return None
        round = self.min_round()
        return round if max(self._first.values()) <= round else None

    def advance(self, rounds: int) -> None:
        self._over = self.min_round() + rounds
        self.highest_opened = self._over - 1
        for bucket in range(len(self._next)):
            self._next[bucket] = self._over
            self._versions[bucket] += rounds

    def min_round(self) -> int:
        return max(self._over, self._lowest_first)

    def join(self, rank: int, at_least: int) -> int:
        assert rank not in self._first, f"rank {rank} joined twice"
        self._first[rank] = max(self.highest_opened + 1, at_least)
        self._lowest_first = min(self._first.values())
        return self._first[rank]

    def leave(self, rank: int) -> list[Action]:
        if self._first.pop(rank, None) is None:
            return []
        self._lowest_first = min(self._first.values(), default=0)
        for round in self._rounds.values():
            round.members.discard(rank)
        return self._settle(range(len(self._next)))

    def check(self, push: _Push) -> None:
        lowest = self._lowest(push.bucket)
        if push.rank in self._first and push.round > lowest + MAX_AHEAD:
            raise ProtocolError(
                f"rank {push.rank} pushed round {push.round} while bucket {push.bucket} is still "
                f"in round {lowest}; a worker must wait for a round before it goes on"
            )

    def on_push(self, push: _Push) -> list[Action]:
        rank, round, bucket, base = push
        if rank not in self._first:
            return push.drop("dead")
        if round < self._first[rank] or round < self._next[bucket]:
            return push.drop("late")
        pushed = self._pushed[bucket].get(round, {})
        if rank in pushed:
            return push.drop("duplicate")
        if round not in self._rounds:
            self._open(round)
        self._pushed[bucket].setdefault(round, pushed)[rank] = base
        return self._settle((bucket,))

    def pending(self) -> dict[tuple[int, int], tuple[int, ...]]:
        found = {}
        for bucket, by_round in enumerate(self._pushed):
            for round in by_round:
                # The rounds before it must close first, also those nobody has opened yet.
                ranks = set()
                for earlier in range(self._lowest(bucket), round + 1):
                    ranks |= self._awaited(earlier, bucket)
                found[round, bucket] = tuple(sorted(ranks))
        return found

    def waiting_for(self, bucket: int) -> tuple[int, ...]:
        round = self._lowest(bucket)
        if round > self.highest_opened:
            return ()
        return tuple(sorted(self._awaited(round, bucket)))

    def _open(self, round: int) -> None:
        members = {rank for rank, first in self._first.items() if first <= round}
        self._rounds[round] = _Round(members, len(self._next))
        self.highest_opened = max(self.highest_opened, round)

    def _lowest(self, bucket: int) -> int:
        """The lowest round that somebody may still push this bucket in."""
        return max(self._next[bucket], self._lowest_first)

    def _awaited(self, round: int, bucket: int) -> set[int]:
        if round not in self._rounds:
            return {rank for rank, first in self._first.items() if first <= round}
        return self._rounds[round].members - self._pushed[bucket].get(round, {}).keys()

    def _settle(self, buckets: Iterable[int]) -> list[Action]:
        """Close all that can be closed in these buckets."""
        actions: list[Action] = []
        over: set[int] = set()
        for bucket in buckets:
            for round in sorted(self._rounds):
                if round < self._next[bucket]:
                    continue
                # A lower round that has yet to open, by a member that takes part in it, is first.
                if round > self._lowest(bucket) and self._first:
                    break
                if not self._ready(round, bucket):
                    break
                actions += self._close(round, bucket)
                if self._rounds[round].open_buckets == 0:
                    del self._rounds[round]
                    self._over = round + 1
                    over.add(round)
        return _mark_last(actions, over) if over else actions

    def _ready(self, round: int, bucket: int) -> bool:
        pushed = len(self._pushed[bucket].get(round, ()))
        return self._suffice(pushed, len(self._awaited(round, bucket)))

    def _suffice(self, pushed: int, awaited: int) -> bool:
        # The margin keeps 0.7 * 10 at 7. With nobody left to push, the round closes empty.
        return pushed >= math.ceil(self._quorum * (pushed + awaited) * (1 - 1e-12))

    def would_close(self, round: int, bucket: int, ranks: Collection[int]) -> bool:
        if round < self._next[bucket]:
            return True
        if round > self._lowest(bucket):
            return False
        awaited = self._awaited(round, bucket)
        there = awaited.intersection(ranks)
        pushed = len(self._pushed[bucket].get(round, ())) + len(there)
        return self._suffice(pushed, len(awaited) - len(there))

    def would_keep(self, rank: int, round: int) -> bool:
        return False  # what is kept here waits for others that the hub asks for, too

    def _close(self, round: int, bucket: int) -> list[Action]:
        self._next[bucket] = round + 1
        self._rounds[round].open_buckets -= 1
        bases = self._pushed[bucket].pop(round, None)
        if not bases:
            return []
        ranks = tuple(sorted(bases))
        staleness = tuple(self._versions[bucket] - bases[rank] for rank in ranks)
        self._versions[bucket] += 1
        return [Apply(bucket, round, ranks, staleness, closes=False)]


def _mark_last(actions: list[Action], over: set[int]) -> list[Action]:
    """`actions` with `closes` set on the last Apply of each round that is over."""
    last = {a.round: i for i, a in enumerate(actions) if isinstance(a, Apply)}
    marks = {last[round] for round in over if round in last}
    return [
        a._replace(closes=True) if i in marks and isinstance(a, Apply) else a
        for i, a in enumerate(actions)
    ]


class _OnArrival:
    """ssp, and async as ssp without a bound.

    _first  member -> the first round it takes part in
    _clock  member -> the highest round it has pushed, one below its first before it has
    _seen   member -> bucket -> the highest round it has pushed the bucket in
    _kept   pushes too far ahead, in order of arrival
    """

    def __init__(self, versions: list[int], bound: int | None, drop_over: int | None) -> None:
        self.highest_opened = -1
        self._versions = versions
        self._bound = bound
        self._drop_over = drop_over
        self._first: dict[int, int] = {}
        self._clock: dict[int, int] = {}
        self._seen: dict[int, dict[int, int]] = {}
        self._kept: list[_Push] = []

    @property
    def members(self) -> tuple[int, ...]:
        return tuple(sorted(self._first))

    def at_rest(self) -> int | None:
        return None

    def advance(self, rounds: int) -> None:
        raise AssertionError("rounds are never at rest out of step")

    def min_round(self) -> int:
        return 1 + min(self._clock.values(), default=self.highest_opened)

    def join(self, rank: int, at_least: int) -> int:
        assert rank not in self._first, f"rank {rank} joined twice"
        # A rank that comes back while a push of its last life is kept must not push that again.
        own = (push.round for push in self._kept if push.rank == rank)
        first = max(1 + max((*self._clock.values(), *own), default=-1), at_least)
        self._first[rank] = first
        self._clock[rank] = first - 1
        self._seen[rank] = {}
        return first

    def leave(self, rank: int) -> list[Action]:
        if self._first.pop(rank, None) is None:
            return []
        del self._clock[rank], self._seen[rank]
        return self._release()

    def check(self, push: _Push) -> None:
        if self._bound is None or push.rank not in self._first:
            return
        lead = self._lead(push)
        if lead > self._bound + MAX_AHEAD:
            raise ProtocolError(
                f"rank {push.rank} pushed round {push.round}, {lead} ahead of the slowest; "
                f"a worker must wait when it is more than {self._bound} ahead"
            )

    def on_push(self, push: _Push) -> list[Action]:
        rank, round, bucket, _ = push
        if rank not in self._first:
            return push.drop("dead")
        last = self._seen[rank].get(bucket, self._first[rank] - 1)
        if round <= last:
            again = round == last and bucket in self._seen[rank]
            return push.drop("duplicate" if again else "late")
        self._seen[rank][bucket] = round
        actions: list[Action] = []
        if self._may_apply(push):
            actions.append(self._apply(push))
        else:
            self._kept.append(push)
        if round > self._clock[rank]:
            self._clock[rank] = round
            self.highest_opened = max(self.highest_opened, round)
            actions += self._release()
        return actions

    def pending(self) -> dict[tuple[int, int], tuple[int, ...]]:
        found: dict[tuple[int, int], set[int]] = {}
        for push in self._kept:
            found.setdefault((push.round, push.bucket), set()).update(self._slower(push))
        return {key: tuple(sorted(ranks)) for key, ranks in found.items()}

    def waiting_for(self, bucket: int) -> tuple[int, ...]:
        slower = (self._slower(push) for push in self._kept if push.bucket == bucket)
        return tuple(sorted(set().union(*slower)))

    def would_close(self, round: int, bucket: int, ranks: Collection[int]) -> bool:
        return True  # a push needs no other

    def would_keep(self, rank: int, round: int) -> bool:
        return rank in self._first and not self._may_apply(_Push(rank, round, 0, 0))

    def _lead(self, push: _Push) -> int:
        """How many rounds a push is ahead of the slowest other member; 0 if there is none."""
        others = (clock for rank, clock in self._clock.items() if rank != push.rank)
        return push.round - min(others, default=push.round)

    def _slower(self, push: _Push) -> set[int]:
        assert self._bound is not None  # async keeps nothing
        limit = push.round - self._bound
        return {rank for rank, clock in self._clock.items() if rank != push.rank and clock < limit}

    def _may_apply(self, push: _Push) -> bool:
        return self._bound is None or self._lead(push) <= self._bound

    def _release(self) -> list[Action]:
        """Answer the kept pushes that need not wait any more, in order of arrival."""
        kept, self._kept = self._kept, []
        actions: list[Action] = []
        for push in kept:
            if self._may_apply(push):
                actions.append(self._apply(push))
            else:
                self._kept.append(push)
        return actions

    def _apply(self, push: _Push) -> Action:
        rank, round, bucket, base = push
        staleness = self._versions[bucket] - base
        if self._drop_over is not None and staleness > self._drop_over:
            return Drop(rank, bucket, round, "stale")
        self._versions[bucket] += 1
        return Apply(bucket, round, (rank,), (staleness,), closes=False)
