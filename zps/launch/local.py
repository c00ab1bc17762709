"""A whole job, or one node's share of it, on this machine: its hubs, n workers, one exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zps.config import Settings, variable
from zps.errors import ConfigError
from zps.launch.supervise import Hub, Job, Spec, Supervisor
from zps.relay.process import at_home

__all__ = ["Hubs", "Plan", "command", "launch", "worker_environment"]

_HUB_STOP_S = 5.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run: `command` is one worker's, the same for all of them.

    workers  on this machine
    """

    command: Sequence[str]
    workers: int
    hubs: int = 1
    inherit_first: bool = False
    grace_s: float = 10.0
    colour: bool = False

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"-n {self.workers}: a job needs at least one worker")
        if self.hubs < 1:
            raise ConfigError(f"--hubs {self.hubs}: a job needs at least one hub")


@dataclass(frozen=True, slots=True)
class Hubs:
    """The hubs of a job as one: it has ended as soon as one of them has."""

    members: Sequence[Hub]

    @property
    def pid(self) -> int:
        """Of the one that has failed, or of the first."""
        failed = (hub.pid for hub in self.members if hub.poll())
        return next(failed, self.members[0].pid)

    def formed(self) -> bool:
        """See `Hub`."""
        return all(hub.formed() for hub in self.members)

    def poll(self) -> int | None:
        """See `Hub`; of several codes, the first that means a failure."""
        codes = [code for code in (hub.poll() for hub in self.members) if code is not None]
        return next(filter(None, codes), 0) if codes else None


def command(script: str, args: Sequence[str], *, module: bool) -> list[str]:
    """The command of one worker: this Python with a script file, or with `-m module`."""
    if module:
        return [sys.executable, "-m", script, *args]
    if not Path(script).exists():
        raise ConfigError(f"there is no script {script!r}; for a module write -m {script}")
    return [sys.executable, script, *args]


def launch(
    plan: Plan,
    environ: Mapping[str, str],
    say: Callable[[str], None],
    **chosen: Any,
) -> int:
    """Run the plan to its end and return the job's exit code; see `Supervisor.run`.

    environ  the environment of the workers, and where settings are looked up after `chosen`
    say      gets each event (a death, a signal) as one line
    Hubs are started unless the settings name some, and a node hub if they ask for it. With the
    setting `nodes` this is one node of several, which are all given the same hub.
    Raises ConfigError, HubUnreachable.
    """
    shared = {name: value for name, value in environ.items() if name != variable("rank")}
    settings = _settings(plan, shared, chosen)
    with ExitStack() as stack:
        hub: Hub | None = None
        address = settings.hub
        if address is None or settings.node_hub:
            hub, address = _start_hubs(plan.hubs, settings, stack)
        elif plan.hubs > 1:
            raise ConfigError(f"--hubs {plan.hubs}, but {variable('hub')} names hubs already")
        first = plan.workers * (settings.node_rank or 0)
        workers = [
            Spec(
                rank=first + place,
                command=plan.command,
                environ=worker_environment(shared, settings, address, place, plan.workers),
                inherit=plan.inherit_first and first + place == 0,
            )
            for place in range(plan.workers)
        ]
        job = Job(workers, hub, settings.on_death, plan.grace_s, plan.colour)
        return Supervisor(job, say).run()


def _start_hubs(count: int, settings: Settings, stack: ExitStack) -> tuple[Hub, str]:
    """Hubs that end with `stack`, and their addresses as workers are given them."""
    # Here, so that a plan is checked before it is loaded.
    from zps.hub.process import HubProcess
    from zps.relay import process as node

    start: Callable[[Settings], HubProcess] = node.start if settings.node_hub else HubProcess.start
    if count > 1 and settings.hub_threads is None:
        threads = max(1, len(os.sched_getaffinity(0)) // count)  # they work at the same time
        settings = settings.replace(hub_threads=threads)
    started = []
    for _ in range(count):
        started.append(start(settings))
        stack.callback(started[-1].stop, timeout_s=_HUB_STOP_S)
    return Hubs(started), ",".join(hub.address for hub in started)


def worker_environment(
    base: Mapping[str, str], settings: Settings, address: str, place: int, workers: int
) -> dict[str, str]:
    """The environment of one worker: `base`, the settings, its place in the job.

    place    its number on this machine, which has `workers`; others come before it, on nodes with
             a lower `node_rank`
    RANK and its kin are what other programs look for. Cores are shared out through OMP_NUM_THREADS
    unless somebody has set it: n workers with a thread per core each would fight over them.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    rank = workers * (settings.node_rank or 0) + place
    world_size = workers * (settings.nodes or 1)
    own = at_home(settings) if settings.node_hub else settings
    return {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        **base,
        **own.to_env(),
        variable("hub"): address,
        variable("rank"): str(rank),
        variable("world_size"): str(world_size),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(place),
        "LOCAL_WORLD_SIZE": str(workers),
    }


def _settings(plan: Plan, environ: Mapping[str, str], chosen: Mapping[str, Any]) -> Settings:
    """The job's settings, with the number of workers on all nodes."""
    values = {**chosen, "rank": None}
    anyone = {name: value for name, value in environ.items() if name != variable("world_size")}
    asked = Settings.load(environ=anyone, **values)
    nodes = asked.nodes or 1
    if nodes > 1 and (asked.hub is None or asked.node_rank is None):
        raise ConfigError(
            f"nodes={nodes} needs a hub that all of them can reach, and this one's number: start "
            "`zps hub --bind tcp://HOST:PORT`, and give its address as hub, and node_rank"
        )
    if asked.node_hub and asked.nodes is None:
        raise ConfigError("node_hub needs nodes and node_rank: --nodes 2 --node-rank 0")
    return Settings.load(environ=environ, **{**values, "world_size": plan.workers * nodes})
