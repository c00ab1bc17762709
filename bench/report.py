"""How figures are told: a table for people, a JSON line for each subject, and their origin."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from bench.harness import Measured, Ratio, Run, human, ratio_of_medians
from bench.peers.base import BenchError, cores

# The options that all comparisons share.
Workers = Annotated[int, typer.Option("-n", "--workers", min=1, max=64)]
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


@dataclass(frozen=True, slots=True)
class Goal:
    """`peer` takes at least `at_least` times as long as `subject`, at these sizes (empty: all)."""

    subject: str
    peer: str
    at_least: float
    sizes: tuple[int, ...] = ()

    def covers(self, subject: str, peer: str, size: int) -> bool:
        return (subject, peer) == (self.subject, self.peer) and size in (self.sizes or (size,))


@dataclass(slots=True)
class Case:
    """All participants at one size, measured in one run."""

    bench: str
    size: int
    payload_bytes: int
    world: int
    run: Run
    goals: Sequence[Goal] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def subjects(self) -> list[str]:
        """Those whom the others are compared with: every form of zps, or else the first."""
        names = list(self.run.measured)
        return [name for name in names if name.startswith("zps")] or names[:1]

    def goal(self, subject: str, peer: str) -> float | None:
        covers = (g.at_least for g in self.goals if g.covers(subject, peer, self.size))
        return next(covers, None)

    def ratio(self, subject: str, peer: str) -> Ratio:
        return ratio_of_medians(self.run.measured[peer].cycles, self.run.measured[subject].cycles)


def facts() -> dict[str, Any]:
    """The machine, the versions and the commit, for the record of a measurement."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "machine": {
            "cpu": cpu[1] if cpu else platform.machine(),
            "cores": cores(),
            "memory_gib": round(memory / 2**30, 1),
            "kernel": platform.release(),
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "numpy", "pyzmq")},
        },
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no", "--", "zps", "csrc")),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _git(*arguments: str) -> str:
    here = Path(__file__).parent.parent
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def lines(case: Case) -> list[str]:
    """One JSON line for each subject of the case."""
    return [json.dumps(_record(case, subject)) for subject in case.subjects]


def _record(case: Case, subject: str) -> dict[str, Any]:
    peers = {}
    for name in case.run.measured:
        if name != subject:
            ratio, goal = case.ratio(subject, name), case.goal(subject, name)
            peers[name] = {
                **_figures(case.run.measured[name]),
                "ratio": round(ratio.value, 3),
                "ratio_ci95": [round(ratio.low, 3), round(ratio.high, 3)],
                **({"goal": round(goal, 3), "met": ratio.value >= goal} if goal else {}),
            }
    return {
        "bench": case.bench,
        "what": subject,
        "size": case.size,
        "bytes": case.payload_bytes,
        "workers": case.world,
        **_figures(case.run.measured[subject]),
        "peers": peers,
        "start_us": round(case.run.start_us, 1),
        "other_cpu": round(case.run.other_cpu, 3),
        **case.facts,
    }


def _figures(measured: Measured) -> dict[str, Any]:
    return {
        "p10_us": round(measured.p(10), 1),
        "p50_us": round(measured.p(50), 1),
        "p99_us": round(measured.p(99), 1),
        "rounds": int(measured.samples.size),
        "late": measured.late,
        "threads": measured.threads,
    }


def table(case: Case) -> Table:
    """The case for people: each participant, and its time as a multiple of each subject's."""
    shown = Table(
        title=f"{case.bench}: {human(case.size)}, {case.payload_bytes / 1e6:g} MB, "
        f"{case.world} workers",
        caption=f"empty round {case.run.start_us:.0f} µs, "
        f"other processes used {case.run.other_cpu:.0%} of the cores",
    )
    shown.add_column("participant")
    for title in (
        "p10 ms",
        "p50 ms",
        "p99 ms",
        "rounds",
        "threads",
        *(f"÷ {s}" for s in case.subjects),
    ):
        shown.add_column(title, justify="right")
    for name, measured in case.run.measured.items():
        threads = f"{measured.threads['worker']} + {measured.threads['server']}"
        ratios = ("" if s == name else _cell(case, s, name) for s in case.subjects)
        shown.add_row(
            name,
            *(f"{measured.p(percent) / 1e3:.3f}" for percent in (10, 50, 99)),
            str(measured.samples.size),
            threads,
            *ratios,
        )
    return shown


def _cell(case: Case, subject: str, peer: str) -> str:
    ratio, goal = case.ratio(subject, peer), case.goal(subject, peer)
    text = f"{ratio.value:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"
    if goal is None:
        return text
    colour = "green" if ratio.value >= goal else "red"
    return f"[{colour}]{text} goal {goal:.3g}[/{colour}]"


def tell(case: Case, console: Console, json_file: Path | None) -> None:
    """Prints the table on `console`, the JSON lines on stdout, and adds them to `json_file`."""
    console.print(table(case))
    for line in lines(case):
        print(line, flush=True)
        if json_file is not None:
            with json_file.open("a") as file:
                file.write(line + "\n")


def console() -> Console:
    """Where people read; stdout is left to the JSON lines."""
    shown = Console(stderr=True)
    if not shown.is_terminal:
        shown.width = 120
    return shown


@contextmanager
def complaints(console: Console, name: str) -> Iterator[None]:
    """Tells a BenchError in one paragraph and ends the command with code 2."""
    try:
        yield
    except BenchError as error:
        console.print(f"{name}: {error}", style="red", highlight=False, markup=False)
        raise typer.Exit(2) from None


@contextmanager
def progress(console: Console, steps: int) -> Iterator[Callable[[str], None]]:
    """A function that says what comes next and moves a bar, drawn on a terminal only.

    It draws only when called: a thread that refreshes would disturb what is measured.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    hidden = not console.is_terminal
    with Progress(
        *columns, console=console, auto_refresh=False, transient=True, disable=hidden
    ) as bar:
        task = bar.add_task("", total=steps)
        yield lambda text: bar.update(task, advance=1, description=text, refresh=True)
