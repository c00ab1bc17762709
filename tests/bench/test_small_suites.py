"""rtt, pull, scale, converge and breakdown, with real processes at sizes that take no time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench import breakdown, converge, harness, pull, rtt, scale
from bench.converge import BASE, Way
from bench.harness import Measured, Run
from bench.options import read
from bench.out import Out, Record
from bench.peers import digits_loop, problem
from bench.peers.base import BenchError, Peer, Seat
from bench.peers.echo import Echo
from bench.peers.hubs import Hubs2
from bench.peers.team import Cpu
from bench.peers.zps_round import Zps
from bench.report import Case
from bench.scale import Point


@pytest.fixture(autouse=True)
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := Zps.available():
        pytest.skip(reason)
    monkeypatch.setitem(harness.PLANS, harness.Level.QUICK, harness.Plan(cycles=2, block_s=0.01))


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
    assert all(found["cpu_us"]["workers"] > 0 for found in (times, times["peers"]["echo"]))
    assert times["cpu_us"]["server"] == pytest.approx(cpu["server_us"], abs=0.1)


def test_starts_that_disagree_widen_the_interval_of_processor_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measured(*server_us: float, restarts: list[int]) -> Measured:
        cpu = [Cpu(1.0, us) for us in server_us for _ in range(20)]
        return Measured([np.full(3, 50.0)] * sum(restarts), {}, restarts=restarts, cpu=cpu)

    # The last start has lost a cycle, of which every round began late.
    for restarts in ([10] * 4, [10, 10, 10, 9]):
        both = {
            "zps": measured(*[10.0] * 4, restarts=restarts),
            "echo": measured(20.0, 20.0, 20.0, 40.0, restarts=restarts),
        }
        rtt.tell_cpu(Case("rtt", 1000, 4000, 2, Run(both, 1.0, 0.0)), Out())
        (record,) = records_of(capsys)
        low, high = record["peers"]["echo"]["ratio_ci95"]
        assert low < 2.0
        assert high > 4.0


@contextmanager
def seated(peer: type[Peer], size: int, folder: Path) -> Iterator[Peer]:
    """A participant's only worker, in this process."""
    with peer.serve(1, size, 3, folder) as server:
        worker = peer()
        worker.setup(Seat(0, 1, size, 3, server.address))
        yield worker
        worker.close()


def test_an_echo_is_what_was_sent_in_this_round(tmp_path: Path) -> None:
    with seated(Echo, 10, tmp_path) as worker:
        for number in range(2):
            worker.prepare(number)
            worker.round()
            assert np.array_equal(worker.weights(), Echo.answer(number + 1))
            assert not np.array_equal(worker.weights(), Echo.answer(number))


@pytest.mark.parametrize("peer", [*pull.PEERS, Hubs2], ids=lambda peer: peer.name)
def test_after_every_round_a_participant_holds_the_current_weights(
    peer: type[Peer], tmp_path: Path
) -> None:
    with seated(peer, 5000, tmp_path) as worker:
        for number in range(2):
            worker.prepare(number)
            worker.round()
            expected = problem.reference(1, 5000, 3, number + 1)
            np.testing.assert_allclose(worker.weights(), expected, rtol=1e-5, atol=1e-6)


def test_growth_is_told_for_each_point_beside_the_smallest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    points = [Point(1000, 2, 1), Point(20_000, 2, 2, Hubs2)]
    names = [point.name for point in points]
    measured = {name: Measured([np.full(3, 50.0)] * 2, {}) for name in names}
    measured[names[1]] = Measured([np.full(3, 1500.0)] * 2, {})
    scale.tell("parameters", points, Run(measured, 1.0, 0.0), Out())
    (record,) = records_of(capsys)
    first, second = record["points"]
    assert (first["relative"], first["hubs"], second["hubs"]) == (1.0, 1, 2)
    assert (second["relative"], record["off_linear"]) == (1.5, 0.5)


def test_the_largest_points_are_left_out_when_they_and_their_reference_do_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points = [Point(size, 2, 1) for size in (10_000_000, 20_000_000, 100_000_000)]
    fits = sum(point.memory_bytes for point in points[:2])
    monkeypatch.setattr(harness, "available_bytes", lambda: fits + 20 * points[1].size - 1)
    left = list(points)
    assert scale._drop_what_does_not_fit(left, True) == [points[2], points[1]]
    monkeypatch.setattr(harness, "available_bytes", lambda: fits + 20 * points[1].size)
    left = list(points)
    assert scale._drop_what_does_not_fit(left, True) == [points[2]]


