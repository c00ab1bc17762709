"""What all comparisons share: what runs, in which order, what figures mean, how they are told.

Method: every participant's processes live for the whole run and wait without using a core. The
parties take turns in mirrored blocks (A B C, C B A), so that a slow drift of the machine meets all
of them alike, and a ratio is one of medians of the same cycle: see stats.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from .naming import nearest
from .peers import team as teams_of
from .peers.base import BenchError, Peer, cores
from .peers.problem import Array
from .peers.team import Block, Cpu, Samples, Team

PROCESS_BYTES = 250 << 20  # an interpreter with torch
_GLANCE_S = 0.2
_PATIENCE_S = 300.0
_UNITS = {"": 1, "K": 1_000, "M": 1_000_000, "G": 1_000_000_000}


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure: mirrored cycles, and about how long each block of rounds lasts."""

    cycles: int
    block_s: float
    most_rounds: int = 200
    calm: float = 1.0  # a block waits, and is repeated, while others use more of the cores
    patience_s: float = 0.0  # until so long after the first block; then it takes what it gets

    @property
    def blocks(self) -> int:
        """Blocks per participant."""
        return 2 * self.cycles


class Level(Enum):
    """How long a run may take: about a minute for all suites, some minutes each, or as needed."""

    QUICK = "quick"
    NORMAL = "normal"
    FULL = "full"


# Of each start. Starts differ more than cycles do, so there are rather more of them.
PLANS = {
    Level.QUICK: Plan(cycles=3, block_s=0.15, most_rounds=50),
    Level.NORMAL: Plan(cycles=4, block_s=0.3),
    Level.FULL: Plan(cycles=10, block_s=0.5),
}


def plan(level: Level, cycles: int | None, calm: float | None) -> Plan:
    """What the command line asks for."""
    base = PLANS[level]
    base = base if cycles is None else replace(base, cycles=cycles)
    return base if calm is None else replace(base, calm=calm, patience_s=_PATIENCE_S)


@dataclass(slots=True)
class Measured:
    """One participant's rounds in microseconds, by cycle, and how many began late.

    threads    "worker" and "server": those that compute, of each process; "total": all there are
    restarts   how many of the cycles, in order, were measured by each start of the processes
    cpu        processor time of each block
    """

    cycles: list[Samples]
    threads: dict[str, int]
    late: int = 0
    restarts: list[int] = field(default_factory=list)
    cpu: list[Cpu] = field(default_factory=list)

    @property
    def samples(self) -> Samples:
        return np.concatenate(self.cycles)

    def p(self, percent: float) -> float:
        return float(np.percentile(self.samples, percent))

    @property
    def cpu_us(self) -> dict[str, float]:
        """Processor time (user and system) a round: of all workers, and of the server."""
        if not self.cpu:
            return {}
        workers, server = (
            float(np.median([getattr(part, name) for part in self.cpu]))
            for name in ("workers_us", "server_us")
        )
        return {"workers": workers, "server": server, "total": workers + server}


# --- what to run ---------------------------------------------------------------------------------


def parse_sizes(text: str) -> list[int]:
    """`1K,25M` → [1000, 25000000]. Raises BenchError naming the part that is no size."""
    return [_parse_size(part) for part in text.split(",")]


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?)\s*", text.upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise BenchError(f"{text!r} is not a size: give parameters as 1000, 1K or 25M")
    return size


def choose(names: str | None, known: Iterable[type[Peer]]) -> tuple[list[type[Peer]], list[str]]:
    """The participants to run, and a line about each that cannot run here.

    `names` is a comma-separated choice, or None for every available one. Raises BenchError for a
    name that nobody has, and for a chosen participant that is not available.
    """
    table = {peer.name: peer for peer in known}
    wanted = [name.strip() for name in names.split(",")] if names else list(table)
    for name in wanted:
        if name not in table:
            raise nearest(name, table, "peer")
    missing = {name: reason for name in wanted if (reason := table[name].available())}
    if names and missing:
        raise BenchError("; ".join(f"peer {name}: {reason}" for name, reason in missing.items()))
    chosen = [table[name] for name in dict.fromkeys(wanted) if name not in missing]
    if not chosen:
        raise BenchError("no peer can run here")
    return chosen, [f"{name} is left out: {reason}" for name, reason in missing.items()]


