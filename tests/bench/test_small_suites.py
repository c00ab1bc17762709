"""rtt, pull, scale, converge and breakdown, with real processes at sizes that take no time."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from bench import breakdown, converge, harness, pull, rtt, scale
from bench.converge import BASE, Way
from bench.harness import Plan
from bench.options import read
from bench.out import Out, Record
from bench.peers import problem
from bench.peers.base import BenchError
from bench.peers.echo import Echo
from bench.peers.hubs import Hubs2
from bench.peers.team import team
from bench.peers.zps_round import Zps
from bench.scale import Point


@pytest.fixture(autouse=True)
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := Zps.available():
        pytest.skip(reason)
    monkeypatch.setattr(harness, "QUICK", Plan(cycles=2, block_s=0.01))


def records_of(capsys: pytest.CaptureFixture[str]) -> list[Record]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_round_trip_is_told_in_time_and_in_the_servers_processor_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rtt.prepare(read(quick=True))(Out())
    times, cpu = records_of(capsys)
    assert (times["what"], list(times["peers"])) == ("zps", ["echo"])
    assert (cpu["what"], list(cpu["peers"])) == ("zps-cpu", ["echo"])
    assert 0 < cpu["peers"]["echo"]["server_us"] < 1e5
    assert cpu["server_us"] > 0
    assert times["cpu_us"]["server"] == pytest.approx(cpu["server_us"], abs=0.1)


def test_an_echo_of_something_else_is_an_error(tmp_path: Path) -> None:
    with team(Echo, 1, 10, 3, tmp_path) as members:
        members.run(2)
        harness.check(members, Echo.answer(2), 2)
        with pytest.raises(BenchError, match="echo: worker 0 has wrong weights"):
            harness.check(members, Echo.answer(1), 2)


@pytest.mark.parametrize("peer", pull.PEERS, ids=lambda peer: peer.name)
def test_every_way_to_pull_brings_the_current_weights(peer: type[Zps], tmp_path: Path) -> None:
    with team(peer, 1, 5000, 3, tmp_path) as members:
        for rounds in (1, 2):
            members.run(1)
            harness.check(members, problem.reference(1, 5000, 3, rounds), rounds)


def test_growth_is_told_for_each_point_beside_the_smallest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    points = [Point(1000, 1, 1), Point(20_000, 1, 2, Hubs2)]
    run = scale.measure(points, read(quick=True), Out())
    scale.tell("parameters", points, run, Out())
    (record,) = records_of(capsys)
    first, second = record["points"]
    assert (first["relative"], first["hubs"], second["hubs"]) == (1.0, 1, 2)
    assert second["relative"] == pytest.approx(
        second["p50_us"] / first["p50_us"] / 20, rel=0.05, abs=0.01
    )


def test_growth_counts_from_two_workers_on() -> None:
    def points(*pairs: tuple[int, float]) -> list[Record]:
        return [{"workers": workers, "relative": relative} for workers, relative in pairs]

    assert scale.off_linear(points((2, 1.0), (4, 0.9), (8, 0.95))) == 0.0
    assert scale.off_linear(points((2, 1.0), (4, 1.3), (8, 1.1))) == 0.3
    assert scale.off_linear(points((1, 1.0), (2, 2.0), (4, 2.2))) == 0.1


def test_a_point_moves_every_gradient_and_the_state() -> None:
    assert Point(10, 4, 1).moved_bytes == 10 * (4 * 4 + 16)


def test_a_job_tells_its_loss_and_the_bytes_of_its_codec() -> None:
    if find_spec("sklearn") is None:
        pytest.skip("scikit-learn is not installed")
    curve = converge.learn(Way("bsp", "onebit"), 1, 2, seed=0)
    assert curve["loss"][-1] < curve["loss"][0]
    assert curve["push_bytes"] < 4 * 75_000 / 16


def test_a_way_that_does_not_learn_is_an_error() -> None:
    converge.check(BASE, {"accuracy": 0.9})
    with pytest.raises(BenchError, match="bsp: it recognises 50.0% of the digits"):
        converge.check(BASE, {"accuracy": 0.5})


def test_bytes_and_time_count_until_the_target_is_reached(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def curve(*loss: float, nbytes: int = 100) -> converge.Curve:
        times = [0.5 * n for n in range(len(loss))]
        rounds = [4 * n for n in range(len(loss))]
        found = {"rounds": rounds, "seconds": times, "loss": list(loss)}
        return {"push_bytes": nbytes, "accuracy": 0.9, **found}

    ways = {
        BASE: [curve(2.0, 0.1)],
        Way("bsp", "int8"): [curve(2.0, 1.0, 0.1, nbytes=25)],
        Way("async", "none"): [curve(2.0, 1.0)],
    }
    converge.tell(ways, 2, Out())
    _, int8, never = records_of(capsys)
    assert int8["to_target"] == {"rounds": 8, "seconds": 1.0, "bytes": 200}
    assert int8["over_bsp"] == {"rounds": 2.0, "seconds": 2.0, "bytes": 0.5}
    assert (never["to_target"], never["over_bsp"]["bytes"]) == (None, None)


def test_where_the_engine_writes_no_traces_the_breakdown_is_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(breakdown, "unavailable", lambda: "it writes none")
    breakdown.prepare(read(quick=True))(Out())
    assert "breakdown is skipped: it writes none" in capsys.readouterr().err


def test_where_the_engine_writes_traces_they_make_up_a_round(
    capsys: pytest.CaptureFixture[str],
) -> None:
    if reason := breakdown.unavailable():
        pytest.skip(reason)
    breakdown.tell(1000, 1, breakdown.measure(1000, 1, 5, seed=3), Out())
    (record,) = records_of(capsys)
    assert {"encode", "apply", "wake"} <= record["parts_us"].keys()
    assert all(np.isfinite(us) and us >= 0 for us in record["parts_us"].values())
