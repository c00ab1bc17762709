"""Rounds against a model: any order of joins, pushes, repeats, goodbyes and deaths, in every mode.

The model keeps what was said to `Rounds` (members, frozen members, pushes not yet answered) in
plain dicts and sets. It never decides anything: it judges each answer by the mode's promises.
"""

from __future__ import annotations

import copy
from fractions import Fraction
from math import ceil

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from zps.core.rounds import MAX_AHEAD, Action, Apply, Drop, Mode, Rounds
from zps.errors import ProtocolError

RANKS = range(4)
Key = tuple[int, int, int]  # (rank, round, bucket)


class RoundsMachine(RuleBasedStateMachine):
    """What every mode promises. `judge_apply` and `awaited` are the mode's own."""

    mode: Mode
    rounds: Rounds

    # What was said.
    first: dict[int, int]  # member -> its first round
    pushed: dict[int, set[tuple[int, int]]]  # member -> (round, bucket) of this life
    pending: dict[Key, int]  # pushes without an answer -> base, in order of arrival
    highest: int
    # What was answered.
    versions: list[int]
    answered: int
    accepted: int

    def start(self, buckets: int, **options: object) -> None:
        self.rounds = Rounds(buckets, self.mode, **options)  # type: ignore[arg-type]
        self.first, self.pushed, self.pending = {}, {}, {}
        self.highest, self.answered, self.accepted = -1, 0, 0
        self.versions = [0] * buckets

    # -- what the modes differ in ----------------------------------------------------------

    def expected_first(self, rank: int) -> int:
        raise NotImplementedError

    def expected_drop(self, key: Key) -> str | None:
        """The reason for which a member's push is dropped on arrival, if it is."""
        raise NotImplementedError

    def lowest(self, key: Key) -> int:
        """The round that this member should wait for before it goes far beyond."""
        raise NotImplementedError

    def judge_apply(self, apply: Apply) -> None:
        raise NotImplementedError

    def awaited(self, round: int, bucket: int) -> set[int]:
        """The live ranks that the pending pushes of (round, bucket) wait for."""
        raise NotImplementedError

    def on_accepted(self, key: Key) -> None:
        """The mode's own notes about a push that was not dropped on arrival."""

    # -- what may happen -------------------------------------------------------------------

    @rule(rank=st.sampled_from(RANKS), later=st.sampled_from([None, None, None, 0, 3]))
    def join(self, rank: int, later: int | None) -> None:
        if rank in self.first:
            return
        at_least = 0 if later is None else self.highest + 1 + later
        expected = max(self.expected_first(rank), at_least)
        assert self.rounds.join(rank, at_least) == expected
        self.first[rank] = expected
        self.pushed[rank] = set()

    @precondition(lambda self: self.first)
    @rule(data=st.data())
    def push_next(self, data: st.DataObject) -> None:
        """An honest worker's next push: the lowest (round, bucket) it has not pushed."""
        rank = data.draw(st.sampled_from(sorted(self.first)))
        top = max((round for round, _ in self.pushed[rank]), default=self.first[rank])
        missing = [b for b in range(len(self.versions)) if (top, b) not in self.pushed[rank]]
        if missing:
            self.push(data, (rank, top, data.draw(st.sampled_from(missing))))
        else:
            self.push(data, (rank, top + 1, data.draw(st.sampled_from(range(len(self.versions))))))

    @precondition(lambda self: self.first)
    @rule(data=st.data(), steps=st.integers(2, 4))
    def run_ahead(self, data: st.DataObject, steps: int) -> None:
        """One member pushes the same bucket in one round after another."""
        rank = data.draw(st.sampled_from(sorted(self.first)))
        bucket = data.draw(st.sampled_from(range(len(self.versions))))
        begun = max((round for round, _ in self.pushed[rank]), default=self.first[rank])
        for round in range(begun, begun + steps):
            self.push(data, (rank, round, bucket))

    @precondition(lambda self: self.first)
    @rule(data=st.data())
    def fill_a_round(self, data: st.DataObject) -> None:
        """Every member that can pushes one (round, bucket), but perhaps for one of them."""
        bucket = data.draw(st.sampled_from(range(len(self.versions))))
        round = max(0, min(self.highest, min(self.first.values())) + data.draw(st.integers(0, 3)))
        spared = data.draw(st.sampled_from([*RANKS, None, None]))
        for rank in data.draw(st.permutations(sorted(self.first))):
            if rank != spared:
                self.push(data, (rank, round, bucket))

    @rule(data=st.data(), rank=st.sampled_from(RANKS))
    def push_anything(self, data: st.DataObject, rank: int) -> None:
        """Late, repeated, early, or from no member at all."""
        round = data.draw(st.integers(max(0, self.highest - 3), self.highest + 4))
        bucket = data.draw(st.sampled_from(range(len(self.versions))))
        self.push(data, (rank, round, bucket))

    @precondition(lambda self: self.pending)
    @rule(data=st.data())
    def push_again(self, data: st.DataObject) -> None:
        self.push(data, data.draw(st.sampled_from(sorted(self.pending))))

    @precondition(lambda self: self.first)
    @rule(data=st.data(), beyond=st.integers(1, 5))
    def push_far_ahead(self, data: st.DataObject, beyond: int) -> None:
        rank = data.draw(st.sampled_from(sorted(self.first)))
        bucket = data.draw(st.sampled_from(range(len(self.versions))))
        key = (rank, self.lowest((rank, 0, bucket)) + MAX_AHEAD + beyond, bucket)
        if self.mode is Mode.ASYNC or self.expected_drop(key):
            return
        before = copy.deepcopy((self.rounds.versions, self.rounds.pending(), self.highest))
        with pytest.raises(ProtocolError):
            self.rounds.on_push(*key, base=0)
        after = (self.rounds.versions, self.rounds.pending(), self.rounds.highest_opened)
        assert before == after

    @precondition(lambda self: self.first)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.bury(data.draw(st.sampled_from(sorted(self.first))))

    @precondition(lambda self: self.first)
    @rule(data=st.data())
    def restart(self, data: st.DataObject) -> None:
        rank = data.draw(st.sampled_from(sorted(self.first)))
        self.bury(rank)
        self.join(rank, later=None)

    @rule(rank=st.sampled_from(RANKS))
    def leave_without_having_joined(self, rank: int) -> None:
        if rank not in self.first:
            assert self.rounds.leave(rank) == []

    @precondition(lambda self: len(self.first) > 1)
    @rule(data=st.data())
    def everyone_leaves(self, data: st.DataObject) -> None:
        for rank in data.draw(st.permutations(sorted(self.first))):
            self.bury(rank)

    def push(self, data: st.DataObject, key: Key) -> None:
        rank, round, bucket = key
        version = self.versions[bucket]
        base = data.draw(st.integers(max(0, version - 3), version))
        reason = "dead" if rank not in self.first else self.expected_drop(key)
        if reason is None:
            self.pending[key] = base
            self.pushed[rank].add((round, bucket))
            self.highest = max(self.highest, round)
            self.accepted += 1
            self.on_accepted(key)
        actions = self.rounds.on_push(rank, round, bucket, base)
        if reason is not None:
            assert actions == [Drop(rank, bucket, round, reason)]
            return
        self.judge(actions)

    def bury(self, rank: int) -> None:
        del self.first[rank], self.pushed[rank]
        self.judge(self.rounds.leave(rank))

    # -- what is promised ------------------------------------------------------------------

    def judge(self, actions: list[Action]) -> None:
        for action in actions:
            ranks = action.ranks if isinstance(action, Apply) else (action.rank,)
            assert list(ranks) == sorted(set(ranks)), "contributors are distinct and ascending"
            assert ranks, "an application has contributors"
            keys = [(rank, action.round, action.bucket) for rank in ranks]
            assert all(key in self.pending for key in keys), "contributors have really pushed"
            staleness = tuple(self.versions[action.bucket] - self.pending[key] for key in keys)
            if isinstance(action, Apply):
                assert action.staleness == staleness
                self.judge_apply(action)
                self.versions[action.bucket] += 1
            else:
                self.judge_stale(action, staleness[0])
            for key in keys:
                del self.pending[key]
            self.answered += len(keys)

    def judge_stale(self, drop: Drop, staleness: int) -> None:
        raise AssertionError(f"{drop} answers a push that was accepted")

    @invariant()
    def versions_count_the_applications(self) -> None:
        assert self.rounds.versions == self.versions

    @invariant()
    def no_push_is_lost(self) -> None:
        """Each is applied, dropped, or still kept while a live worker is awaited."""
        assert self.accepted == self.answered + len(self.pending)
        kept = {(round, bucket) for _, round, bucket in self.pending}
        assert self.rounds.pending() == {key: tuple(sorted(self.awaited(*key))) for key in kept}
        assert all(self.rounds.pending().values()), "kept although nobody is awaited"
        for bucket in range(len(self.versions)):
            lowest = min((round for round, b in kept if b == bucket), default=None)
            if lowest is not None:
                assert self.rounds.waiting_for(bucket)
                assert set(self.rounds.waiting_for(bucket)) <= self.first.keys()

    @invariant()
    def nothing_is_kept_when_everyone_has_left(self) -> None:
        if not self.first:
            assert not self.pending
            assert self.rounds.pending() == {}

    @invariant()
    def the_highest_round_is_known(self) -> None:
        assert self.rounds.highest_opened == self.highest

    def teardown(self) -> None:
        if hasattr(self, "rounds"):
            for rank in sorted(self.first):
                self.bury(rank)
            assert not self.pending