def require_memory(
    peers: Sequence[type[Peer]], size: int, world: int, *, payload_bytes: int
) -> None:
    """Raises BenchError when the participants do not fit into memory together.

    size           as in a `Seat`
    payload_bytes  of one copy of all weights
    """
    own = 5 * payload_bytes  # the reference, and what comparing with it takes
    need = own + sum(p.memory_bytes(size, world) + (world + 1) * PROCESS_BYTES for p in peers)
    have = available_bytes()
    if need > have:
        raise BenchError(
            f"size {human(size)} with {world} workers and {len(peers)} peers needs about "
            f"{need / 2**30:.1f} GiB, {have / 2**30:.1f} GiB are free: "
            "choose a smaller size or fewer --peers"
        )


def available_bytes() -> int:
    """Memory that can be had without swapping, within the control group's limit if there is one."""
    info = Path("/proc/meminfo").read_text()
    found = re.search(r"MemAvailable:\s+(\d+) kB", info)
    assert found, "every Linux since 3.14 tells what is available"
    have = int(found[1]) << 10
    group = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            have = min(have, int((group / limit).read_text()) - int((group / used).read_text()))
        except (OSError, ValueError):  # not this version of control groups, or "max"
            continue
    return have


def human(size: int) -> str:
    """25000000 → 25 M."""
    for unit in ("G", "M", "K"):
        if size >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.4g} {unit}"
    return str(size)


# --- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """One participant of a run: what it is called there, and what each of its workers is given."""

    name: str
    peer: type[Peer]
    world: int
    size: int


def entries(peers: Iterable[type[Peer]], world: int, size: int) -> list[Entry]:
    """All of these at one size, called by their own names."""
    return [Entry(peer.name, peer, world, size) for peer in peers]


@contextmanager
def all_teams(
    entered: Iterable[Entry], seed: int, tick: Callable[[str], None], *, fresh: bool = False
) -> Iterator[dict[str, Team]]:
    """The teams of all participants, every process of which lives until the `with` block ends.

    fresh  every worker begins with a new interpreter: see `processes.start`
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="bench-")))
        teams = {}
        for number, entry in enumerate(entered):
            tick(f"start {entry.name}")
            own = folder / str(number)
            own.mkdir()
            teams[entry.name] = stack.enter_context(
                teams_of.team(entry.peer, entry.world, entry.size, seed, own, fresh=fresh)
            )
        yield teams


def merged(runs: Sequence[Run]) -> Run:
    """The runs of several restarts as one."""
    found: dict[str, Measured] = {}
    for name, first in runs[0].measured.items():
        parts = [run.measured[name] for run in runs]
        found[name] = Measured(
            cycles=[cycle for part in parts for cycle in part.cycles],
            threads=first.threads,
            late=sum(part.late for part in parts),
            restarts=[len(part.cycles) for part in parts],
            cpu=[cpu for part in parts for cpu in part.cpu],
        )
    starts = [run.start_us for run in runs]
    return Run(found, float(np.median(starts)), float(np.mean([run.other_cpu for run in runs])))


def mirrored(names: Sequence[str]) -> list[str]:
    """One cycle: A B C C B A."""
    return [*names, *reversed(names)]


def rounds_per_block(median_us: float, plan: Plan) -> int:
    """How many rounds of this length fill a block; at least two."""
    return int(min(plan.most_rounds, max(2, plan.block_s * 1e6 / median_us)))


@dataclass(slots=True)
class Run:
    """What one run measured, the median cost of timing an empty round, and how calm it was.

    other_cpu   share of all cores that other processes of this machine used during the blocks
    """

    measured: dict[str, Measured]
    start_us: float
    other_cpu: float


def measure(teams: Mapping[str, Team], plan: Plan, tick: Callable[[str], None]) -> Run:
    """Times all teams in turns; `tick` hears of each block."""
    rounds, start_us = _warm_up(teams, plan, tick)
    found = {name: Measured([], team.threads()) for name, team in teams.items()}
    shares: list[float] = []
    until = time.monotonic() + plan.patience_s
    for _ in range(plan.cycles):
        blocks: dict[str, list[Samples]] = {name: [] for name in teams}
        for name in mirrored(list(teams)):
            tick(name)
            block, share = timed_block(teams[name], rounds[name], plan.calm, until)
            blocks[name].append(block.samples)
            found[name].late += block.late
            found[name].cpu.append(block.cpu)
            shares.append(share)
        merged = {name: np.concatenate(parts) for name, parts in blocks.items()}
        if all(part.size for part in merged.values()):
            for name, part in merged.items():
                found[name].cycles.append(part)
    if not all(measured.cycles for measured in found.values()):
        raise BenchError("every round began late: this machine is too busy to measure anything")
    return Run(found, start_us, sum(shares) / len(shares))


def timed_block(team: Team, rounds: int, calm: float, until: float) -> tuple[Block, float]:
    """One block, and the share of the cores that others used meanwhile.

    Until the time `until` (monotonic seconds) it waits while others use more than the share `calm`,
    and is repeated if they did so during the block.
    """
    while True:
        while time.monotonic() < until and _others_over(_GLANCE_S) > calm:
            continue
        others = Others(team)
        with team.awake():
            team.run(1)  # caches and cores change hands between blocks
            block = team.run(rounds)
        share = others.share()
        if share <= calm or time.monotonic() >= until:
            return block, share


class Others:
    """How much of the machine processes use that are neither this one nor the team's."""

    def __init__(self, team: Team | None = None) -> None:
        self._team = team
        self._began = self._now()

    def share(self) -> float:
        """Share of all cores since this object was made."""
        used, wall = (now - then for now, then in zip(self._now(), self._began, strict=True))
        return max(0.0, used / (wall * cores()))

    def _now(self) -> tuple[float, float]:
        own = time.process_time() + (self._team.cpu_s() if self._team else 0.0)
        return _busy_s() - own, time.monotonic()


