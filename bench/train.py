"""How long does a training step take, end to end: zps, DistributedDataParallel, and neither?

    python -m bench.train -n 2

The model is an MLP 1024 - 4096 - 4096 - 1024 with ReLU (25 million parameters), the loss is MSE on
fixed random data, 16 rows a worker. First every participant has to reach NumPy's weights.
"""

from __future__ import annotations

from typing import Annotated

import typer

from . import harness, report, suites
from .options import Options, read
from .out import Out
from .peers.base import Peer
from .peers.team import Team
from .peers.training import TrainDdp, TrainLocal, TrainZps, parameters, reference
from .report import Case
from .suites import Teams

PEERS: tuple[type[Peer], ...] = (TrainZps, TrainDdp, TrainLocal)
_QUICK_PEERS: tuple[type[Peer], ...] = (TrainZps, TrainDdp)
_CHECKED_STEPS = 3
WIDTH = 4096
_QUICK_WIDTH = 512
# Sums run in another order: a few ulp a step, and more where a ReLU is near its edge.
_RTOL, _ATOL = 1e-4, 1e-6

app = typer.Typer(add_completion=False)


def prepare(options: Options, width: int | None = None) -> suites.Job:
    """One model, with each number of workers. The sizes of `options` are not for this suite."""
    chosen, notes = suites.participants(options, PEERS, PEERS if width else _QUICK_PEERS)
    width = width or options.by_level(_QUICK_WIDTH, WIDTH, WIDTH)
    worlds = options.workers or (2,)
    for world in worlds:
        harness.require_memory(chosen, width, world, payload_bytes=4 * parameters(width))

    def job(out: Out) -> None:
        for note in notes:
            out.note(note)
        for world in worlds:
            report.tell(measure_width(chosen, width, world, options, out), out)

    return job


def check_weights(teams: Teams, world: int, width: int, seed: int) -> None:
    """Runs the first steps. Raises BenchError unless every worker holds NumPy's weights."""
    mean = reference(range(world), width, seed, _CHECKED_STEPS)
    for team in teams.values():
        alone = team.peer is TrainLocal
        with team.awake():
            team.run(_CHECKED_STEPS)
            for rank, weights in team.weights():
                expected = reference([rank], width, seed, _CHECKED_STEPS) if alone else mean
                who = f"{team.peer.name}: worker {rank}"
                harness.compare(who, weights, expected, _CHECKED_STEPS, _RTOL, _ATOL)


def _sharing(teams: Teams) -> list[Team]:
    return [team for name, team in teams.items() if name != TrainLocal.name]


def measure_width(
    peers: list[type[Peer]], width: int, world: int, options: Options, out: Out
) -> Case:
    """All peers on a model of this width: correctness first, then time."""
    entered = harness.entries(peers, world, width)
    run = suites.compare(
        *(entered, options, out),
        check=lambda teams: check_weights(teams, world, width, options.seed),
        sharing=_sharing,
    )
    size = parameters(width)
    return Case("train", size, 4 * size, world, run, report.facts())


@app.command()
def main(
    width: Annotated[int | None, typer.Option(min=1, help="of the two hidden layers")] = None,
    workers: report.Workers = "2",
    peers: report.Peers = None,
    quick: report.Quick = False,
    cycles: report.Cycles = None,
    restarts: report.Restarts = 1,
    calm: report.Calm = None,
    seed: report.Seed = 0,
    json_file: report.JsonFile = None,
) -> None:
    """Time one training step of zps, DDP and local training side by side."""
    with suites.alone("bench.train", json_file) as out:
        options = read(
            quick=quick,
            cycles=cycles,
            calm=calm,
            restarts=restarts,
            seed=seed,
            workers=workers,
            peers=peers,
        )
        prepare(options, width or WIDTH)(out)


if __name__ == "__main__":
    app()
