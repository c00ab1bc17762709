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
from .step import measure_size

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
                report.tell(measure_size("pull", chosen, size, world, options, out), out)

    return job