def _others_over(seconds: float) -> float:
    """Share of all cores that others use, watched for so long; no team may run."""
    others = Others()
    time.sleep(seconds)
    return others.share()


def _warm_up(
    teams: Mapping[str, Team], plan: Plan, tick: Callable[[str], None]
) -> tuple[dict[str, int], float]:
    rounds: dict[str, int] = {}
    for name, team in teams.items():
        with team.awake():
            team.run(2)
            first = team.run(3).samples
            guess = rounds_per_block(float(np.median(first)) if first.size else 1e3, plan)
            again = team.run(guess).samples
            rounds[name] = rounds_per_block(float(np.median(again)), plan) if again.size else guess
        tick(name)
    quiet = [team for team in teams.values() if not team.peer.spins_when_idle]
    empty = [s for team in quiet[:1] if (s := team.run_empty(100).samples).size]
    return rounds, float(np.median(empty[0])) if empty else float("nan")


def check(team: Team, expected: Array, rounds: int, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Raises BenchError unless every worker of the team holds the expected weights."""
    for rank, weights in team.weights():
        compare(f"{team.peer.name}: worker {rank}", weights, expected, rounds, rtol, atol)


def compare(
    who: str, weights: Array, expected: Array, rounds: int, rtol: float, atol: float
) -> None:
    """Raises BenchError, in the name of `who`, unless these are the expected weights."""
    if weights.shape != expected.shape:
        raise BenchError(f"{who} holds {weights.size} weights, not {expected.size}")
    error = np.abs(weights - expected)
    wrong = ~(error <= atol + rtol * np.abs(expected))
    if wrong.any():
        at = int(np.argmax(wrong))
        raise BenchError(
            f"{who} has wrong weights after {rounds} rounds: "
            f"{int(wrong.sum())} of {wrong.size} differ; at {at} it holds {weights[at]!r}, "
            f"the reference {expected[at]!r}"
        )


def check_agreement(team: Team) -> None:
    """Raises BenchError unless all workers of the team hold the same bits, if they are to."""
    with team.awake():
        if team.peer.same_bits and len(set(team.digests())) > 1:
            raise BenchError(f"{team.peer.name}: after all rounds its workers hold other weights")


def _busy_s() -> float:
    """Seconds that the cores of this process have been busy since boot, all together."""
    own = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name in own:
            user, nice, system, _idle, _iowait, irq, softirq = (int(field) for field in fields[:7])
            ticks += user + nice + system + irq + softirq
    return ticks / os.sysconf("SC_CLK_TCK")
