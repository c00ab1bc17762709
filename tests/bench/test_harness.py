"""The harness's arithmetic, and what it refuses before any work."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import numpy as np
import pytest

from bench import harness
from bench.harness import (
    Measured,
    Plan,
    Run,
    choose,
    merged,
    mirrored,
    parse_sizes,
    rounds_per_block,
)
from bench.peers import problem
from bench.peers.base import BenchError, Peer
from bench.peers.gloo import Gloo
from bench.peers.rpc import Rpc
from bench.peers.team import Block, Cpu, merge
from bench.peers.zps_round import Zps, ZpsGrad
from bench.stats import ratio_of_medians

PEERS: tuple[type[Peer], ...] = (Zps, ZpsGrad, Gloo, Rpc)


class Missing(Gloo):
    name = "missing"

    @classmethod
    def available(cls) -> str | None:
        return "it is not there"


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("1000", [1000]), ("1K", [1000]), ("1k,25M", [1000, 25_000_000]), ("0.5M", [500_000])],
)
def test_sizes_are_read_with_their_units(text: str, sizes: list[int]) -> None:
    assert parse_sizes(text) == sizes


@pytest.mark.parametrize("text", ["", "0", "1X", "-3", "1K,,2K", "K"])
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(BenchError, match="is not a size"):
        parse_sizes(text)


def test_sizes_are_told_as_they_are_read() -> None:
    assert [harness.human(n) for n in (7, 1000, 1_500_000)] == ["7", "1 K", "1.5 M"]


def test_an_unknown_peer_is_named_with_the_nearest_known_one() -> None:
    with pytest.raises(BenchError, match=r"unknown peer 'glo' \(did you mean 'gloo'\?\)"):
        choose("zps,glo", PEERS)


def test_a_chosen_peer_that_cannot_run_is_an_error_and_an_unchosen_one_a_note() -> None:
    with pytest.raises(BenchError, match="it is not there"):
        choose("missing", [Gloo, Missing])
    chosen, notes = choose(None, [Gloo, Missing])
    assert chosen == [Gloo]
    assert notes == ["missing is left out: it is not there"]


def test_a_peer_named_twice_runs_once() -> None:
    assert choose("gloo,gloo", PEERS)[0] == [Gloo]


def test_a_size_that_does_not_fit_is_refused_with_both_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(harness, "available_bytes", lambda: 8 << 30)
    harness.require_memory(PEERS, 1_000_000, 2, payload_bytes=4_000_000)
    with pytest.raises(BenchError, match=r"needs about \d+\.\d GiB, 8\.0 GiB are free"):
        harness.require_memory(PEERS, 1_000_000_000, 2, payload_bytes=4_000_000_000)


def test_a_cycle_is_its_own_mirror_image() -> None:
    cycle = mirrored(["a", "b", "c"])
    assert cycle == ["a", "b", "c", "c", "b", "a"]
    assert cycle == cycle[::-1]


def test_a_block_has_at_least_two_rounds_and_at_most_what_the_plan_allows() -> None:
    plan = Plan(cycles=2, block_s=0.1, most_rounds=50)
    assert [rounds_per_block(us, plan) for us in (1e6, 1e4, 1.0)] == [2, 10, 50]


class FakeTeam:
    """Takes no time and no core; counts the blocks."""

    blocks = 0

    def awake(self) -> AbstractContextManager[None]:
        return nullcontext()

    def run(self, rounds: int) -> Block:
        self.blocks += rounds > 1
        return Block(np.full(rounds, 5.0), 0)

    def cpu_s(self) -> float:
        return 0.0


@pytest.mark.parametrize(("patience_s", "blocks"), [(60.0, 3), (0.0, 1)])
def test_a_block_is_repeated_until_others_are_calm_or_patience_ends(
    patience_s: float, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = iter([0.5, 0.3, 0.01])
    monkeypatch.setattr(harness.Others, "share", lambda self: next(shares))
    monkeypatch.setattr(harness, "_others_over", lambda seconds: 0.0)
    team = FakeTeam()
    until = time.monotonic() + patience_s
    block, share = harness.timed_block(team, 4, 0.1, until)  # type: ignore[arg-type]
    assert (team.blocks, len(block.samples)) == (blocks, 4)
    assert share == (0.01 if patience_s else 0.5)


def test_the_ratio_of_medians_ignores_outliers() -> None:
    above = [np.array([10.0, 10.0, 1000.0])] * 4
    below = [np.array([2.0, 2.0, 0.001])] * 4
    ratio = ratio_of_medians(above, below)
    assert (ratio.value, ratio.low, ratio.high) == (5.0, 5.0, 5.0)


@pytest.mark.parametrize("cycles", [6, 9, 20])
def test_the_interval_of_one_start_covers_the_true_ratio_as_often_as_it_says(cycles: int) -> None:
    generator = np.random.default_rng(cycles)
    covered = 0
    for _ in range(200):
        drift = generator.lognormal(0.0, 0.2, size=cycles)  # a slow machine slows both alike
        above = [3.0 * d * generator.lognormal(0.0, 0.05, size=20) for d in drift]
        below = [1.0 * d * generator.lognormal(0.0, 0.05, size=20) for d in drift]
        ratio = ratio_of_medians(above, below)
        assert ratio.low <= ratio.value <= ratio.high
        covered += ratio.low <= 3.0 <= ratio.high
    assert 181 <= covered <= 199  # 95 % of 200, and three standard deviations


@pytest.mark.parametrize("starts", [2, 3, 5, 14])
def test_the_interval_covers_what_only_another_start_would_show(starts: int) -> None:
    generator = np.random.default_rng(starts)
    covered = 0
    for _ in range(200):
        above, below = [], []
        for lucky in generator.lognormal(0.0, 0.05, size=starts):
            for drift in generator.lognormal(0.0, 0.05, size=4):
                above.append(3.0 * lucky * drift * generator.lognormal(0.0, 0.05, size=5))
                below.append(drift * generator.lognormal(0.0, 0.05, size=5))
        ratio = ratio_of_medians(above, below, restarts=[4] * starts)
        assert ratio.low <= ratio.value <= ratio.high
        covered += ratio.low <= 3.0 <= ratio.high
    assert 181 <= covered <= 199  # 95 % of 200, and three standard deviations


def test_a_machine_that_changes_its_pace_midway_does_not_change_the_ratio() -> None:
    pace = [1.0] * 5 + [1.6] * 4
    above = [np.full(9, 3.0 * p) for p in pace]
    below = [np.full(count, p) for count, p in zip([2] * 5 + [9] * 4, pace, strict=True)]
    ratio = ratio_of_medians(above, below)
    assert [round(x, 9) for x in (ratio.low, ratio.value, ratio.high)] == [3.0] * 3


def test_the_ratio_of_several_starts_is_their_geometric_mean() -> None:
    below = [np.full(4, 1.0)] * 4
    above = [*[np.full(4, 2.0)] * 3, np.full(4, 8.0)]
    cycles = ratio_of_medians(above, below)
    assert (cycles.low, cycles.value) == (2.0, 2.0)
    starts = ratio_of_medians(above, below, restarts=[3, 1])
    assert round(starts.value, 9) == 4.0
    assert starts.low < 2.0 < 8.0 < starts.high


def test_the_runs_of_all_restarts_become_one() -> None:
    def run(us: float, late: int) -> Run:
        found = Measured([np.full(2, us)] * 3, {"worker": 1}, late, cpu=[Cpu(us, 2 * us)])
        return Run({"zps": found}, start_us=us, other_cpu=us)

    both = merged([run(10.0, 1), run(20.0, 2)])
    found = both.measured["zps"]
    assert (found.restarts, found.late, found.samples.size) == ([3, 3], 3, 12)
    assert found.cpu_us == {"workers": 15.0, "server": 30.0, "total": 45.0}
    assert (both.start_us, both.other_cpu) == (15.0, 15.0)


def test_a_round_lasts_from_the_last_start_to_the_last_end() -> None:
    #                 common start, own start, end
    rank0 = np.array([[1000, 1000, 9000], [0, 0, 7000]])
    rank1 = np.array([[1000, 3000, 6000], [0, 0, 8000]])
    assert merge([rank0, rank1], keep_late=False).samples.tolist() == [6.0, 8.0]


def test_a_round_that_one_worker_began_late_is_left_out_and_counted() -> None:
    late = 60_000
    rank0 = np.array([[0, 0, 100_000], [0, 0, 100_000]])
    rank1 = np.array([[0, late, 200_000], [0, 0, 100_000]])
    block = merge([rank0, rank1], keep_late=False)
    assert (block.samples.tolist(), block.late) == ([100.0], 1)
    block = merge([rank0, rank1], keep_late=True)
    assert (block.samples.tolist(), block.late) == ([140.0, 100.0], 1)


def test_a_long_round_may_begin_a_little_later() -> None:
    rank0 = np.array([[0, 0, 9_000_000]])
    rank1 = np.array([[0, 60_000, 9_060_000]])
    assert merge([rank0, rank1], keep_late=False).samples.tolist() == [9000.0]


def test_the_reference_is_sgd_with_momentum_on_the_mean_gradient() -> None:
    torch = pytest.importorskip("torch")
    weights = torch.nn.Parameter(torch.from_numpy(problem.initial_weights(33, seed=5)))
    optimizer = torch.optim.SGD([weights], lr=problem.LR, momentum=problem.MOMENTUM)
    grads = [torch.from_numpy(problem.gradient(rank, 33, seed=5)) for rank in range(3)]
    for number in range(6):
        weights.grad = sum(grads) / 3 * problem.factor(number)
        optimizer.step()
    expected = problem.reference(3, 33, seed=5, rounds=6)
    np.testing.assert_allclose(weights.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_every_rank_and_round_pushes_something_else() -> None:
    ranks = [problem.gradient(rank, 100, seed=1) for rank in range(3)]
    assert not np.allclose(ranks[0], ranks[1])
    assert not np.allclose(ranks[1], ranks[2])
    factors = [problem.factor(n) for n in range(8)]
    assert all(a != b for a, b in pairwise(factors))
    assert sum(factors) == 0.0
