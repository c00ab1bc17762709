"""When a bucket is applied, and with whose gradients, one rule at a time."""

from __future__ import annotations

import pytest

from zps.core.rounds import MAX_AHEAD, Action, Apply, Drop, Mode, Rounds
from zps.errors import ConfigError, ProtocolError


def bsp(members: int, buckets: int = 1, quorum: float = 1.0) -> Rounds:
    return joined(Rounds(buckets, Mode.BSP, quorum=quorum), members)


def ssp(members: int, staleness: int, buckets: int = 1, drop_over: int | None = None) -> Rounds:
    return joined(Rounds(buckets, Mode.SSP, staleness=staleness, drop_over=drop_over), members)


def joined(rounds: Rounds, members: int) -> Rounds:
    for rank in range(members):
        assert rounds.join(rank) == 0
    return rounds


def applied(actions: list[Action]) -> list[tuple[int, int, tuple[int, ...]]]:
    """(round, bucket, ranks) of each Apply; no Drop among them."""
    assert all(isinstance(action, Apply) for action in actions)
    return [(a.round, a.bucket, a.ranks) for a in actions if isinstance(a, Apply)]


class TestBsp:
    def test_a_bucket_waits_for_every_member(self) -> None:
        rounds = bsp(3)
        assert rounds.on_push(2, 0, 0, base=0) == []
        assert rounds.on_push(0, 0, 0, base=0) == []
        assert rounds.waiting_for(0) == (1,)
        assert rounds.on_push(1, 0, 0, base=0) == [Apply(0, 0, (0, 1, 2), (0, 0, 0))]
        assert rounds.versions == [1]
        assert rounds.waiting_for(0) == ()

    def test_buckets_are_applied_one_by_one_and_the_last_closes_the_round(self) -> None:
        rounds = bsp(1, buckets=2)
        assert rounds.on_push(0, 0, 1, base=0) == [Apply(1, 0, (0,), (0,))]
        assert rounds.min_round() == 0
        assert rounds.on_push(0, 0, 0, base=0) == [Apply(0, 0, (0,), (0,))]
        assert rounds.min_round() == 1

    def test_a_repeated_push_counts_once(self) -> None:
        rounds = bsp(2)
        rounds.on_push(0, 0, 0, base=0)
        assert rounds.on_push(0, 0, 0, base=0) == [Drop(0, 0, 0, "duplicate")]
        assert applied(rounds.on_push(1, 0, 0, base=0)) == [(0, 0, (0, 1))]
        assert rounds.on_push(0, 0, 0, base=0) == [Drop(0, 0, 0, "late")]
        assert rounds.versions == [1]

    def test_the_next_round_waits_for_this_one(self) -> None:
        rounds = bsp(2)
        rounds.on_push(0, 0, 0, base=0)
        assert rounds.on_push(0, 1, 0, base=0) == []
        assert rounds.pending() == {(0, 0): (1,), (1, 0): (1,)}
        assert rounds.on_push(1, 1, 0, base=0) == []
        assert rounds.on_push(1, 0, 0, base=0) == [
            Apply(0, 0, (0, 1), (0, 0)),
            Apply(0, 1, (0, 1), (1, 1)),
        ]

    def test_a_round_that_nobody_has_opened_yet_comes_first_all_the_same(self) -> None:
        rounds = bsp(1)
        assert rounds.on_push(0, 1, 0, base=0) == []
        assert rounds.waiting_for(0) == (0,)
        assert rounds.pending() == {(1, 0): (0,)}
        assert applied(rounds.on_push(0, 0, 0, base=0)) == [(0, 0, (0,)), (1, 0, (0,))]

    def test_a_joiner_enters_at_the_next_round(self) -> None:
        rounds = bsp(1)
        rounds.on_push(0, 0, 0, base=0)
        assert rounds.join(1) == 1
        assert rounds.on_push(1, 0, 0, base=1) == [Drop(1, 0, 0, "late")]
        assert rounds.on_push(0, 1, 0, base=1) == []
        assert applied(rounds.on_push(1, 1, 0, base=1)) == [(1, 0, (0, 1))]

    def test_a_joiner_does_not_hold_up_a_round_that_has_begun(self) -> None:
        rounds = bsp(2)
        rounds.on_push(0, 0, 0, base=0)
        assert rounds.join(2) == 1
        assert applied(rounds.on_push(1, 0, 0, base=0)) == [(0, 0, (0, 1))]

    def test_a_joiner_of_several_hubs_may_enter_later(self) -> None:
        rounds = bsp(1)
        assert rounds.join(1, at_least=2) == 2
        for round in range(2):
            assert applied(rounds.on_push(0, round, 0, base=round)) == [(round, 0, (0,))]
        assert rounds.on_push(0, 2, 0, base=2) == []
        assert applied(rounds.on_push(1, 2, 0, base=2)) == [(2, 0, (0, 1))]

    def test_a_job_may_begin_at_any_round(self) -> None:
        rounds = Rounds(2, Mode.BSP)
        assert rounds.join(0, at_least=1_000_000) == 1_000_000
        assert rounds.min_round() == 1_000_000
        assert applied(rounds.on_push(0, 1_000_000, 0, base=0)) == [(1_000_000, 0, (0,))]
        assert applied(rounds.on_push(0, 1_000_000, 1, base=0)) == [(1_000_000, 1, (0,))]
        assert rounds.min_round() == 1_000_001

    def test_what_a_dead_member_pushed_counts_and_the_rest_is_not_awaited(self) -> None:
        rounds = bsp(2, buckets=2)
        rounds.on_push(1, 0, 0, base=0)
        rounds.on_push(0, 0, 1, base=0)
        assert applied(rounds.leave(1)) == [(0, 1, (0,))]
        assert rounds.on_push(1, 0, 1, base=0) == [Drop(1, 1, 0, "dead")]
        assert rounds.on_push(0, 0, 0, base=0) == [Apply(0, 0, (0, 1), (0, 0))]

    def test_a_leaver_frees_several_rounds_at_once(self) -> None:
        rounds = bsp(2)
        for round in range(3):
            rounds.on_push(0, round, 0, base=0)
        assert applied(rounds.leave(1)) == [(0, 0, (0,)), (1, 0, (0,)), (2, 0, (0,))]

    def test_a_round_whose_members_all_left_ends_without_an_application(self) -> None:
        rounds = bsp(1, buckets=2)
        assert applied(rounds.on_push(0, 0, 0, base=0)) == [(0, 0, (0,))]
        assert rounds.leave(0) == []
        assert rounds.min_round() == 1
        assert rounds.versions == [1, 0]
        assert rounds.join(5) == 1
        assert applied(rounds.on_push(5, 1, 1, base=0)) == [(1, 1, (5,))]

    def test_a_round_is_over_although_a_bucket_of_it_stays_empty(self) -> None:
        rounds = bsp(2, buckets=2)
        rounds.on_push(0, 0, 0, base=0)
        assert rounds.leave(0) == []
        assert rounds.min_round() == 0
        assert rounds.leave(1) == [Apply(0, 0, (0,), (0,))]
        assert rounds.min_round() == 1

    def test_a_leaver_closes_a_round_in_all_of_its_buckets(self) -> None:
        rounds = bsp(2, buckets=2)
        rounds.on_push(0, 0, 0, base=0)
        rounds.on_push(0, 0, 1, base=0)
        assert rounds.leave(1) == [Apply(0, 0, (0,), (0,)), Apply(1, 0, (0,), (0,))]
        assert rounds.min_round() == 1

    def test_a_rank_that_comes_back_enters_at_the_next_round(self) -> None:
        rounds = bsp(2)
        rounds.on_push(1, 0, 0, base=0)
        rounds.leave(1)
        assert rounds.join(1) == 1
        assert rounds.on_push(1, 0, 0, base=0) == [Drop(1, 0, 0, "late")]
        assert applied(rounds.on_push(0, 0, 0, base=0)) == [(0, 0, (0, 1))]

    def test_leaving_twice_does_nothing(self) -> None:
        rounds = bsp(1)
        assert rounds.leave(0) == rounds.leave(0) == rounds.leave(7) == []

    def test_nobody_runs_ahead_without_end(self) -> None:
        rounds = bsp(2)
        assert rounds.on_push(0, MAX_AHEAD, 0, base=0) == []
        with pytest.raises(ProtocolError, match=r"rank 0 pushed round 65 .* still in round 0"):
            rounds.on_push(0, MAX_AHEAD + 1, 0, base=0)
        assert rounds.highest_opened == MAX_AHEAD


