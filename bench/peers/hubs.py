"""Participants of bench.scale: zps with several hubs, which share the model and the cores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import ClassVar

from .base import Server, cores
from .zps_round import Zps, start_hub

_BUCKETS = 8  # at least: a model of one bucket cannot be shared


class Hubs(Zps):
    """As `zps`, with `hubs` of them; each has its share of the cores.

    The one parameter is spread over all of them, which costs every worker a copy of its gradient
    and of the weights: what is measured is the dearest way to share a model.
    """

    name: ClassVar[str] = "zps-1-hub"
    about: ClassVar[str] = "zps in bsp, its cores shared out among several hubs"
    hubs: ClassVar[int] = 1

    @classmethod
    def memory_bytes(cls, size: int, world: int) -> int:
        return super().memory_bytes(size, world) + 8 * size * world

    @classmethod
    @contextmanager
    def serve(cls, world: int, size: int, seed: int, folder: Path) -> Iterator[Server]:
        threads = max(1, cores() // cls.hubs)
        bucket_bytes = max(4096, min(4 << 20, 4 * size // _BUCKETS // 64 * 64))
        with ExitStack() as stack:
            servers = [
                stack.enter_context(
                    start_hub(world, hub_threads=threads, bucket_bytes=bucket_bytes)
                )
                for _ in range(cls.hubs)
            ]
            yield Server(
                ",".join(server.address for server in servers),
                tuple(pid for server in servers for pid in server.pids),
                threads * cls.hubs,
            )


class Hubs2(Hubs):
    name = "zps-2-hubs"
    hubs = 2


class Hubs4(Hubs):
    name = "zps-4-hubs"
    hubs = 4
