"""zps with ZPS_TRACE set: what it costs to leave it on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

from .base import Seat, Server
from .zps_round import ZpsGrad, start_hub


class ZpsTraced(ZpsGrad):
    """As `zps-grad`; hub and workers record spans, and write them when they end."""

    name: ClassVar[str] = "zps-traced"
    about: ClassVar[str] = "zps in bsp, gradient copied from p.grad, with ZPS_TRACE"

    @classmethod
    @contextmanager
    def serve(cls, world: int, size: int, seed: int, folder: Path) -> Iterator[Server]:
        with start_hub(world, trace=folder / "trace.json") as server:
            yield server

    def setup(self, seat: Seat) -> None:
        self._folder = TemporaryDirectory(prefix="bench-")
        os.environ["ZPS_TRACE"] = str(Path(self._folder.name) / "trace.json")
        super().setup(seat)

    def close(self) -> None:
        super().close()
        self._folder.cleanup()
