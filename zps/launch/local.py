"""A whole job on this machine: one hub, n workers, one exit code."""

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

__all__ = ["Plan", "command", "launch", "worker_environment"]

_HUB_STOP_S = 5.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run: `command` is one worker's, the same for all of them."""

    command: Sequence[str]
    workers: int
    hubs: int = 1
    inherit_first: bool = False
    grace_s: float = 10.0
    colour: bool = False

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"-n {self.workers}: a job needs at least one worker")
        if self.hubs != 1:
            raise ConfigError(
                f"--hubs {self.hubs}: this version starts one hub; a model is not yet sharded over "
                "several"
            )


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
    A hub is started unless the settings name one. Raises ConfigError, HubUnreachable.
    """
    shared = {name: value for name, value in environ.items() if name != variable("rank")}
    settings = Settings.load(environ=shared, **{**chosen, "rank": None, "world_size": plan.workers})
    with ExitStack() as stack:
        hub: Hub | None = None
        address = settings.hub
        if address is None:
            from zps.hub.process import HubProcess  # here, so that a plan is checked before it

            process = HubProcess.start(settings)
            stack.callback(process.stop, timeout_s=_HUB_STOP_S)
            hub, address = process, process.address
        workers = [
            Spec(
                rank=rank,
                command=plan.command,
                environ=worker_environment(shared, settings, address, rank, plan.workers),
                inherit=plan.inherit_first and rank == 0,
            )
            for rank in range(plan.workers)
        ]
        job = Job(workers, hub, settings.on_death, plan.grace_s, plan.colour)
        return Supervisor(job, say).run()


def worker_environment(
    base: Mapping[str, str], settings: Settings, address: str, rank: int, workers: int
) -> dict[str, str]:
    """The environment of one worker: `base`, the settings, its place in the job.

    RANK and its kin are what other programs look for. Cores are shared out through OMP_NUM_THREADS
    unless somebody has set it: n workers with a thread per core each would fight over them.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    return {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        **base,
        **settings.to_env(),
        variable("hub"): address,
        variable("rank"): str(rank),
        variable("world_size"): str(workers),
        "RANK": str(rank),
        "WORLD_SIZE": str(workers),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(workers),
    }
