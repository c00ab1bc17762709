"""What a measurement says of itself."""

from __future__ import annotations

from pathlib import Path

from bench.origin import _git
from bench.report import table
from tests.bench.samples import SIZE, case, told


def test_every_form_of_zps_has_a_record_with_its_peers_and_their_ratios() -> None:
    first, second = told(zps=100.0, zps_grad=200.0, gloo=600.0)
    assert (first["what"], second["what"]) == ("zps", "zps-grad")
    assert (first["bytes"], first["p50_us"], first["p99_us"]) == (4 * SIZE, 100.0, 100.0)
    assert first["threads"] == {"worker": 1, "server": 2, "total": 9}
    assert first["cpu_us"] == {"workers": 100.0, "server": 50.0, "total": 150.0}
    assert first["peers"]["gloo"]["ratio"] == 6.0
    assert first["peers"]["gloo"]["ratio_ci95"] == [6.0, 6.0]
    assert (first["peers"]["gloo"]["goal"], first["peers"]["gloo"]["verdict"]) == (6.0, "met")
    assert "goal" not in second["peers"]["zps"]
    assert {"machine", "commit", "restarts"} <= first.keys()


def test_without_zps_the_first_participant_is_compared_with_the_others() -> None:
    (record,) = told(rpc=500.0, gloo=100.0)
    assert record["what"] == "rpc"
    assert record["peers"]["gloo"]["ratio"] == 0.2


def test_a_missed_goal_is_told() -> None:
    assert told(zps=100.0, gloo=400.0)[0]["peers"]["gloo"]["verdict"] == "missed"


def test_the_table_has_a_row_for_each_participant_and_a_column_for_each_subject() -> None:
    shown = table(case(zps=100.0, zps_grad=200.0, gloo=600.0))
    assert shown.row_count == 3
    assert [str(column.header) for column in shown.columns][-2:] == ["÷ zps", "÷ zps-grad"]


def test_the_commit_of_a_repository_that_zps_is_only_installed_in_is_not_told() -> None:
    root = Path(__file__).parent.parent.parent
    assert _git("rev-parse", "HEAD", here=root / "docs") == ""
