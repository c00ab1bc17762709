"""Where does the time of a round go: encoding, signalling, the hub's work, waking up?

    python -m bench breakdown [--sizes 1K,1M,25M]

The engine's processes write down their own spans (ZPS_TRACE). But in a quick run, rounds with and
without are also compared: what does it cost to leave traces on? --restarts, --cycles and --calm are
for that comparison.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from rich.table import Table

from . import harness, report, spans, suites
from .options import Options
from .out import Out
from .peers import team as teams_of
from .peers.base import BenchError, Peer
from .peers.traced import ZpsTraced
from .peers.zps_round import ZpsGrad
from .step import check_weights, measure_size

COMPARED: tuple[type[Peer], ...] = (ZpsGrad, ZpsTraced)
_VARIABLE = "ZPS_TRACE"
_WARM_UP_ROUNDS = 10
_NEAR = 0.15  # by which parts may miss the round that they are said to make up


class Round(NamedTuple):
    """A round and its parts, in microseconds.

    parts_us  the mean of each, in the order in which they happen
    p50_us    of the same rounds as the workers timed them; None: all of them began late
    """

    parts_us: dict[str, float]
    p50_us: float | None

    @property
    def sum_us(self) -> float:
        return sum(self.parts_us.values())

    @property
    def off(self) -> float:
        """The sum of the parts beyond the round's time, as a share of that; 0 if there is none."""
        return self.sum_us / self.p50_us - 1 if self.p50_us else 0.0


def prepare(options: Options) -> suites.Job:
    """Each size with each number of workers; a note where the engine writes no traces."""
    reason = ZpsGrad.available() or unavailable()
    sizes = options.sizes or options.by_level(
        (1_000, 1_000_000), (1_000, 1_000_000, 25_000_000), (1_000, 1_000_000, 25_000_000)
    )
    worlds = options.workers or (2,)
    compared = options.by_level((), COMPARED, COMPARED)
    for size in sizes if reason is None else ():
        harness.require_memory(compared or [ZpsGrad], size, max(worlds), payload_bytes=4 * size)
    rounds = options.by_level(50, 200, 500)
    ignored = sorted({"restarts", "cycles", "calm"} & options.given) if not compared else ()

    def job(out: Out) -> None:
        if reason is not None:
            out.note(f"breakdown is skipped: {reason}")
            return
        if ignored:
            out.note(f"breakdown: a quick run only reads traces, whatever --{', --'.join(ignored)}")
        for world in worlds:
            for size in sizes:
                tell(size, world, measure(size, world, rounds, options.seed), out)
                if compared:
                    report.tell(measure_size("breakdown", compared, size, world, options, out), out)

    return job


def unavailable() -> str | None:
    """None, or why the engine here writes no traces."""
    from zps.config import Settings
    from zps.errors import ConfigError

    try:
        Settings.load(environ={**os.environ, _VARIABLE: "trace.json"})
    except ConfigError as error:
        return f"this zps writes no traces: {error}"
    return None


def measure(size: int, world: int, rounds: int, seed: int) -> Round:
    """What makes up a round, from p.grad to the new weights; the first ones do not count."""
    with TemporaryDirectory(prefix="bench-") as folder:
        path = Path(folder) / "trace.json"
        with (
            _traced(path),
            teams_of.team(ZpsGrad, world, size, seed, Path(folder)) as team,
        ):
            check_weights({ZpsGrad.name: team}, world, size, seed)
            team.run(_WARM_UP_ROUNDS)
            since_us = time.monotonic_ns() / 1000
            samples = team.run(rounds).samples
        p50_us = float(np.median(samples)) if samples.size else None
        return Round(spans.breakdown(path, rounds, since_us), p50_us)


@contextmanager
def _traced(path: Path) -> Iterator[None]:
    """Processes that are started meanwhile write traces."""
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = str(path)
    try:
        yield
    finally:
        del os.environ[_VARIABLE]
        if before is not None:
            os.environ[_VARIABLE] = before


def tell(size: int, world: int, found: Round, out: Out) -> None:
    """A row for each part, and the record; a note if they do not add up to a round."""
    if not found.parts_us:
        raise BenchError("the traces have none of the names that make up a round")
    table = Table(title=f"breakdown: {harness.human(size)}, {world} workers, from p.grad")
    for title in ("part", "µs", "share"):
        table.add_column(title, justify="right" if table.columns else "left")
    for name, us in found.parts_us.items():
        table.add_row(name, f"{us:.1f}", f"{us / found.sum_us:.0%}")
    table.add_section()
    table.add_row("sum", f"{found.sum_us:.1f}", "")
    table.add_row("median round", "late" if found.p50_us is None else f"{found.p50_us:.1f}", "")
    out.show(table)
    if abs(found.off) > _NEAR:
        share = f"{1 + found.off:.0%} of the median round"
        out.note(f"the parts, means of all rounds, add up to {share}: they are not shares of it")
    out.record(
        {
            "bench": "breakdown",
            "what": ZpsGrad.name,
            "size": size,
            "workers": world,
            "parts_us": {name: round(us, 2) for name, us in found.parts_us.items()},
            "round_p50_us": None if found.p50_us is None else round(found.p50_us, 2),
            **report.facts(),
        }
    )
