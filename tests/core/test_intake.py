from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from zps.core.intake import Ask, Intake


def everyone(world: int):
    """A bucket needs all of `world` ranks."""
    return lambda round, bucket, ranks: set(ranks) >= set(range(world))


def nobody(round, bucket, ranks):
    return False


def anybody(round, bucket, ranks):
    return True


def test_what_fits_is_asked_for_before_anybody_else_has_announced():
    intake = Intake(budget=10)
    intake.announce(0, 0, 0, 4)
    intake.announce(0, 0, 1, 4)
    intake.announce(0, 0, 2, 4)
    assert intake.next(nobody) == [Ask(0, 0, 0), Ask(0, 0, 1)]
    assert intake.held_bytes == 8
    assert intake.next(nobody) == []


def test_room_comes_back_when_a_bucket_is_consumed():
    intake = Intake(budget=4)
    for bucket in range(2):
        intake.announce(0, 0, bucket, 4)
    assert intake.next(nobody) == [Ask(0, 0, 0)]
    intake.consumed(0, 0, 0)  # it has not even come: a peer's word counts for nothing
    assert intake.next(nobody) == []
    assert intake.arrived(0, 0, 0)
    intake.consumed(0, 0, 0)
    assert intake.held_bytes == 0
    assert intake.next(nobody) == [Ask(0, 0, 1)]


def test_earlier_rounds_and_lower_buckets_are_asked_for_first():
    intake = Intake(budget=100)
    for round, bucket in ((1, 0), (0, 1), (0, 0), (1, 1)):
        intake.announce(3, round, bucket, 1)
    assert [(a.round, a.bucket) for a in intake.next(nobody)] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_bucket_that_can_be_completed_is_asked_for_over_the_budget():
    intake = Intake(budget=4)
    intake.announce(0, 0, 5, 4)  # rank 0 begins with another bucket than rank 1
    assert intake.next(everyone(2)) == [Ask(0, 0, 5)]
    intake.announce(1, 0, 9, 4)
    assert intake.next(everyone(2)) == []
    intake.announce(0, 0, 9, 4)
    assert intake.next(everyone(2)) == [Ask(0, 0, 9), Ask(1, 0, 9)]
    assert intake.held_bytes == 12


def test_over_the_budget_only_one_bucket_is_taken_at_a_time():
    intake = Intake(budget=0)
    for bucket in range(3):
        for rank in range(2):
            intake.announce(rank, 0, bucket, 4)
    assert intake.next(everyone(2)) == [Ask(0, 0, 0), Ask(1, 0, 0)]
    assert intake.next(everyone(2)) == []
    for rank in range(2):
        intake.arrived(rank, 0, 0)
        intake.consumed(rank, 0, 0)
    assert intake.next(everyone(2)) == [Ask(0, 0, 1), Ask(1, 0, 1)]


def test_over_the_budget_only_one_rank_completes_its_round_where_rounds_are_whole():
    intake = Intake(budget=8)
    for bucket in range(3):
        for rank in range(2):
            intake.announce(rank, 0, bucket, 4, whole=True)
    first = [Ask(0, 0, 0), Ask(1, 0, 0), Ask(0, 0, 1), Ask(0, 0, 2)]
    assert intake.next(anybody) == first
    for ask in first:
        assert intake.next(anybody) == []
        intake.arrived(*ask)
    for bucket in range(3):
        intake.consumed(0, 0, bucket)
    assert intake.next(anybody) == [Ask(1, 0, 1), Ask(1, 0, 2)]


def test_a_rank_that_has_gone_leaves_the_exception_to_others():
    intake = Intake(budget=0)
    for rank in range(2):
        intake.announce(rank, 0, 0, 4, whole=True)
    assert intake.next(anybody) == [Ask(0, 0, 0)]
    intake.forget(0)
    assert intake.next(anybody) == [Ask(1, 0, 0)]


def test_what_was_not_asked_for_has_not_arrived():
    intake = Intake(budget=0)
    intake.announce(0, 0, 0, 4)
    assert not intake.arrived(0, 0, 0)
    assert not intake.arrived(1, 0, 0)
    assert intake.knows(0, 0, 0)
    assert not intake.knows(1, 0, 0)


