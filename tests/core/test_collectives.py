from __future__ import annotations

from zps.core.collectives import Collectives


def test_a_collective_is_complete_once_all_have_asked() -> None:
    collectives = Collectives("publish", "barrier")
    collectives.ask("barrier", 1, seq=7)
    assert list(collectives.complete((0, 1))) == []
    collectives.ask("barrier", 0, seq=3)
    assert list(collectives.complete((0, 1))) == [("barrier", {0: 3, 1: 7})]


def test_it_begins_anew_when_it_was_complete() -> None:
    collectives = Collectives("barrier")
    for seq in (1, 2):
        collectives.ask("barrier", 0, seq)
        assert list(collectives.complete((0,))) == [("barrier", {0: seq})]
    assert list(collectives.complete((0,))) == []


def test_one_that_nobody_has_come_to_is_not_complete_when_nobody_is_needed() -> None:
    collectives = Collectives("barrier")
    assert list(collectives.complete(())) == []
    collectives.ask("barrier", 4, seq=1)
    assert list(collectives.complete(())) == [("barrier", {4: 1})]


def test_whoever_leaves_is_not_answered_and_not_awaited() -> None:
    collectives = Collectives("barrier")
    collectives.ask("barrier", 0, seq=1)
    collectives.ask("barrier", 1, seq=1)
    collectives.leave(0)
    assert collectives.came("barrier") == (1,)
    assert list(collectives.complete((1,))) == [("barrier", {1: 1})]


def test_only_a_collective_that_has_begun_waits_for_anybody() -> None:
    collectives = Collectives("publish", "barrier")
    assert collectives.awaited((0, 1, 2)) == set()
    collectives.ask("publish", 1, seq=1)
    assert collectives.awaited((0, 1, 2)) == {0, 2}


def test_collectives_of_other_names_do_not_meet() -> None:
    collectives = Collectives("publish", "barrier")
    collectives.ask("publish", 0, seq=1)
    collectives.ask("barrier", 1, seq=2)
    assert list(collectives.complete((0, 1))) == []


def test_a_later_request_replaces_the_one_before() -> None:
    collectives = Collectives("barrier")
    collectives.ask("barrier", 0, seq=1)
    collectives.ask("barrier", 0, seq=2)
    assert list(collectives.complete((0,))) == [("barrier", {0: 2})]
