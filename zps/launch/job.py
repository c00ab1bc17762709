"""`zps.init()` and `zps.shutdown()`: this process finds its hub, or starts one."""

from __future__ import annotations

import atexit
import os
import sys
from typing import Any

from zps.config import Settings
from zps.errors import ConfigError
from zps.hub.process import HubProcess
from zps.launch import torchrun
from zps.relay import process as relay
from zps.training import current
from zps.wire.address import ensure_private, ipc_address
from zps.worker.worker import Worker

_hub: HubProcess | None = None


def init(
    hub: str | None = None,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    **settings: Any,
) -> None:
    """Join a job: arguments > ZPS_* > torchrun's variables > a hub of this process's own.

    hub         address; None: as above
    rank        from 0, below world_size
    **settings  any field of `zps.Settings`, such as mode="ssp", staleness=2
    Returns at once; the workers meet when they declare their model (`zps.Optimizer`). Calling it
    again without `shutdown` is an error. Raises ConfigError, HubUnreachable, DuplicateRank,
    RankOutOfRange.
    """
    global _hub
    if current.is_initialized() and current.current().inherited:
        current.set_current(None)  # a fork's parent has it, and its hub
        _hub = None
    if current.is_initialized():
        raise ConfigError("zps.init() was called twice; call zps.shutdown() in between")
    found = Settings.load(hub=hub, rank=rank, world_size=world_size, **settings)
    if found.node_hub:
        found, _hub = _node_hub(found)
    elif not found.hubs:
        found, _hub = _own_hub(found)
    try:
        current.set_current(Worker(settings=found))
    except BaseException:
        _stop_hub()
        raise
    atexit.register(_at_exit)


def shutdown() -> None:
    """Leave the job. The model keeps its last weights; calling it twice is allowed."""
    atexit.unregister(_at_exit)
    _leave(goodbye=True)


def _own_hub(settings: Settings) -> tuple[Settings, HubProcess | None]:
    """The settings completed with the address of a hub, and that hub if it is ours."""
    job = torchrun.detect(os.environ)
    if job is None:
        if (settings.world_size or 1) > 1 or (settings.rank or 0) > 0:
            raise ConfigError(
                f"rank {settings.rank} of {settings.world_size} workers needs a common hub: start "
                "the script with `zps launch` or torchrun, or set ZPS_HUB"
            )
        settings = settings.replace(rank=0, world_size=1)
        hub = HubProcess.start(settings)
        return settings.replace(hub=hub.address), hub
    if not job.one_node:
        raise ConfigError(
            f"torchrun started {job.world_size} workers on several nodes; start `zps hub` and set "
            "ZPS_HUB for all of them"
        )
    settings = settings.replace(rank=job.rank, world_size=job.world_size)
    ensure_private(settings.runtime_dir)
    address = ipc_address(settings.runtime_dir, job.hub_token())
    started = HubProcess.start(settings, token=job.hub_token()) if job.rank == 0 else None
    return settings.replace(hub=address), started


def _node_hub(settings: Settings) -> tuple[Settings, HubProcess | None]:
    """The settings with this node's own hub in place of the one of all nodes; it, if it is ours."""
    job = torchrun.detect(os.environ)
    if job is None or not settings.hubs:
        raise ConfigError(
            "node_hub needs ZPS_HUB, the address of the hub of all nodes, and somebody who starts "
            "this node's workers: use `zps launch --nodes` or torchrun"
        )
    if job.world_size % job.local_world_size:
        raise ConfigError(
            f"node_hub needs as many workers on every node; {job.local_world_size} of "
            f"{job.world_size} are here"
        )
    settings = settings.replace(
        rank=job.rank, world_size=job.world_size, nodes=job.nodes, node_rank=job.node_rank
    )
    token = job.hub_token(job.node_rank)
    ensure_private(settings.runtime_dir)
    started = relay.start(settings, token=token) if job.local_rank == 0 else None
    address = ipc_address(settings.runtime_dir, token)
    return relay.at_home(settings).replace(hub=address), started


def _at_exit() -> None:
    # A worker that ends by an exception has died, and its job decides by policy what that means.
    # In an interactive session there were others before, and the end is nobody's failure.
    _leave(goodbye=not hasattr(sys, "last_type") or hasattr(sys, "ps1"))


def _leave(*, goodbye: bool) -> None:
    if current.is_initialized():
        worker = current.current()
        current.set_current(None)
        worker.close(goodbye=goodbye)
    _stop_hub()


def _stop_hub() -> None:
    global _hub
    hub, _hub = _hub, None
    if hub is not None and hub.owned_here:
        while hub.poll() is None and not hub.wait_finished(1.0):
            pass  # under torchrun the others may still be at work
        hub.stop()
