"""How long does one synchronous round take: push, average, SGD with momentum, weights visible?

    python -m bench.step --sizes 1K,1M,25M -n 2

A round lasts from the moment when every worker holds its gradient to the moment when the last
worker may read the new weights. First every participant has to reach the weights NumPy reaches.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench import harness, report
from bench.peers import problem
from bench.peers.base import BenchError, Peer
from bench.peers.gloo import Gloo
from bench.peers.rpc import Rpc
from bench.peers.team import team
from bench.peers.zps_round import Zps, ZpsGrad
from bench.report import Case, Goal

PEERS: tuple[type[Peer], ...] = (Zps, ZpsGrad, Gloo, Rpc)
GOALS = (
    Goal("zps", "gloo", 5.0, (1_000_000, 25_000_000)),
    Goal("zps-grad", "gloo", 2.5, (1_000_000, 25_000_000)),
    Goal("zps", "rpc", 20.0, (1_000_000, 25_000_000)),
)
_CHECKED_ROUNDS = 5

app = typer.Typer(add_completion=False)


def measure_size(
    peers: list[type[Peer]], size: int, world: int, seed: int, plan: harness.Plan, console: Console
) -> Case:
    """All peers at one size: correctness first, then time."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        bar = stack.enter_context(report.progress(console))
        steps = len(peers) * (3 + plan.blocks)
        task = bar.add_task("start", total=steps)

        def tick(text: str) -> None:
            bar.update(task, advance=1, description=f"{harness.human(size)} {text}", refresh=True)

        teams = {}
        for peer in peers:
            teams[peer.name] = stack.enter_context(team(peer, world, size, seed, folder))
            tick(f"start {peer.name}")
        expected = problem.reference(world, size, seed, _CHECKED_ROUNDS)
        for name, member in teams.items():
            with member.awake():
                member.run(_CHECKED_ROUNDS)
                harness.check(member, expected, _CHECKED_ROUNDS)
            tick(f"check {name}")
        del expected
        measured, start_us, other_cpu = harness.measure(teams, plan, tick)
        for member in teams.values():
            harness.check_agreement(member)
        return Case(
            "step", size, 4 * size, world, measured, start_us, other_cpu, GOALS, report.facts()
        )


@app.command()
def main(
    sizes: Annotated[str, typer.Option(help="fp32 parameters: 1000, 1K, 25M, ...")] = "1K,1M,25M",
    workers: Annotated[int, typer.Option("-n", "--workers", min=1, max=64)] = 2,
    peers: Annotated[str | None, typer.Option(help="comma-separated; default: all")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="fewer and shorter blocks")] = False,
    cycles: Annotated[int | None, typer.Option(min=2, help="mirrored cycles")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="add JSON lines here")] = None,
) -> None:
    """Time one synchronous round of every participant side by side."""
    console = report.console()
    try:
        wanted = harness.parse_sizes(sizes)
        chosen, notes = harness.choose(peers, PEERS)
        for size in wanted:
            harness.require_memory(chosen, size, workers)
        for note in notes:
            console.print(f"[yellow]{note}[/yellow]")
        plan = harness.QUICK if quick else harness.FULL
        if cycles is not None:
            plan = harness.Plan(cycles, plan.block_s, plan.most_rounds)
        for size in wanted:
            case = measure_size(chosen, size, workers, seed, plan, console)
            report.tell(case, console, json_file)
    except BenchError as error:
        console.print(f"[red]bench.step:[/red] {error}", highlight=False)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