class BspMachine(RoundsMachine):
    mode = Mode.BSP

    @initialize(buckets=st.integers(1, 3), quorum=st.sampled_from([1.0, 1.0, 0.75, 0.5, 0.1]))
    def begin(self, buckets: int, quorum: float) -> None:
        self.start(buckets, quorum=quorum)
        self.quorum = Fraction(str(quorum))
        self.frozen: dict[int, set[int]] = {}  # opened round -> its members that have not left
        self.closed = [-1] * buckets  # the highest round that each bucket was applied in

    def expected_first(self, rank: int) -> int:
        return self.highest + 1

    def expected_drop(self, key: Key) -> str | None:
        rank, round, bucket = key
        if round < self.first[rank] or round <= self.closed[bucket]:
            return "late"
        return "duplicate" if key in self.pending else None

    def lowest(self, key: Key) -> int:
        return max(self.closed[key[2]] + 1, min(self.first.values()))

    def on_accepted(self, key: Key) -> None:
        self.frozen.setdefault(
            key[1], {rank for rank, first in self.first.items() if first <= key[1]}
        )

    @rule(data=st.data(), count=st.integers(1, 3))
    def go_by(self, data: st.DataObject, count: int) -> None:
        """Rounds of all, one push at a time, and at once."""
        round = self.rounds.at_rest()
        if round is None:
            return
        assert self.rounds.members == tuple(sorted(self.first))
        assert not self.pending
        at_once = copy.deepcopy(self.rounds)
        at_once.advance(count)
        if self.quorum < 1:
            return
        for number in range(round, round + count):
            for bucket in range(len(self.versions)):
                for rank in data.draw(st.permutations(sorted(self.first))):
                    self.push(data, (rank, number, bucket))
        assert self.closed == [round + count - 1] * len(self.versions)
        assert vars(at_once._policy) == vars(self.rounds._policy)

    def bury(self, rank: int) -> None:
        for members in self.frozen.values():
            members.discard(rank)
        super().bury(rank)

    def contributors(self, round: int, bucket: int) -> set[int]:
        return {rank for rank, r, b in self.pending if (r, b) == (round, bucket)}

    def missing(self, round: int, bucket: int) -> set[int]:
        """Live members of a round that have yet to push a bucket that is open in it."""
        if round not in self.frozen:
            return {rank for rank, first in self.first.items() if first <= round}
        return self.frozen[round] - self.contributors(round, bucket)

    def judge_apply(self, apply: Apply) -> None:
        round, bucket = apply.round, apply.bucket
        assert round > self.closed[bucket], "once in each round, and in order"
        pushed, missing = self.contributors(round, bucket), self.missing(round, bucket)
        assert set(apply.ranks) == pushed, "everyone who has pushed contributes"
        assert len(pushed) >= ceil(self.quorum * len(pushed | missing)), "members have pushed"
        if self.quorum == 1:
            assert not missing
        for earlier in range(self.closed[bucket] + 1, round):
            assert not self.contributors(earlier, bucket)
            assert not self.missing(earlier, bucket), "an earlier round is still open"
        self.closed[bucket] = round

    def awaited(self, round: int, bucket: int) -> set[int]:
        earlier = range(self.closed[bucket] + 1, round + 1)
        return set().union(*(self.missing(r, bucket) for r in earlier))

    def over(self, round: int) -> bool:
        return all(
            round <= closed or not (self.contributors(round, bucket) or self.missing(round, bucket))
            for bucket, closed in enumerate(self.closed)
        )

    @invariant()
    def a_quorum_that_has_pushed_is_not_kept_waiting(self) -> None:
        for _, round, bucket in self.pending:
            blocked = any(self.missing(r, bucket) for r in range(self.closed[bucket] + 1, round))
            pushed, missing = self.contributors(round, bucket), self.missing(round, bucket)
            enough = len(pushed) >= ceil(self.quorum * len(pushed | missing))
            assert blocked or not enough

    @invariant()
    def min_round_is_the_lowest_that_is_not_over(self) -> None:
        lowest = self.rounds.min_round()
        assert all(self.over(round) for round in range(lowest))
        if self.first:
            assert not self.over(lowest)
        else:
            assert lowest == self.highest + 1

    @invariant()
    def closed_rounds_are_forgotten(self) -> None:
        """What is stored grows with the open rounds only."""
        policy = vars(self.rounds)["_policy"]
        assert all(round >= self.rounds.min_round() for round in policy._rounds)
        kept = {
            (rank, round, bucket)
            for bucket, by_round in enumerate(policy._pushed)
            for round, bases in by_round.items()
            for rank in bases
        }
        assert kept == self.pending.keys()


