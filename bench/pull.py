"""What does it cost to hold the current weights: as a view, as a copy, or in messages?

    python -m bench pull --sizes 1M,25M

A pull is timed after a round that has changed every weight. `memcpy` copies as many bytes within
the worker, which is what a copy costs at least.
"""

from __future__ import annotations

from . import harness, report, suites
from .options import Options
from .out import Out
from .peers.base import Peer
from .peers.pulls import Memcpy, PullAlias, PullCopy, PullMessage
from .report import Case
from .step import check_weights

PEERS: tuple[type[Peer], ...] = (PullAlias, PullCopy, PullMessage, Memcpy)


def prepare(options: Options) -> suites.Job:
    """Each size with each number of workers, who all pull at once."""
    chosen, notes = harness.choose(options.peers, PEERS)
    sizes = options.sizes or options.by_level(
        (1_000_000,), (1_000_000, 25_000_000), (1_000, 1_000_000, 25_000_000)
    )
    worlds = options.workers or options.by_level((1,), (1, 2), (1, 2, 4))
    for size in sizes:
        harness.require_memory(chosen, size, max(worlds), payload_bytes=4 * size)

    def job(out: Out) -> None:
        for note in notes:
            out.note(note)
        for world in worlds:
            for size in sizes:
                report.tell(measure(chosen, size, world, options, out), out)

    return job


def measure(peers: list[type[Peer]], size: int, world: int, options: Options, out: Out) -> Case:
    """All ways to pull at one size: correctness first, then time."""
    plan, restarts = options.plan, options.restarts
    with out.progress(harness.ticks(len(peers), plan, restarts)) as tick:
        run = harness.compare(
            harness.entries(peers, world, size),
            *(plan, restarts, options.seed, tick),
            check=lambda teams: check_weights(teams, world, size, options.seed),
        )
    return Case("pull", size, 4 * size, world, run, report.facts())
