"""Peer `rpc`: the batch-updating parameter server of PyTorch's tutorial on rpc."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import ClassVar

from . import problem
from .base import Peer, Seat, Server, cores
from .problem import Array
from .server_process import server_process


class Rpc(Peer):
    name: ClassVar[str] = "rpc"
    about: ClassVar[str] = (
        "torch.distributed.rpc, the batch-updating parameter server of PyTorch's tutorial"
    )
    spins_when_idle: ClassVar[bool] = True  # tensorpipe's shared-memory transport polls

    @classmethod
    def available(cls) -> str | None:
        if reason := super().available():
            return reason
        import torch.distributed.rpc as rpc

        return None if rpc.is_available() else "this torch is built without rpc"

    @classmethod
    def memory_bytes(cls, size: int, world: int) -> int:
        worker = 5  # base, gradient, old and new weights, one message in flight
        server = 3 + 2 * world  # weights, gradient, momentum, messages in and out
        return 4 * size * (worker * world + server)

    @classmethod
    @contextmanager
    def serve(cls, world: int, size: int, seed: int, folder: Path) -> Iterator[Server]:
        address = f"file://{folder / cls.name}.rendezvous"
        with server_process(cls.name, _serve, world, size, seed, address) as (_, pid):
            yield Server(address, (pid,), cores())

    def setup(self, seat: Seat) -> None:
        import torch

        from . import rpc_server

        rpc_server.join(f"worker{seat.rank}", seat.rank, seat.world + 1, seat.address)
        self._call = torch.distributed.rpc.rpc_sync
        self._leave = torch.distributed.rpc.shutdown
        self._server, self._update = rpc_server.SERVER, rpc_server.update_and_fetch
        self._base = torch.from_numpy(problem.gradient(seat.rank, seat.size, seat.seed))
        self._grad = torch.empty_like(self._base)
        self._weights = torch.from_numpy(problem.initial_weights(seat.size, seat.seed))

    def prepare(self, round_number: int) -> None:
        import torch

        torch.mul(self._base, problem.factor(round_number), out=self._grad)

    def round(self) -> None:
        self._weights = self._call(self._server, self._update, args=(self._grad,))

    def weights(self) -> Array:
        flat: Array = self._weights.numpy()
        return flat

    def close(self) -> None:
        self._leave()


def _serve(world: int, size: int, seed: int, address: str, parent: Connection) -> None:
    from . import rpc_server  # only in the server's own process: it imports torch

    rpc_server.serve(world, size, seed, address, parent)
