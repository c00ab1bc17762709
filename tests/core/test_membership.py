"""Who takes part, one rule at a time."""

from __future__ import annotations

import pytest

from zps.core.membership import Admitted, Membership, Refused, Verdict
from zps.errors import ConfigError


def formed(world_size: int, **policy: object) -> Membership:
    membership = Membership(world_size, **policy)  # type: ignore[arg-type]
    for rank in range(world_size):
        membership.hello(rank, f"first-{rank}")
        membership.declared(rank)
    assert membership.formed
    return membership


def refused(answer: Admitted | Refused) -> str:
    assert isinstance(answer, Refused)
    return answer.code


def test_each_worker_gets_a_session_of_its_own() -> None:
    membership = Membership(2)
    assert membership.hello(1, "a") == Admitted(1, rejoined=False, repeat=False)
    assert membership.hello(0, "b") == Admitted(2, rejoined=False, repeat=False)
    assert membership.live == (0, 1)
    assert (membership.session_of(0), membership.session_of(1)) == (2, 1)


def test_a_repeated_hello_is_answered_again() -> None:
    membership = Membership(1)
    membership.hello(0, "a")
    assert membership.hello(0, "a") == Admitted(1, rejoined=False, repeat=True)


def test_a_second_process_on_a_rank_is_refused() -> None:
    membership = Membership(1)
    membership.hello(0, "a")
    assert refused(membership.hello(0, "b")) == "duplicate_rank"
    assert membership.session_of(0) == 1


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    assert refused(Membership(2).hello(rank, "a")) == "rank_out_of_range"


def test_the_job_is_formed_once_every_rank_has_declared() -> None:
    membership = Membership(2)
    membership.hello(0, "a")
    membership.declared(0)
    assert not membership.formed
    assert membership.missing() == (1,)
    membership.hello(1, "b")
    assert membership.missing() == (1,)
    membership.declared(1)
    assert membership.formed
    assert membership.missing() == ()


def test_a_formed_job_stays_formed() -> None:
    membership = formed(2)
    membership.die(0)
    assert membership.formed
    assert membership.missing() == ()


def test_a_dead_rank_may_come_back_with_a_higher_session() -> None:
    membership = formed(2)
    membership.die(0)
    assert membership.session_of(0) is None
    assert membership.dead == (0,)
    assert membership.hello(0, "new") == Admitted(3, rejoined=True, repeat=False)
    assert membership.hello(0, "new") == Admitted(3, rejoined=True, repeat=True)
    assert membership.dead == ()


def test_an_incarnation_that_ended_does_not_come_back() -> None:
    membership = formed(2)
    membership.die(0)
    membership.bye(1)
    assert refused(membership.hello(0, "first-0")) == "session_lost"
    assert refused(membership.hello(1, "first-1")) == "finished"
    assert membership.live == ()


def test_a_finished_rank_may_come_back() -> None:
    membership = formed(1)
    membership.bye(0)
    assert membership.hello(0, "new") == Admitted(2, rejoined=True, repeat=False)


def test_a_goodbye_never_ends_a_job() -> None:
    membership = formed(3, min_workers=3)
    assert [membership.bye(rank) for rank in range(3)] == [Verdict.CONTINUE] * 3
    assert membership.why == ""


def test_shrink_goes_on_down_to_min_workers() -> None:
    membership = formed(4, min_workers=2)
    assert membership.die(3) is Verdict.CONTINUE
    assert membership.die(0) is Verdict.CONTINUE
    assert membership.die(1) is Verdict.ABORT
    assert "rank 1 died: 1 of 4 workers left" in membership.why
    assert "min_workers=2" in membership.why


def test_a_death_seen_twice_counts_once() -> None:
    membership = formed(2)
    assert membership.die(1) is membership.die(1) is membership.die(9) is Verdict.CONTINUE
    assert membership.live == (0,)


def test_a_death_after_the_goodbye_is_none() -> None:
    membership = formed(2, on_death="abort")
    membership.bye(1)
    assert membership.die(1) is Verdict.CONTINUE


def test_wait_waits_until_a_replacement_says_hello() -> None:
    membership = formed(2, on_death="wait", min_workers=2)
    assert membership.die(1) is Verdict.WAIT
    assert membership.why == "rank 1 died; waiting for a replacement"
    assert membership.die(0) is Verdict.WAIT
    assert membership.why == "ranks 0, 1 died; waiting for a replacement"
    membership.hello(0, "new")
    assert membership.verdict is Verdict.WAIT
    membership.hello(1, "new")
    assert membership.verdict is Verdict.CONTINUE


def test_abort_ends_the_job_at_the_first_death_for_good() -> None:
    membership = formed(2, on_death="abort")
    assert membership.die(1) is Verdict.ABORT
    membership.hello(1, "new")
    assert membership.dead == ()
    assert membership.verdict is Verdict.ABORT
    assert membership.why == "rank 1 died, and on_death is abort"


def test_a_death_before_formation_waits_for_a_replacement_that_declares_again() -> None:
    membership = Membership(2, min_workers=2)
    for rank in range(2):
        membership.hello(rank, "a")
    membership.declared(0)
    assert membership.die(0) is Verdict.WAIT
    membership.declared(1)
    assert membership.missing() == (0,)
    membership.hello(0, "b")
    assert membership.verdict is Verdict.CONTINUE
    assert not membership.formed
    membership.declared(0)
    assert membership.formed


def test_who_declared_and_finished_early_does_not_hold_up_formation() -> None:
    membership = Membership(2)
    membership.hello(0, "a")
    membership.declared(0)
    membership.bye(0)
    membership.hello(1, "b")
    membership.declared(1)
    assert membership.formed


@pytest.mark.parametrize(
    "wrong", [{"world_size": 0}, {"min_workers": 3}, {"min_workers": -1}, {"on_death": "cry"}]
)
def test_an_impossible_setting_is_refused(wrong: dict[str, object]) -> None:
    settings: dict[str, object] = {"world_size": 2, **wrong}
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Membership(**settings)  # type: ignore[arg-type]


def test_a_hub_of_some_ranks_is_formed_once_they_have_declared() -> None:
    membership = Membership(6, ranks=range(2, 4))
    assert membership.missing() == (2, 3)
    for rank in (2, 3):
        membership.hello(rank, "a")
        membership.declared(rank)
    assert membership.formed
    assert membership.missing() == ()


@pytest.mark.parametrize(("rank", "text"), [(1, "rank 1 is not 2 to 3"), (6, "is not 0 to 5")])
def test_ranks_of_other_hubs_are_refused(rank: int, text: str) -> None:
    answer = Membership(6, ranks=range(2, 4)).hello(rank, "a")
    assert isinstance(answer, Refused)
    assert answer.code == "rank_out_of_range"
    assert text in answer.text
