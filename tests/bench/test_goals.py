"""Goals, and how records are held against them."""

from __future__ import annotations

from dataclasses import asdict

from bench import goals, soak
from bench.goals import GOALS, Goal, Judged, judge
from bench.train import WIDTH, parameters
from tests.bench.samples import scale, told
from tests.bench.test_soak import looks


def found(text: str, judged: list[tuple[Goal, Judged | None]]) -> Judged | None:
    (one,) = [result for goal, result in judged if text in goal.text]
    return one


def test_a_ratio_is_held_against_the_goal_for_its_size_and_workers() -> None:
    judged = judge([*told(zps=100.0, gloo=700.0), *told(world=4, zps=100.0, gloo=500.0)])
    two, four = found("in place vs gloo, 25 M, n = 2", judged), found("gloo, 25 M, n = 4", judged)
    assert two is not None
    assert four is not None
    assert (two.value, two.verdict, four.value, four.verdict) == (7.0, "met", 5.0, "missed")
    assert found("vs mpi, 25 M, n = 4", judged) is None
    assert found("in place vs gloo, 25 M, n = 2", judge(told(size=1000, zps=1.0, gloo=9.0))) is None


def test_a_goal_of_at_most_is_told_in_its_own_direction() -> None:
    record = told("rtt", 1000, 2, zps=150.0, echo=100.0)
    one = found("1 K round, n = 2 ÷ raw pyzmq", judge(record))
    assert one is not None
    assert (round(one.value, 2), one.verdict) == (1.5, "missed")
    assert one.interval is not None
    assert one.interval[0] <= one.value <= one.interval[1]


def test_the_latest_record_counts() -> None:
    one = found("workers, off linear", judge([scale("workers", 1, 1.5), scale("workers", 1, 1.02)]))
    assert one is not None
    assert (round(one.value, 2), one.verdict) == (0.02, "met")


def test_growth_is_judged_by_its_interval() -> None:
    one = found("workers, off linear", judge([scale("workers", 1, 1.151)]))
    assert one is not None
    assert one.verdict == "open"


def test_what_a_soak_calls_steady_is_within_its_goal() -> None:
    for more, expected in ((3 << 20, "met"), (5 << 20, "missed")):
        told = soak.judge(looks(memory_bytes=lambda n, more=more: [(10 << 20) + more * (n > 20)]))
        record = {"bench": "soak", "what": "zps", **asdict(told)}
        one = found("soak: growth of memory", judge([record]))
        assert one is not None
        assert (one.verdict == "met", one.verdict) == (told.steady, expected)


def test_an_interval_that_contains_the_bound_leaves_the_goal_open() -> None:
    goal = Goal("", "step", "zps", 6.0, "gloo")
    verdicts = [
        Judged(goal, value, interval).verdict
        for value, interval in (
            (7.0, (6.5, 7.5)),
            (7.0, (5.5, 7.5)),
            (5.0, (4.0, 5.5)),
            (7.0, None),
        )
    ]
    assert verdicts == ["met", "open", "missed", "met"]


def test_every_goal_is_about_a_suite_that_there_is() -> None:
    from bench.suites import SUITES

    assert {goal.bench for goal in GOALS} <= {suite.name for suite in SUITES}
    assert len({goal.text for goal in GOALS}) == len(GOALS)
    assert all((goal.peer is None) != (goal.field is None) for goal in GOALS)


def test_the_bound_of_a_table_is_a_ratio_of_the_peer_to_the_subject() -> None:
    goal = goals.ratio_goal("train", "zps", "ddp", 25_175_040, 2)
    assert goal is not None
    assert round(goal.least, 3) == round(1 / 0.65, 3)
    assert goals.ratio_goal("train", "zps", "ddp", 1000, 2) is None


def test_the_goals_of_training_are_for_the_model_that_is_trained() -> None:
    (size,) = {size for goal in GOALS if goal.bench == "train" for size in goal.sizes}
    assert size == parameters(WIDTH)
