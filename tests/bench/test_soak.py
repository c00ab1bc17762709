"""A soak's verdict, and the soak itself for a moment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

from bench import soak
from bench.out import Out
from bench.peers import problem
from bench.peers.base import BenchError
from bench.peers.problem import Array
from bench.peers.team import Block
from bench.peers.zps_round import Zps
from bench.soak import Look, judge


def looks(**series: Any) -> list[Look]:
    """Forty looks at two processes; a series is a function of the look's number."""

    def at(name: str, number: int, usual: Any) -> Any:
        return series[name](number) if name in series else usual

    return [
        Look(
            at_s=float(number),
            rounds=10 * number,
            p50_us=at("p50_us", number, 100.0),
            p99_us=200.0,
            memory_bytes=at("memory_bytes", number, [100 << 20, 50 << 20]),
            descriptors=at("descriptors", number, [20, 30]),
            threads=at("threads", number, [4, 6]),
            other_cpu=at("other_cpu", number, 0.01),
        )
        for number in range(40)
    ]


def test_what_stays_as_it_is_is_steady() -> None:
    verdict = judge(looks())
    assert verdict.steady
    assert (verdict.memory_growth, verdict.latency_drift, verdict.descriptors_more) == (0, 0, 0)


def test_memory_that_grows_is_told_with_its_process() -> None:
    verdict = judge(looks(memory_bytes=lambda n: [100 << 20, (50 + n) << 20]))
    assert verdict.faults == ("process 1 has grown by 20.0 MiB",)
    assert verdict.memory_growth > soak.MEMORY_LIMIT


def test_memory_that_only_grows_at_the_start_is_steady() -> None:
    assert judge(looks(memory_bytes=lambda n: [(100 + min(n, 9)) << 20, 50 << 20])).steady


@pytest.mark.parametrize("what", ["descriptors", "threads"])
def test_a_leak_of_descriptors_or_threads_is_told(what: str) -> None:
    verdict = judge(looks(**{what: lambda n: [20, 30 + n // 10]}))
    assert verdict.faults == (f"a process has 2 more {what} than before",)


def test_a_passing_descriptor_is_no_leak() -> None:
    assert judge(looks(descriptors=lambda n: [20 + n % 2, 30])).steady


def test_rounds_that_slow_down_are_a_fault_unless_others_were_busy() -> None:
    slower = lambda n: 100.0 + 2 * n  # noqa: E731
    verdict = judge(looks(p50_us=slower))
    assert verdict.faults == ("a round takes 31% longer than before",)
    busy = judge(looks(p50_us=slower, other_cpu=lambda n: 0.5))
    assert busy.steady
    assert not busy.calm
    assert busy.latency_drift == verdict.latency_drift


def test_the_weights_after_any_number_of_rounds_are_those_of_the_reference() -> None:
    for rounds in (1, 2, 50):
        np.testing.assert_allclose(
            soak.expected_at(np.arange(10, 60), rounds, 100, 2, seed=3),
            problem.reference(2, 100, 3, rounds)[10:60],
            atol=1e-5,
        )


def test_a_round_that_was_lost_among_very_many_is_found() -> None:
    rounds = 5000

    class Other:
        peer = Zps

        def __init__(self, done: int) -> None:
            self._done = done

        def weights(self) -> Iterator[tuple[int, Array]]:
            yield 0, soak.expected_at(np.arange(100), self._done, 100, 1, seed=3)

    soak.check_sample(Other(rounds), rounds, 100, 1, seed=3)  # type: ignore[arg-type]
    with pytest.raises(BenchError, match="worker 0 has wrong weights after 5000 rounds"):
        soak.check_sample(Other(rounds - 4), rounds, 100, 1, seed=3)  # type: ignore[arg-type]


def test_a_moment_of_it_ends_with_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    if reason := Zps.available():
        pytest.skip(reason)
    seen = soak.soak(1000, 1, 0.05, seed=3, out=Out())
    soak.tell(seen, 1000, 1, Out())
    record = json.loads(capsys.readouterr().out)
    assert record["rounds"] == seen[-1].rounds >= 80
    assert record["descriptors_more"] == record["threads_more"] == 0
    assert len(record["looks"][0]["memory_bytes"]) == 2  # the worker and the hub


def test_a_machine_on_which_every_round_begins_late_ends_the_soak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = 0

    class Late:
        def run(self, rounds: int) -> Block:
            nonlocal blocks
            blocks += 1
            assert blocks < 100, "it goes on for ever"
            return Block(np.empty(0), rounds)

        def cpu_s(self) -> float:
            return 0.0

    monkeypatch.setattr(soak, "_PATIENCE_S", 0.0)
    with pytest.raises(BenchError, match="too busy to soak"):
        soak.watch(Late(), 0.0, lambda text: None)  # type: ignore[arg-type]


def test_wrong_weights_at_the_end_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        peer = Zps

        def weights(self) -> Iterator[tuple[int, Array]]:
            yield 0, np.full(10, 9.0, np.float32)

    monkeypatch.setattr(soak.teams_of, "team", lambda *_: nullcontext(Wrong()))
    monkeypatch.setattr(soak, "watch", lambda *_: looks())
    with pytest.raises(BenchError, match="worker 0 has wrong weights after 390 rounds"):
        soak.soak(10, 1, 0.01, seed=3, out=Out())
