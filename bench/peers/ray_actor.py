"""Peer `ray`: a parameter server that is a Ray actor, as Ray's own example builds it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import ClassVar

import numpy as np

from .base import Peer, Seat, Server, cores
from .problem import Array
from .server_process import server_process

_OWN_BYTES = 500 << 20  # gcs, raylet, agents and the least that the store may have
_ACTOR_BYTES = 250 << 20  # an interpreter with torch and ray


class RayActor(Peer):
    """Rank 0 is the example's driver; the workers it drives are actors, one for each rank."""

    name: ClassVar[str] = "ray"
    about: ClassVar[str] = (
        "an actor as parameter server and an actor for each worker, as in Ray's example"
    )

    @classmethod
    def available(cls) -> str | None:
        if reason := super().available():
            return reason
        return None if find_spec("ray") else "ray is not installed; run `pip install ray`"

    @classmethod
    def memory_bytes(cls, size: int, world: int) -> int:
        worker = 3  # base, gradient, weights
        server = 3 + world  # weights, momentum, sum; stacked gradients
        store = 2 * (world + 2)  # gradients and weights, of this round and the last
        return 4 * size * (worker * world + server + store) + _OWN_BYTES + world * _ACTOR_BYTES

    @classmethod
    @contextmanager
    def serve(cls, world: int, size: int, seed: int, folder: Path) -> Iterator[Server]:
        token = secrets.token_hex(32)
        with server_process(cls.name, _serve, world, size, seed, token) as ((address, pids), pid):
            yield Server(f"{address} {token}", (pid, *pids), cores())

    def setup(self, seat: Seat) -> None:
        address, token = seat.address.split()
        _prepare_ray(token)
        import ray

        from . import ray_server

        ray_server.join(address=address)
        self._get, self._leave = ray.get, ray.shutdown
        self._own = ray.get_actor(ray_server.worker_name(seat.rank))
        self._server = ray.get_actor(ray_server.SERVER)
        driven = range(seat.world if seat.rank == 0 else 0)
        self._workers = [ray.get_actor(ray_server.worker_name(rank)) for rank in driven]

    def prepare(self, round_number: int) -> None:
        self._get([worker.prepare.remote(round_number) for worker in self._workers])

    def round(self) -> None:
        if not self._workers:
            return
        gradients = [worker.compute_gradients.remote() for worker in self._workers]
        weights = self._server.apply_gradients.remote(*gradients)
        self._get([worker.set_weights.remote(weights) for worker in self._workers])

    def weights(self) -> Array:
        return np.array(self._get(self._own.get_weights.remote()))

    def close(self) -> None:
        self._leave()


def _prepare_ray(token: str) -> None:
    """What ray reads when it is imported. The token is what all who join the cluster must know.

    By default ray would leave a token in the user's home, and tell its authors that it is used.
    """
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token, RAY_USAGE_STATS_ENABLED="0")


def _serve(world: int, size: int, seed: int, token: str, parent: Connection) -> None:
    _prepare_ray(token)
    from . import ray_server  # only in the server's own process: it imports ray and torch

    ray_server.serve(world, size, seed, parent)
