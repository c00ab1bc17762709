"""Where does the time of a round go: encoding, signalling, the hub's work, waking up?

    python -m bench breakdown [--sizes 1K,1M,25M]

The engine's processes write down their own spans (ZPS_TRACE). But in a quick run, rounds with and
without are also compared: what does it cost to leave traces on? --restarts, --cycles and --calm are
for that comparison.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.table import Table

from . import harness, report, spans, suites
from .options import Options
from .out import Out
from .peers import team as teams_of
from .peers.base import BenchError, Peer
from .peers.traced import ZpsTraced
from .peers.zps_round import ZpsGrad
from .step import CHECKED_ROUNDS, check_weights, measure_size

COMPARED: tuple[type[Peer], ...] = (ZpsGrad, ZpsTraced)
_VARIABLE = "ZPS_TRACE"


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


def measure(size: int, world: int, rounds: int, seed: int) -> dict[str, float]:
    """Microseconds of each part of a round, from p.grad to the new weights."""
    with TemporaryDirectory(prefix="bench-") as folder:
        path = Path(folder) / "trace.json"
        with (
            _traced(path),
            teams_of.team(ZpsGrad, world, size, seed, Path(folder)) as team,
        ):
            check_weights({ZpsGrad.name: team}, world, size, seed)
            team.run(rounds)
        return spans.breakdown(path, CHECKED_ROUNDS + rounds)  # all of them are in the trace


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


def tell(size: int, world: int, parts: dict[str, float], out: Out) -> None:
    """A row for each part, and the record."""
    if not parts:
        raise BenchError("the traces have none of the names that make up a round")
    whole = sum(parts.values())
    table = Table(title=f"breakdown: {harness.human(size)}, {world} workers, from p.grad")
    for title in ("part", "µs", "share"):
        table.add_column(title, justify="right" if table.columns else "left")
    for name, us in parts.items():
        table.add_row(name, f"{us:.1f}", f"{us / whole:.0%}")
    out.show(table)
    out.record(
        {
            "bench": "breakdown",
            "what": ZpsGrad.name,
            "size": size,
            "workers": world,
            "parts_us": {name: round(us, 2) for name, us in parts.items()},
            **report.facts(),
        }
    )
