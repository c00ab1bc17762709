"""How long does one synchronous round take: push, average, SGD with momentum, weights visible?

    python -m bench.step --sizes 1K,1M,25M -n 2

A round lasts from the moment when every worker holds its gradient to the moment when the last
worker may read the new weights. First every participant has to reach the weights NumPy reaches.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from bench import harness, report
from bench.peers import problem
from bench.peers.base import Peer
from bench.peers.gloo import Gloo
from bench.peers.hivemind import Hivemind
from bench.peers.kernel import Kernel
from bench.peers.mpi import Mpi
from bench.peers.ray_actor import RayActor
from bench.peers.rpc import Rpc
from bench.peers.zps_round import Zps, ZpsGrad, ZpsTcp
from bench.report import Case, Goal

PEERS: tuple[type[Peer], ...] = (Zps, ZpsGrad, ZpsTcp, Kernel, Gloo, Mpi, Rpc, RayActor, Hivemind)
GOALS = (
    Goal("zps", "gloo", 5.0, (1_000_000, 25_000_000)),
    Goal("zps-grad", "gloo", 2.5, (1_000_000, 25_000_000)),
    Goal("zps-tcp", "gloo", 1.0, (25_000_000,)),
    Goal("zps", "rpc", 20.0, (1_000_000, 25_000_000)),
)
_CHECKED_ROUNDS = 5

app = typer.Typer(add_completion=False)


def measure_size(
    peers: list[type[Peer]], size: int, world: int, seed: int, plan: harness.Plan, console: Console
) -> Case:
    """All peers at one size: correctness first, then time."""
    steps = len(peers) * (3 + plan.blocks)
    with (
        report.progress(console, steps) as tick,
        harness.all_teams(peers, world, size, seed, tick) as teams,
    ):
        expected = problem.reference(world, size, seed, _CHECKED_ROUNDS)
        for name, team in teams.items():
            tick(f"check {name}")
            with team.awake():
                team.run(_CHECKED_ROUNDS)
                harness.check(team, expected, _CHECKED_ROUNDS)
        del expected
        run = harness.measure(teams, plan, tick)
        for team in teams.values():
            harness.check_agreement(team)
    facts = report.facts()
    return Case("step", size, 4 * size, world, run, GOALS, facts)


@app.command()
def main(
    sizes: Annotated[str, typer.Option(help="fp32 parameters: 1000, 1K, 25M, ...")] = "1K,1M,25M",
    workers: report.Workers = 2,
    peers: report.Peers = None,
    quick: report.Quick = False,
    cycles: report.Cycles = None,
    calm: report.Calm = None,
    seed: report.Seed = 0,
    json_file: report.JsonFile = None,
) -> None:
    """Time one synchronous round of every participant side by side."""
    console = report.console()
    with report.complaints(console, "bench.step"):
        wanted = harness.parse_sizes(sizes)
        chosen, notes = harness.choose(peers, PEERS)
        for size in wanted:
            harness.require_memory(chosen, size, workers, payload_bytes=4 * size)
        for note in notes:
            console.print(note, style="yellow")
        plan = harness.plan(quick, cycles, calm)
        for size in wanted:
            case = measure_size(chosen, size, workers, seed, plan, console)
            report.tell(case, console, json_file)


if __name__ == "__main__":
    app()
