"""Does anything grow, leak or slow down while rounds go on for minutes?

    python -m bench soak --minutes 10

Two workers and their hub do one round after another. Again and again memory, file descriptors and
threads of every process are read, and the time of a round. The verdict compares the last quarter of
the run with the second: the first is what a start costs. In the end every worker must hold the
weights that so many rounds of SGD make, to the last bit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from . import harness, report, suites
from .footprint import resident_bytes
from .options import Options
from .out import Out
from .peers import problem
from .peers import team as teams_of
from .peers.base import BenchError
from .peers.problem import Array
from .peers.team import Samples, Team
from .peers.zps_round import Zps

Indices = npt.NDArray[np.intp]

SIZE, WORKERS = 1_000_000, 2
MEMORY_LIMIT = 0.02  # growth of a process, of what it had; and never less than a few pages' worth
MEMORY_FLOOR = 4 << 20
LATENCY_LIMIT = 0.25
_CALM = 0.1  # share of the cores
_LEAST_LOOKS = 8
_PATIENCE_S = 60.0  # beyond the time that was asked for, on a machine where no round begins in time
_LOOKS = 240
_PLACES = 256


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen at one moment; lists have one entry a process, the hub's last.

    p50_us      of the rounds since the last look
    other_cpu   share of the cores that other processes used meanwhile
    """

    at_s: float
    rounds: int
    p50_us: float
    p99_us: float
    memory_bytes: list[int]
    descriptors: list[int]
    threads: list[int]
    other_cpu: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the looks amount to. `faults` are sentences; none means that the run was steady.

    memory_growth      the largest of a process, from the second quarter to the last, as a share
    memory_of_allowed  the growth of a process as a share of what it may grow by; more than 1 is a
                       fault
    latency_drift      of the median time of a round, from the second quarter to the last
    calm               other processes used little: otherwise the drift is no fault
    """

    memory_growth: float
    memory_of_allowed: float
    latency_drift: float
    calm: bool
    descriptors_more: int
    threads_more: int
    faults: tuple[str, ...]

    @property
    def steady(self) -> bool:
        return not self.faults


def prepare(options: Options) -> suites.Job:
    """One soak: of the first size and number of workers that are given."""
    if reason := Zps.available():
        raise BenchError(f"soak: {reason}")
    size = options.sizes[0] if options.sizes else SIZE
    world = options.workers[0] if options.workers else WORKERS
    harness.require_memory([Zps], size, world, payload_bytes=4 * size)
    minutes = options.minutes or options.by_level(0.06, 1.0, 10.0)

    def job(out: Out) -> None:
        tell(soak(size, world, 60 * minutes, options.seed, out), size, world, out)

    return job


def soak(size: int, world: int, seconds: float, seed: int, out: Out) -> list[Look]:
    """Rounds for so long, and what was seen. Raises BenchError for wrong weights at the end."""
    with (
        TemporaryDirectory(prefix="bench-") as folder,
        out.progress(_LOOKS) as tick,
        teams_of.team(Zps, world, size, seed, Path(folder)) as team,
    ):
        looks = watch(team, seconds, tick)
        rounds = looks[-1].rounds
        check_sample(team, rounds, size, world, seed)
        harness.check_agreement(team)
    return looks


def watch(team: Team, seconds: float, tick: Callable[[str], None]) -> list[Look]:
    """Looks at a running team, at even distances, until the time is over.

    Raises BenchError when the machine is so busy that there is too little to judge.
    """
    began, every = time.monotonic(), seconds / _LOOKS
    looks: list[Look] = []
    rounds, a_block = 0, 10
    while len(looks) < _LEAST_LOOKS or time.monotonic() - began < seconds:
        others, parts = harness.Others(team), list[Samples]()
        until = time.monotonic() + every
        while not parts or time.monotonic() < until:
            parts.append(team.run(a_block).samples)
            rounds += a_block
        samples = np.concatenate(parts)
        if not samples.size:  # every round began late: the machine was elsewhere
            if time.monotonic() - began > seconds + _PATIENCE_S:
                raise BenchError("nearly every round began late: this machine is too busy to soak")
            continue
        at_s = time.monotonic() - began
        looks.append(_look(team, at_s, rounds, samples, others.share()))
        tick(f"{rounds} rounds")
    return looks


def _look(team: Team, at_s: float, rounds: int, samples: Any, other_cpu: float) -> Look:
    pids = team.pids()
    return Look(
        at_s=round(at_s, 3),
        rounds=rounds,
        p50_us=round(float(np.median(samples)), 1),
        p99_us=round(float(np.percentile(samples, 99)), 1),
        memory_bytes=[resident_bytes(pid) for pid in pids],
        descriptors=[len(os.listdir(f"/proc/{pid}/fd")) for pid in pids],
        threads=[len(os.listdir(f"/proc/{pid}/task")) for pid in pids],
        other_cpu=round(other_cpu, 3),
    )


def judge(looks: Sequence[Look]) -> Verdict:
    """Compares the second quarter of a run with the last."""
    quarter = len(looks) // 4
    before, after = looks[quarter : 2 * quarter], looks[-quarter:]
    growth, of_allowed, faults = _memory(before, after)
    for what in ("descriptors", "threads"):
        more = _more(before, after, what)
        if more > 0:
            faults.append(f"a process has {more} more {what} than before")
    drift = _median(after, "p50_us") / _median(before, "p50_us") - 1
    calm = max(_median(after, "other_cpu"), _median(before, "other_cpu")) < _CALM
    if drift > LATENCY_LIMIT and calm:
        faults.append(f"a round takes {drift:.0%} longer than before")
    return Verdict(
        round(growth, 4),
        round(of_allowed, 3),
        round(drift, 3),
        calm,
        _more(before, after, "descriptors"),
        _more(before, after, "threads"),
        tuple(faults),
    )


def _memory(before: Sequence[Look], after: Sequence[Look]) -> tuple[float, float, list[str]]:
    """The largest growth of a process, as a share of what it had and of what is allowed; faults."""
    worst, of_allowed, faults = 0.0, 0.0, []
    for number in range(len(before[0].memory_bytes)):
        then = float(np.median([look.memory_bytes[number] for look in before]))
        now = float(np.median([look.memory_bytes[number] for look in after]))
        worst = max(worst, (now - then) / then)
        allowed = max(MEMORY_FLOOR, MEMORY_LIMIT * then)
        of_allowed = max(of_allowed, (now - then) / allowed)
        if now - then > allowed:
            faults.append(f"process {number} has grown by {(now - then) / 2**20:.1f} MiB")
    return worst, of_allowed, faults


def _more(before: Sequence[Look], after: Sequence[Look], what: str) -> int:
    """The largest lasting increase of a process: of the least that it had."""
    then = np.min([getattr(look, what) for look in before], axis=0)
    now = np.min([getattr(look, what) for look in after], axis=0)
    return int(max(0, (now - then).max()))


def _median(looks: Sequence[Look], what: str) -> float:
    return float(np.median([getattr(look, what) for look in looks]))


def check_sample(team: Team, rounds: int, size: int, world: int, seed: int) -> None:
    """Raises BenchError unless every worker holds, at the places looked at, the very bits that so
    many rounds make. Rounding errors of hundreds of thousands of rounds add up: only the same
    operations in float32 tell one that is lost from them.
    """
    at = np.linspace(0, size - 1, min(size, _PLACES)).astype(np.intp)
    expected = expected_at(at, rounds, size, world, seed)
    for rank, weights in team.weights():
        who = f"{team.peer.name}: worker {rank}"
        harness.compare(who, weights[at], expected, rounds, rtol=0.0, atol=0.0)


def expected_at(at: Indices, rounds: int, size: int, world: int, seed: int) -> Array:
    """The weights at these places after so many rounds, float32, with the engine's operations."""
    bases = [problem.gradient(rank, size, seed)[at] for rank in range(world)]
    means = []
    for number in range(problem.CYCLE):
        factor = np.float32(problem.factor(number))
        means.append(sum(base * factor for base in bases) / np.float32(world))
    weights, momentum = problem.initial_weights(size, seed)[at], means[0]
    lr, kept = np.float32(problem.LR), np.float32(problem.MOMENTUM)
    for number in range(rounds):
        momentum = kept * momentum + means[number % problem.CYCLE] if number else means[0]
        weights = weights - lr * momentum
    return weights


def tell(looks: Sequence[Look], size: int, world: int, out: Out) -> None:
    """The verdict for people, and everything that was seen for the report."""
    verdict = judge(looks)
    last = looks[-1]
    judged = "" if verdict.calm else " (not judged: other processes were busy)"
    if verdict.steady:
        out.show(
            f"[green]steady[/green]: {last.rounds} rounds in {last.at_s:.0f} s, memory "
            f"{verdict.memory_growth:+.2%}, time of a round {verdict.latency_drift:+.1%}{judged}, "
            "as many file descriptors and threads as before"
        )
    for fault in verdict.faults:
        out.show(f"[red]not steady[/red]: {fault}")
    out.record(
        {
            "bench": "soak",
            "what": Zps.name,
            "size": size,
            "workers": world,
            "seconds": last.at_s,
            "rounds": last.rounds,
            "steady": verdict.steady,
            **asdict(verdict),
            "looks": [asdict(look) for look in looks],
            **report.facts(),
        }
    )