class TestQuorum:
    def test_a_bucket_is_applied_when_the_share_has_pushed(self) -> None:
        rounds = bsp(4, quorum=0.75)
        assert rounds.on_push(3, 0, 0, base=0) == rounds.on_push(1, 0, 0, base=0) == []
        assert applied(rounds.on_push(0, 0, 0, base=0)) == [(0, 0, (0, 1, 3))]
        assert rounds.on_push(2, 0, 0, base=0) == [Drop(2, 0, 0, "late")]

    def test_the_share_is_of_those_that_can_still_push_or_have(self) -> None:
        rounds = bsp(4, quorum=0.5)
        rounds.on_push(0, 0, 0, base=0)
        rounds.leave(0)
        assert rounds.leave(1) == []  # one of {0, 2, 3}
        assert applied(rounds.leave(2)) == [(0, 0, (0,))]  # one of {0, 3}

    @pytest.mark.parametrize(
        ("quorum", "members", "needed"),
        [(0.7, 10, 7), (0.1, 10, 1), (0.3, 10, 3), (0.75, 3, 3), (0.5, 3, 2), (1e-9, 5, 1)],
    )
    def test_the_share_is_rounded_up_and_not_by_an_error_of_arithmetic(
        self, quorum: float, members: int, needed: int
    ) -> None:
        rounds = bsp(members, quorum=quorum)
        for rank in range(needed - 1):
            assert rounds.on_push(rank, 0, 0, base=0) == []
        assert len(rounds.on_push(needed - 1, 0, 0, base=0)) == 1


