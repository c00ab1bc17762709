"""Every participant, with real processes, at a size that takes no time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import harness, step
from bench.peers import problem
from bench.peers.base import BenchError, Peer
from bench.peers.gloo import Gloo
from bench.peers.team import team
from bench.peers.zps_round import Zps

SIZE = 1000


def skip_unless_available(peer: type[Peer]) -> None:
    reason = peer.available()
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("peer", step.PEERS, ids=lambda peer: peer.name)
def test_a_participant_reaches_the_reference_and_leaves_no_process(
    peer: type[Peer], tmp_path: Path
) -> None:
    skip_unless_available(peer)
    with team(peer, 2, SIZE, 3, tmp_path) as members:
        pids = members.pids()
        with members.awake():
            members.run(3)
            harness.check(members, problem.reference(2, SIZE, 3, rounds=3), 3)
            block = members.run(2)
            harness.check(members, problem.reference(2, SIZE, 3, rounds=5), 5)
            assert len(block.samples) in (2, 2 - block.late)  # late ones are kept where all spin
            assert (block.samples > 0).all()
            assert block.cpu.workers_us > 0
        harness.check_agreement(members)
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def test_wrong_weights_are_told_with_worker_and_place(tmp_path: Path) -> None:
    skip_unless_available(Gloo)
    with team(Gloo, 1, SIZE, 3, tmp_path) as members:
        members.run(1)
        expected = problem.reference(1, SIZE, 3, rounds=1)
        expected[17] += 1.0
        with pytest.raises(BenchError, match=r"gloo: worker 0 .* 1 of 1000 differ; at 17 "):
            harness.check(members, expected, 1)


class Failing(Gloo):
    name = "failing"

    def round(self) -> None:
        raise RuntimeError("no such luck")


def test_a_worker_that_fails_is_named_with_its_reason(tmp_path: Path) -> None:
    skip_unless_available(Gloo)
    with team(Failing, 1, SIZE, 3, tmp_path) as members:
        with pytest.raises(BenchError, match=r"failing: worker 0 failed:[\s\S]*no such luck"):
            members.run(1)
        members.kill()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sizes", "many"], "'many' is not a size"),
        (["--peers", "zps,glo"], "did you mean 'gloo'?"),
        (["--sizes", "900G"], "GiB are free"),
    ],
)
def test_nonsense_is_refused_before_any_work(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(step.app, arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert not result.stdout


def test_the_command_prints_and_keeps_one_line_for_each_form_of_zps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_unless_available(Zps)
    monkeypatch.setitem(harness.PLANS, harness.Level.QUICK, harness.Plan(cycles=2, block_s=0.01))
    kept = tmp_path / "lines.json"
    arguments = ["--sizes", "1K", "-n", "1", "--peers", "zps,zps-grad", "--quick"]
    result = CliRunner().invoke(step.app, [*arguments, "--json", str(kept)])
    assert result.exit_code == 0, result.stderr
    assert result.stdout == kept.read_text()
    assert len(result.stdout.splitlines()) == 2
