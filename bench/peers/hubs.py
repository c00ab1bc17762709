"""Participants of bench.scale: zps with several hubs, which share the model and the cores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import ClassVar

from .base import Server, cores
from .zps_round import Zps, start_hub


class Hubs(Zps):
    """As `zps`, with `hubs` of them; each has its share of the cores."""

    name: ClassVar[str] = "zps-hubs"
    about: ClassVar[str] = "zps in bsp with several hubs"
    hubs: ClassVar[int] = 1

    @classmethod
    @contextmanager
    def serve(cls, world: int, size: int, seed: int, folder: Path) -> Iterator[Server]:
        threads = max(1, cores() // cls.hubs)
        with ExitStack() as stack:
            servers = [
                stack.enter_context(start_hub(world, hub_threads=threads)) for _ in range(cls.hubs)
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
