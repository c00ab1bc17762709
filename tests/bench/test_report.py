"""What a measurement says of itself."""

from __future__ import annotations

import json

import numpy as np

from bench.harness import Measured, Run
from bench.report import Case, Goal, facts, lines, table


def case(**measured: float) -> Case:
    """A case in which every round of each participant took the given microseconds."""
    found = {
        name.replace("_", "-"): Measured([np.full(4, us)] * 3, {"worker": 1, "server": 2})
        for name, us in measured.items()
    }
    goals = (Goal("zps", "gloo", 5.0, (1000,)),)
    return Case("step", 1000, 4000, 2, Run(found, 1.0, 0.25), goals, facts())


def test_every_form_of_zps_has_a_line_with_its_peers_and_their_ratios() -> None:
    records = [json.loads(line) for line in lines(case(zps=100.0, zps_grad=200.0, gloo=600.0))]
    assert [record["what"] for record in records] == ["zps", "zps-grad"]
    first = records[0]
    assert (first["bytes"], first["p50_us"], first["p99_us"]) == (4000, 100.0, 100.0)
    assert first["threads"] == {"worker": 1, "server": 2}
    assert first["peers"]["gloo"]["ratio"] == 6.0
    assert first["peers"]["gloo"]["ratio_ci95"] == [6.0, 6.0]
    assert first["peers"]["gloo"]["met"] is True
    assert "goal" not in records[1]["peers"]["gloo"]
    assert {"machine", "commit"} <= first.keys()


def test_without_zps_the_first_participant_is_compared_with_the_others() -> None:
    (line,) = lines(case(rpc=500.0, gloo=100.0))
    record = json.loads(line)
    assert record["what"] == "rpc"
    assert record["peers"]["gloo"]["ratio"] == 0.2


def test_a_missed_goal_is_told() -> None:
    record = json.loads(lines(case(zps=100.0, gloo=400.0))[0])
    assert record["peers"]["gloo"]["met"] is False


def test_the_table_has_a_row_for_each_participant_and_a_column_for_each_subject() -> None:
    shown = table(case(zps=100.0, zps_grad=200.0, gloo=600.0))
    assert shown.row_count == 3
    assert [str(column.header) for column in shown.columns][-2:] == ["÷ zps", "÷ zps-grad"]