class TestSsp:
    def test_a_push_within_the_bound_is_applied_on_arrival(self) -> None:
        rounds = ssp(2, staleness=1)
        assert applied(rounds.on_push(0, 0, 0, base=0)) == [(0, 0, (0,))]

    def test_a_push_too_far_ahead_waits_for_the_slowest(self) -> None:
        rounds = ssp(3, staleness=1)
        rounds.on_push(0, 0, 0, base=0)
        assert rounds.on_push(0, 1, 0, base=1) == []
        assert rounds.waiting_for(0) == (1, 2)
        assert rounds.pending() == {(1, 0): (1, 2)}
        assert applied(rounds.on_push(1, 0, 0, base=0)) == [(0, 0, (1,))]
        assert rounds.waiting_for(0) == (2,)
        assert rounds.on_push(2, 0, 0, base=2) == [
            Apply(0, 0, (2,), (0,)),
            Apply(0, 1, (0,), (2,)),
        ]
        assert rounds.pending() == {}

    def test_what_was_kept_is_applied_in_order_of_arrival(self) -> None:
        rounds = ssp(3, staleness=0)
        rounds.on_push(1, 0, 0, base=0)
        rounds.on_push(0, 0, 0, base=0)
        assert applied(rounds.on_push(2, 0, 0, base=0))[1:] == [(0, 0, (1,)), (0, 0, (0,))]

    def test_a_leaver_is_not_waited_for_and_what_it_pushed_counts(self) -> None:
        rounds = ssp(3, staleness=0)
        rounds.on_push(0, 0, 0, base=0)
        rounds.on_push(1, 0, 0, base=0)
        assert rounds.leave(0) == []
        assert applied(rounds.leave(2)) == [(0, 0, (0,)), (0, 0, (1,))]

    def test_a_repeated_push_counts_once(self) -> None:
        rounds = ssp(2, staleness=0)
        rounds.on_push(0, 0, 0, base=0)
        assert rounds.on_push(0, 0, 0, base=0) == [Drop(0, 0, 0, "duplicate")]
        assert len(applied(rounds.on_push(1, 0, 0, base=0))) == 2
        assert rounds.on_push(0, 0, 0, base=0) == [Drop(0, 0, 0, "duplicate")]

    def test_a_joiner_enters_beside_the_fastest(self) -> None:
        rounds = ssp(2, staleness=5)
        for round in range(3):
            rounds.on_push(0, round, 0, base=0)
        assert rounds.join(2) == 3
        assert rounds.on_push(2, 2, 0, base=0) == [Drop(2, 0, 2, "late")]
        assert applied(rounds.on_push(2, 3, 0, base=0)) == [(3, 0, (2,))]

    def test_a_rank_that_comes_back_does_not_repeat_a_push_that_is_kept(self) -> None:
        rounds = ssp(2, staleness=0)
        for round in range(3):
            rounds.on_push(0, round, 0, base=0)
        rounds.leave(0)
        assert rounds.join(0) == 3

    def test_the_first_after_everyone_left_begins_at_0(self) -> None:
        rounds = ssp(1, staleness=0)
        rounds.on_push(0, 0, 0, base=0)
        rounds.leave(0)
        assert rounds.join(1) == 0

    def test_nobody_runs_ahead_without_end(self) -> None:
        rounds = ssp(2, staleness=3)
        with pytest.raises(ProtocolError, match=r"68 ahead of the slowest"):
            rounds.on_push(0, MAX_AHEAD + 3, 0, base=0)
        assert rounds.on_push(0, MAX_AHEAD + 2, 0, base=0) == []

    def test_alone_nobody_is_ahead_of_anybody(self) -> None:
        rounds = ssp(1, staleness=0)
        assert applied(rounds.on_push(0, 500, 0, base=0)) == [(500, 0, (0,))]

    def test_a_gradient_over_the_limit_is_dropped_without_a_version(self) -> None:
        rounds = ssp(2, staleness=9, drop_over=1)
        for round in range(2):
            rounds.on_push(0, round, 0, base=round)
        assert rounds.on_push(1, 0, 0, base=0) == [Drop(1, 0, 0, "stale")]
        assert rounds.versions == [2]
        assert applied(rounds.on_push(1, 1, 0, base=1)) == [(1, 0, (1,))]


