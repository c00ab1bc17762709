"""ssp and async: a push is applied by itself, at once or when the slower ones have come on."""

from __future__ import annotations

from collections.abc import Collection

from zps.core.actions import MAX_AHEAD, Action, Apply, Drop, Push
from zps.errors import ProtocolError

__all__ = ["OnArrival"]


class OnArrival:
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
        self._kept: list[Push] = []

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

    def check(self, push: Push) -> None:
        if self._bound is None or push.rank not in self._first:
            return
        lead = self._lead(push)
        if lead > self._bound + MAX_AHEAD:
            raise ProtocolError(
                f"rank {push.rank} pushed round {push.round}, {lead} ahead of the slowest; "
                f"a worker must wait when it is more than {self._bound} ahead"
            )

    def on_push(self, push: Push) -> list[Action]:
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
        return rank in self._first and not self._may_apply(Push(rank, round, 0, 0))

    def _lead(self, push: Push) -> int:
        """How many rounds a push is ahead of the slowest other member; 0 if there is none."""
        others = (clock for rank, clock in self._clock.items() if rank != push.rank)
        return push.round - min(others, default=push.round)

    def _slower(self, push: Push) -> set[int]:
        assert self._bound is not None  # async keeps nothing
        limit = push.round - self._bound
        return {rank for rank, clock in self._clock.items() if rank != push.rank and clock < limit}

    def _may_apply(self, push: Push) -> bool:
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

    def _apply(self, push: Push) -> Action:
        rank, round, bucket, base = push
        staleness = self._versions[bucket] - base
        if self._drop_over is not None and staleness > self._drop_over:
            return Drop(rank, bucket, round, "stale")
        self._versions[bucket] += 1
        return Apply(bucket, round, (rank,), (staleness,))
