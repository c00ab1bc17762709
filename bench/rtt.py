"""What does the control path cost: a round of next to nothing beside a bare ZeroMQ round trip?

    python -m bench rtt [-n 1,2]

In `zps` each worker pushes 1,000 parameters and waits for the new weights. `echo` is one process,
whatever the number of workers, that sends 64 bytes to a ROUTER and gets them back: no message of
pyzmq's can have less. Beside the time, the processor time of the two servers is compared: what a
round takes from the cores that workers would use.
"""

from __future__ import annotations

import numpy as np

from . import goals, harness, report, sections, stats, suites
from .harness import Entry
from .options import Options
from .out import Out
from .peers import problem
from .peers.base import Peer
from .peers.echo import Echo
from .peers.zps_round import Zps
from .report import Case
from .suites import Teams

PEERS: tuple[type[Peer], ...] = (Zps, Echo)
SIZE = 1_000
_CHECKED_ROUNDS = 5


def prepare(options: Options) -> suites.Job:
    """1,000 parameters with each number of workers; other sizes are not for this suite."""
    chosen, notes = harness.choose(options.peers, PEERS)
    worlds = options.workers or options.by_level((2,), (1, 2), (1, 2, 4))

    def job(out: Out) -> None:
        for note in notes:
            out.note(note)
        for world in worlds:
            measure(chosen, world, options, out)

    return job


def measure(peers: list[type[Peer]], world: int, options: Options, out: Out) -> None:
    """The round trips and the servers' processor time, checked, shown and recorded."""
    entered = [Entry(peer.name, peer, 1 if peer is Echo else world, SIZE) for peer in peers]
    run = suites.compare(
        *(entered, options, out), check=lambda teams: check(teams, world, options.seed)
    )
    case = Case("rtt", SIZE, 4 * SIZE, world, run, report.facts())
    report.tell(case, out)
    if {Zps.name, Echo.name} <= run.measured.keys():
        tell_cpu(case, out)


def check(teams: Teams, world: int, seed: int) -> None:
    """Runs the first rounds. Raises BenchError for wrong weights, or another message than sent."""
    for team in teams.values():
        with team.awake():
            team.run(_CHECKED_ROUNDS)
            if team.peer is Echo:
                expected = Echo.answer(_CHECKED_ROUNDS)
            else:
                expected = problem.reference(world, SIZE, seed, _CHECKED_ROUNDS)
            harness.check(team, expected, _CHECKED_ROUNDS)


def tell_cpu(case: Case, out: Out) -> None:
    """The hub's processor time a round beside the echo's."""
    hub, echo = (case.run.measured[name] for name in (Zps.name, Echo.name))
    # Two blocks are a cycle, as for times.
    ours, theirs = (
        list(np.array([cpu.server_us for cpu in found.cpu]).reshape(-1, 2)) for found in (hub, echo)
    )
    # Every start has as many blocks as the others; its times may be fewer, without what was late.
    starts = len(hub.restarts) or 1
    ratio = stats.ratio_of_medians(theirs, ours, restarts=[len(ours) // starts] * starts)
    goal = goals.ratio_goal("rtt", "zps-cpu", Echo.name, case.size, case.world)
    hub_us, echo_us = hub.cpu_us["server"], echo.cpu_us["server"]
    judged = {}
    if goal is not None:
        interval = ratio.low, ratio.high
        verdict = goals.verdict(ratio.value, interval, goal.least, starts=case.starts)
        judged = {"goal": round(goal.least, 3), "verdict": verdict}
    record = {
        "bench": "rtt",
        "what": "zps-cpu",
        "size": case.size,
        "workers": case.world,
        "server_us": round(hub_us, 2),
        "peers": {Echo.name: {"server_us": round(echo_us, 2), **ratio.record(), **judged}},
        "restarts": case.starts,
        "other_cpu": round(case.run.other_cpu, 3),
        **case.facts,
    }
    out.show(sections.server_time(record))
    out.record(record)
