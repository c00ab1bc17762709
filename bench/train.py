"""How long does a training step take, end to end: zps, DistributedDataParallel, and neither?

    python -m bench.train -n 2

The model is an MLP 1024 - 4096 - 4096 - 1024 with ReLU (25 million parameters), the loss is MSE on
fixed random data, 16 rows a worker. First zps and DDP have to reach the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer
from rich.console import Console

from bench import harness, report
from bench.peers.base import Peer
from bench.peers.team import Team
from bench.peers.training import TrainDdp, TrainLocal, TrainZps, parameters
from bench.report import Case, Goal

PEERS: tuple[type[Peer], ...] = (TrainZps, TrainDdp, TrainLocal)
GOALS = (Goal("zps", "ddp", 1 / 0.65, (parameters(4096),)),)
_CHECKED_STEPS = 3
# Sums run in another order: a few ulp a step, and more where a ReLU is near its edge.
_RTOL, _ATOL = 1e-4, 1e-6

app = typer.Typer(add_completion=False)


def check_weights(teams: Mapping[str, Team]) -> None:
    """Raises BenchError unless all workers of zps and DDP hold the same weights."""
    expected = None
    for team in _sharing(teams):
        with team.awake():
            team.run(_CHECKED_STEPS)
            harness.check_agreement(team)
            if expected is None:
                expected = dict(team.weights())[0]
            else:
                harness.check(team, expected, _CHECKED_STEPS, rtol=_RTOL, atol=_ATOL)


def _sharing(teams: Mapping[str, Team]) -> list[Team]:
    return [team for name, team in teams.items() if name != TrainLocal.name]


def measure_width(
    peers: list[type[Peer]], width: int, world: int, seed: int, plan: harness.Plan, console: Console
) -> Case:
    """All peers on a model of this width: correctness first, then time."""
    steps = len(peers) * (2 + plan.blocks) + 1
    with (
        report.progress(console, steps) as tick,
        harness.all_teams(peers, world, width, seed, tick) as teams,
    ):
        tick("check")
        check_weights(teams)
        run = harness.measure(teams, plan, tick)
        for team in _sharing(teams):
            harness.check_agreement(team)
    size, facts = parameters(width), report.facts()
    return Case("train", size, 4 * size, world, run, GOALS, facts)


@app.command()
def main(
    width: Annotated[int, typer.Option(min=1, help="of the two hidden layers")] = 4096,
    workers: report.Workers = 2,
    peers: report.Peers = None,
    quick: report.Quick = False,
    cycles: report.Cycles = None,
    calm: report.Calm = None,
    seed: report.Seed = 0,
    json_file: report.JsonFile = None,
) -> None:
    """Time one training step of zps, DDP and local training side by side."""
    console = report.console()
    with report.complaints(console, "bench.train"):
        chosen, notes = harness.choose(peers, PEERS)
        harness.require_memory(chosen, width, workers, payload_bytes=4 * parameters(width))
        for note in notes:
            console.print(note, style="yellow")
        plan = harness.plan(quick, cycles, calm)
        case = measure_width(chosen, width, workers, seed, plan, console)
        report.tell(case, console, json_file)


if __name__ == "__main__":
    app()
