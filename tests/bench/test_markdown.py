"""The report and the plots, from records alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import markdown, plots
from bench.out import Record
from tests.bench.samples import (
    BREAKDOWN,
    CODECS,
    CONVERGE,
    SERVER_TIME,
    SOAK,
    WIRE,
    kernel,
    scale,
    told,
)

RECORDS: list[Record] = [
    *told(zps=100.0, zps_grad=200.0, gloo=700.0),
    *told(size=1000, zps=10.0, zps_grad=12.0, gloo=70.0),
    *told("rtt", 1000, 2, zps=15.0, echo=10.0),
    SERVER_TIME,
    *CODECS,
    *WIRE,
    kernel(1),
    kernel(2),
    scale("workers", 1.0, 1.3),
    SOAK,
    CONVERGE,
    BREAKDOWN,
]


def test_a_report_has_a_section_for_each_suite_and_says_where_it_was_measured() -> None:
    text = markdown.render(RECORDS, [Path("/r/plots/a.png")], Path("/r"))
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        *("## Goals", "## step", "## rtt", "## codecs", "## wire", "## kernels", "## scale"),
        *("## soak", "## converge", "## breakdown", "## Plots", "## How to read it"),
    ]
    assert text.count(RECORDS[0]["machine"]["cpu"]) == 1
    assert "![a](plots/a.png)" in text


@pytest.mark.parametrize(
    "line",
    [
        "| round in place vs gloo, 25 M, n = 2 | ≥ 6 | 7 | 7.00–7.00 | met |",
        "| growth with workers, off linear | ≤ 0.15 | 0.3 | 0.20–0.40 | missed |",
        "| soak: growth of memory, of what is allowed | ≤ 1 | 1.75 |  | missed |",
        "| zps-grad vs gloo | 25 M | 2 | 3.50 (3.50–3.50) | 3 | 0.200 / 0.700 | 0.300 / 1.050 "
        "| 9 / 9 | 25% |",
        "| sgd | engine | 2 | 25 M | 0.95 (0.90–1.00) | 0.85 | 12.0 |",
        "| workers | point 1 | 0.100 | 1.30 (1.20–1.40) |",
        "| bsp int8 | 4 | 1.25 | 0.250 | 97.0% |",
        "| 25 M | 2 | 400 / 410 | encode 25%, apply 50%, wake 25% |",
        "- a round's processor time, n = 2: hub 5 µs, echo 20 µs: 0.25 × (0.20–0.50)",
        "| int8 | 0.50 (0.40–0.60) |  | 0.70 (0.60–0.80) |",
        "- encode topk 1 %, 25 M: torch.topk takes 12.0 × as long (11.90–12.10), goal 5",
        "- zps-int8: 1.02 MB to the hub (formula +0.01%), 1.02 MB back (formula +0.01%)",
        "- none: 94.0% of the 1000 Mb/s of plain TCP, goal 90%",
        "- node: 4 workers send 4.00 MB a round, one would send 4.01; they get 4.00 MB, one would "
        "get 4.01",
        "- memory: a hub of 8 workers who push 16.8 MB each, one of them late, held 127 MB, 1.08 × "
        "what it must; goal 1.3",
    ],
)
def test_its_tables_hold_what_was_measured(line: str) -> None:
    assert markdown.render(RECORDS, [], Path()).splitlines().count(line) == 1


def test_goals_that_were_not_measured_are_named() -> None:
    text = markdown.render(RECORDS, [], Path())
    (line,) = [line for line in text.splitlines() if line.startswith("Not measured in this run: ")]
    assert "round in place vs mpi, 25 M, n = 2; " in line
    assert "growth with workers" not in line


def test_a_soak_that_was_not_steady_says_why() -> None:
    assert "**not steady**: 1000 rounds in 60 s" in markdown.render(RECORDS, [], Path())
    assert "process 2 has grown by 7.0 MiB" in markdown.render(RECORDS, [], Path())


def test_a_report_of_nothing_is_one() -> None:
    assert "Nothing was measured." in markdown.render([], [], Path())


def test_the_terminal_shows_only_goals_that_were_measured() -> None:
    assert markdown.goals_table([]).row_count == 0
    assert markdown.goals_table(RECORDS).row_count == 8


def test_every_plot_is_drawn_when_there_is_something_to_show(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = plots.draw(RECORDS, tmp_path)
    assert {path.stem for path in drawn} == {
        *("time-step-n2", "latency-step-n2", "latency-rtt-n2", "roofline", "breakdown"),
        *("loss-by-time", "loss-by-bytes", "scale-workers", "soak-zps"),
    }
    assert all(path.stat().st_size > 5000 for path in drawn)


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plots.draw([], tmp_path) == []


def test_without_matplotlib_the_reason_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert plots.unavailable() == "plots need matplotlib: pip install 'zps-engine[bench]'"