class TestAsync:
    def test_nothing_ever_waits(self) -> None:
        rounds = joined(Rounds(1, Mode.ASYNC), 2)
        for round in range(200):
            [action] = rounds.on_push(0, round, 0, base=0)
            assert action == Apply(0, round, (0,), (round,))
        assert rounds.pending() == {}
        assert rounds.waiting_for(0) == ()

    def test_rounds_may_be_skipped_but_not_repeated(self) -> None:
        rounds = joined(Rounds(1, Mode.ASYNC), 1)
        assert applied(rounds.on_push(0, 500, 0, base=0)) == [(500, 0, (0,))]
        assert rounds.on_push(0, 500, 0, base=0) == [Drop(0, 0, 500, "duplicate")]
        assert rounds.on_push(0, 499, 0, base=0) == [Drop(0, 0, 499, "late")]


@pytest.mark.parametrize("mode", Mode)
class TestEveryMode:
    def test_a_stranger_is_not_heard(self, mode: Mode) -> None:
        assert Rounds(1, mode).on_push(0, 0, 0, base=0) == [Drop(0, 0, 0, "dead")]

    @pytest.mark.parametrize(
        ("round", "bucket", "base"), [(0, 2, 0), (0, -1, 0), (-1, 0, 0), (0, 0, 1), (0, 0, -1)]
    )
    def test_an_impossible_push_is_a_bad_peer(
        self, mode: Mode, round: int, bucket: int, base: int
    ) -> None:
        rounds = joined(Rounds(2, mode), 1)
        with pytest.raises(ProtocolError, match="rank 0"):
            rounds.on_push(0, round, bucket, base)
        assert rounds.versions == [0, 0]
        assert rounds.highest_opened == -1

    def test_a_restored_hub_sets_the_versions_in_place(self, mode: Mode) -> None:
        rounds = joined(Rounds(1, mode), 1)
        rounds.versions[:] = [40]
        [action] = rounds.on_push(0, 0, 0, base=40)
        assert isinstance(action, Apply)
        assert action.staleness == (0,)
        assert rounds.versions == [41]


@pytest.mark.parametrize("wrong", [{"staleness": -1}, {"quorum": 0.0}, {"quorum": 1.01}])
def test_an_impossible_setting_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Rounds(1, Mode.BSP, **wrong)  # type: ignore[arg-type]