def test_a_rank_that_has_gone_holds_nothing():
    intake = Intake(budget=8)
    for bucket in range(3):
        intake.announce(0, 0, bucket, 4)
    intake.next(nobody)
    intake.arrived(0, 0, 0)
    intake.forget(0)
    assert intake.held_bytes == 0
    assert not any(intake.knows(0, 0, bucket) for bucket in range(3))
    assert intake.next(nobody) == []
    intake.consumed(0, 0, 0)  # the round it was in ends later
    assert intake.held_bytes == 0


@given(
    budget=st.integers(0, 40),
    orders=st.lists(st.permutations(range(6)), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 12), min_size=6, max_size=6),
    data=st.data(),
)
def test_every_order_of_announcements_comes_to_its_end_within_the_bound(
    budget, orders, sizes, data
):
    """Ranks announce their buckets in orders of their own; a bucket is consumed once all have it.

    Each announces one at a time, and waits for nothing: whatever is asked for arrives at some time.
    """
    world = len(orders)
    intake = Intake(budget)
    to_announce = [list(order) for order in orders]
    on_their_way: list[Ask] = []
    here: Counter[int] = Counter()
    done: set[int] = set()
    while len(done) < 6:
        ready = [rank for rank in range(world) if to_announce[rank]]
        steps = ["announce"] * bool(ready) + ["arrive"] * bool(on_their_way)
        assert steps, "nothing moves any more"
        if data.draw(st.sampled_from(steps)) == "announce":
            rank = data.draw(st.sampled_from(ready))
            bucket = to_announce[rank].pop()
            intake.announce(rank, 0, bucket, sizes[bucket])
        else:
            ask = on_their_way.pop(data.draw(st.integers(0, len(on_their_way) - 1)))
            assert intake.arrived(*ask)
            here[ask.bucket] += 1
            if here[ask.bucket] == world:
                done.add(ask.bucket)
                for rank in range(world):
                    intake.consumed(rank, 0, ask.bucket)
        on_their_way += intake.next(everyone(world))
        assert intake.held_bytes <= budget + world * max(sizes)
    assert intake.held_bytes == 0


@given(
    budget=st.integers(0, 60),
    orders=st.lists(st.permutations(range(6)), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 12), min_size=6, max_size=6),
    data=st.data(),
)
def test_whole_rounds_come_to_their_end_within_the_bound_in_every_order(
    budget, orders, sizes, data
):
    """Out of step, a rank's round is consumed once all of its buckets are here."""
    world = len(orders)
    intake = Intake(budget)
    to_announce = [list(order) for order in orders]
    on_their_way: list[Ask] = []
    here: Counter[int] = Counter()
    while any(here[rank] < 6 for rank in range(world)):
        ready = [rank for rank in range(world) if to_announce[rank]]
        steps = ["announce"] * bool(ready) + ["arrive"] * bool(on_their_way)
        assert steps, "nothing moves any more"
        if data.draw(st.sampled_from(steps)) == "announce":
            rank = data.draw(st.sampled_from(ready))
            bucket = to_announce[rank].pop()
            intake.announce(rank, rank % 2, bucket, sizes[bucket], whole=True)
        else:
            ask = on_their_way.pop(data.draw(st.integers(0, len(on_their_way) - 1)))
            assert intake.arrived(*ask)
            here[ask.rank] += 1
            if here[ask.rank] == 6:
                for bucket in range(6):
                    intake.consumed(ask.rank, ask.round, bucket)
        on_their_way += intake.next(anybody)
        assert intake.held_bytes <= budget + sum(sizes)
    assert intake.held_bytes == 0


def test_what_would_only_be_kept_is_not_asked_for_yet():
    intake = Intake(budget=4)
    intake.announce(0, 5, 0, 4)
    intake.announce(1, 2, 0, 4)
    assert intake.next(nobody, lambda rank, round: rank == 0) == [Ask(1, 2, 0)]
    intake.arrived(1, 2, 0)
    intake.consumed(1, 2, 0)
    assert intake.next(nobody, lambda rank, round: False) == [Ask(0, 5, 0)]


def test_what_would_only_be_kept_is_not_the_exception_either():
    intake = Intake(budget=0)
    intake.announce(0, 5, 0, 4)
    assert intake.next(lambda *_: True, lambda rank, round: rank == 0) == []
    intake.announce(1, 6, 0, 4)
    assert intake.next(lambda *_: True, lambda rank, round: rank == 0) == [Ask(1, 6, 0)]
