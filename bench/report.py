"""How a comparison is told: a table for people, a record for each subject, and their origin."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from . import goals
from .harness import Measured, Run, human
from .origin import facts as facts
from .out import Out, Record
from .stats import PERCENTILES, Ratio, ratio_of_medians

# The options that all comparisons share.
Workers = Annotated[str, typer.Option("-n", "--workers", help="as 2, or 2,4 one by one")]
Restarts = Annotated[int | None, typer.Option("--restarts", min=1, help="of every process")]
Peers = Annotated[str | None, typer.Option("--peers", help="comma-separated; default: all")]
Quick = Annotated[bool, typer.Option("--quick", help="fewer and shorter blocks")]
Cycles = Annotated[int | None, typer.Option("--cycles", min=2, help="mirrored cycles")]
Calm = Annotated[
    float | None,
    typer.Option(
        "--calm",
        min=0.0,
        max=1.0,
        help="wait with, and repeat, blocks while other processes use more of the cores than this",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0)]
JsonFile = Annotated[Path | None, typer.Option("--json", help="add the JSON lines to this file")]


@dataclass(slots=True)
class Case:
    """All participants at one size, measured in one run."""

    bench: str
    size: int
    payload_bytes: int
    world: int
    run: Run
    facts: dict[str, Any] = field(default_factory=dict)
    _ratios: dict[tuple[str, str], Ratio] = field(default_factory=dict)

    @property
    def subjects(self) -> list[str]:
        """Those whom the others are compared with: every form of zps, or else the first."""
        names = list(self.run.measured)
        return [name for name in names if name.startswith("zps")] or names[:1]

    @property
    def starts(self) -> int:
        """How often the processes were started."""
        return max([1, *(len(found.restarts) for found in self.run.measured.values())])

    def goal(self, subject: str, peer: str) -> float | None:
        """The least ratio of the peer's time to the subject's that is aimed at."""
        goal = goals.ratio_goal(self.bench, subject, peer, self.size, self.world)
        return None if goal is None else goal.least

    def ratio(self, subject: str, peer: str) -> Ratio:
        """The peer's time over the subject's, worked out once."""
        if (subject, peer) not in self._ratios:
            above, below = self.run.measured[peer], self.run.measured[subject]
            self._ratios[subject, peer] = ratio_of_medians(
                above.cycles, below.cycles, restarts=below.restarts
            )
        return self._ratios[subject, peer]


def records(case: Case) -> list[Record]:
    """What is kept of the case: one record for each subject."""
    return [_record(case, subject) for subject in case.subjects]


def _record(case: Case, subject: str) -> dict[str, Any]:
    peers = {}
    for name in case.run.measured:
        if name != subject:
            ratio, goal = case.ratio(subject, name), case.goal(subject, name)
            peers[name] = {
                **figures(case.run.measured[name]),
                **ratio.record(),
                **(_judged(case, ratio, goal) if goal else {}),
            }
    return {
        "bench": case.bench,
        "what": subject,
        "size": case.size,
        "bytes": case.payload_bytes,
        "workers": case.world,
        **figures(case.run.measured[subject]),
        "peers": peers,
        "restarts": case.starts,
        "start_us": None if math.isnan(case.run.start_us) else round(case.run.start_us, 1),
        "other_cpu": round(case.run.other_cpu, 3),
        **case.facts,
    }


def _judged(case: Case, ratio: Ratio, goal: float) -> Record:
    return {"goal": round(goal, 3), "verdict": _verdict(case, ratio, goal)}


def _verdict(case: Case, ratio: Ratio, goal: float) -> str:
    return goals.verdict(ratio.value, (ratio.low, ratio.high), goal, starts=case.starts)


def figures(measured: Measured) -> dict[str, Any]:
    """What every record says of one participant."""
    return {
        "p10_us": round(measured.p(10), 1),
        "p50_us": round(measured.p(50), 1),
        "p99_us": round(measured.p(99), 1),
        "rounds": int(measured.samples.size),
        "late": measured.late,
        "threads": measured.threads,
        "cpu_us": {name: round(value, 1) for name, value in measured.cpu_us.items()},
        "quantiles_us": [round(measured.p(percent), 1) for percent in PERCENTILES],
    }


def table(case: Case) -> Table:
    """The case for people: each participant, and its time as a multiple of each subject's."""
    shown = Table(
        title=f"{case.bench}: {human(case.size)}, {case.payload_bytes / 1e6:g} MB, "
        f"{case.world} workers",
        caption=f"empty round {case.run.start_us:.0f} µs, "
        f"other processes used {case.run.other_cpu:.0%} of the cores"
        + (", one start: others may differ by more" if case.starts == 1 else ""),
    )
    shown.add_column("participant")
    for title in (
        "p10 ms",
        "p50 ms",
        "p99 ms",
        "rounds",
        "threads",
        "cpu ms",
        *(f"÷ {s}" for s in case.subjects),
    ):
        shown.add_column(title, justify="right")
    for name, measured in case.run.measured.items():
        threads = f"{case.world} × {measured.threads['worker']} + {measured.threads['server']}"
        cpu = measured.cpu_us.get("total", float("nan"))
        ratios = ("" if s == name else _cell(case, s, name) for s in case.subjects)
        shown.add_row(
            name,
            *(f"{measured.p(percent) / 1e3:.3f}" for percent in (10, 50, 99)),
            str(measured.samples.size),
            threads,
            f"{cpu / 1e3:.3f}",
            *ratios,
        )
    return shown


def _cell(case: Case, subject: str, peer: str) -> str:
    ratio, goal = case.ratio(subject, peer), case.goal(subject, peer)
    text = f"{ratio.value:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"
    if goal is None:
        return text
    colour = goals.COLOURS[_verdict(case, ratio, goal)]
    return f"[{colour}]{text} goal {goal:.3g}[/{colour}]"


def tell(case: Case, out: Out) -> None:
    """Shows the table and records the lines."""
    out.show(table(case))
    for record in records(case):
        out.record(record)
