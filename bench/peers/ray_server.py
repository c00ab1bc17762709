"""The actors of peer `ray` and the processes around them; imported only where ray is installed.

Source: "Parameter Server" in Ray's examples. Three changes: weights are one flat array instead of a
model's list of arrays, the gradient lies ready when a round begins, and the mean of gradients is
applied instead of their sum.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from multiprocessing.connection import Connection
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import ray
import torch

from . import problem
from .base import cores
from .problem import Array
from .processes import descendants

NAMESPACE = "bench"
SERVER = "server"
_LEAST_STORE_BYTES = 128 << 20


class _Actor:
    def pid(self) -> int:
        return os.getpid()


class ParameterServer(_Actor):
    """Holds the model and the optimizer."""

    def __init__(self, size: int, seed: int) -> None:
        torch.set_num_threads(cores())
        self._weights = torch.from_numpy(problem.initial_weights(size, seed))
        self._optimizer = torch.optim.SGD([self._weights], lr=problem.LR, momentum=problem.MOMENTUM)

    def apply_gradients(self, *gradients: Array) -> Array:
        """Steps with the mean of the gradients, (size,) float32 each; returns the new weights."""
        summed = np.stack(gradients).sum(axis=0)
        summed /= len(gradients)
        self._optimizer.zero_grad()
        self._weights.grad = torch.from_numpy(summed)
        self._optimizer.step()
        return self.get_weights()

    def get_weights(self) -> Array:
        return self._weights.numpy()


class DataWorker(_Actor):
    """Holds its copy of the model, and computes the gradients of one rank."""

    def __init__(self, rank: int, size: int, seed: int) -> None:
        torch.set_num_threads(1)
        self._base = problem.gradient(rank, size, seed)
        self._grad = np.empty_like(self._base)
        self._weights = problem.initial_weights(size, seed)

    def prepare(self, round_number: int) -> None:
        np.multiply(self._base, np.float32(problem.factor(round_number)), out=self._grad)

    def compute_gradients(self) -> Array:
        return self._grad

    def set_weights(self, weights: Array) -> None:
        np.copyto(self._weights, weights)  # as load_state_dict does

    def get_weights(self) -> Array:
        return self._weights


def serve(world: int, size: int, seed: int, parent: Connection) -> None:
    """Starts a cluster and the actors in it; sends its address and the pids of what matters."""
    with TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        # One more for the server. Gradients, weights, and those of the last round not yet freed.
        store = 4 * size * 2 * (world + 2) + _LEAST_STORE_BYTES
        found = join(
            num_cpus=world + 1,
            num_gpus=0,
            object_store_memory=store,
            _temp_dir=folder,
            include_dashboard=False,
        )
        actors = _start_actors(world, size, seed)
        pids = ray.get([actor.pid.remote() for actor in actors])
        parent.send((found, tuple({*descendants(os.getpid()), *pids})))
        with suppress(EOFError):
            parent.recv()
        ray.shutdown()


def join(**options: Any) -> str:
    """Connects this process with a cluster, by default a new one; returns its address."""
    # Loopback is the fastest way here, and nobody outside can reach it.
    found = ray.init(
        namespace=NAMESPACE,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
        **options,
    )
    return str(found.address_info["address"])


def worker_name(rank: int) -> str:
    return f"worker{rank}"


def _start_actors(world: int, size: int, seed: int) -> list[Any]:
    server = ray.remote(ParameterServer).options(name=SERVER, num_cpus=1)
    worker = ray.remote(DataWorker)
    return [
        server.remote(size, seed),
        *(
            worker.options(name=worker_name(rank), num_cpus=1).remote(rank, size, seed)
            for rank in range(world)
        ),
    ]
