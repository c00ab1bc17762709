"""bsp: a bucket is applied once its round has come together, or a share of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from zps.core.actions import MAX_AHEAD, Action, Apply, Push
from zps.errors import ProtocolError

__all__ = ["InStep"]


class _Round:
    """One open round: its frozen members that are still live, and how many buckets are open."""

    __slots__ = ("members", "open_buckets")

    def __init__(self, members: set[int], open_buckets: int) -> None:
        self.members = members
        self.open_buckets = open_buckets


class InStep:
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

    def check(self, push: Push) -> None:
        lowest = self._lowest(push.bucket)
        if push.rank in self._first and push.round > lowest + MAX_AHEAD:
            raise ProtocolError(
                f"rank {push.rank} pushed round {push.round} while bucket {push.bucket} is still "
                f"in round {lowest}; a worker must wait for a round before it goes on"
            )

    def on_push(self, push: Push) -> list[Action]:
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
        return actions

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
        return [Apply(bucket, round, ranks, staleness)]
