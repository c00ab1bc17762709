"""Several nodes on one machine: a hub of all nodes, a node hub for each, workers anywhere.

with nodes(tmp_path, workers=2) as cluster:
    with cluster.workers() as workers:          # of all ranks, in this process
        at_once(*(partial(train, worker) for worker in workers))
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from tests.ports import free_port
from tests.workers import ROOT
from zps.config import Settings
from zps.hub.process import HubProcess
from zps.relay import process as relay
from zps.worker.worker import Worker

#: Small buckets, so that small models have several; a wait in vain fails soon.
COMMON: dict[str, Any] = {"bucket_bytes": 4096, "timeout_s": 20.0}


class Cluster:
    """Running hubs. Ranks are those of the whole job."""

    def __init__(self, top: HubProcess, hubs: list[HubProcess], workers: int, runtime_dir: Path):
        self.top = top
        self.hubs = hubs
        self.per_node = workers
        self.world = workers * len(hubs)
        self.runtime_dir = runtime_dir

    @property
    def alive(self) -> bool:
        return all(hub.poll() is None for hub in (self.top, *self.hubs))

    def address(self, rank: int) -> str:
        """The hub of a rank's node."""
        return self.hubs[rank // self.per_node].address

    def worker(self, rank: int, **settings: Any) -> Worker:
        own = Settings(timeout_s=COMMON["timeout_s"], **settings)
        return Worker(self.address(rank), rank=rank, world_size=self.world, settings=own)

    @contextmanager
    def workers(self, **settings: Any) -> Iterator[list[Worker]]:
        """Workers of all ranks, in this process."""
        with ExitStack() as stack:
            yield [stack.enter_context(self.worker(r, **settings)) for r in range(self.world)]


def node_settings(top: str, node: int, runtime_dir: Path, *, count: int, world: int) -> Settings:
    """What the hub of one of `count` nodes is started with."""
    return Settings(
        hub=top,
        node_hub=True,
        nodes=count,
        node_rank=node,
        world_size=world,
        runtime_dir=runtime_dir,
        connect_timeout_s=10,
    )


@contextmanager
def nodes(
    tmp_path: Path, *, count: int = 2, workers: int = 2, tcp: bool = False, **settings: Any
) -> Iterator[Cluster]:
    """`settings` are those of the hub of all nodes, whose shared ones count everywhere."""
    runtime_dir = tmp_path / "run"
    own = Settings(**{**COMMON, "runtime_dir": runtime_dir, "world_size": count, **settings})
    bind = f"tcp://127.0.0.1:{free_port()}" if tcp else None
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)), ExitStack() as stack:
        top = stack.enter_context(HubProcess.start(own, bind=bind))
        hubs = [
            stack.enter_context(
                relay.start(
                    node_settings(
                        top.address, node, runtime_dir, count=count, world=count * workers
                    )
                )
            )
            for node in range(count)
        ]
        yield Cluster(top, hubs, workers, runtime_dir)