@pytest.mark.parametrize(
    ("relative", "off"),
    [
        ({2: 1.0, 4: 0.9, 8: 0.95}, 0.0),
        ({2: 1.0, 4: 1.3, 8: 1.1}, 0.3),
        ({1: 1.0, 2: 2.0, 4: 2.2}, 0.1),
    ],
)
def test_growth_counts_from_two_workers_on(relative: dict[int, float], off: float) -> None:
    points = [Point(1000, workers, 1) for workers in relative]
    measured = {
        point.name: Measured([np.full(3, 100.0 * point.workers * relative[point.workers])] * 2, {})
        for point in points
    }
    found = scale.off_linear("workers", points, Run(measured, 1.0, 0.0))
    assert found == {"off_linear": off, "off_linear_ci95": [off, off]}


@pytest.mark.parametrize(
    ("times", "off", "least", "most"),
    [
        ((220.0, 250.0, 240.0, 260.0), 0.225, 0.09, 0.31),
        ((150.0, 190.0, 250.0, 170.0), 0.0, 0.0, 0.26),
    ],
)
def test_growth_may_be_that_of_any_point_within_its_interval(
    times: tuple[float, ...], off: float, least: float, most: float
) -> None:
    points = [Point(1000, workers, 1) for workers in (2, 4, 8)]
    measured = {
        point.name: Measured([np.full(3, us) for us in cycles], {})
        for point, cycles in zip(points, ([100.0] * 4, times, [400.0] * 4), strict=True)
    }
    found = scale.off_linear("workers", points, Run(measured, 1.0, 0.0))
    low, high = found["off_linear_ci95"]
    assert found["off_linear"] == off
    assert least <= low <= off < high < most


def test_growth_with_workers_is_by_worker(capsys: pytest.CaptureFixture[str]) -> None:
    points = [Point(1000, 2, 1), Point(1000, 8, 1)]
    times = (100.0, 440.0)
    measured = {
        point.name: Measured([np.full(3, us)] * 2, {})
        for point, us in zip(points, times, strict=True)
    }
    scale.tell("workers", points, Run(measured, 1.0, 0.0), Out())
    (record,) = records_of(capsys)
    assert [point["relative"] for point in record["points"]] == [1.0, 1.1]
    assert record["off_linear"] == 0.1


def test_a_job_tells_its_loss_and_the_bytes_of_its_codec(tmp_path: Path) -> None:
    if find_spec("sklearn") is None:
        pytest.skip("scikit-learn is not installed")
    converge.write_digits(tmp_path / "digits.npz")
    curve = converge.learn(Way("bsp", "onebit"), tmp_path / "digits.npz", 1, 2, seed=0)
    assert curve["loss"][-1] < curve["loss"][0]
    assert curve["push_bytes"] < 4 * 75_000 / 16


def test_the_loss_is_worked_out_when_no_round_is_left_that_could_go_on_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    seen: list[int | str] = []

    class Counting(torch.nn.CrossEntropyLoss):  # type: ignore[misc, name-defined]
        def forward(self, output: Any, target: Any) -> Any:
            seen.append(len(target))
            return super().forward(output, target)

    zps = SimpleNamespace(
        init=lambda: None,
        rank=lambda: 0,
        world_size=lambda: 2,
        Optimizer=lambda optimizer, net: optimizer,
        shutdown=lambda: seen.append("over"),
    )
    settings = SimpleNamespace(mode="async")
    sizes = SimpleNamespace(push=SimpleNamespace(encoded_nbytes=300_000))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of this very process
    monkeypatch.setattr(digits_loop, "zps", zps)
    monkeypatch.setattr(digits_loop, "current", lambda: SimpleNamespace(settings=settings))
    monkeypatch.setattr(digits_loop, "measure", lambda net, settings: sizes)
    monkeypatch.setattr(digits_loop.nn, "CrossEntropyLoss", Counting)
    rounds = 10
    images, labels = np.eye(64, dtype=np.float32)[np.arange(640) % 64], np.arange(640) % 10
    np.savez(tmp_path / "data.npz", images, images[:7], labels, labels[:7])
    digits_loop.main(tmp_path / "data.npz", tmp_path / "curve.json", 1, seed=0)
    curve = json.loads((tmp_path / "curve.json").read_text())
    assert curve["rounds"] == [0, 4, 8, 10]
    assert curve["loss"][-1] < curve["loss"][0]
    assert seen == [digits_loop.BATCH] * rounds + ["over"] + [len(labels)] * len(curve["loss"])


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
    assert record["round_p50_us"] is None or record["round_p50_us"] > 0
    assert all(np.isfinite(us) and us >= 0 for us in record["parts_us"].values())


def test_parts_that_do_not_add_up_to_a_round_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    parts = {"encode": 60.0, "apply": 60.0}
    for p50_us, said in ((120.0, False), (130.0, False), (100.0, True), (200.0, True)):
        breakdown.tell(1000, 1, breakdown.Round(parts, p50_us), Out())
        assert ("not shares of it" in capsys.readouterr().err) == said