class SspMachine(RoundsMachine):
    mode = Mode.SSP

    @initialize(
        buckets=st.integers(1, 3),
        staleness=st.integers(0, 3),
        drop_over=st.none() | st.integers(0, 3),
    )
    def begin(self, buckets: int, staleness: int, drop_over: int | None) -> None:
        self.start(buckets, staleness=staleness, drop_over=drop_over)
        self.staleness, self.drop_over = staleness, drop_over

    def clock(self, rank: int) -> int:
        return max((r for r, _ in self.pushed[rank]), default=self.first[rank] - 1)

    def lead(self, key: Key) -> int:
        others = [self.clock(rank) for rank in self.first if rank != key[0]]
        return key[1] - min(others, default=key[1])

    def expected_first(self, rank: int) -> int:
        own = [round for r, round, _ in self.pending if r == rank]
        return 1 + max([self.clock(other) for other in self.first] + own, default=-1)

    def expected_drop(self, key: Key) -> str | None:
        rank, round, bucket = key
        if (round, bucket) in self.pushed[rank]:
            # Only the last push of a bucket is known for what it was.
            last = max(r for r, b in self.pushed[rank] if b == bucket)
            return "duplicate" if round == last else "late"
        before = [r for r, b in self.pushed[rank] if b == bucket]
        return "late" if round < max(before, default=self.first[rank]) else None

    def lowest(self, key: Key) -> int:
        others = [self.clock(rank) for rank in self.first if rank != key[0]]
        # Alone, nobody is ahead of anybody: aim at a round that is refused as late.
        return min(others) + self.staleness if others else -MAX_AHEAD - 10

    def judge_apply(self, apply: Apply) -> None:
        [rank] = apply.ranks
        assert self.lead((rank, apply.round, apply.bucket)) <= self.staleness, "the bound"
        assert self.drop_over is None or apply.staleness[0] <= self.drop_over

    def judge_stale(self, drop: Drop, staleness: int) -> None:
        assert drop.reason == "stale"
        assert self.drop_over is not None
        assert staleness > self.drop_over
        assert self.lead((drop.rank, drop.round, drop.bucket)) <= self.staleness

    def judge(self, actions: list[Action]) -> None:
        order = list(self.pending)
        ranks = (a.ranks[0] if isinstance(a, Apply) else a.rank for a in actions)
        answered = [
            order.index((rank, a.round, a.bucket)) for rank, a in zip(ranks, actions, strict=True)
        ]
        new = len(order) - 1  # the push of this call goes first, if it need not wait
        kept = answered[1:] if answered[:1] == [new] else answered
        assert kept == sorted(kept), "in order of arrival"
        super().judge(actions)

    def awaited(self, round: int, bucket: int) -> set[int]:
        return {
            other
            for rank, r, b in self.pending
            if (r, b) == (round, bucket)
            for other in self.first
            if other != rank and round - self.clock(other) > self.staleness
        }

    @invariant()
    def nothing_within_the_bound_is_kept(self) -> None:
        assert all(self.lead(key) > self.staleness for key in self.pending)

    @invariant()
    def min_round_is_the_slowest_members(self) -> None:
        clocks = [self.clock(rank) for rank in self.first]
        assert self.rounds.min_round() == 1 + min(clocks, default=self.highest)


class AsyncMachine(SspMachine):
    mode = Mode.ASYNC

    @initialize(buckets=st.integers(1, 3), drop_over=st.none() | st.integers(0, 3))
    def begin(self, buckets: int, drop_over: int | None) -> None:  # type: ignore[override]
        self.start(buckets, drop_over=drop_over)
        self.staleness, self.drop_over = 10**9, drop_over

    @invariant()
    def nothing_is_ever_kept(self) -> None:
        assert not self.pending


EFFORT = settings(
    deadline=None,
    max_examples=100,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
TestBsp = BspMachine.TestCase
TestSsp = SspMachine.TestCase
TestAsync = AsyncMachine.TestCase
TestBsp.settings = TestSsp.settings = EFFORT
TestAsync.settings = settings(EFFORT, max_examples=30)
