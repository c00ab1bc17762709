"""zps itself: one hub, workers on shared memory, rule SGD with momentum in the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from bench.peers import problem
from bench.peers.base import Peer, Seat, Server, cores
from bench.peers.problem import Array


class Zps(Peer):
    """The gradient lies in the slot when the round begins: a loop that writes it there itself."""

    name: ClassVar[str] = "zps"
    about: ClassVar[str] = "zps in bsp, gradient written in place in the worker's slot"

    @classmethod
    def available(cls) -> str | None:
        if reason := super().available():
            return reason
        try:
            import zps.native  # noqa: F401
        except ImportError as error:
            return f"zps is not built here ({error}); run `pip install -e .`"
        return None

    @classmethod
    def memory_bytes(cls, size: int, world: int) -> int:
        return 4 * size * (2 + world * 3)  # weights, momentum; base, first weights, slot each

    @classmethod
    @contextmanager
    def serve(cls, world: int, size: int, seed: int, folder: Path) -> Iterator[Server]:
        with start_hub(world) as server:
            yield server

    def setup(self, seat: Seat) -> None:
        import torch

        import zps

        self._base = torch.from_numpy(problem.gradient(seat.rank, seat.size, seat.seed))
        self._worker = zps.Worker(seat.address, rank=seat.rank, world_size=seat.world)
        self._worker.declare(
            {"w": torch.from_numpy(problem.initial_weights(seat.size, seat.seed))},
            rule="sgd",
            groups=[{"params": ["w"], "lr": problem.LR, "momentum": problem.MOMENTUM}],
        )
        self._grad = self._worker.slot("w")

    def prepare(self, round_number: int) -> None:
        import torch

        torch.mul(self._base, problem.factor(round_number), out=self._grad)

    def round(self) -> None:
        self._worker.push("w").wait()

    def weights(self) -> Array:
        flat: Array = self._worker.weights("w").numpy()
        return flat

    def close(self) -> None:
        self._worker.close()


class ZpsGrad(Zps):
    """The gradient lies in a tensor of its own, as autograd leaves it in `p.grad`."""

    name: ClassVar[str] = "zps-grad"
    about: ClassVar[str] = "zps in bsp, gradient copied from p.grad into the slot"

    @classmethod
    def memory_bytes(cls, size: int, world: int) -> int:
        return super().memory_bytes(size, world) + 4 * size * world

    def setup(self, seat: Seat) -> None:
        super().setup(seat)
        self._grad = self._base.clone()

    def round(self) -> None:
        self._worker.push({"w": self._grad}).wait()


@contextmanager
def start_hub(world: int) -> Iterator[Server]:
    """A hub in bsp, with as many threads as there are cores unless a setting says otherwise."""
    from zps.config import Settings
    from zps.hub.process import HubProcess

    settings = Settings.load(world_size=world, mode="bsp")
    with HubProcess.start(settings) as hub:
        yield Server(hub.address, (hub.pid,), settings.hub_threads or cores())
