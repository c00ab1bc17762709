"""How long does one synchronous round take: push, average, SGD with momentum, weights visible?

    python -m bench.step --sizes 1K,1M,25M -n 2

A round lasts from the moment when every worker holds its gradient to the moment when the last
worker may read the new weights. First every participant has to reach the weights NumPy reaches.
"""

from __future__ import annotations

from typing import Annotated

import typer

from . import harness, report, suites
from .options import Options, read
from .out import Out
from .peers import problem
from .peers.base import BenchError, Peer
from .peers.gloo import Gloo
from .peers.hivemind import Hivemind
from .peers.kernel import Kernel
from .peers.mpi import Mpi
from .peers.ray_actor import RayActor
from .peers.rpc import Rpc
from .peers.zps_round import Zps, ZpsAllow, ZpsGrad, ZpsTcp
from .report import Case
from .suites import Teams

PEERS: tuple[type[Peer], ...] = (
    *(Zps, ZpsAllow, ZpsGrad, ZpsTcp),
    *(Kernel, Gloo, Mpi, Rpc, RayActor, Hivemind),
)
QUICK_PEERS: tuple[type[Peer], ...] = (Zps, ZpsGrad, Kernel, Gloo, Mpi)
SIZES = (1_000, 1_000_000, 25_000_000)
_QUICK_SIZES = (1_000_000,)
_ALL_SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 25_000_000, 100_000_000)
CHECKED_ROUNDS = 5

app = typer.Typer(add_completion=False)


def prepare(options: Options) -> suites.Job:
    """All sizes with all numbers of workers, one after the other.

    What was asked for and does not fit into memory is an error; what the suite itself would choose
    is then measured with fewer participants, the hungriest left out first, or not at all.
    """
    peers, notes = suites.participants(options, PEERS, QUICK_PEERS)
    sizes = options.sizes or options.by_level(_QUICK_SIZES, SIZES, _ALL_SIZES)
    worlds = options.workers or options.by_level((2,), (2, 4), (1, 2, 4, 8))
    cases = []
    for world in worlds:
        for size in sizes:
            fitting = peers
            if options.sizes and (options.workers or world == worlds[0]):
                harness.require_memory(peers, size, world, payload_bytes=4 * size)
            else:
                fitting, left_out = _fitting(peers, size, world)
                notes += left_out
            if fitting:
                cases.append((fitting, size, world))

    def job(out: Out) -> None:
        for note in notes:
            out.note(note)
        for fitting, size, world in cases:
            report.tell(measure_size("step", fitting, size, world, options, out), out)

    return job


def measure_size(
    bench: str, peers: list[type[Peer]], size: int, world: int, options: Options, out: Out
) -> Case:
    """All peers at one size, for the suite `bench`: correctness first, then time."""
    entered = harness.entries(peers, world, size)
    run = suites.compare(
        *(entered, options, out),
        check=lambda teams: check_weights(teams, world, size, options.seed),
    )
    return Case(bench, size, 4 * size, world, run, report.facts())


def check_weights(teams: Teams, world: int, size: int, seed: int) -> None:
    """Runs the first rounds. Raises BenchError unless every worker holds NumPy's weights."""
    expected = problem.reference(world, size, seed, CHECKED_ROUNDS)
    for team in teams.values():
        with team.awake():
            team.run(CHECKED_ROUNDS)
            harness.check(team, expected, CHECKED_ROUNDS)


def _fitting(peers: list[type[Peer]], size: int, world: int) -> tuple[list[type[Peer]], list[str]]:
    """Those that fit into memory together, and a line about each that does not."""
    kept, notes = list(peers), list[str]()
    while kept:
        try:
            harness.require_memory(kept, size, world, payload_bytes=4 * size)
            return kept, notes
        except BenchError:
            hungriest = max(kept, key=lambda peer: peer.memory_bytes(size, world))
            kept.remove(hungriest)
            notes.append(
                f"{hungriest.name} is left out at {harness.human(size)} with {world} workers: "
                "there is not enough memory"
            )
    return kept, notes


@app.command()
def main(
    sizes: Annotated[str, typer.Option(help="fp32 parameters: 1000, 1K, 25M, ...")] = "1K,1M,25M",
    workers: report.Workers = "2",
    peers: report.Peers = None,
    quick: report.Quick = False,
    cycles: report.Cycles = None,
    restarts: report.Restarts = 1,
    calm: report.Calm = None,
    seed: report.Seed = 0,
    json_file: report.JsonFile = None,
) -> None:
    """Time one synchronous round of every participant side by side."""
    with suites.alone("bench.step", json_file) as out:
        options = read(
            quick=quick,
            cycles=cycles,
            calm=calm,
            restarts=restarts,
            seed=seed,
            sizes=sizes,
            workers=workers,
            peers=peers,
        )
        prepare(options)(out)


if __name__ == "__main__":
    app()
