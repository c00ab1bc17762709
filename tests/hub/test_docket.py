"""Rounds on hold at one of several hubs: who is asked, which verdict counts, in what order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.hub.bench import SIZES, Bench
from zps.hub.docket import SKIP, Docket, Findings, Question
from zps.memory.control import Outcome

GOOD = Findings(4.0, finite=True)
APPLIED, SKIPPED = Outcome.APPLIED, Outcome.SKIPPED


def docket(*keys: tuple[int, ...], asked: tuple[int, ...] = (0, 1)) -> Docket:
    made = Docket()
    for key in keys:
        made.add(key, [], GOOD)
    for question in made.questions():
        made.asked(question.key, asked)
    return made


def verdicts(due: Any) -> list[Findings]:
    return [verdict for _, verdict in due]


def test_each_question_comes_up_once() -> None:
    made = Docket()
    made.add((3,), [], GOOD)
    assert made.questions() == [Question((3,), GOOD)]
    assert made.questions() == []


def test_in_step_everyone_is_asked_and_otherwise_whose_round_it_is() -> None:
    assert [Question((3,), GOOD).concerns(rank) for rank in range(3)] == [True] * 3
    assert [Question((3, 1), GOOD).concerns(rank) for rank in range(3)] == [False, True, False]


def test_the_first_verdict_counts() -> None:
    made = docket((0,))
    assert verdicts(made.decide((0,), SKIP)) == [SKIP]
    assert made.decide((0,), GOOD) == []


def test_a_verdict_on_what_is_not_on_hold_is_ignored() -> None:
    made = docket((0,))
    assert made.decide((1,), GOOD) == []
    assert made.holds_before(1)


def test_rounds_keep_their_order_whatever_order_their_verdicts_have() -> None:
    made = docket((0,), (1,))
    assert made.decide((1,), SKIP) == []
    assert verdicts(made.decide((0,), GOOD)) == [GOOD, SKIP]


def test_out_of_step_no_worker_waits_for_another() -> None:
    made = docket((0, 0), (0, 1))
    assert verdicts(made.decide((0, 1), GOOD)) == [GOOD]
    assert made.holds_before(1)


def test_a_round_is_skipped_when_the_last_one_asked_has_left() -> None:
    made = docket((0,))
    assert made.leave(0) == []
    assert made.waiting_for() == {1}
    assert verdicts(made.leave(1)) == [SKIP]
    assert not made.holds_before(99)


def test_a_round_of_which_nobody_was_told_yet_does_not_suffer_from_a_leaver() -> None:
    made = Docket()
    made.add((0,), [], GOOD)
    assert made.leave(0) == []
    assert verdicts(made.asked((0,), [])) == [SKIP]


# --- in an engine -------------------------------------------------------------------------------


def asked(bench: Bench, *ranks: int) -> list[Question]:
    questions = bench.engine.questions()
    for question in questions:
        bench.engine.asked(question, ranks or range(3))
    return questions


def decide(bench: Bench, norm_sq: float = 0.0, *, round: int = 0, finite: bool = True) -> None:
    bench.engine.decide(0, round, Findings(norm_sq, finite))
    bench.engine.flush()


def test_a_round_on_hold_waits_for_the_verdict() -> None:
    bench = Bench("add", one_of_several=True)
    pushes = [bench.push(rank, hold=True) for rank in range(3)]
    assert asked(bench) == [Question((0,), Findings(0.0, finite=True))]
    assert bench.versions() == [0] * 4
    assert bench.engine.waiting_for() == (0, 1, 2)
    assert not bench.engine.slot_busy(9, 0)
    assert bench.engine.slot_busy(1, 0)
    decide(bench)
    assert bench.values() == dict.fromkeys(SIZES, 3.0)
    assert bench.outcomes(pushes[0]) == [APPLIED] * 4
    assert bench.engine.waiting_for() == ()


def test_a_round_that_was_good_here_is_skipped_for_what_is_elsewhere() -> None:
    bench = Bench("adam", [{"lr": 0.1}], one_of_several=True)
    pushes = [bench.push(rank, hold=True) for rank in range(3)]
    asked(bench)
    decide(bench, finite=False)
    assert bench.values() == dict.fromkeys(SIZES, 0.0)
    assert bench.steps() == dict.fromkeys(SIZES, 0)
    assert bench.versions() == bench.engine.rounds.versions == [1] * 4
    assert bench.outcomes(pushes[1]) == [SKIPPED] * 4


def test_the_norm_of_all_hubs_clips_the_part_of_this_one() -> None:
    bench = Bench("sgd", [{"lr": 1.0}], max_grad_norm=2.0, one_of_several=True)
    for rank in range(3):
        bench.push(rank, 1.0)
    (question,) = asked(bench)
    assert question.measured == Findings(float(sum(SIZES.values())), finite=True)
    decide(bench, 100.0)
    assert bench.values() == pytest.approx(dict.fromkeys(SIZES, -2.0 / 10.0))


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_part_that_is_not_finite_is_told_without_a_norm(value: float) -> None:
    bench = Bench("sgd", [{"lr": 1.0}], max_grad_norm=2.0, one_of_several=True)
    for rank in range(3):
        bench.push(rank, value)
    assert [question.measured for question in asked(bench)] == [SKIP]


def test_rounds_that_are_not_on_hold_ask_nobody() -> None:
    bench = Bench("add", one_of_several=True)
    for rank in range(3):
        bench.push(rank)
    assert asked(bench) == []
    assert bench.values() == dict.fromkeys(SIZES, 3.0)


def test_out_of_step_a_round_that_was_dropped_here_is_asked_about_all_the_same() -> None:
    bench = Bench(
        "sgd",
        [{"lr": 1.0}],
        mode="async",
        staleness_policy="drop",
        staleness=0,
        max_grad_norm=1.0,
        one_of_several=True,
    )
    bench.push(0, 1.0)
    asked(bench)
    decide(bench, 1.0)
    stale = bench.push(1, 1.0, base=0)
    assert bench.outcomes(stale) == [Outcome.STALE] * 4
    assert asked(bench) == [Question((0, 1), Findings(0.0, finite=True))]
    bench.engine.decide(1, 0, GOOD)
    assert not bench.engine._docket.holds_before(9)


def test_a_round_nobody_can_decide_about_is_skipped() -> None:
    bench = Bench("add", members=(0,), one_of_several=True)
    bench.push(0, hold=True)
    asked(bench, 0)
    bench.engine.leave(0)
    bench.engine.flush()
    assert bench.values() == dict.fromkeys(SIZES, 0.0)
    assert bench.versions() == bench.engine.rounds.versions == [1] * 4


def test_a_newcomer_is_not_let_in_while_a_round_before_its_first_is_on_hold() -> None:
    bench = Bench("add", fuse=True, members=(0, 1), one_of_several=True)
    for rank in range(2):
        bench.push(rank, hold=True)
    asked(bench)
    assert bench.engine.join(2) == 1
    assert not bench.engine.closed_before(1)
    decide(bench)
    assert bench.engine.closed_before(1)


def test_a_newcomer_may_enter_later_than_it_could() -> None:
    """Another hub is ahead: what nobody else waits for at this one must not wait for it."""
    bench = Bench("add", members=(0, 1), one_of_several=True)
    assert bench.engine.join(2) == 0
    for rank in range(2):
        bench.push(rank)
    assert bench.engine.waiting_for() == (2,)
    assert bench.engine.enter(2, 1) == 1
    bench.engine.flush()
    assert bench.values() == dict.fromkeys(SIZES, 2.0)
    for rank in range(3):
        bench.push(rank, round=1)
    assert bench.values() == dict.fromkeys(SIZES, 5.0)


def test_hubs_that_are_told_the_same_leave_no_state_behind() -> None:
    bench = Bench("add", one_of_several=True)
    for round_ in range(30):
        for rank in range(3):
            bench.push(rank, round=round_, hold=True)
        asked(bench)
        for _ in range(3):  # every worker sends its verdict
            decide(bench, round=round_)
    assert bench.values() == dict.fromkeys(SIZES, 90.0)
    assert not bench.engine._busy
    assert not bench.engine._docket._cases
    assert np.all(bench.control.closed == 30)
