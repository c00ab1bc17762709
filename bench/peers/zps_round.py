"""zps itself: one hub, workers on shared memory or messages, SGD with momentum in the hub."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from . import problem
from .base import BenchError, Peer, Seat, Server, cores
from .problem import Array

if TYPE_CHECKING:
    import zps

_SHARED = "memfd:zps-"  # how the hub's memory is called where it is mapped


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

    @classmethod
    def connect(cls, seat: Seat) -> zps.Worker:
        """This seat's worker, before it has declared anything."""
        import zps

        return zps.Worker(seat.address, rank=seat.rank, world_size=seat.world)

    def setup(self, seat: Seat) -> None:
        import torch

        self._base = torch.from_numpy(problem.gradient(seat.rank, seat.size, seat.seed))
        self._worker = self.connect(seat)
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


class ZpsAllow(Zps):
    """As the rivals do it, which send what they are given: nobody looks for NaN."""

    name: ClassVar[str] = "zps-allow"
    about: ClassVar[str] = "zps in bsp, in place, without the look for NaN (ZPS_NONFINITE=allow)"

    @classmethod
    def connect(cls, seat: Seat) -> zps.Worker:
        import zps

        return zps.Worker(seat.address, rank=seat.rank, world_size=seat.world, nonfinite="allow")


class ZpsTcp(Zps):
    """Gradients and weights are messages over loopback, as between two hosts."""

    name: ClassVar[str] = "zps-tcp"
    about: ClassVar[str] = "zps in bsp, gradients and weights in messages over loopback TCP"

    @classmethod
    def memory_bytes(cls, size: int, world: int) -> int:
        # Weights, momentum; base, first weights, slot, own weights of each; received gradients.
        return 4 * size * (2 + world * 4) + (128 << 20)

    @classmethod
    @contextmanager
    def serve(cls, world: int, size: int, seed: int, folder: Path) -> Iterator[Server]:
        with start_hub(world, f"tcp://127.0.0.1:{free_port()}") as server:
            yield server

    @classmethod
    def connect(cls, seat: Seat) -> zps.Worker:
        import zps

        return zps.Worker(seat.address, rank=seat.rank, world_size=seat.world, link="message")

    def setup(self, seat: Seat) -> None:
        """Raises BenchError when this worker shares memory with its hub all the same."""
        super().setup(seat)
        if _SHARED in Path("/proc/self/maps").read_text():
            self.close()
            raise BenchError("this worker maps its hub's memory: it does not use messages")


@contextmanager
def start_hub(world: int, bind: str | None = None, **settings: Any) -> Iterator[Server]:
    """A hub in bsp, with as many threads as there are cores unless a setting says otherwise.

    bind      where it listens; None: a private ipc socket
    settings  of the hub, beside those of the environment
    Raises ConfigError, HubUnreachable with the hub's own reason.
    """
    from zps.config import Settings
    from zps.hub.process import HubProcess

    own = Settings.load(world_size=world, mode="bsp", **settings)
    with HubProcess.start(own, bind=bind) as hub:
        yield Server(hub.address, (hub.pid,), own.hub_threads or cores())


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of `host` that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
