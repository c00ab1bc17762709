"""How does the cost of a round grow with parameters, with workers, and with hubs?

    python -m bench scale [--sizes 1M,10M,100M] [-n 2,4,8,16]

The figure is linearity: `relative` is the time for each parameter, or for each worker, over that of
the smallest point. 1 is linear growth; less than 1 means that fixed costs are shared by more;
`off_linear` is the most by which it lies above 1. All points of a part are alive together and take
turns, so that they are comparable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from . import harness, report, suites
from .harness import Entry, Run
from .options import NothingToDo, Options
from .out import Out, Record
from .peers import problem
from .peers.base import BenchError
from .peers.hubs import Hubs, Hubs2, Hubs4
from .peers.zps_round import Zps
from .stats import Ratio, ratio_of_medians
from .suites import Teams

EACH = {"parameters": "a parameter", "workers": "a worker", "hubs": "a parameter"}
_CHECKED_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Point:
    """One participant: parameters, workers and hubs."""

    size: int
    workers: int
    hubs: int
    peer: type[Zps] = Zps

    @property
    def name(self) -> str:
        hubs = f"{self.hubs} hub{'s' if self.hubs > 1 else ''}"
        return f"{harness.human(self.size)}, n = {self.workers}, {hubs}"

    @property
    def entry(self) -> Entry:
        return Entry(self.name, self.peer, self.workers, self.size)

    @property
    def memory_bytes(self) -> int:
        processes = (self.workers + self.hubs) * harness.PROCESS_BYTES
        return self.peer.memory_bytes(self.size, self.workers) + processes


def prepare(options: Options) -> suites.Job:
    """The parts `parameters`, `workers` and `hubs`.

    Points that were asked for and do not fit into memory together are an error; of its own, the
    suite takes as many as do.
    """
    if reason := Zps.available():
        raise BenchError(f"scale: {reason}")
    parts = parts_of(options)
    notes = []
    for what, points in parts.items():
        own = options.sizes is None and options.workers is None
        notes += [
            f"scale: {what} without {point.name}: there is not enough memory"
            for point in _drop_what_does_not_fit(points, own)
        ]
    parts = {what: points for what, points in parts.items() if len(points) > 1}
    if not parts:
        alone = "scale: growth is what lies between two points: give two --sizes or two --workers"
        raise BenchError("; ".join(notes)) if notes else NothingToDo(alone)

    def job(out: Out) -> None:
        for note in notes:
            out.note(note)
        for what, points in parts.items():
            tell(what, points, measure(points, options, out), out)

    return job


def parts_of(options: Options) -> dict[str, list[Point]]:
    """The points of each part, smallest first."""
    sizes = options.sizes or options.by_level(
        (1_000_000, 4_000_000),
        (1_000_000, 10_000_000, 25_000_000),
        (1_000_000, 4_000_000, 10_000_000, 25_000_000, 100_000_000),
    )
    worlds = options.workers or options.by_level((2, 4), (2, 4, 8), (1, 2, 4, 8, 16))
    hubs = options.by_level((), (Hubs, Hubs2, Hubs4), (Hubs, Hubs2, Hubs4))
    size = options.by_level(min(sizes), 10_000_000, 10_000_000)
    if options.sizes:
        size = min(sizes)
    return {
        "parameters": [Point(count, 2, 1) for count in sorted(set(sizes))],
        "workers": [Point(size, world, 1) for world in sorted(set(worlds))],
        "hubs": [Point(size, 2, peer.hubs, peer) for peer in hubs],
    }


def _drop_what_does_not_fit(points: list[Point], allowed: bool) -> list[Point]:
    """Takes the largest off `points` until they fit; returns them. Raises BenchError instead."""
    have, dropped = harness.available_bytes(), []
    while points and (need := _memory_bytes(points)) > have:
        if not allowed:
            raise BenchError(
                f"scale: {points[-1].name} and what it is compared with need about "
                f"{need / 2**30:.1f} GiB, {have / 2**30:.1f} GiB are free: choose smaller --sizes "
                "or fewer --workers"
            )
        dropped.append(points.pop())
    return dropped


def _memory_bytes(points: Sequence[Point]) -> int:
    """Of all points together, and of the largest one's reference, as harness.require_memory's."""
    reference = 5 * 4 * max(point.size for point in points)
    return reference + sum(point.memory_bytes for point in points)


def measure(points: Sequence[Point], options: Options, out: Out) -> Run:
    """All points in turns, each checked first."""

    def check(teams: Teams) -> None:
        for point in points:
            team = teams[point.name]
            expected = problem.reference(point.workers, point.size, options.seed, _CHECKED_ROUNDS)
            team.run(_CHECKED_ROUNDS)
            harness.check(team, expected, _CHECKED_ROUNDS)

    return suites.compare([point.entry for point in points], options, out, check)


def tell(what: str, points: Sequence[Point], run: Run, out: Out) -> None:
    """The table and the record of one part."""
    told = [_told(what, point, points[0], run) for point in points]
    table = Table(
        title=f"scale: {what}",
        caption=f"other processes used {run.other_cpu:.0%} of the cores",
    )
    for title in ("", "p50 ms", "cpu ms", "ns / parameter", f"time {EACH[what]}, of the smallest"):
        table.add_column(title, justify="right" if table.columns else "left")
    for row in told:
        low, high = row["relative_ci95"]
        table.add_row(
            row["name"],
            f"{row['p50_us'] / 1e3:.3f}",
            f"{row['cpu_us'].get('total', 0) / 1e3:.3f}",
            f"{row['p50_us'] * 1e3 / row['size']:.3f}",
            f"{row['relative']:.2f} ({low:.2f}–{high:.2f})",
        )
    out.show(table)
    linear = {} if what == "hubs" else off_linear(what, points, run)
    origin = {
        "restarts": len(next(iter(run.measured.values())).restarts) or 1,
        "other_cpu": round(run.other_cpu, 3),
        **report.facts(),
    }
    out.record({"bench": "scale", "what": what, "points": told, **linear, **origin})


def off_linear(what: str, points: Sequence[Point], run: Run) -> Record:
    """By how much the dearest point's relative time is above the smallest's, and the interval.

    A single worker has nobody to wait for: growth is counted from two workers on.
    """
    shared = [point for point in points if point.workers > 1] or points[:1]
    ratios = [relative(what, point, shared[0], run) for point in shared]
    # Of the largest: it is at least any point's, and another one than the dearest may turn out so.
    value, low, high = (
        round(max(getattr(ratio, end) for ratio in ratios) - 1, 3)
        for end in ("value", "low", "high")
    )
    return {"off_linear": value, "off_linear_ci95": [low, high]}


def relative(what: str, point: Point, smallest: Point, run: Run) -> Ratio:
    """The time of a point for each of what grows, over that of the smallest."""
    own, first = run.measured[point.name], run.measured[smallest.name]
    ratio = ratio_of_medians(own.cycles, first.cycles, restarts=own.restarts)
    units = [p.workers if what == "workers" else p.size for p in (smallest, point)]
    share = units[0] / units[1]
    return Ratio(ratio.value * share, ratio.low * share, ratio.high * share)


def _told(what: str, point: Point, smallest: Point, run: Run) -> dict[str, Any]:
    ratio = relative(what, point, smallest, run)
    return {
        "name": point.name,
        "size": point.size,
        "workers": point.workers,
        "hubs": point.hubs,
        **report.figures(run.measured[point.name]),
        "relative": round(ratio.value, 3),
        "relative_ci95": [round(ratio.low, 3), round(ratio.high, 3)],
    }
