"""In which order a comparison checks and measures its participants: with teams of no process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest

from bench import harness, suites
from bench.harness import Entry, Plan
from bench.options import Level, Options
from bench.out import Out
from bench.peers.base import BenchError
from bench.peers.gloo import Gloo
from bench.peers.problem import Array
from bench.peers.team import Block, Cpu
from bench.peers.zps_round import Zps
from bench.suites import Teams

_CHECKED = 5  # rounds; no other block has as many
_US = {"a": 100.0, "b": 300.0}


class FakeTeam:
    """Every round takes as long as its name says, and what is done with it is written down.

    wrong  its workers hold other weights than they should: "all", or after all rounds "one"
    """

    peer = Gloo

    def __init__(self, name: str, done: list[str], wrong: str) -> None:
        self.name, self.done, self.wrong = name, done, wrong

    def awake(self) -> AbstractContextManager[None]:
        return nullcontext()

    def run(self, rounds: int) -> Block:
        self.done.append(f"{self.name} {rounds}")
        return Block(np.full(rounds, _US[self.name]), 0, Cpu(1.0, 2.0))

    run_empty = run

    def weights(self) -> Iterator[tuple[int, Array]]:
        yield 0, np.full(4, 1.0 if self.wrong == "all" else 0.0, np.float32)

    def digests(self) -> list[str]:
        self.done.append(f"{self.name} digests")
        return ["one", "other" if self.wrong == "one" else "one"]

    def threads(self) -> dict[str, int]:
        return {"worker": 1, "server": 1, "total": 3}

    def cpu_s(self) -> float:
        return 0.0


@pytest.fixture
def wrong() -> dict[str, str]:
    return {"a": "", "b": ""}


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str]) -> list[str]:
    """What was done with the teams, in order."""
    seen: list[str] = []

    @contextmanager
    def all_teams(
        entered: Iterable[Entry], seed: int, tick: Any, *, fresh: bool
    ) -> Iterator[dict[str, FakeTeam]]:
        assert not fresh  # a quick run forks
        seen.append("start")
        yield {entry.name: FakeTeam(entry.name, seen, wrong[entry.name]) for entry in entered}
        seen.append("end")

    monkeypatch.setattr(harness, "all_teams", all_teams)
    return seen


def compare(restarts: int, cycles: int) -> harness.Run:
    def check(teams: Teams) -> None:
        for team in teams.values():
            team.run(_CHECKED)
            harness.check(team, np.zeros(4, np.float32), _CHECKED)

    options = Options(Level.QUICK, Plan(cycles, block_s=0.001), restarts)
    entered = [Entry("a", Zps, 2, 4), Entry("b", Gloo, 2, 4)]
    return suites.compare(entered, options, Out(), check)


def blocks(done: list[str]) -> list[str]:
    """Whose blocks were timed: those that follow one round to get the caches back."""
    return [one.split()[0] for one in done if one.endswith(" 1")]


def test_participants_take_turns_in_mirrored_cycles(done: list[str]) -> None:
    compare(restarts=1, cycles=3)
    assert "".join(blocks(done)) == "abba" * 3


def test_everybody_is_checked_before_anything_is_timed_at_every_start(done: list[str]) -> None:
    compare(restarts=2, cycles=2)
    starts = [at for at, one in enumerate(done) if one == "start"]
    ends = [at for at, one in enumerate(done) if one == "end"]
    assert len(starts) == len(ends) == 2
    for begin, end in zip(starts, ends, strict=True):
        start = done[begin + 1 : end]
        assert start[:2] == [f"a {_CHECKED}", f"b {_CHECKED}"]
        assert "".join(blocks(start)) == "abba" * 2
        assert start[-2:] == ["a digests", "b digests"]


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_wrong_result_ends_the_suite_before_anything_is_timed(
    name: str, wrong: dict[str, str], done: list[str]
) -> None:
    wrong[name] = "all"
    with pytest.raises(BenchError, match="worker 0 has wrong weights after 5 rounds: 4 of 4"):
        compare(restarts=2, cycles=2)
    assert not blocks(done)


def test_workers_that_disagree_after_all_rounds_end_the_suite(
    wrong: dict[str, str], done: list[str]
) -> None:
    wrong["b"] = "one"
    with pytest.raises(BenchError, match="after all rounds its workers hold other weights"):
        compare(restarts=2, cycles=2)
    assert done.count("start") == 1


def test_what_all_starts_measured_is_one_run(done: list[str]) -> None:
    run = compare(restarts=3, cycles=2)
    for name, us in _US.items():
        found = run.measured[name]
        assert found.restarts == [2, 2, 2]
        assert (found.p(0), found.p(100)) == (us, us)
        assert len(found.cpu) == 3 * 2 * 2
        assert found.cpu_us == {"workers": 1.0, "server": 2.0, "total": 3.0}
